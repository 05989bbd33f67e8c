"""Helpers of the tests of a decode step's products on a CPU."""

from typing import Any

import pytest
import torch
from fastgpt_kernels.operations.decode_step.reference import multiply
from models import assert_same_within_rounding, token_ids
from torch import Tensor

from fastgpt import generate as engine
from fastgpt.generate import products
from fastgpt.generate.implementations import Rows, implementations_of
from fastgpt.generate.products import Cost, Products


def prefer(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make one implementation the cheapest wherever it can be taken."""

    def costs(matrices: list[Tensor], n_rows: int, rows: Rows) -> dict[str, Cost]:
        return {
            other: Cost(0.0, 1.0 if other == name else 2.0, copies=other == "packed")
            for other in implementations_of(matrices[0], n_rows, rows)
        }

    monkeypatch.setattr(products, "costs", costs)


@torch.no_grad()
def assert_step_equals_blocks(model: Any, n_rows: int, name: str, monkeypatch: pytest.MonkeyPatch) -> Products:
    """Hold a decode step that prefers one implementation against the model's own blocks. Returns its products."""
    ids, positions = token_ids(n_rows, 9, 131), torch.arange(9)[None]
    expected = model(ids).logits[:, -1]
    prefer(name, monkeypatch)
    weights = engine.view_weights(model)
    chosen = Products(weights, n_rows, products.MIN_STEPS)
    assert name in chosen.chosen.values()
    cache = engine.KVCache.allocate(model, n_rows, 9)
    engine.prefill(model, cache, ids[:, :8], None, positions[:, :8])
    logits = engine.decode_one_token(weights, cache, ids[:, 8], positions[:, 8], chosen)
    assert_same_within_rounding(logits, expected, n_ulps=64 if weights.wte.dtype == torch.float32 else 4)
    return chosen


def exact(x: Tensor, matrix: Tensor, bias: Tensor | None) -> Tensor:
    """The product in float64."""
    return multiply(x.double(), matrix.double(), None if bias is None else bias.double())
