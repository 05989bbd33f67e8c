"""A pytest plugin that runs every kernel of a test from its PTX.

    cd tests
    TRITON_CACHE_DIR=/tmp/ptx PYTHONPATH=.:../kernels:.. pytest -p ptx.plugin -k "not [reference" kernels/layer_norm

Tests that need the CPU interpreter are skipped. A fault that the checks notice fails a test like a wrong result.
PTX_ARCH: sm_90 by default. PTX_WARPS: a seed; runs warps one by one in random order.
"""

import os

os.environ["TRITON_INTERPRET"] = "0"

from collections.abc import Iterator

import interpreter
import pytest

from .launch import executing

_OPTIONS = {"warps": True, "seed": int(os.environ["PTX_WARPS"])} if "PTX_WARPS" in os.environ else {}


def pytest_configure(config: pytest.Config) -> None:
    interpreter.DEVICE, interpreter.INTERPRETING = "cpu", False


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    with executing(os.environ.get("PTX_ARCH", "sm_90"), **_OPTIONS) as session:
        result = yield
    assert not session.problems(), session.summary()
    return result
