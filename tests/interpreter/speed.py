"""Do once per launch what the interpreter repeats for every call of a device function."""

from types import FunctionType
from typing import Any
from unittest import mock

from triton.runtime import interpreter
from triton.runtime.interpreter import GridExecutor


def patch_once() -> None:
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
