"""What the Triton gelu_mlp has beyond its reference: rounding, the bits of dropout, descriptors, refusals."""

from functools import partial
from typing import Any

import fastgpt_kernels
import pytest
import torch
import triton.language as tl
from accuracy import assert_same_bits, gradients, max_error
from fastgpt_kernels.common import arithmetic, chip, dropout
from fastgpt_kernels.operations.gelu_mlp import tiles as gelu_mlp_tiles
from fastgpt_kernels.operations.gelu_mlp.op import gelu_mlp, supports
from interpreter import DEVICE, only_interpreted

from .formula import ONE_SUM, SEED, assert_mlp_parity, formula, make_inputs, of, results

pytestmark = pytest.mark.usefixtures("on_the_device")

fused = of(fastgpt_kernels)


# --- rounding -------------------------------------------------------------------------------------------------------


@only_interpreted
def test_a_wrong_constant_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = make_inputs(33, 16, n_hidden=64)
    assert_mlp_parity(fastgpt_kernels, inputs)
    monkeypatch.setattr(arithmetic, "_CUBIC", tl.constexpr(0.0448 / 0.044715 * arithmetic._CUBIC.value))
    with pytest.raises(AssertionError, match="error"):
        assert_mlp_parity(fastgpt_kernels, inputs)


def test_output_is_rounded_once() -> None:
    """A residual far above the product, which leaves no room for a rounding between them."""
    x, fc_weight, fc_bias, proj_weight, proj_bias = make_inputs(9, 16, n_hidden=32, dtype=torch.bfloat16)
    inputs = x, fc_weight, fc_bias, proj_weight * 0, torch.full_like(proj_bias, 1.0)
    # Its step is 2: the kept 1.0204 rounds up to it, but in bfloat16 would be 1.0234 and 1 a tie, that goes to 256.
    residual = torch.full((9, 16), 256.0, dtype=torch.bfloat16)
    dropped = fused(*inputs, residual, dropout_p=0.02)
    assert set(dropped.unique().tolist()) == {256.0, 258.0}


def test_bits_do_not_depend_on_gradients_being_wanted() -> None:
    inputs = make_inputs(40, 32, n_hidden=64, dtype=torch.bfloat16)
    without = fused(*inputs)
    assert torch.equal(without, fused(*[tensor.requires_grad_() for tensor in inputs]))


# --- dropout --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.usefixtures("small_tiles")
def test_dropout_is_the_references_to_the_bit(dtype: torch.dtype) -> None:
    """Where the product is 1 everywhere, and in the gradient of its bias and input."""
    n_rows, n_out = 37, 72
    x, fc_weight, fc_bias, proj_weight, proj_bias = make_inputs(n_rows, 8, n_hidden=16, n_out=n_out, dtype=dtype)
    inputs = x, fc_weight, fc_bias, proj_weight * 0, torch.ones_like(proj_bias)
    keep, keep_scale = dropout.dropout_keep_mask((1, 1, n_rows, n_out), 0.3, SEED, x.device)
    assert torch.equal(fused(*inputs, dropout_p=0.3), (keep[0, 0] * keep_scale).to(dtype))
    *_, dbias = gradients(partial(fused, dropout_p=0.3), inputs, [torch.ones(n_rows, n_out)])
    assert max_error(dbias, keep[0, 0].sum(0) * keep_scale) <= torch.finfo(dtype).eps * n_rows


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_output_of_several_column_tiles(dropout_p: float) -> None:
    """Wider than the tile of the pass that sums the bias gradient."""
    n_out = 2 * gelu_mlp_tiles.GELU_MLP_BWD_PRODUCT.block_cols + 3
    assert_mlp_parity(fastgpt_kernels, make_inputs(5, 8, n_hidden=16, n_out=n_out), dropout_p=dropout_p, slack=ONE_SUM)


def test_seeds() -> None:
    inputs = make_inputs(9, 16, n_hidden=32)
    seed = torch.tensor(SEED)
    leaves = [tensor.requires_grad_() for tensor in inputs]
    out = gelu_mlp(*leaves, dropout_p=0.5, seed=seed)  # pyright: ignore
    seed.add_(1)
    grads = torch.autograd.grad(out.sum(), leaves)
    again = fused(*leaves, dropout_p=0.5)
    assert torch.equal(out, again)
    assert_same_bits(list(grads), list(torch.autograd.grad(again.sum(), leaves)))
    torch.manual_seed(0)
    drawn = [gelu_mlp(*inputs, dropout_p=0.5) for _ in range(2)]  # pyright: ignore
    assert not torch.equal(*drawn)


# --- tiles ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n_rows", "n_cols", "large"),
    [
        (16 * 1024, 3072, True),  # a training step of GPT-2 small
        (16 * 1024, 768, True),
        (1024, 3072, False),  # a prompt of it: 96 and 24 wide tiles for 132 multiprocessors
        (1024, 768, False),
        (128 * 264, 256, False),
        (128 * 264 + 1, 256, True),
        (128 * 264, 257, True),
        (2**20, 255, False),  # Half of a wide tile would be empty.
        (0, 768, False),
    ],
)
def test_a_large_product_has_two_wide_tiles_for_each_multiprocessor(n_rows: int, n_cols: int, large: bool) -> None:
    assert gelu_mlp_tiles.is_large_product(n_rows, n_cols, 132) is large


@pytest.mark.parametrize(
    ("element_size", "architecture", "describable", "block_cols"),
    [(2, "sm_90", True, 256), (2, "sm_90", False, 128), (4, "sm_90", True, 64), (2, "sm_80", True, 128)],
)
def test_large_products_have_wide_tiles_on_hopper_in_half_precision(
    element_size: int, architecture: str, describable: bool, block_cols: int
) -> None:
    for kernel in ("hidden", "out", "pre"):
        small, large = (
            gelu_mlp_tiles.product_tile(kernel, element_size, element_size, architecture, describable, is_large)
            for is_large in (False, True)
        )
        assert large.block_cols == block_cols
        assert (small == large) == (block_cols != 256)


@pytest.mark.parametrize("kernel", ["hidden", "out", "pre"])
@pytest.mark.parametrize(
    ("result_size", "large", "block_cols", "n_resident"),
    [
        (2, False, 128, 2),
        (4, False, 128, 1),
        (8, False, 128, 1),
        (2, True, 256, 1),
        (4, True, 256, 1),
        (8, True, 128, 1),
    ],
)
def test_results_in_a_wider_dtype_leave_one_program_resident(
    kernel: str, result_size: int, large: bool, block_cols: int, n_resident: int
) -> None:
    tile = gelu_mlp_tiles.product_tile(kernel, 2, result_size, "sm_90", True, large)
    assert (tile.block_cols, tile.n_resident) == (block_cols, n_resident)


@pytest.mark.skipif(DEVICE == "cuda", reason="the GPU here may be no Hopper")
@pytest.mark.parametrize("stream", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize(("n_rows", "n_cols", "block_cols"), [(383, 272, 256), (120, 136, 128)])
def test_tiles_of_hopper(
    n_rows: int, n_cols: int, block_cols: int, stream: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three row tiles and two column tiles, or one and two, none of them full, in programs that take several."""
    chosen = []

    def note(kernel: str, *arguments: Any) -> gelu_mlp_tiles.ProductTile:
        tile = product_tile(kernel, *arguments)
        chosen.append((kernel, tile.block_cols))
        return tile

    product_tile = gelu_mlp_tiles.product_tile
    monkeypatch.setattr(gelu_mlp_tiles, "product_tile", note)
    *inputs, residual = make_inputs(n_rows, n_cols, n_hidden=264, dtype=torch.bfloat16, has_residual=True)
    with chip.assume(chip.Chip("sm_90", 1)):
        assert_mlp_parity(fastgpt_kernels, (*inputs, residual.to(stream)), dropout_p=0.25)
    forward = [("hidden", block_cols), ("out", 128 if stream == torch.float64 else block_cols)]
    assert chosen == forward + forward + [("pre", block_cols)]


# --- dtypes and refusals --------------------------------------------------------------------------------------------


def test_autocast_computes_in_its_dtype() -> None:
    inputs = make_inputs(20, 16, n_hidden=32, has_residual=True)
    with torch.autocast(DEVICE, torch.bfloat16):
        out, *grads = results(fused, inputs)
        expected = formula(*inputs)
    assert out.dtype == expected.dtype == torch.float32
    assert max_error(out, expected) < 0.05
    assert all(grad.dtype == torch.float32 for grad in grads)
    rounded = [tensor.bfloat16() for tensor in inputs[:5]]
    assert torch.equal(out, fused(*rounded, inputs[5]))


def test_what_the_kernel_cannot_do_is_refused() -> None:
    x, *weights = make_inputs(3, 4, n_hidden=8)
    with pytest.raises(ValueError, match=r"must share one dtype, not torch\.bfloat16, torch\.float32"):
        fused(x.bfloat16(), *weights)
    with pytest.raises(ValueError, match=r"no kernel for torch\.int64: it takes torch\.float32"):
        fused(x.long(), *(weight.long() for weight in weights))
    with pytest.raises(ValueError, match=r"must be on .*, not on meta"):
        fused(x, *weights, x.to("meta"))
    with pytest.raises(ValueError, match=r"dropout_p must be in \[0, 1\), not 1\.0"):
        fused(x, *weights, dropout_p=1.0)
    with pytest.raises(ValueError, match="unknown activation 'tanh'"):
        fused(x, *weights, activation="tanh")
    assert supports(x)
    assert not supports(x.long())


@pytest.mark.parametrize("wanted", range(6))
def test_one_gradient_alone(wanted: int) -> None:
    inputs = list(make_inputs(9, 16, n_hidden=32, has_residual=True))
    expected = gradients(fused, inputs, [torch.ones(9, 16)])[wanted]
    inputs[wanted].requires_grad_()
    fused(*inputs).backward(torch.ones(9, 16))
    assert torch.equal(inputs[wanted].grad, expected)  # pyright: ignore


# --- bugs this field has had ----------------------------------------------------------------------------------------


@pytest.mark.usefixtures("small_tiles")
def test_bug_descriptors_where_rows_are_not_aligned() -> None:
    """Every matrix in turn starts 4 bytes late: pointers take it."""
    inputs = make_inputs(37, 16, n_hidden=48, has_residual=True)
    aligned = results(fused, inputs)
    for late, tensor in enumerate(inputs):
        moved = torch.zeros(tensor.numel() + 1)[1:].view(tensor.shape).copy_(tensor)
        assert_same_bits(aligned, results(fused, (*inputs[:late], moved, *inputs[late + 1 :])))
