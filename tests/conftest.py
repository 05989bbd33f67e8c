"""Settings that must be made before a test imports torch and transformers."""

import os
from importlib.util import find_spec

os.environ["HF_HUB_OFFLINE"] = "1"
# Several test processes share the cores, and so do the commands that they start: a thread that waits for another, which
# has no core, takes one until it gets there.
os.environ["OMP_NUM_THREADS"] = "1"

import accuracy_table
import fuzz  # noqa: F401 - registers the profiles
import pytest
import torch
from hypothesis import settings

# Without a GPU, Triton kernels run in the CPU interpreter. triton reads this variable on import, and the interpreter is
# repaired for all tests, because some of them import no kernel and yet run one.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
if find_spec("triton") is not None:
    import interpreter  # noqa: F401

torch.set_num_threads(1)

settings.load_profile("quick")


# Tests that run only when the option with their marker's name is given.
ON_REQUEST = {
    "mutants": "also try the tests on kernels with deliberate mistakes",
    "faults": "try all faults of checkpoints, and 10,000 damaged configurations",
    "soak": "also run what takes minutes to show",
    "ptx": "also run every compiled form that ships on the CPU",
}


def pytest_addoption(parser: pytest.Parser) -> None:
    for name, what in ON_REQUEST.items():
        parser.addoption(f"--{name}", action="store_true", help=what)
    parser.addoption("--accuracy-table", action="store_true", help="end with the worst error of each operation")
    parser.addoption("--approximate", action="store_true", help="let special functions err as a GPU's may")


def pytest_configure(config: pytest.Config) -> None:
    # With -n, a process that has nothing left takes over tests of another, because slow ones at the end would keep it
    # waiting. Here and not among pytest's options, because pytest-benchmark times nothing where --dist is given.
    if config.getoption("dist", "no") == "load":
        config.option.dist = "worksteal"
    if config.getoption("--accuracy-table"):
        config.pluginmanager.register(accuracy_table)
    if config.getoption("--approximate"):
        pytest.importorskip("interpreter.approximations").apply()
    for name, what in ON_REQUEST.items():
        config.addinivalue_line("markers", f"{name}: {what}; asked for by --{name}")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    left_out = [name for name in ON_REQUEST if not config.getoption(f"--{name}")]
    unwanted = [item for item in items if any(map(item.get_closest_marker, left_out))]
    items[:] = [item for item in items if item not in unwanted]
    # What takes minutes goes first, because at the end one process would wait for another.
    items.sort(key=lambda item: item.path.name != "test_ptx.py")
    config.hook.pytest_deselected(items=unwanted)
