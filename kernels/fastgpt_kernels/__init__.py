"""The operations GPT-2 is made of, as fused Triton kernels and as a torch reference.

Dimensions, in every docstring and comment of this package:

    B  batch            H  heads             F  hidden width of the MLP
    T  tokens           D  head size         V  vocabulary
    C  channels = H*D   N  rows = B*T

A product is a matrix product (GEMM), a program one instance of a Triton kernel, and the stream the residual stream.

Every operation has a folder in `operations`: `reference.py` is its formula in plain torch, which is the specification,
the parity reference and the path for CPUs; `kernels.py` holds its Triton kernels, `op.py` launches them, and `tiles.py`
chooses how. `op` has functions of the same name and signature as `reference`, and is imported on first use, so that
importing this package touches neither triton nor a GPU.
"""

import importlib
from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor

from . import operations, reference
from .common.chip import architecture

OPERATIONS = ("layer_norm", "add_layer_norm", "causal_attention", "gelu_mlp", "linear_cross_entropy")

# The folder of `operations` whose `op` launches the Triton kernels of an operation, and says with `supports` which
# tensors they take.
KERNEL_MODULES = {
    "layer_norm": "layer_norm",
    "add_layer_norm": "layer_norm",
    "causal_attention": "attention",
    "gelu_mlp": "gelu_mlp",
    "linear_cross_entropy": "linear_cross_entropy",
}


class KernelUnavailableError(RuntimeError):
    """A Triton kernel was asked for by name and cannot run here; the message says why."""


def kernel(operation: str) -> Callable:
    """The Triton implementation of one of `OPERATIONS`.

    Raises KernelUnavailableError where triton is not installed or the operation has no kernel.
    """
    return getattr(_module(operation), operation)


def supports(operation: str, x: Tensor) -> bool:
    """Whether the kernel of an operation takes tensors of x's kind; raises as `kernel` does."""
    return _module(operation).supports(x)


def check_device(device: torch.device) -> None:
    """Raise KernelUnavailableError where no kernel runs on a device, with the cause and the cure.

    On a GPU the first call compiles and launches a tiny kernel, unless torch is capturing or tracing.
    """
    if device.type == "cuda":
        name = architecture(device)
        if name.startswith("sm_") and int(name[3:]) < 80:
            raise KernelUnavailableError(f"the Triton kernels need sm_80 or newer, and {device} is {name}")
        if fault := _fault(device):
            raise KernelUnavailableError(f"no Triton kernel runs on {device}: {fault}")
    elif device.type != "cpu" or not _interprets():
        raise KernelUnavailableError(
            f"the Triton kernels run on a GPU, not on {device.type}; on a CPU with TRITON_INTERPRET=1, slowly"
        )


def why_unavailable(operation: str, device: torch.device) -> str | None:
    """Why the kernel of an operation cannot run on a device: what `kernel` or `check_device` raise. None where it can.

    An answer and not an error, because torch.compile cannot catch what a constant of its trace raises.
    """
    try:
        kernel(operation)
        check_device(device)
    except KernelUnavailableError as error:
        return str(error)
    return None


def _fault(device: torch.device) -> str | None:
    from .common import probe  # It imports triton, which need not be installed.

    return probe.fault(device)


def _interprets() -> bool:
    try:
        return importlib.import_module("triton.knobs").runtime.interpret
    except ModuleNotFoundError:
        return False


def _module(operation: str) -> ModuleType:
    _import_module(operation)
    # Not from sys.modules, of which torch.compile, while it traces, has a copy from before the import.
    return _folder(operation).op


def _folder(operation: str) -> ModuleType:
    return getattr(operations, KERNEL_MODULES[operation])


def _import_module(operation: str) -> None:
    """Import the module of an operation's kernel."""
    if operation not in OPERATIONS:
        raise ValueError(f"unknown operation {operation!r}: choose one of {', '.join(OPERATIONS)}")
    if operation not in KERNEL_MODULES:
        raise KernelUnavailableError(f"{operation}: this version has no Triton kernel for it")
    folder = _folder(operation)
    if hasattr(folder, "op"):  # At every call of an operation: importlib takes ten times as long to find it.
        return
    try:
        importlib.import_module(f"{folder.__name__}.op")
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != "triton":
            raise
        raise KernelUnavailableError(
            f"{operation}: triton is not installed (pip install triton; Linux only, so under Windows use WSL)"
        ) from error


# What these return holds for the whole process: torch.compile, which cannot trace them, takes it as a constant. This is
# the mark that `torch.compiler.assume_constant_result` sets; calling that would import the whole compiler.
for _function in (why_unavailable, _import_module):
    setattr(_function, "_dynamo_marked_constant", True)  # noqa: B010


def __getattr__(name: str) -> Callable:
    if name in OPERATIONS:
        return kernel(name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "KERNEL_MODULES",
    "OPERATIONS",
    "KernelUnavailableError",
    "check_device",
    "kernel",
    "reference",
    "supports",
    "why_unavailable",
]
