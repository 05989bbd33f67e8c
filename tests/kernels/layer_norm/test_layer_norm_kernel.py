"""What the Triton layer_norm and add_layer_norm have beyond their reference: bits, launches, dtypes and refusals."""

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import fastgpt_kernels
import pytest
import torch
from accuracy import DTYPES, assert_same_bits, forward, gradients, max_error
from fastgpt_kernels import reference
from fastgpt_kernels.common import chip, launch
from fastgpt_kernels.operations.layer_norm import op as module
from fastgpt_kernels.operations.layer_norm import tiles as layer_norm_tiles
from fastgpt_kernels.operations.layer_norm.op import add_layer_norm, layer_norm, supports
from torch import Tensor

from .formula import (
    add_layer_norm_formula,
    assert_layer_norm_parity,
    layer_norm_formula,
    make_inputs,
    make_sum_inputs,
    make_tensor,
    of,
)

pytestmark = pytest.mark.usefixtures("on_the_device")


def results(inputs: tuple[Tensor, ...], upstream: list[Tensor]) -> list[Tensor]:
    """Outputs and gradients of layer_norm or add_layer_norm."""
    operation = of(fastgpt_kernels, inputs)
    return [*forward(operation, inputs), *gradients(operation, inputs, upstream)]


# --- parity ---------------------------------------------------------------------------------------------------------


def test_widest_row() -> None:
    inputs = make_inputs(2, 4096, dtype=torch.bfloat16)
    assert supports(inputs[0])
    assert_layer_norm_parity(fastgpt_kernels, inputs)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_sum_is_normalised_as_it_is_stored(dtype: torch.dtype) -> None:
    """Because backward reads it again: unrounded, its statistics would differ between the passes."""
    x, residual, weight, bias = make_sum_inputs(7, 65, dtype=dtype)
    y, summed = add_layer_norm(x, residual, weight, bias)
    assert torch.equal(y, layer_norm(summed, weight, bias))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("read", [(True, True), (True, False), (False, True)])
def test_the_gradient_of_a_stream_without_addition_joins_that_of_its_norm(
    dtype: torch.dtype, read: tuple[bool, bool]
) -> None:
    """As if zeros had been added, bit by bit, whichever of the two results is read."""
    _, *inputs = make_sum_inputs(7, 65, dtype=dtype)
    upstream = [make_tensor(7, 65, dtype=dtype) for is_read in read if is_read]

    def bits(added: Tensor | None) -> list[Tensor]:
        residual, weight, bias = leaves = [x.clone().requires_grad_() for x in inputs]
        both = add_layer_norm(added, residual, weight, bias)
        outputs = [output for output, is_read in zip(both, read, strict=True) if is_read]
        return [*both, *torch.autograd.grad(outputs, leaves if read[0] else leaves[:1], upstream)]

    assert_same_bits(bits(None), bits(torch.zeros_like(inputs[0])))


@pytest.mark.parametrize("mean", [1e4, -1e4])
def test_float32_far_from_zero_errs_by_a_millionth(mean: float) -> None:
    x, weight, bias = make_inputs(8, 768)
    x = make_tensor(8, 768) + mean
    for ones in (weight, torch.ones_like(weight)):
        (truth,) = forward(layer_norm_formula, [x.double(), ones.double(), bias.double()])
        assert max_error(layer_norm(x, ones, bias), truth) <= 1e-6 * truth.abs().max()
    assert_layer_norm_parity(fastgpt_kernels, (x, weight, bias))


# --- dtypes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
def test_sum_of_two_dtypes_is_promoted(weight_dtype: torch.dtype) -> None:
    x, residual, weight, bias = make_sum_inputs(5, 40)
    inputs = x.bfloat16(), residual, weight.to(weight_dtype), bias
    upstream = [make_tensor(5, 40, seed=5), make_tensor(5, 40, seed=6)]
    exact = [tensor.double() for tensor in inputs]
    truth = forward(add_layer_norm_formula, exact) + gradients(add_layer_norm_formula, exact, upstream)
    dtypes = [torch.float32, torch.float32, *(tensor.dtype for tensor in inputs)]
    for ours, true, dtype in zip(results(inputs, upstream), truth, dtypes, strict=True):
        assert ours.dtype == dtype
        assert max_error(ours, true) <= 4 * torch.finfo(dtype).eps * true.abs().max()


def test_autocast_on_cuda_normalises_to_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    enabled = torch.is_autocast_enabled("cuda")
    torch.set_autocast_enabled("cuda", True)
    try:
        dtypes = [module._normalised_dtype(dtype, "cuda") for dtype in DTYPES]
        assert module._normalised_dtype(torch.bfloat16, "cpu") == torch.bfloat16
    finally:
        torch.set_autocast_enabled("cuda", enabled)
    assert dtypes == [torch.float64, torch.float32, torch.float32, torch.float32]
    assert module._normalised_dtype(torch.bfloat16, "cuda") == torch.bfloat16

    monkeypatch.setattr(module, "_normalised_dtype", lambda *_: torch.float32)
    x, weight, bias = make_inputs(5, 40, dtype=torch.bfloat16)
    exact = [tensor.double() for tensor in (x, weight, bias)]
    y, dx, dweight, dbias = results((x, weight, bias), [make_tensor(5, 40)])
    assert (y.dtype, dx.dtype, dweight.dtype, dbias.dtype) == (torch.float32, *3 * [torch.bfloat16])
    assert max_error(y, forward(layer_norm_formula, exact)[0]) <= 1e-5
    for grad, true in zip(
        (dx, dweight, dbias), gradients(layer_norm_formula, exact, [make_tensor(5, 40)]), strict=True
    ):
        assert max_error(grad, true) <= 2**-8 * true.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_on_cpu_leaves_dtypes_alone(dtype: torch.dtype) -> None:
    x, weight, bias = (tensor.cpu() for tensor in make_inputs(5, 32))
    inputs = x.to(dtype), weight, bias
    with torch.autocast("cpu", torch.bfloat16):
        y = module._normalised_dtype(inputs[0].dtype, "cpu")
        expected = reference.layer_norm(*inputs)
    assert y == expected.dtype == dtype


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90", "sm_100", "sm_120", "gfx942"])
def test_programs_of_backward_fill_the_registers_of_every_multiprocessor(architecture: str) -> None:
    """With 16 warps of 128 registers a thread, however many warps a program has."""
    with chip.assume(chip.Chip(architecture, 100)):
        for tile in layer_norm_tiles.layer_norm_tiles("bwd", architecture):
            n_programs = layer_norm_tiles.layer_norm_bwd_programs(torch.zeros(1), tile)
            assert n_programs * tile.num_warps == 100 * 16


# --- refusals -------------------------------------------------------------------------------------------------------


def test_what_the_kernel_cannot_do_is_refused() -> None:
    x, weight, bias = make_inputs(3, 8)
    with pytest.raises(ValueError, match=r"no kernel for torch\.int64: it takes torch\.float32"):
        layer_norm(x.long(), weight, bias)
    with pytest.raises(ValueError, match=r"must be on .*, not on meta"):
        layer_norm(x, weight.to("meta"), bias)
    for n_channels, dtype in ((4097, torch.float32), (4097, torch.bfloat16), (2049, torch.float64)):
        wide = torch.zeros(1, n_channels, dtype=dtype)
        assert not supports(wide)
        with pytest.raises(ValueError, match=rf"{n_channels} channels exceed the .* in {dtype}: use"):
            layer_norm(wide, wide[0], wide[0])
        with pytest.raises(ValueError, match="exceed"):
            add_layer_norm(wide, wide, wide[0], wide[0])
    assert supports(torch.zeros(1, 2048, dtype=torch.float64))
    assert not supports(x.long())


def test_package_finds_the_kernels() -> None:
    for operation in (layer_norm, add_layer_norm):
        assert fastgpt_kernels.kernel(operation.__name__) is operation


# --- bugs this field has had ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_programs", [1, 2, 7])
@pytest.mark.parametrize("n_rows", [1, 2, 13])
def test_bug_weight_gradient_misses_rows(n_rows: int, n_programs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Partial sums sized unlike the grid; in integers, where every row shows."""
    x, upstream = make_tensor(n_rows, 4), make_tensor(n_rows, 4, seed=5).mul(4).round()
    monkeypatch.setattr(layer_norm_tiles, "layer_norm_bwd_programs", lambda x, tile: n_programs)
    monkeypatch.setattr(layer_norm_tiles, "layer_norm_reduce_partials", lambda architecture: 4)
    *_, dbias = results((x, torch.ones(4), torch.zeros(4)), [upstream])
    assert torch.equal(dbias, upstream.sum(0))


def test_bug_saved_sum_is_shared_with_the_caller() -> None:
    inputs = [tensor.requires_grad_() for tensor in make_sum_inputs(3, 8)]
    y, stream = forward(add_layer_norm, inputs)
    stream.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("current", [0, 1])
def test_bug_launched_on_another_gpu(current: int, monkeypatch: pytest.MonkeyPatch) -> None:
    entered: list[str] = []

    @contextmanager
    def device(device: torch.device) -> Iterator[None]:
        entered.append(str(device))
        yield

    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current)
    kernel = {(5,): lambda *args, **options: entered.append("launched")}
    launch.launch(kernel, 5, SimpleNamespace(is_cuda=True, device=torch.device("cuda:1")))  # pyright: ignore
    assert entered == ["cuda:1", "launched"][current:]
