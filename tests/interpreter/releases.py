"""Where the releases of triton differ, and which of them these hooks were tried with."""

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
    """Of 3.10.0 and of 3.10.0+gitabcdef: (3, 10, 0)."""
    return tuple(map(int, re.findall(r"\d+", version.partition("+")[0])[:3]))


def _was_tried(version: str) -> bool:
    return version.partition("+")[0] in TRIED


def check(version: str) -> None:
    """Warn of a release whose interpreter these hooks have not met; test_interpreter.py says whether they hold."""
    if not _was_tried(version):
        warnings.warn(
            f"tests/interpreter was tried with triton {', '.join(TRIED)}, not {version}: run "
            "tests/interpreter/test_interpreter.py first; where it fails, compare "
            "triton/runtime/interpreter.py with what the package replaces",
            stacklevel=2,
        )


@contextmanager
def skipping_what_is_unknown(version: str) -> Iterator[None]:
    """Skip the test module that imports the hooks where a release that was not tried lacks what they replace."""
    try:
        yield
    except (ImportError, AttributeError) as error:
        if _was_tried(version):
            raise
        pytest.skip(f"triton {version} is not known to tests/interpreter: {error}", allow_module_level=True)


def mend(version: str) -> None:
    """Make a release count as the later ones do."""
    if _numbers(version) >= (3, 7):
        return
    patch = interpreter._patch_lang_tensor

    def patch_with_index(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        # Of an array with one element, of which numpy 2.4 makes no int.
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    mock.patch.object(interpreter, "_patch_lang_tensor", patch_with_index).start()
