"""Bounds checks: interpreted pointers are host addresses, which are compared with the tensors of the launch."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np
import torch
from triton.runtime import interpreter
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder, TensorHandle

# Position of the mask among the arguments after the pointers; None if every lane is live.
ACCESSES = {"create_masked_load": 0, "create_masked_store": 1, "create_atomic_rmw": 1, "create_atomic_cas": None}


class OutOfBoundsError(IndexError):
    """The live lanes of a load, store or atomic do not all point into one tensor."""


def _address_range(tensor: torch.Tensor) -> tuple[int, int]:
    """The first address of a tensor that is not empty, and the address past its last element."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()


def watch() -> None:
    """For the rest of the process, raise if the live lanes of an access are not all in one tensor of the launch."""
    ranges: list[tuple[int, int]] = []
    arguments_of_launch = GridExecutor._init_args_hst

    def remember_tensors(executor: GridExecutor, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        args, kwargs = arguments_of_launch(executor, args, kwargs)
        tensors = [getattr(arg, "base", arg) for arg in (*args, *kwargs.values())]
        ranges[:] = [_address_range(x) for x in tensors if isinstance(x, torch.Tensor) and x.numel()]
        return args, kwargs

    def check(pointers: TensorHandle, mask: TensorHandle | None, access: str) -> None:
        addresses = pointers.data.ravel()
        if mask is not None:
            addresses = addresses[np.broadcast_to(mask.data, pointers.data.shape).ravel().astype(bool)]
        if addresses.size == 0:
            return
        n_bytes = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        first, end = int(addresses.min()), int(addresses.max()) + n_bytes
        if not any(low <= first and end <= high for low, high in ranges):
            raise OutOfBoundsError(f"{access}: {addresses.size} live lanes span {end - first} bytes, not in one tensor")

    def checked(name: str, mask_position: int | None) -> Callable:
        access = getattr(InterpreterBuilder, name)

        def checked_access(builder: InterpreterBuilder, *args: Any, **options: Any) -> Any:
            pointers, *rest = args[name == "create_atomic_rmw" :]
            check(pointers, None if mask_position is None else rest[mask_position], name)
            return access(builder, *args, **options)

        return checked_access

    for name, mask_position in ACCESSES.items():
        mock.patch.object(InterpreterBuilder, name, checked(name, mask_position)).start()
    mock.patch.object(GridExecutor, "_init_args_hst", remember_tensors).start()


@contextmanager
def check_overflow() -> Iterator[None]:
    """Index arithmetic that leaves int32 raises, and tl.device_assert fires."""
    options = interpreter.interpreter_builder.options
    names = ("debug", "sanitize_overflow")
    before = [getattr(options, name) for name in names]
    try:
        for name in names:
            object.__setattr__(options, name, True)
        yield
    finally:
        for name, value in zip(names, before, strict=True):
            object.__setattr__(options, name, value)
