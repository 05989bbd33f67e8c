"""How products of float32 are computed: torch's setting for its own products on a GPU holds for the kernels' too."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from .chip import architecture


def tf32_is_allowed() -> bool:
    """Whether torch may round the operands of float32 products to tf32.

    torch.set_float32_matmul_precision documents "high" and "medium" as TensorFloat32 on CUDA. Its getter and
    `allow_tf32` raise where `fp32_precision` was set instead, while `fp32_precision` follows them.
    """
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


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
