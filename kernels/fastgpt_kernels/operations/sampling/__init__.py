"""The next token of every row, from logits."""
