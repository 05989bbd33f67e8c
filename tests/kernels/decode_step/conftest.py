"""What tests of the decode step run with."""

from collections.abc import Iterator

import interpreter
import pytest
import torch


@pytest.fixture
def on_the_device() -> Iterator[None]:
    """New tensors lie where the kernels run, and no gradients are recorded."""
    with torch.device(interpreter.DEVICE), torch.inference_mode():
        yield
