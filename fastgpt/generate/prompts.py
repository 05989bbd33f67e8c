"""Prompts of different lengths as one batch."""

from collections.abc import Sequence

import torch
from torch import Tensor


def pad_left(prompts: Sequence[Tensor | Sequence[int]], pad_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Pad B prompts on the left. Returns ids and attention mask, both (B, T) int64.

    prompts: each a list of token ids or a tensor of them, (T,) or (1, T). pad_id: the padding token.
    Raises ValueError on an empty list, and on a prompt that is empty or has another shape.
    """
    if not prompts:
        raise ValueError("nothing to continue: the list of prompts is empty")
    rows = [torch.as_tensor(prompt, dtype=torch.int64, device=device) for prompt in prompts]
    for number, row in enumerate(rows):
        if row.numel() == 0:
            raise ValueError(f"nothing to continue: prompt {number} is empty")
        if row.shape not in ((row.numel(),), (1, row.numel())):
            raise ValueError(f"prompt {number} has shape {tuple(row.shape)}: give (T,) or (1, T)")
    n_tokens = max(row.numel() for row in rows)
    ids = torch.full((len(rows), n_tokens), pad_id, device=device)
    mask = torch.zeros_like(ids)
    for row, row_ids, row_mask in zip(rows, ids, mask, strict=True):
        row_ids[n_tokens - row.numel() :] = row.flatten()
        row_mask[n_tokens - row.numel() :] = 1
    return ids, mask
