"""Products with int4 weights: how they are rounded. `test_int8.py` holds what they share with int8 weights."""

import copy
import pickle
from typing import Any

import pytest
import torch
from fastgpt_kernels.common import int4
from fastgpt_kernels.common.int4 import GROUP_SIZES, Int4Matrix
from fastgpt_kernels.common.int8 import Int8Matrix
from models import pair, tiny_config, token_ids
from torch import Tensor
from transformers.pytorch_utils import Conv1D

import fastgpt
from fastgpt.model.rounded import Int4Linear


def squared_errors(matrix: Tensor, rounded: Tensor, group_size: int) -> Tensor:
    """(out, groups)."""
    return (matrix.double() - rounded.double()).square().t().unflatten(1, (-1, group_size)).sum(-1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_columns_are_rounded_better_than_to_sevenths_of_the_largest_in_a_group(
    dtype: torch.dtype, group_size: int, scale: float
) -> None:
    """That is the usual symmetric rounding, whose scales are floats, where steps are whole numbers up to 15."""
    torch.manual_seed(0)
    matrix = (torch.randn(256, 50) * torch.logspace(-2, 0.5, 50) * scale).to(dtype)
    matrix[:, 7] = 0
    matrix[:group_size, 9] = 0
    rounded = Int4Matrix.nearest(matrix, group_size)
    assert (rounded.shape, rounded.group_size) == (matrix.shape, group_size)
    floats = rounded.to_float(torch.float64)
    assert (floats[:, 7] == 0).all()
    assert (floats[:group_size, 9] == 0).all()
    grid = matrix.double().t().unflatten(1, (-1, group_size)).abs().amax(-1, keepdim=True) / 7
    usual = (matrix.double().t().unflatten(1, (-1, group_size)) / grid).nan_to_num().round() * grid
    errors = squared_errors(matrix, floats, group_size)
    usual_errors = squared_errors(matrix, usual.flatten(1).t(), group_size)
    assert (errors.sum(1) <= usual_errors.sum(1)).all()
    assert errors.sum() < 0.75 * usual_errors.sum()


def test_the_largest_weight_of_a_column_is_nearly_exact() -> None:
    """One weight of a group is far from the others: it becomes -8 steps of 15."""
    torch.manual_seed(0)
    matrix = torch.randn(128, 2) * 1e-3
    matrix[5, 0], matrix[70, 1] = 3.0, -5.0
    floats = Int4Matrix.nearest(matrix, 64).to_float(torch.float32)
    assert floats[5, 0].item() == pytest.approx(3.0, rel=2**-16)
    assert floats[70, 1].item() == pytest.approx(-5.0, rel=2**-16)


def test_the_steps_of_least_error_are_taken() -> None:
    """Nearly: trying all of them for each group would gain a thousandth."""
    torch.manual_seed(0)
    rounded = Int4Matrix.nearest(matrix := torch.randn(256, 40), 64)
    groups = (matrix.t() / rounded.scale[:, None]).unflatten(1, (-1, 64))
    steps = torch.tensor([sign * step for step in range(1, 16) for sign in (1, -1)])[:, None, None, None]
    errors = ((groups / steps).round().clamp(-8, 7) * steps - groups).square().sum(-1)  # (30, out, groups)
    found = (rounded.to_int8().values.unflatten(1, (-1, 64)) - groups).square().sum(-1)
    assert errors.amin(0).sum() * 0.999 <= found.sum() <= errors.amin(0).sum() * 1.005


def test_an_int4_matrix_is_an_int8_matrix() -> None:
    """Exactly: every value is -8 to 7 times its step, two of them lie in a byte, and its floats are those of int8."""
    torch.manual_seed(0)
    rounded = Int4Matrix.nearest(torch.randn(96, 33) * torch.logspace(-42, 30, 33), 32)
    values = torch.empty(33, 96, dtype=torch.int64)
    for row, column in torch.cartesian_prod(torch.arange(33), torch.arange(96)).tolist():
        byte = int(rounded.values[row, column // 2])
        half = byte >> 4 if column % 2 else byte & 15
        values[row, column] = (half - 8) * int(rounded.steps[row, column // 32])
    as_int8 = rounded.to_int8()
    assert isinstance(as_int8, Int8Matrix)
    assert torch.equal(as_int8.values.long(), values)
    assert values.abs().max() <= 120
    assert torch.equal(as_int8.scale, rounded.scale)
    exact = values.double().t() * rounded.scale.double()
    for dtype in (torch.float32, torch.float64):
        assert torch.equal(rounded.to_float(dtype).double(), exact)


def test_parts_of_a_matrix_are_rounded_as_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    matrix = torch.randn(128, 67)
    whole = Int4Matrix.nearest(matrix, 64)
    monkeypatch.setattr(int4, "_MAX_SEARCHED", 1000)
    assert all(map(torch.equal, whole, Int4Matrix.nearest(matrix, 64)))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"bits": 3}, "rounds to 8 bits or 4, not 3"),
        ({"bits": 4, "activations": True}, "activations=True needs bits=8"),
        ({"bits": 4, "group_size": 16}, "group_size must be one of 32, 64, 128, not 16"),
        ({"bits": 4, "group_size": 64.0}, r"group_size must be one of 32, 64, 128, not 64\.0"),
        ({"bits": 4, "group_size": 128}, r"attn\.c_attn\.weight: groups of 128 do not divide 64 inputs"),
    ],
)
def test_what_is_not_offered_is_told_and_nothing_changes(options: dict[str, Any], words: str) -> None:
    _, ours = pair(tiny_config())
    with pytest.raises(ValueError, match=words):
        fastgpt.quantize(ours, **options)
    assert isinstance(ours.transformer.h[0].mlp.c_fc, Conv1D)
    assert not hasattr(ours.config, "quantization_config")


def test_weights_that_are_not_finite_are_named() -> None:
    _, ours = pair(tiny_config())
    with torch.no_grad():
        ours.transformer.h[1].mlp.c_fc.weight[3, 5] = torch.nan
    with pytest.raises(ValueError, match=r"^transformer\.h\.1\.mlp\.c_fc\.weight: .* NaN or Inf has no int4"):
        fastgpt.quantize(ours, bits=4)


def test_a_model_is_rounded_in_one_way() -> None:
    ours = fastgpt.quantize(pair(tiny_config())[1], bits=4, group_size=32)
    assert fastgpt.quantize(ours, bits=4, group_size=32) is ours
    products = [module for module in ours.modules() if isinstance(module, Int4Linear)]
    others: list[dict[str, Any]] = [{}, {"bits": 4, "group_size": 64}, {"head": True}]
    for options in others:
        with pytest.raises(ValueError, match="quantised already, to 4 bits in groups of 32"):
            fastgpt.quantize(ours, **options)
    assert fastgpt.quantize(ours, bits=4, group_size=32, head=True) is ours
    assert isinstance(ours.lm_head, Int4Linear)
    assert products == [
        module for module in ours.modules() if isinstance(module, Int4Linear) and module.bias is not None
    ]
    with pytest.raises(ValueError, match="quantised already, to 8 bits"):
        fastgpt.quantize(fastgpt.quantize(pair(tiny_config())[1]), bits=4)


@torch.no_grad()
def test_copies_and_dtypes_keep_the_parts() -> None:
    ours = fastgpt.quantize(pair(tiny_config())[1], bits=4, head=True)
    before, ids = ours.state_dict(), token_ids(2, 9, 131)
    for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert torch.equal(other(ids).logits, ours(ids).logits)
    in_half = copy.deepcopy(ours).to(torch.bfloat16)
    product = in_half.transformer.h[0].mlp.c_fc
    assert isinstance(product, Int4Linear)
    assert [part.dtype for part in product.matrix] == [torch.uint8, torch.int8, torch.float32]
    after, parts = in_half.state_dict(), [name for name in before if name.endswith((".steps", ".scale"))]
    assert len(parts) == 2 * (2 * 4 + 1)
    for name in (*parts, "lm_head.weight", "transformer.h.0.mlp.c_fc.weight"):
        assert torch.equal(after[name], before[name])
