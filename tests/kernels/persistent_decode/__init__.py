"""Tests of persistent_decode."""
