"""The operations compared with torch's, one at a time, on the shapes of GPT-2: what runs, and how it is timed.

Bytes and FLOPs are those that an operation cannot avoid, as `kernels/README.md` counts them.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from statistics import quantiles
from typing import Any

import fastgpt_kernels
import torch
import torch.nn.functional as F
from fastgpt_kernels import reference
from fastgpt_kernels.common.precision import tf32_is_allowed
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import fastgpt.bench.machine as machine

from .. import ops
from ..accounting import Shape

DROPOUT_P = 0.1
TINY = {"tiny": Shape(n_layer=1, n_embd=32, n_head=2, n_positions=32, vocab_size=67)}


@dataclass(frozen=True)
class Case:
    """One operation at one size, done by several contenders.

    inputs: what every contender is called with. contenders: the first is fastgpt's, the second the torch reference,
    with which the others are compared. forward, backward: (bytes, FLOPs) of the pass. directions: what is timed, as of
    `make_call`; where backward is in none, no gradients are computed, otherwise of the floating inputs.
    """

    operation: str
    inputs: tuple[Tensor, ...]
    contenders: dict[str, Callable[..., Any]]
    forward: tuple[int, int]
    backward: tuple[int, int]
    directions: tuple[str, ...] = ("forward", "forward+backward")

    @property
    def is_differentiated(self) -> bool:
        return any("backward" in direction for direction in self.directions)


def cases(shape: Shape, n_batch: int, n_tokens: int, device: torch.device, dtype: torch.dtype) -> Iterator[Case]:
    """Every operation on n_batch sequences of n_tokens; one at a time is in memory."""

    random = partial(_random, device, dtype)
    C, H, V, N = shape.n_embd, shape.n_head, shape.vocab_size, n_batch * n_tokens

    yield _layer_norm_case(random(N, C), random(C), random(C))
    yield _add_layer_norm_case(random(N, C), random(N, C), random(C), random(C))
    packed = random(n_batch, n_tokens, 3 * C)
    for dropout_p in (0.0, DROPOUT_P):
        yield _attention_case(packed, H, dropout_p)
    yield _mlp_case(shape, N, device, dtype)
    labels = torch.randint(V, (N,), device=device)
    flops = 2 * N * V * C
    vocabulary = (V * C + N * C) * dtype.itemsize
    yield Case(
        "linear_cross_entropy",
        (random(N, C), random(V, C, scale=C**-0.5), labels),
        {**_ours("linear_cross_entropy"), "torch, unfused": lambda x, w, y: F.cross_entropy((x @ w.t()).float(), y)},
        (vocabulary, flops),
        (2 * vocabulary, 2 * flops),
    )


def _random(device: torch.device, dtype: torch.dtype, *sizes: int, scale: float = 1.0) -> Tensor:
    return (torch.randn(sizes, device=device) * scale).to(dtype).requires_grad_()


def _ours(operation: str, **options: Any) -> dict[str, Callable[..., Any]]:
    return {
        "fastgpt": partial(getattr(ops, operation), **options),
        "torch": partial(getattr(reference, operation), **options),
    }


def _layer_norm_case(x: Tensor, weight: Tensor, bias: Tensor) -> Case:
    row_bytes, n = x.nbytes, x.numel()
    return Case("layer_norm", (x, weight, bias), _ours("layer_norm"), (2 * row_bytes, 9 * n), (3 * row_bytes, 18 * n))


def _add_layer_norm_case(x: Tensor, *others: Tensor) -> Case:
    row_bytes, n = x.nbytes, x.numel()
    return Case(
        "add_layer_norm", (x, *others), _ours("add_layer_norm"), (4 * row_bytes, 10 * n), (4 * row_bytes, 19 * n)
    )


def _attention_case(packed: Tensor, n_heads: int, dropout_p: float) -> Case:
    """On q, k and v as the projection leaves them, packed in one tensor."""
    B, T, width = packed.shape
    D = width // 3 // n_heads

    def unpacked(attend: Callable[..., Tensor], packed: Tensor) -> Tensor:
        q, k, v = packed.view(B, T, 3, n_heads, D).permute(2, 0, 3, 1, 4)
        return attend(q, k, v).transpose(1, 2).reshape(B, T, n_heads * D)

    contenders = dict(_ours("causal_attention", dropout_p=dropout_p))
    if packed.is_cuda:
        for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION):
            contenders[f"sdpa {backend.name.split('_')[0].lower()}"] = partial(_pinned_sdpa, backend, dropout_p)
    else:
        contenders["sdpa"] = partial(F.scaled_dot_product_attention, is_causal=True, dropout_p=dropout_p)
    flops = 2 * T * (T + 1) * D * B * n_heads
    return Case(
        "causal_attention" + (f", dropout {dropout_p}" if dropout_p else ""),
        (packed,),
        {name: partial(unpacked, attend) for name, attend in contenders.items()},
        (packed.nbytes * 4 // 3, flops),
        (packed.nbytes * 8 // 3, flops * 5 // 2),
    )


def _pinned_sdpa(backend: SDPBackend, dropout_p: float, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=dropout_p)


def _mlp_case(shape: Shape, n_rows: int, device: torch.device, dtype: torch.dtype) -> Case:
    random = partial(_random, device, dtype)
    C, hidden_width = shape.n_embd, shape.n_inner or 4 * shape.n_embd
    x, fc_weight, fc_bias = random(n_rows, C), random(C, hidden_width, scale=C**-0.5), random(hidden_width)
    inputs = x, fc_weight, fc_bias, random(hidden_width, C, scale=0.02), random(C)
    flops = 4 * n_rows * hidden_width * C
    n_bytes = 2 * (fc_weight.nbytes + x.nbytes + n_rows * hidden_width * dtype.itemsize)
    contenders = _ours("gelu_mlp")
    if x.is_cuda:  # On a CPU it computes the exact GELU, not the tanh form.

        def cublas_epilogue(x: Tensor, fc_weight: Tensor, fc_bias: Tensor, *proj: Tensor) -> Tensor:
            return torch.addmm(proj[1], torch._addmm_activation(fc_bias, x, fc_weight, use_gelu=True), proj[0])

        contenders["cuBLASLt epilogue"] = cublas_epilogue
    return Case("gelu_mlp", inputs, contenders, (n_bytes, flops), (2 * n_bytes, 2 * flops))


def mlp_and_stream_case(
    shape: Shape, n_rows: int, device: torch.device, dtype: torch.dtype, stream_dtype: torch.dtype
) -> Case:
    """The MLP added to a residual stream, which under autocast is in float32."""

    def onto(mlp: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        return mlp(*inputs[:-1], residual=inputs[-1])

    alone = _mlp_case(shape, n_rows, device, dtype)
    stream = _random(device, stream_dtype, n_rows, shape.n_embd)
    # The stream is read, and the result is in its dtype.
    n_bytes, flops = alone.forward[0] - alone.inputs[0].nbytes + 2 * stream.nbytes, alone.forward[1]
    return replace(
        alone,
        operation=f"gelu_mlp, {str(stream_dtype).removeprefix('torch.')} stream",
        inputs=(*alone.inputs, stream),
        contenders={name: partial(onto, mlp) for name, mlp in _ours("gelu_mlp").items()},
        forward=(n_bytes, flops),
        backward=(2 * n_bytes, 2 * flops),
    )


# --- the gate -------------------------------------------------------------------------------------------------------


def check(case: Case) -> str | None:
    """What is wrong with fastgpt's outputs and gradients, None when nothing is.

    The truth is the reference in a wider dtype. In the Frobenius norm, fastgpt may err 1.5 times as much as the
    reference does in the dtype itself, plus two ulps (of tf32 where torch may round float32 to it). Whole numbers must
    be equal. All draw the same dropout.
    """
    first = case.inputs[0]
    wider = torch.float64 if first.dtype == torch.float32 else torch.float32
    wide = tuple(
        x.detach().to(wider).requires_grad_(case.is_differentiated) if x.is_floating_point() else x for x in case.inputs
    )
    functions = list(case.contenders.values())
    truth, eager, ours = (
        _results(function, inputs)
        for function, inputs in ((functions[1], wide), (functions[1], case.inputs), (functions[0], case.inputs))
    )
    for i, (true, theirs, mine) in enumerate(zip(truth, eager, ours, strict=True)):
        if not mine.is_floating_point():
            if not torch.equal(mine, true):
                n_wrong = int((mine != true).sum())
                return f"{case.operation}: {n_wrong} of {mine.numel()} numbers of result {i} are not the reference's"
            continue
        # A scalar is a mean over rows. The reference may be exact by luck, while rounding errors of rows average out.
        mean_ulp = 0.0 if mine.ndim else torch.finfo(first.dtype).eps / len(first) ** 0.5
        # Matrix units truncate float32 to tf32 where torch's library rounds it, so they may err by more than it does.
        is_tf32 = mine.dtype == torch.float32 and first.dtype == torch.float32 and tf32_is_allowed()
        ulp = max(2**-10 if is_tf32 else torch.finfo(mine.dtype).eps, mean_ulp)
        error, allowed = _distance(mine, true), 1.5 * _distance(theirs, true) + 2 * ulp
        if not error <= allowed:
            return f"{case.operation}: result {i} errs by {error:.2e}, allowed {allowed:.2e}"
    return None


def _results(function: Callable[..., Any], inputs: tuple[Tensor, ...]) -> list[Tensor]:
    torch.manual_seed(0)
    outputs = function(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    return [*outputs, *_gradients(outputs, inputs)] if outputs[0].requires_grad else list(outputs)


def _gradients(outputs: tuple[Tensor, ...], inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    generator = torch.Generator(outputs[0].device).manual_seed(1)
    upstream = [
        torch.randn(y.shape, generator=generator, device=y.device).to(y.dtype) if y.ndim else torch.ones_like(y)
        for y in outputs
    ]
    return torch.autograd.grad(outputs, [x for x in inputs if x.requires_grad], upstream)


def _distance(x: Tensor, truth: Tensor) -> float:
    truth = truth.double()
    return ((x.double() - truth).norm() / truth.norm()).item()


# --- time -----------------------------------------------------------------------------------------------------------


def measure(case: Case, rates: dict[str, float], budget_s: float) -> list[dict[str, Any]]:
    """A row for each contender and pass: median time and quartiles in s, peak memory in bytes, share of the floor.

    rates: of `machine.measure_rates`. budget_s: timed seconds of each row. For a contender that cannot run, a row says
    why under "skipped".
    """
    rows: list[dict[str, Any]] = []
    for name, function in case.contenders.items():
        for direction in case.directions:
            row: dict[str, Any] = {"operation": case.operation, "direction": direction, "contender": name}
            n_bytes, n_flops = case.forward
            if direction == "forward+backward":
                n_bytes, n_flops = n_bytes + case.backward[0], n_flops + case.backward[1]
            try:
                row |= time_call(make_call(function, case.inputs, direction), case.inputs[0].device, budget_s)
            except (RuntimeError, fastgpt_kernels.KernelUnavailableError) as error:
                rows.append(row | {"skipped": str(error).splitlines()[0]})
                continue
            floor_s = max(n_bytes / rates["bandwidth"], n_flops / rates["matrix_rate"])
            rows.append(row | {"bytes": n_bytes, "flops": n_flops, "share_of_floor": floor_s / row["median_s"]})
    return rows


def make_call(function: Callable[..., Any], inputs: tuple[Tensor, ...], direction: str) -> Callable[[], Any]:
    """One pass of a contender: "forward" without gradients, "backward" alone, or "forward+backward".

    "replay" is a forward pass in a CUDA graph, in which the steps of a generation run; on a CPU a forward pass.
    """
    if direction in ("forward", "replay"):
        call = torch.no_grad()(partial(function, *(x.detach() for x in inputs)))
        return _in_a_graph(call) if direction == "replay" and inputs[0].is_cuda else call
    leaves = [x for x in inputs if x.requires_grad]
    outputs = function(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    upstream = [torch.randn_like(y) if y.ndim else torch.ones_like(y) for y in outputs]
    if direction == "backward":
        return partial(torch.autograd.grad, outputs, leaves, upstream, retain_graph=True)
    del outputs  # and what they keep for their backward pass
    return lambda: torch.autograd.grad(function(*inputs), leaves, upstream if len(upstream) > 1 else upstream[0])


def _in_a_graph(call: Callable[[], Any]) -> Callable[[], None]:
    call()  # It compiles, and packs what it keeps.
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def time_call(call: Callable[[], Any], device: torch.device, budget_s: float) -> dict[str, Any]:
    """Median and quartiles in s, peak memory in bytes, of a call that takes about budget_s in all.

    On a GPU also the seconds in which the host launches it, which the others do not count.
    """
    call()
    peak_bytes, _ = machine.peak_growth(call, device)
    figures: dict[str, Any] = {"peak_bytes": peak_bytes}
    if device.type == "cuda":
        samples, figures["launch_s"] = machine.gpu_seconds(call, device, budget_s)
    else:
        samples = [machine.seconds(call, device) for _ in range(3)]
    low, median, high = quantiles(samples)
    return {"median_s": median, "quartiles_s": [low, high], **figures}
