"""The record of causal_attention (`records.Record`)."""

from typing import Any

import pytest
import torch
from fastgpt_kernels.operations.attention import backward_kernels, kernels, tiles
from fastgpt_kernels.operations.attention.op import padded_dim
from records import Record, Shapes


def shapes_of(n_batch: int, n_heads: int, n_queries: int, n_keys: int, head_dim: int) -> Shapes:
    queries, keys = (n_batch, n_heads, n_queries, head_dim), (n_batch, n_heads, n_keys, head_dim)
    return {"q": queries, "k": keys, "v": keys}


def masked_with_dropout(n: int) -> tuple[Shapes, dict[str, Any]]:
    mask = torch.ones(2, n + 2, dtype=torch.bool)
    mask[0, :2] = False
    return shapes_of(2, 2, n, n + 2, 16), {"key_padding_mask": mask, "dropout_p": 0.25, "seed": torch.tensor(3)}


def several_programs(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(tiles, "attention_tile", lambda *_: tiles.AttentionTile(16, 16, 4, 1))


def launch(n_tokens: int, head_dim: int, dtype: torch.dtype) -> None:
    """2**33 elements, by 2**20 heads: past what a second grid axis holds, too."""
    x, statistic = torch.zeros(16, dtype=dtype), torch.zeros(16)
    mask, seed = torch.zeros(16, dtype=torch.uint8), torch.zeros((), dtype=torch.int64)
    n_batch, n_heads = 2**16, 16
    strides: Any = (n_heads * n_tokens * head_dim, head_dim, n_heads * head_dim)
    sizes: dict[str, Any] = {"n_batch_heads": n_batch * n_heads, "n_heads": n_heads, "n_queries": n_tokens}
    more: dict[str, Any] = {"n_keys": n_tokens, "score_scale": 1.0, "threshold": 9, "keep_scale": 1.0}
    dims: dict[str, Any] = {"HEAD_DIM": head_dim, "PADDED_DIM": padded_dim(head_dim), "BLOCK_Q": 64}
    flags: dict[str, Any] = {"BLOCK_K": 64, "HAS_KEY_MASK": True, "HAS_DROPOUT": True, "PRECISION": "ieee"}
    grid, stats = (n_batch * n_heads * n_tokens // 64,), (statistic, statistic)
    fwd: Any = kernels._causal_attention_fwd_kernel[grid]
    names = "delta", "dq", "dkdv"
    delta, dq, dkdv = (getattr(backward_kernels, f"_causal_attention_bwd_{name}_kernel")[grid] for name in names)
    fwd(x, x, x, mask, seed, x, *stats, *(3 * strides), **sizes, **more, **dims, **flags)
    delta(x, x, statistic, *(2 * strides), **sizes, keep_scale=1.0, **dims)
    backward = {**sizes, **more, **dims, **flags, "scale": 1.0, "N_PACKED": 3}
    dq(x, x, x, x, *stats, statistic, mask, seed, x, *(4 * strides), **backward)
    dkdv(x, x, x, x, *stats, statistic, mask, seed, x, x, *(4 * strides), **backward)


EMPTY = [(0, 2, 5, 5, 8), (2, 0, 5, 5, 8), (2, 2, 0, 0, 8), (2, 2, 5, 5, 0)]
RECORDS = {
    "causal_attention": Record(
        forms={"plain": lambda n: (shapes_of(2, 2, n, n + 2, 16), {}), "mask, dropout": masked_with_dropout},
        empty=[shapes_of(*sizes) for sizes in EMPTY],
        several_programs=several_programs,
        huge={
            "many heads, float32": lambda: launch(128, 64, torch.float32),
            "many heads, bfloat16": lambda: launch(128, 64, torch.bfloat16),
            "many rows, float32": lambda: launch(4096, 2, torch.float32),
            "many rows, bfloat16": lambda: launch(4096, 2, torch.bfloat16),
        },
    )
}
