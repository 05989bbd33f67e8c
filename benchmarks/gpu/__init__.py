"""What only a GPU can prove and measure."""
