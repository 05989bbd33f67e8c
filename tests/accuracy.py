"""The tolerance of the tests: a result may err little more than plain torch does in the same dtype.

"truth" is a formula in float64 on the same values, "eager" the same formula in the dtype under test.
"""

from collections.abc import Callable, Sequence

import accuracy_table
import torch
from torch import Tensor

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
LAYOUTS = ["contiguous", "padded", "transposed", "strided"]
# The values between the elements of a view. Not NaN, because torch's bfloat16 product on CPUs with AMX reads past the
# rows of a padded matrix and multiplies those values by zero.
GAP = 1e4


def random(*shape: int, seed: int = 0) -> Tensor:
    """Standard normal float64 values on the default device, which depend only on the shape and the seed."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + sum(shape))
    values = torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")
    return values.to(torch.get_default_device())


def relayout(x: Tensor, layout: str) -> Tensor:
    """The same values in another memory layout; the gaps hold `GAP`, so that reading one shows in the result."""
    if layout == "contiguous" or x.ndim == 0:
        return x.clone(memory_format=torch.contiguous_format)
    if layout == "transposed":
        return x.permute(*reversed(range(x.ndim))).contiguous().permute(*reversed(range(x.ndim)))
    step, n_extra = {"padded": (1, 3), "strided": (2, 0)}[layout]
    memory = x.new_full((*x.shape[:-1], x.shape[-1] * step + n_extra), GAP)
    view = memory[..., : x.shape[-1] * step : step]
    return view.copy_(x)


def max_error(value: Tensor, truth: Tensor) -> float:
    """The largest absolute difference; NaN when there is a NaN, 0 when there are no elements."""
    assert value.shape == truth.shape, f"shape {tuple(value.shape)}, not {tuple(truth.shape)}"
    return (value.double() - truth.double()).abs().max().item() if value.numel() else 0.0


def assert_as_accurate(
    fused: Tensor,
    eager: Tensor,
    truth: Tensor,
    factor: float = 1.25,
    n_ulps: float = 1,
    largest: float | None = None,
    eager_error: float = 0.0,
) -> float:
    """`fused` may err `factor` times as much as eager torch in the same dtype, plus `n_ulps` of the largest value.

    truth: the formula on float64 inputs. eager: the formula in fused's own dtype. largest: None takes the largest value
    of truth. eager_error: how much eager errs on other inputs like these, if that is more.
    Returns the error as a share of what is allowed.
    """
    if fused.dtype == torch.float64:  # the truth errs too
        n_ulps = 1000 * n_ulps
    assert fused.dtype == eager.dtype, f"dtype {fused.dtype}, not {eager.dtype}"
    eager_error, error = max(max_error(eager, truth), eager_error), max_error(fused, truth)
    largest = _largest(truth) if largest is None else largest
    allowed = factor * eager_error + n_ulps * torch.finfo(fused.dtype).eps * largest
    assert allowed < float("inf"), "eager torch or the truth is not finite here: nothing can be said"
    assert error <= allowed, (
        f"error {error:.3g}, allowed {allowed:.3g} (eager {eager_error:.3g}, largest {largest:.3g})"
    )
    return error / allowed if error else 0.0


def _largest(x: Tensor) -> float:
    return x.abs().max().item() if x.numel() else 0.0


def assert_same_bits(first: Sequence[Tensor], second: Sequence[Tensor]) -> None:
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


Function = Callable[..., Tensor | tuple[Tensor, ...]]


def forward(function: Function, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The outputs of `function`, always as a tuple."""
    outputs = function(*inputs)
    return (outputs,) if isinstance(outputs, Tensor) else outputs


def gradients(function: Function, inputs: Sequence[Tensor], upstream: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The gradient of every input; upstream: the gradient of every output."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    outputs = forward(function, inputs)
    upstream = [grad.to(output.dtype) for grad, output in zip(upstream, outputs, strict=True)]
    return torch.autograd.grad(outputs, inputs, upstream)


# On how many permutations of the inputs eager's error is measured, in addition to the inputs themselves.
N_MORE_DRAWS = 3


def drawn_again(x: Tensor, seed: int) -> Tensor:
    """The same values in another order along the last axis: another draw from the same distribution.

    With an even seed the last two axes are exchanged in memory. torch then adds up products in another order, and on
    some processors errs twice as much or half as much.
    """
    if x.ndim == 0:
        return x
    order = torch.randperm(x.shape[-1], generator=torch.Generator().manual_seed(seed), device="cpu")
    drawn = x.detach()[..., order.to(x.device)]
    return drawn.mT.contiguous().mT if seed % 2 == 0 and x.ndim > 1 else drawn


def assert_parity(
    fused: Function,
    formula: Function,
    inputs: Sequence[Tensor],
    upstream: Sequence[Tensor] | None = None,
    *,
    slack: float = 1.0,
    terms_cancel: bool = False,
) -> None:
    """`assert_as_accurate` on every output and on the gradient of every input.

    The largest of a few rounding errors is random, and the order in which torch adds depends on the processor. So
    eager's error is the largest on these inputs and on `N_MORE_DRAWS` permutations of them.

    inputs: floating tensors in the dtype under test. upstream: the gradient of every output, random when None.
    slack: how many times the usual error is allowed; random tests need it, because they find cases where eager happens
    to err little. terms_cancel: a gradient may be much smaller than its terms, which are as large as the largest
    gradient, so the allowed ulps are those of the terms.
    """
    evaluations = [evaluate(formula, inputs, upstream)]
    for seed in range(N_MORE_DRAWS):
        evaluations.append(evaluate(formula, [drawn_again(x, seed) for x in inputs], upstream))
    (truth, eager), largest = evaluations[0], None
    actual = forward(fused, inputs), gradients(fused, inputs, _upstream(truth[0], inputs, upstream))
    for number, (kind, factor) in enumerate((("forward", 1.25), ("gradients", 1.5))):
        if kind == "gradients" and terms_cancel:
            largest = max(map(_largest, truth[number]))
        for place, ours in enumerate(actual[number]):
            eager_error = max(max_error(e[number][place], t[number][place]) for t, e in evaluations)
            true, theirs = truth[number][place], eager[number][place]
            share = assert_as_accurate(ours, theirs, true, factor * slack, slack, largest, eager_error)
            accuracy_table.record(fused, ours.dtype, kind, share * factor * slack, slack > 1)


Outputs = tuple[tuple[Tensor, ...], tuple[Tensor, ...]]


def evaluate(formula: Function, inputs: Sequence[Tensor], upstream: Sequence[Tensor] | None) -> tuple[Outputs, Outputs]:
    """Outputs and gradients of the truth and of eager torch."""
    exact = [x.double() for x in inputs]
    truth, eager = forward(formula, exact), forward(formula, inputs)
    upstream = _upstream(truth, inputs, upstream)
    return (truth, gradients(formula, exact, upstream)), (eager, gradients(formula, inputs, upstream))


def _upstream(
    outputs: Sequence[Tensor], inputs: Sequence[Tensor], upstream: Sequence[Tensor] | None
) -> Sequence[Tensor]:
    """Values that the dtype under test represents exactly, because their rounding would count as an error."""
    return upstream or [random(*y.shape, seed=99).to(inputs[0].dtype) for y in outputs]
