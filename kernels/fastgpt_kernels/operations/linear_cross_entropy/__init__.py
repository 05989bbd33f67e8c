"""The head and its cross-entropy, in chunks of rows, forward and backward."""
