"""The two products of an MLP with everything else in their epilogues, forward and backward."""
