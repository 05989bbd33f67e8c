"""Checkpoints on disk: what their headers say, whether that fits a configuration, and everything that is wrong."""
