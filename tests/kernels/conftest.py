"""What tests of kernels run with."""

import sys
from collections.abc import Iterator
from types import ModuleType

import fastgpt_kernels
import pytest
import torch


@pytest.fixture(autouse=True)
def _unwritten_elements_show() -> Iterator[None]:
    """New memory holds NaN, or the largest integer, so that a result shows an element that no kernel wrote.

    On a GPU torch.mm would be refused in this mode, and only warns here.
    """
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def _launches_are_chosen_anew() -> None:
    """A test may replace the launch configuration that an earlier one read."""
    if launch := sys.modules.get("fastgpt_kernels.common.launch"):
        launch.forget_plans()


@pytest.fixture
def on_the_device() -> Iterator[None]:
    """New tensors lie where the kernels run."""
    with torch.device(pytest.importorskip("interpreter").DEVICE):
        yield


@pytest.fixture(params=["reference", "kernel"])
def operations(request: pytest.FixtureRequest) -> Iterator[ModuleType]:
    """The operations as torch references, then as kernels; new tensors are on the device where those run."""
    if request.param == "reference":
        module, device = fastgpt_kernels.reference, "cpu"
    else:
        module, device = fastgpt_kernels, pytest.importorskip("interpreter").DEVICE
    with torch.device(device):
        yield module
