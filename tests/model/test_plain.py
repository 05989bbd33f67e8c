"""What is read directly is what its constructor made: every other model gives transformers' answers."""

import os
import re
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from threading import Event, Thread, current_thread
from typing import Any

import pytest
import torch
from changes import CHANGES
from fuzz import cases
from hypothesis import example, given
from hypothesis import strategies as st
from models import assert_same_within_rounding, lively, tiny_config, token_ids
from torch import Tensor
from transformers import GPT2LMHeadModel

import fastgpt
from fastgpt.model import plain

# What transformers' own classes give and ours, in every way in which they are used.
PADDED = torch.ones(2, 7, dtype=torch.long).index_fill(1, torch.tensor([0]), 0)
PADDED[0, 0] = 1
GREEDY: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}


def stock() -> Any:
    torch.manual_seed(0)
    return lively(GPT2LMHeadModel(tiny_config())).eval()


def answers(model: Any) -> dict[str, Any]:
    """Logits, tokens and the training loss; an error in place of what cannot be had."""
    ids = token_ids(2, 7, 131)

    def loss() -> Tensor:
        torch.manual_seed(1)
        return model.train()(ids, labels=ids).loss.detach()

    def sampled() -> Any:
        torch.manual_seed(2)
        return model.generate(ids, **GREEDY | {"do_sample": True}).tolist()

    ways = {
        "logits": lambda: model(ids).logits.detach(),
        "padded logits": lambda: model(ids, attention_mask=PADDED).logits.detach()[:, 1:],
        "greedy": lambda: model.generate(ids, **GREEDY).tolist(),
        "padded greedy": lambda: model.generate(ids, attention_mask=PADDED, **GREEDY).tolist(),
        "sampled": sampled,
        "beams": lambda: model.generate(ids, num_beams=2, **GREEDY).tolist(),
        "lookup": lambda: model.generate(ids[:1], prompt_lookup_num_tokens=3, **GREEDY).tolist(),
        "loss": loss,
    }
    found: dict[str, Any] = {}
    for way, answer in ways.items():
        try:
            found[way] = answer()
        except Exception as error:
            found[way] = error
        model.eval()
    return found


def assert_same_answers(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    for way, expected in theirs.items():
        answer = ours[way]
        if isinstance(expected, Exception):
            is_theirs = (type(answer), str(answer)) == (type(expected), str(expected))
            names_the_cause = isinstance(answer, ValueError) and re.search(r"-?\d+ is outside the ", str(answer))
            assert is_theirs or names_the_cause, (way, answer, expected)
        elif isinstance(expected, Tensor):
            assert isinstance(answer, Tensor), (way, answer)
            assert_same_within_rounding(answer, expected, n_ulps=512)
        else:
            assert answer == expected, way


def has_layer_0(model: Any) -> bool:
    return any(getattr(part, "layer_idx", None) == 0 for part in model.transformer.h.modules())


def compare(before: list[str], after: list[str], used_first: bool = True) -> list[str]:
    """The same changes to both: some before ours is patched, and some to a model that has generated already.

    Returns the changes that could not be made, which are the same for both.
    """
    found, impossible = [], []
    for is_ours in (False, True):
        model = stock()
        with ExitStack() as stack:
            impossible.append(changed(model, before, stack))
            if is_ours:
                fastgpt.patch(model)
            if used_first:
                answers(model)
            impossible[-1] += changed(model, after, stack)
            found.append(answers(model))
    assert impossible[1] == impossible[0]
    if has_layer_0(model):  # Without one, transformers' answers mean nothing: docs/differences.md.
        assert_same_answers(found[1], found[0])
    return impossible[0]


def changed(model: Any, names: list[str], stack: ExitStack) -> list[str]:
    """Make the changes. Returns the names of those whose layer another one has removed."""
    impossible = []
    for name in names:
        try:
            CHANGES[name](model, stack)
        except (AttributeError, IndexError):
            impossible.append(name)
    return impossible


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("when", ["before patch", "after generate"])
def test_a_changed_model_gives_the_answers_of_transformers(name: str, when: str) -> None:
    names = ([name], []) if when == "before patch" else ([], [name])
    assert compare(*names, used_first=when != "before patch") == []


def test_masks_without_a_layer_0() -> None:
    """transformers makes the masks of later tokens for the cache of layer 0, which stays empty."""
    model = stock()
    with ExitStack() as stack:
        assert changed(model, ["blocks reordered", "a block replaced"], stack) == []
        assert not has_layer_0(model)
        expected = answers(model)
        ours = answers(fastgpt.patch(model))
    assert ours["greedy"] == expected["greedy"]  # of one row, in which nothing is hidden
    with pytest.raises(ValueError, match=r"key_padding_mask must be bool of shape \(2, 8\), not .* of shape \(2, 1\)"):
        raise ours["padded greedy"]
    assert ours["lookup"] != expected["lookup"]
    assert ours["lookup"] == [row[: len(ours["lookup"][0])] for row in ours["greedy"][:1]]


@given(
    before=st.lists(st.sampled_from(sorted(CHANGES)), max_size=2),
    after=st.lists(st.sampled_from(sorted(CHANGES)), max_size=3),
)
@example(before=[], after=["_update_model_kwargs_for_generation"] * 3)  # a position of -1
@example(before=[], after=["a layer removed", "ln_2.eps"])
@example(before=[], after=["GPT2Attention.forward", "attn.is_causal = False"])
@example(before=[], after=["blocks reordered", "a block replaced"])  # no layer 0
@cases(25)  # each runs two models in eight ways
def test_random_chains_of_changes(before: list[str], after: list[str]) -> None:
    compare(before, after, used_first=False)


INSTRUMENT = """
from functools import wraps
from torch import nn

calls = []
original = nn.{kind}.forward

@wraps(original)
def forward(self, *args, **kwargs):
    calls.append(type(self))
    return original(self, *args, **kwargs)

nn.{kind}.forward = forward
"""
GENERATE = """
import instrument
import fastgpt
from models import tiny_config, token_ids

model = fastgpt.GPT2LMHeadModel(tiny_config()).eval()
model.generate(token_ids(1, 5, 131), max_new_tokens=4, do_sample=False, eos_token_id=None)
assert len(instrument.calls) >= 4, instrument.calls
"""


@pytest.mark.parametrize("kind", ["Linear", "Dropout"])
def test_a_class_that_was_patched_before_the_import(kind: str, tmp_path: Path) -> None:
    """Instrumentation that another package has put on a class runs for every token, whenever it was put there."""
    (tmp_path / "instrument.py").write_text(INSTRUMENT.format(kind=kind))
    path = os.pathsep.join([str(tmp_path), str(Path(__file__).parents[1]), *filter(None, sys.path)])
    environment = os.environ | {"PYTHONPATH": path}
    done = subprocess.run(
        [sys.executable, "-c", GENERATE], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr


def test_bug_the_first_torch_compile_of_a_process_stopped_the_engine() -> None:
    """Dynamo wraps the functions that make modules; modules do the same as before."""
    torch.compile(torch.nn.ReLU(), backend="eager")(torch.ones(2))
    assert torch.nn.Module.__setstate__.__module__ == "torch._dynamo.mutation_guard"
    assert not list(plain.changes_of_class(type(fastgpt.GPT2LMHeadModel(tiny_config()))))


def test_bug_two_threads_in_a_model_whose_blocks_share_a_layer() -> None:
    """The second begins while the first runs, and ends after it: neither changes the attention of the other."""
    found, inside, first_ended = {}, Event(), Event()
    with ExitStack() as stack, torch.no_grad():
        theirs, ours = stock(), fastgpt.patch(stock())
        for model in (theirs, ours):
            CHANGES["a block used twice"](model, stack)
        ids = token_ids(2, 7, 131)
        expected = theirs(ids).logits

        def run(name: str) -> None:
            with torch.no_grad():
                found[name] = ours(ids).logits

        def meet(*_: Any) -> None:
            if current_thread() is second:
                inside.set()
                first_ended.wait(1)
            elif not second.is_alive() and not inside.is_set():
                second.start()
                inside.wait(0.2)

        second = Thread(target=run, args=["second"])
        ours.transformer.wpe.register_forward_hook(meet)
        run("first")
        first_ended.set()
        second.join()
    for logits in found.values():
        assert_same_within_rounding(logits, expected, n_ulps=512)
    assert len(found) == 2
