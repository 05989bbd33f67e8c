"""The two products of an MLP with what lies between and after them, forward and backward."""
