"""The releases of triton with which these hooks were tried, and where they differ."""

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
from triton.runtime import interpreter

TRIED = ("3.6.0", "3.7.1", "3.8.0", "3.9.0")


def _numbers(version: str) -> tuple[int, ...]:
    """3.10.0 and 3.10.0+gitabcdef give (3, 10, 0)."""
    return tuple(map(int, re.findall(r"\d+", version.partition("+")[0])[:3]))


def _was_tried(version: str) -> bool:
    return version.partition("+")[0] in TRIED


def check(version: str) -> None:
    """Warn about a release with which the hooks were not tried; test_interpreter.py shows whether they work."""
    if not _was_tried(version):
        warnings.warn(
            f"tests/interpreter was tried with triton {', '.join(TRIED)}, not {version}: run "
            "tests/interpreter/test_interpreter.py first; where it fails, compare "
            "triton/runtime/interpreter.py with what the package replaces",
            stacklevel=2,
        )


@contextmanager
def skipping_what_is_unknown(version: str) -> Iterator[None]:
    """Skip the importing test module if an untried release lacks a function that the hooks replace."""
    try:
        yield
    except (ImportError, AttributeError) as error:
        if _was_tried(version):
            raise
        pytest.skip(f"triton {version} is not known to tests/interpreter: {error}", allow_module_level=True)


def mend(version: str) -> None:
    """Give tensors of releases before 3.7 the `__index__` that later ones have."""
    if _numbers(version) >= (3, 7):
        return
    patch = interpreter._patch_lang_tensor

    def patch_with_index(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        # The data is an array with one element, which numpy 2.4 does not convert to int.
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    mock.patch.object(interpreter, "_patch_lang_tensor", patch_with_index).start()
