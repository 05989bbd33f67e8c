"""Settings that must be in place before torch and transformers are imported by a test."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import accuracy_table
import fuzz  # noqa: F401 - registers the profiles
import pytest
import torch
from hypothesis import settings

# Without a GPU, Triton kernels run in the CPU interpreter, which is chosen when triton is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Interleaved small operations of several test processes gain nothing from more threads.
torch.set_num_threads(1)

settings.load_profile("quick")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--mutants", action="store_true", help="also try the tests on kernels with deliberate mistakes")
    parser.addoption("--accuracy-table", action="store_true", help="end with the worst error of each operation")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--accuracy-table"):
        config.pluginmanager.register(accuracy_table)
    config.addinivalue_line("markers", "mutants: runs other tests on a kernel with a mistake; asked for by --mutants")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--mutants"):
        unwanted = [item for item in items if item.get_closest_marker("mutants")]
        items[:] = [item for item in items if item not in unwanted]
        config.hook.pytest_deselected(items=unwanted)
