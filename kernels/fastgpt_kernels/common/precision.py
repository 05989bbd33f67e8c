"""How products are computed: torch's settings for its own products hold for the kernels' too."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor

from .chip import architecture


def tf32_is_allowed() -> bool:
    """Whether torch may round the operands of float32 products to tf32.

    torch.set_float32_matmul_precision documents "high" and "medium" as TensorFloat32 on CUDA. Its getter and
    `allow_tf32` raise where `fp32_precision` was set instead, while `fp32_precision` follows them.
    """
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype to which autocast casts x in a product. None where it is off, and for float64, which it leaves alone.

    The meta device has no autocast, and torch raises there.
    """
    device_type = x.device.type
    if device_type == "meta" or not torch.is_autocast_enabled(device_type) or x.dtype == torch.float64:
        return None
    return torch.get_autocast_dtype(device_type)


def as_autocast(x: Tensor) -> Tensor:
    """x as a product reads it under autocast."""
    dtype = autocast_dtype(x)
    return x if dtype is None else x.to(dtype)


def autocast(device: torch.device, dtype: torch.dtype | None) -> AbstractContextManager:
    """A context in which autocast on a device casts to a dtype, or is off."""
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, dtype, enabled=dtype is not None)


@contextmanager
def float32_products(*, tf32: bool) -> Iterator[None]:
    """Allow torch to round float32 to tf32 inside the block, or forbid it."""
    names = {True: "high", False: "highest"}
    before = tf32_is_allowed()
    torch.set_float32_matmul_precision(names[tf32])
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(names[before])


def product_precision(x: Tensor) -> str:
    """The `input_precision` of products of x in a kernel: "tf32" or, in all dtypes but float32, "ieee".

    Not tf32 on AMD, because only some of those GPUs have it.
    """
    may_round = x.dtype == torch.float32 and not architecture(x.device).startswith("gfx")
    return "tf32" if may_round and tf32_is_allowed() else "ieee"
