"""Tests of layer_norm and add_layer_norm."""
