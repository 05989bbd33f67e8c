"""The one place where a backend is chosen: Triton kernels or torch, for each operation and for generation."""

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import fastgpt_kernels
import torch
from fastgpt_kernels import KernelUnavailableError, reference
from fastgpt_kernels.common.precision import autocast_dtype
from fastgpt_kernels.operations.attention import packed
from fastgpt_kernels.operations.attention import reference as formula
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.autograd import forward_ad

import fastgpt.measured as measured

from .messages import shown

BACKENDS = ("auto", "torch", "triton")

# Checked on use and not on import, so that `fastgpt doctor` can still run and explain a wrong name.
_selected = os.environ.get("FASTGPT_BACKEND", "auto")


def _checked(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{source}: unknown backend {shown(name)}: choose one of {', '.join(BACKENDS)}")
    return name


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Run the operations inside the block on one backend.

    name: "torch" runs torch's own operations, "triton" the kernels (and raises where one cannot run), "auto" the
    kernels on a GPU where they can run and torch's elsewhere. The choice holds for the whole process, not for one
    thread.
    Raises ValueError on another name.
    """
    global _selected
    previous, _selected = _selected, _checked(name, "fastgpt.backend")
    try:
        yield
    finally:
        _selected = previous


def backend_setting() -> str:
    """The name that `backend` or the environment gave, which may be no backend."""
    return _selected


def selected_backend() -> str:
    """The backend in force: "auto", "torch" or "triton". Raises ValueError when the environment names another."""
    return _checked(_selected, "FASTGPT_BACKEND")


def explain(operation: str, device: torch.device | str, dtype: torch.dtype | None = None) -> tuple[str, str]:
    """Which backend `operation` takes for tensors on `device`, in the dtype in which it computes if given, and why.

    In auto mode, a kernel that was measured or is expected to be slower than torch does not run (`measured`). Tensors
    that the kernel does not support still go to the reference, and attention with dropout to its kernel in every
    dtype, because the reference holds all attention weights in memory.
    Returns ("triton" | "torch", reason). Raises KernelUnavailableError when a kernel was asked for by name and cannot
    run, ValueError when the environment names an unknown backend.
    """
    device = torch.device(device)
    if selected_backend() == "torch":
        return "torch", "asked for by name"
    if _selected == "auto" and device.type != "cuda":
        return "torch", f"no kernel runs on {device.type}"
    reason = fastgpt_kernels.why_unavailable(operation, device)
    if reason is not None:
        if _selected == "triton":
            raise KernelUnavailableError(reason)
        _warn_once(device, reason)
        return "torch", reason
    return ("triton", "asked for by name") if _selected == "triton" else measured.choice(operation, dtype, device)


def runs_kernels(device: torch.device | str) -> bool:
    """Whether generation on `device` runs on the Triton kernels. Raises as `explain` does."""
    # Without a dtype, one operation answers for all, because every one has a kernel.
    name, _ = explain("causal_attention", device)
    return name == "triton"


# Types of device that a warning was given for.
_warned: set[str] = set()


def _warn_once(device: torch.device, reason: str) -> None:
    """Warn that a GPU runs without kernels, the first time that it could have used one."""
    if device.type not in _warned:
        _warned.add(device.type)
        warnings.warn(f"fastgpt runs in torch and not on its Triton kernels: {reason}", stacklevel=4)


# As in fastgpt_kernels: torch.compile calls it while tracing instead of tracing it.
_warn_once._dynamo_marked_constant = True  # type: ignore[attr-defined]


def is_exporting() -> bool:
    """Whether torch.export traces this call. Under torch.compile torch 2.11's own function says so, too."""
    return getattr(torch.compiler, "_is_exporting_flag", torch.compiler.is_exporting())


def is_transformed() -> bool:
    """Whether only torch's own operations can run: an autograd.Function raises, or has no rule.

    Under torch.func, forward-mode differentiation, and gradients enabled in inference mode, which records nothing.
    """
    if torch.compiler.is_compiling():  # Dynamo traces them itself.
        return False
    records_in_vain = torch.is_grad_enabled() and torch.is_inference_mode_enabled()
    return records_in_vain or torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def implementation(operation: str, x: Tensor, *others: Tensor, has_dropout: bool = False) -> Callable:
    """The function that runs an operation on x now: a kernel's or the reference's.

    others: more inputs that the kernel must support.
    """
    if is_transformed():
        return getattr(reference, operation)
    needs_kernel = has_dropout and operation == "causal_attention"
    name, _ = explain(operation, x.device, None if needs_kernel else _computes_in(x))
    if name == "triton" and (_selected == "triton" or all(_is_supported(operation, one) for one in (x, *others))):
        return fastgpt_kernels.kernel(operation)
    return getattr(reference, operation)


def _computes_in(x: Tensor) -> torch.dtype:
    """The dtype of a product of x: under autocast not x's own."""
    return autocast_dtype(x) or x.dtype


def _is_supported(operation: str, x: Tensor) -> bool:
    """Kernels read memory directly, which would ignore what a subclass such as DTensor does with it."""
    return type(x) in (Tensor, nn.Parameter, FakeTensor) and fastgpt_kernels.supports(operation, x)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5, dtype: torch.dtype | None = None) -> Tensor:
    """See `fastgpt_kernels.reference.layer_norm`."""
    return implementation("layer_norm", x)(x, weight, bias, eps, dtype)


def add_layer_norm(
    x: Tensor | None,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-5,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """See `fastgpt_kernels.reference.add_layer_norm`."""
    inputs = (residual,) if x is None else (x, residual)
    chosen = implementation("add_layer_norm", *inputs)
    return chosen(x, residual, weight, bias, eps, dtype)


def split_heads(qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v, views (B, H, T, D) of the packed result (B, T, 3, H, D) of one product.

    The attention kernel writes their gradients where the backward of that product reads them.
    """
    has_backward = torch.is_grad_enabled() and not (torch.compiler.is_compiling() or is_transformed())
    if has_backward and implementation("causal_attention", qkv) is not reference.causal_attention:
        return packed.SplitHeads.apply(qkv)  # type: ignore[return-value]
    return formula.split_heads(qkv)


def causal_attention(q: Tensor, k: Tensor, v: Tensor, **options) -> Tensor:
    """See `fastgpt_kernels.reference.causal_attention`."""
    return implementation("causal_attention", q, has_dropout=options.get("dropout_p", 0.0) > 0.0)(q, k, v, **options)


def gelu_mlp(
    x: Tensor,
    fc_weight: Tensor,
    fc_bias: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor,
    activation: str = "gelu_new",
    **options,
) -> Tensor:
    """See `fastgpt_kernels.reference.gelu_mlp`."""
    weights = fc_weight, fc_bias, proj_weight, proj_bias
    return implementation("gelu_mlp", x)(x, *weights, activation, **options)


def linear_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor, **options) -> Tensor:
    """See `fastgpt_kernels.reference.linear_cross_entropy`."""
    return implementation("linear_cross_entropy", hidden)(hidden, weight, labels, **options)
