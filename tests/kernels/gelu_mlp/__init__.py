"""Tests of gelu_mlp."""
