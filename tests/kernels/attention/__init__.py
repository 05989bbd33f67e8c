"""Tests of causal_attention."""
