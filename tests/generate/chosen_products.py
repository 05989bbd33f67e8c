"""Helpers of the tests of a decode step's products on a CPU."""

import pytest
from fastgpt_kernels.operations.decode_step.reference import multiply
from torch import Tensor

from fastgpt.generate import products
from fastgpt.generate.implementations import Rows, implementations_of
from fastgpt.generate.products import Cost


def prefer(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make one implementation the cheapest wherever it can be taken."""

    def costs(matrices: list[Tensor], n_rows: int, rows: Rows) -> dict[str, Cost]:
        return {
            other: Cost(0.0, 1.0 if other == name else 2.0, copies=other == "packed")
            for other in implementations_of(matrices[0], n_rows, rows)
        }

    monkeypatch.setattr(products, "costs", costs)


def exact(x: Tensor, matrix: Tensor, bias: Tensor | None) -> Tensor:
    """The product in float64."""
    return multiply(x.double(), matrix.double(), None if bias is None else bias.double())
