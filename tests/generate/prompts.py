"""Prompts of different lengths."""

import torch
from models import token_ids
from torch import Tensor


def left_padded(prompts: list[Tensor]) -> dict[str, Tensor]:
    """Prompts (1, T) of different lengths as one batch."""
    n_tokens = max(prompt.shape[1] for prompt in prompts)
    ids, mask = (torch.zeros(len(prompts), n_tokens, dtype=torch.long) for _ in range(2))
    for row, prompt in enumerate(prompts):
        ids[row, -prompt.shape[1] :], mask[row, -prompt.shape[1] :] = prompt[0], 1
    return {"input_ids": ids, "attention_mask": mask}


def ragged(n_rows: int, vocab_size: int, longest: int = 16) -> list[Tensor]:
    return [token_ids(1, 1 + (5 * row) % longest, vocab_size, seed=row) for row in range(n_rows)]
