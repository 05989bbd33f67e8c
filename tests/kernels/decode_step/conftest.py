"""What tests of the decode step run with."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture
def without_gradients(on_the_device: None) -> Iterator[None]:
    """New tensors lie where the kernels run, and no gradients are recorded."""
    with torch.inference_mode():
        yield
