"""What a GPT-2 is made of: its blocks, which of them may be fused, and how a model comes to have them."""
