"""torch's defaults, which scripts set for their own tensors, change neither tokens nor losses."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from models import token_ids
from small_models import prompt, small_pair
from torch import Tensor

import fastgpt
from fastgpt.generate import implementations, products
from fastgpt.model import digits

GREEDY = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}


@contextmanager
def default_device() -> Iterator[None]:
    """Tensors that name no device hold nothing, as on a machine with a GPU they would be on the GPU."""
    torch.set_default_device("meta")
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


def of_a_list(model: Any, ids: Tensor, **call: Any) -> Tensor:
    return model.generate([[5, 3], ids[0]], **call)


def of_a_stream(model: Any, ids: Tensor, **call: Any) -> Tensor:
    return torch.stack(list(model.stream(ids, **call)), 1)


def in_int8(model: Any, ids: Tensor, **call: Any) -> Tensor:
    return fastgpt.quantize(model, head=True).generate(ids, **call)


def in_int4(model: Any, ids: Tensor, **call: Any) -> Tensor:
    return fastgpt.quantize(model, bits=4, head=True).generate(ids, **call)


def after_warmup(model: Any, ids: Tensor, **call: Any) -> Tensor:
    fastgpt.warmup(model, prompt_tokens=5)
    return model.generate(ids, **call)


CALLS: dict[str, Callable[..., Tensor]] = {
    "padded": lambda model, ids, **call: model.generate(ids, attention_mask=(ids != ids[0, 0]).long(), **call),
    "sampled": lambda model, ids, **call: model.generate(ids, **call | {"do_sample": True, "top_k": 9}, seed=5),
    "lookup": lambda model, ids, **call: model.generate(ids, **call, prompt_lookup_num_tokens=3),
    "list": of_a_list,
    "stream": of_a_stream,
    "int8": in_int8,
    "int4": in_int4,
    "warmup": after_warmup,
}


@pytest.fixture
def in_a_new_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Products are timed, and the processor is asked what it can do, under the defaults of the test."""
    monkeypatch.setattr(products, "_measured", {})
    known = digits.is_exact, products.is_slow, implementations.multiplies_int4
    for function in known:
        function.cache_clear()
    yield
    for function in known:
        function.cache_clear()


@pytest.mark.parametrize("name", CALLS)
def test_tokens(name: str, backend: str, in_a_new_process: None) -> None:
    ids, ours = prompt(), small_pair()[1]
    # On a CPU so many that products are timed.
    call = GREEDY | {"max_new_tokens": products.MIN_STEPS + 1 if backend == "torch" else 4}
    with default_device():
        found = CALLS[name](ours, ids, **call)
    assert found.tolist() == CALLS[name](ours, ids, **call).tolist()


DEFAULTS = {
    "device": default_device,
    **{str(dtype): partial(default_dtype, dtype) for dtype in (torch.float64, torch.bfloat16)},
}


@pytest.mark.parametrize("name", DEFAULTS)
def test_losses_logits_and_tokens(name: str, backend: str, in_a_new_process: None) -> None:
    _, ours = small_pair(resid_pdrop=0.1, attn_pdrop=0.1, embd_pdrop=0.1)
    ids, found = token_ids(2, 9, 131), []
    for defaults in (nullcontext, DEFAULTS[name]):
        torch.manual_seed(3)
        ours.zero_grad()
        with defaults():
            loss = ours.train()(ids, labels=ids).loss
            loss.backward()
            logits = ours.eval()(ids).logits
            tokens = ours.generate(ids, **GREEDY, max_new_tokens=3)
        found.append((loss, logits, tokens, *(parameter.grad for parameter in ours.parameters())))
    for expected, under_defaults in zip(*found, strict=True):
        assert under_defaults.dtype == expected.dtype
        assert torch.equal(under_defaults, expected)


@pytest.mark.parametrize("has_labels", [True, False])
def test_gradients_enabled_in_inference_mode(has_labels: bool, backend: str) -> None:
    """Nothing is recorded there, and what would be saved for a backward pass cannot be."""
    theirs, ours = small_pair()
    ids = token_ids(2, 9, 131)
    inputs = {"labels": ids} if has_labels else {}
    for model in (theirs, ours):
        model.train() if has_labels else model.eval()
    with torch.inference_mode(), torch.enable_grad():
        expected, found = (model(ids, **inputs) for model in (theirs, ours))
    torch.testing.assert_close(found.logits, expected.logits)
    assert not found.logits.requires_grad
    if has_labels:
        torch.testing.assert_close(found.loss, expected.loss)
