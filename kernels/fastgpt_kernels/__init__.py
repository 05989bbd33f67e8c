"""The operations GPT-2 is made of, as fused Triton kernels and as a torch reference.

Dimensions, in every docstring and comment of this package:

    B  batch            H  heads             F  hidden width of the MLP
    T  tokens           D  head size         V  vocabulary
    C  channels = H*D   N  rows = B*T

`reference` holds each operation in plain torch: the specification, the parity reference and the path for CPUs.
The Triton kernel of an operation has the same name and signature and is imported on first use, so that importing
this package touches neither triton nor a GPU.
"""

import importlib
import importlib.util
from collections.abc import Callable

from . import reference

OPERATIONS = ("layer_norm", "add_layer_norm", "causal_attention", "gelu_mlp", "linear_cross_entropy")

# The module that holds the Triton kernel of an operation.
KERNEL_MODULES: dict[str, str] = {}


class KernelUnavailableError(RuntimeError):
    """A Triton kernel was asked for by name and cannot run here; the message says why."""


def kernel(operation: str) -> Callable:
    """The Triton implementation of one of `OPERATIONS`.

    Raises KernelUnavailableError where triton is not installed or the operation has no kernel.
    """
    if operation not in OPERATIONS:
        raise ValueError(f"unknown operation {operation!r}: choose one of {', '.join(OPERATIONS)}")
    if importlib.util.find_spec("triton") is None:
        raise KernelUnavailableError(f"{operation}: triton is not installed (pip install triton, Linux only)")
    if operation not in KERNEL_MODULES:
        raise KernelUnavailableError(f"{operation}: this version has no Triton kernel for it")
    return getattr(importlib.import_module(f".{KERNEL_MODULES[operation]}", __name__), operation)


def __getattr__(name: str) -> Callable:
    if name in OPERATIONS:
        return kernel(name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = ["KERNEL_MODULES", "OPERATIONS", "KernelUnavailableError", "kernel", "reference"]
