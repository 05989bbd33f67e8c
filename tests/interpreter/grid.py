"""Choose which programs of a grid run, and in which order."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np
from triton.runtime import interpreter
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder, TensorHandle

from .memory import check_overflow


@contextmanager
def dry_run() -> Iterator[None]:
    """Run only the first and last program of each axis; loads give zero, stores do nothing, overflow raises.

    Pointers are not followed, so a launch may claim sizes that its tensors do not have.
    """
    set_index, set_extents = InterpreterBuilder.set_grid_idx, InterpreterBuilder.set_grid_dim
    launch = GridExecutor.__call__

    def load_zeros(_: InterpreterBuilder, pointers: TensorHandle, *__: Any, **___: Any) -> TensorHandle:
        dtype = pointers.get_element_ty()
        return TensorHandle(np.zeros(pointers.data.shape, dtype=interpreter._get_np_dtype(dtype)), dtype)

    def store_nothing(*_: Any, **__: Any) -> None:
        pass

    def launch_corners(executor: Any, *args: Any, **kwargs: Any) -> None:
        grid = executor.grid
        if not isinstance(grid, tuple):
            grid = grid(kwargs)
        extents = (*grid, 1, 1)[:3]
        executor.grid = tuple(min(2, extent) for extent in extents)

        def set_corner(builder: InterpreterBuilder, *index: int) -> None:
            set_index(builder, *(extent - 1 if i else 0 for i, extent in zip(index, extents, strict=True)))

        def set_full_extents(builder: InterpreterBuilder, *_: int) -> None:
            set_extents(builder, *extents)

        with mock.patch.multiple(InterpreterBuilder, set_grid_idx=set_corner, set_grid_dim=set_full_extents):
            launch(executor, *args, **kwargs)

    no_memory = mock.patch.multiple(
        InterpreterBuilder, create_masked_load=load_zeros, create_masked_store=store_nothing
    )
    with no_memory, mock.patch.object(GridExecutor, "__call__", launch_corners), check_overflow():
        yield


@contextmanager
def shuffled_grid(seed: int) -> Iterator[list[int]]:
    """Run the programs of every launch in a random order. It does not show races within one program.

    Gives a list that grows by the number of programs of each launch.
    """
    set_index, set_extents = InterpreterBuilder.set_grid_idx, InterpreterBuilder.set_grid_dim
    order: list[tuple[int, int, int]] = []
    launched: list[int] = []

    def draw_order(builder: InterpreterBuilder, x: int, y: int, z: int) -> None:
        order[:] = [(i, j, k) for i in range(x) for j in range(y) for k in range(z)]
        launched.append(len(order))
        random.Random(seed).shuffle(order)
        set_extents(builder, x, y, z)

    def set_next(builder: InterpreterBuilder, *_: int) -> None:
        set_index(builder, *order.pop())

    with mock.patch.multiple(InterpreterBuilder, set_grid_dim=draw_order, set_grid_idx=set_next):
        yield launched
