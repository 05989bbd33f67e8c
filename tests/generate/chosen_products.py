"""Helpers of the tests of a decode step's products on a CPU."""

from typing import Any

import pytest
import torch
from accuracy import drawn_again, max_error
from fastgpt_kernels.common.decode_weights import RoundedMatrix
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


def largest_eager_error(x: Tensor, matrix: RoundedMatrix, bias: Tensor | None) -> float:
    """Of torch's product with a float copy, over eight draws of rows like these.

    The largest of a few rounding errors is random, and torch adds in another order when the copy is stored the other
    way, and may err twice as much.
    """
    floats = matrix.to_float(x.dtype)
    truth = matrix.to_float(torch.float64)
    return max(
        max_error(multiply(row, stored, bias), exact(row, truth, bias))
        for row in (drawn_again(x, seed) for seed in range(8))
        for stored in (floats.contiguous(), floats.t().contiguous().t())
    )
