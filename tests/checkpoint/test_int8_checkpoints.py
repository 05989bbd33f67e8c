"""Checkpoints with int8 or int4 weights: loaded bitwise, by transformers too if fastgpt is imported, else refused."""

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
from fastgpt.model.rounded import RoundedLinear
from fastgpt.verify import verify_checkpoint


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(
        left[name].dtype == right[name].dtype and torch.equal(left[name], right[name]) for name in left
    )


INT4: dict[str, Any] = {"bits": 4, "group_size": 32}


@pytest.mark.parametrize(
    ("head", "options"),
    [
        *product(HEADS, [{}]),
        *product(("GPT2LMHeadModel", "GPT2DoubleHeadsModel"), [{"head": True, "activations": True}]),
        ("GPT2ForSequenceClassification", INT4),
        ("GPT2LMHeadModel", INT4),
        ("GPT2LMHeadModel", INT4 | {"head": True}),
    ],
    ids=str,
)
def test_a_saved_model_is_loaded_bitwise(head: str, options: dict[str, Any], tmp_path: Path) -> None:
    ours = fastgpt.quantize(pair(tiny_config(), head)[1], **options)
    ours.save_pretrained(tmp_path)
    for family in (fastgpt, transformers):
        again = getattr(family, head).from_pretrained(tmp_path)
        assert type(again) is getattr(family, head)
        assert same(again.state_dict(), ours.state_dict())
        assert {part.rounds_input for part in again.modules() if isinstance(part, RoundedLinear)} == {
            options.get("activations", False)
        }
        assert fastgpt.quantize(again, **options) is again
    in_bfloat16 = getattr(fastgpt, head).from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert same(in_bfloat16.state_dict(), ours.to(torch.bfloat16).state_dict())
    assert verify_checkpoint(tmp_path).problems == []


@pytest.mark.parametrize("bits", [8, 4])
def test_transformers_alone_refuses_it(bits: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a process that did not import fastgpt: no noise is loaded."""
    fastgpt.quantize(pair(tiny_config())[1], bits=bits).save_pretrained(tmp_path)
    for table, kind in product((auto.AUTO_QUANTIZATION_CONFIG_MAPPING, auto.AUTO_QUANTIZER_MAPPING), ("int8", "int4")):
        monkeypatch.delitem(table, f"fastgpt_{kind}")
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


def signed(tensors: dict[str, Tensor]) -> None:
    tensors["transformer.h.1.mlp.c_fc.weight"] = tensors["transformer.h.1.mlp.c_fc.weight"].view(torch.int8)


def float_steps(tensors: dict[str, Tensor]) -> None:
    tensors["transformer.h.1.mlp.c_fc.steps"] = tensors["transformer.h.1.mlp.c_fc.steps"].float()


def of_larger_groups(tensors: dict[str, Tensor]) -> None:
    tensors["transformer.h.1.mlp.c_fc.steps"] = tensors["transformer.h.1.mlp.c_fc.steps"][:, ::2].contiguous()


def without_steps(tensors: dict[str, Tensor]) -> None:
    del tensors["transformer.h.1.mlp.c_fc.steps"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (as_floats, "holds F32, not pairs of int4"),
        (signed, "holds I8, not pairs of int4"),
        (float_steps, "holds F32, not int8"),
        (without_steps, "has no tensor 'h.1.mlp.c_fc.steps'"),
        (of_larger_groups, "has shape (256, 1), but the configuration asks for (256, 2)"),
        (without_head_scale, "has no tensor 'lm_head.scale'"),
    ],
)
def test_a_damaged_checkpoint_of_int4_weights_is_told(change: Any, words: str, tmp_path: Path) -> None:
    fastgpt.quantize(pair(tiny_config())[1], **INT4, head=True).save_pretrained(tmp_path)
    rewrite(tmp_path / "model.safetensors", change)
    assert any(words in problem for problem in verify_checkpoint(tmp_path).problems)
    with pytest.raises(ValueError, match=r"c_fc|lm_head"):
        fastgpt.GPT2LMHeadModel.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"group_size": 128}, "groups of 128 do not divide 64 inputs"),
        ({"group_size": 0}, "group_size must be one of 32, 64, 128, not 0"),
        ({"group_size": "32"}, "group_size must be one of 32, 64, 128, not '32'"),
        ({"group_size": 32.0}, "group_size must be one of 32, 64, 128, not 32.0"),
        ({"group_size": [32]}, "group_size must be one of 32, 64, 128, not"),
    ],
)
def test_groups_that_no_model_has_are_told(fields: dict[str, Any], words: str, tmp_path: Path) -> None:
    fastgpt.quantize(pair(tiny_config())[1], **INT4).save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    content = json.loads(file.read_text())
    content["quantization_config"] |= fields
    file.write_text(json.dumps(content))
    assert any(words in problem for problem in verify_checkpoint(tmp_path).problems)
    with pytest.raises(ValueError, match="group"):
        fastgpt.GPT2LMHeadModel.from_pretrained(tmp_path)


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


@pytest.mark.parametrize("bits", [8, 4])
def test_a_tied_rounded_head_is_refused(bits: int, tmp_path: Path) -> None:
    """transformers would put the token table in its place."""
    fastgpt.quantize(pair(tiny_config())[1], bits=bits, head=True).save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"tie_word_embeddings": True}))
    assert any("tie_word_embeddings must be false" in problem for problem in verify_checkpoint(tmp_path).problems)
    with pytest.raises(ValueError, match="tie_word_embeddings must be false"):
        fastgpt.GPT2LMHeadModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("bits", [8, 4])
def test_rounded_weights_without_their_mark_are_refused(bits: int, tmp_path: Path) -> None:
    fastgpt.quantize(pair(tiny_config())[1], bits=bits).save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    fields = json.loads(file.read_text())
    del fields["quantization_config"]
    file.write_text(json.dumps(fields))
    with pytest.raises(ValueError, match="the configuration asks for"):
        fastgpt.GPT2LMHeadModel.from_pretrained(tmp_path)
