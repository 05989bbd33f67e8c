"""Spare the interpreter what it repeats, and what it computes and then drops."""

from collections.abc import Iterable
from types import FunctionType
from typing import Any
from unittest import mock

import numpy as np
from triton.language import core
from triton.runtime import interpreter
from triton.runtime.interpreter import GridExecutor, ReduceOps


def repeat_less() -> None:
    """Replace the slow parts of the interpreter for the rest of the process."""
    _patch_once()
    find, known = interpreter._get_np_dtype, {}

    def look_up(dtype: core.dtype) -> np.dtype:
        name = dtype.scalar.name
        return known[name] if name in known else known.setdefault(name, find(dtype))

    mock.patch.object(interpreter, "_get_np_dtype", look_up).start()
    make_type, made = core.block_type.__init__, {}

    def make_once(block: core.block_type, element: core.dtype, shape: Iterable[Any]) -> None:
        key = element.name, *(getattr(size, "value", size) for size in shape)
        if key not in made:
            make_type(block, element, list(shape))
            made[key] = dict(vars(block))
        vars(block).update(made[key])

    mock.patch.object(core.block_type, "__init__", make_once).start()
    mock.patch.object(ReduceOps, "generic_reduce", _reduce_in_pairs).start()
    # Without `check_overflow`, which turns both on, nobody sees whether an integer overflowed.
    object.__setattr__(interpreter.interpreter_builder.options, "sanitize_overflow", False)


def _reduce_in_pairs(operation: ReduceOps, inputs: tuple[core.tensor, ...]) -> list[core.tensor]:
    """`tl.reduce` with a function of the kernel: neighbours are combined, all at once, until one is left, as on a GPU.

    Triton's own calls the function once for every element.
    """
    values, axis = operation.unravel(inputs, operation.axis)
    dtypes = [value.dtype for value in values]
    arrays = [np.moveaxis(value.handle.data, axis, 0) for value in values]
    while (n := len(arrays[0])) > 1:
        halves = [
            [
                operation.to_tensor(array[start : n - n % 2 : 2], dtype)
                for array, dtype in zip(arrays, dtypes, strict=True)
            ]
            for start in (0, 1)
        ]
        combined = operation.combine_fn.fn(*halves[0], *halves[1])
        combined = combined if isinstance(combined, tuple | core.tuple) else (combined,)
        arrays = [
            np.concatenate([result.handle.data, array[n - n % 2 :]])
            for result, array in zip(combined, arrays, strict=True)
        ]
    results = [array[0] for array in arrays]
    if operation.keep_dims:
        n_kept = [axis] if operation.axis is not None else range(inputs[0].handle.data.ndim)
        results = [np.expand_dims(result, tuple(n_kept)) for result in results]
    return [operation.to_tensor(result, dtype) for result, dtype in zip(results, dtypes, strict=True)]


def _patch_once() -> None:
    """Replace triton's language in a module once per launch, at the first call into the module, and not at every call.

    The replacement lasts until the launch ends, so repeating it changes nothing.
    """
    patch, launch = interpreter._patch_lang, GridExecutor.__call__
    replaced: set[int] = set()

    def patch_for_a_module(function: FunctionType) -> Any:
        module = id(function.__globals__)
        if module in replaced:
            return None
        replaced.add(module)
        return patch(function)

    def launch_afresh(executor: GridExecutor, *args: Any, **kwargs: Any) -> None:
        replaced.clear()
        launch(executor, *args, **kwargs)

    mock.patch.object(interpreter, "_patch_lang", patch_for_a_module).start()
    mock.patch.object(GridExecutor, "__call__", launch_afresh).start()
