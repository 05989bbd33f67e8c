"""Other implementations of GPT-2 and of its operations."""
