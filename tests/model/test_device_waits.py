"""A forward on a GPU does not make the host wait for the device where no mask is given.

There need be no GPU: tensors say that they are on one, and whatever reads a value on the host is counted.
"""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from models import pair, tiny_config, token_ids
from torch.utils._python_dispatch import TorchDispatchMode

import fastgpt

READS = torch.ops.aten._local_scalar_dense, torch.ops.aten.equal, torch.ops.aten.nonzero


class CountReads(TorchDispatchMode):
    """Counts the operations that would wait for a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.overloadpacket in READS
        return func(*args, **kwargs or {})


@pytest.fixture(autouse=True)
def _as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def refuse(x: torch.Tensor) -> None:
        raise AssertionError("tolist() waits for the device")

    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda x: True), raising=False)
    monkeypatch.setattr(torch.Tensor, "tolist", refuse)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    with fastgpt.backend("torch"):
        yield


def reads(call: Callable[[], Any]) -> int:
    with CountReads() as mode:
        call()
    return mode.count


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("options", [{}, {"use_cache": False}, {"labels": True}], ids=["plain", "no cache", "labels"])
def test_bug_a_forward_waited_for_the_device_before_its_first_layer(training: bool, options: dict[str, Any]) -> None:
    _, ours = pair(tiny_config())
    ids = token_ids(2, 9, 131)
    inputs = {name: ids if name == "labels" else value for name, value in options.items()}
    assert reads(lambda: ours.train(training)(ids, **inputs)) == 0


def test_a_mask_is_looked_at_once_a_forward() -> None:
    """A mask that hides nothing is recognised, because attention without a mask is faster."""
    _, ours = pair(tiny_config(n_layer=3))
    ids = token_ids(2, 9, 131)
    assert reads(lambda: ours(ids, attention_mask=torch.ones_like(ids))) == 1


def test_transformers_own_forward_waits_so_that_waits_are_counted() -> None:
    theirs, _ = pair(tiny_config())
    assert reads(lambda: theirs(token_ids(2, 9, 131))) > 0


def test_generate_still_refuses_an_id_outside_the_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    _, ours = pair(tiny_config())
    ids = token_ids(1, 5, 131)
    ids[0, 2] = 131
    with pytest.raises(ValueError, match="token id 131 is outside the vocabulary"):
        ours.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=2, pad_token_id=0)


def test_a_sequence_past_the_context_is_refused_without_a_look_at_positions() -> None:
    _, ours = pair(tiny_config())
    with pytest.raises(ValueError, match="position 49 is outside the context: n_positions is 48"):
        ours(token_ids(1, 50, 131))
    ours(token_ids(1, 50, 131), position_ids=torch.arange(25).repeat(2)[None])


@pytest.mark.parametrize("training", [False, True])
def test_bug_a_forward_with_a_mask_could_not_be_captured(training: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor can a mask be read while a CUDA graph is captured; transformers leaves it unread then."""
    _, ours = pair(tiny_config())
    ids = token_ids(2, 9, 131)
    expected = ours.train(training)(ids).logits
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    found: list[Any] = []
    assert reads(lambda: found.append(ours(ids, attention_mask=torch.ones_like(ids)))) == 0
    torch.testing.assert_close(found[0].logits, expected)
