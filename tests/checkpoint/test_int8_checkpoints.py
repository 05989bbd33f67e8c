"""Checkpoints with int8 weights: loaded bitwise, by transformers too if fastgpt is imported, else refused."""

import json
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from checkpoints import rewrite
from models import HEADS, pair, tiny_config
from torch import Tensor
from transformers.quantizers import auto

import fastgpt
from fastgpt.model.int8 import Int8Linear
from fastgpt.verify import verify_checkpoint


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(
        left[name].dtype == right[name].dtype and torch.equal(left[name], right[name]) for name in left
    )


@pytest.mark.parametrize(
    ("head", "int8_head"),
    [*product(HEADS, [False]), ("GPT2LMHeadModel", True), ("GPT2DoubleHeadsModel", True)],
)
def test_a_saved_model_is_loaded_bitwise(head: str, int8_head: bool, tmp_path: Path) -> None:
    ours = fastgpt.quantize(pair(tiny_config(), head)[1], head=int8_head, activations=int8_head)
    ours.save_pretrained(tmp_path)
    for family in (fastgpt, transformers):
        again = getattr(family, head).from_pretrained(tmp_path)
        assert type(again) is getattr(family, head)
        assert same(again.state_dict(), ours.state_dict())
        assert {part.rounds_input for part in again.modules() if isinstance(part, Int8Linear)} == {int8_head}
    in_bfloat16 = getattr(fastgpt, head).from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert same(in_bfloat16.state_dict(), ours.to(torch.bfloat16).state_dict())
    assert verify_checkpoint(tmp_path).problems == []


def test_transformers_alone_refuses_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a process that did not import fastgpt: no noise is loaded."""
    fastgpt.quantize(pair(tiny_config())[1]).save_pretrained(tmp_path)
    for table in (auto.AUTO_QUANTIZATION_CONFIG_MAPPING, auto.AUTO_QUANTIZER_MAPPING):
        monkeypatch.delitem(table, "fastgpt_int8")
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        transformers.GPT2LMHeadModel.from_pretrained(tmp_path)


def as_floats(tensors: dict[str, Tensor]) -> None:
    tensors["transformer.h.1.mlp.c_fc.weight"] = tensors["transformer.h.1.mlp.c_fc.weight"].float()


def without_scale(tensors: dict[str, Tensor]) -> None:
    del tensors["transformer.h.1.mlp.c_fc.scale"]


def transposed(tensors: dict[str, Tensor]) -> None:
    name = "transformer.h.1.mlp.c_fc.weight"
    tensors[name] = tensors[name].t().contiguous()


def without_head_scale(tensors: dict[str, Tensor]) -> None:
    del tensors["lm_head.scale"]


def without_head(tensors: dict[str, Tensor]) -> None:
    del tensors["lm_head.weight"], tensors["lm_head.scale"]


def float_head(tensors: dict[str, Tensor]) -> None:
    tensors["lm_head.weight"] = tensors["lm_head.weight"].float()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (as_floats, "holds F32, not int8"),
        (without_scale, "has no tensor 'h.1.mlp.c_fc.scale'"),
        (transposed, "has shape (64, 256), but the configuration asks for (256, 64)"),
        (without_head_scale, "has no tensor 'lm_head.scale'"),
        (without_head, "has no tensor 'lm_head.weight'"),
        (float_head, "holds F32, not int8"),
    ],
)
def test_a_damaged_checkpoint_is_told(change: Any, words: str, tmp_path: Path) -> None:
    fastgpt.quantize(pair(tiny_config())[1], head=True).save_pretrained(tmp_path)
    rewrite(tmp_path / "model.safetensors", change)
    assert any(words in problem for problem in verify_checkpoint(tmp_path).problems)
    with pytest.raises(ValueError, match=r"c_fc|lm_head"):
        fastgpt.GPT2LMHeadModel.from_pretrained(tmp_path)


def test_a_tied_int8_head_is_refused(tmp_path: Path) -> None:
    """transformers would put the token table in its place."""
    fastgpt.quantize(pair(tiny_config())[1], head=True).save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"tie_word_embeddings": True}))
    assert any("tie_word_embeddings must be false" in problem for problem in verify_checkpoint(tmp_path).problems)
    with pytest.raises(ValueError, match="tie_word_embeddings must be false"):
        fastgpt.GPT2LMHeadModel.from_pretrained(tmp_path)


def test_int8_weights_without_their_mark_are_refused(tmp_path: Path) -> None:
    fastgpt.quantize(pair(tiny_config())[1]).save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    fields = json.loads(file.read_text())
    del fields["quantization_config"]
    file.write_text(json.dumps(fields))
    with pytest.raises(ValueError, match="the configuration asks for"):
        fastgpt.GPT2LMHeadModel.from_pretrained(tmp_path)
