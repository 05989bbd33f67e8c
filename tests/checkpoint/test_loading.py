"""Loading: what must load loads bit for bit, and configurations and values that cannot be are refused in one line."""

import json
import os
import shutil
import subprocess
import sys

import peft
import pytest
import torch
import transformers
from checkpoints import KEY, load, refused, refused_within_a_second, rewrite, same_tensors
from models import HEADS, tiny_config
from safetensors.torch import load_file, save_model
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.utils import logging

import fastgpt
from fastgpt.checkpoint.fit import PREFIX, body_shapes, head_shapes, not_finite
from fastgpt.checkpoint.headers import CheckpointFileError

pytestmark = pytest.mark.usefixtures("nothing_global_changes")


# --- what loads -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"add_cross_attention": True, "n_inner": 50, "num_labels": 5},
        {"summary_proj_to_labels": False},
        {"summary_use_proj": False},
    ],
)
def test_shapes_are_those_of_the_model(head, changes):
    model = getattr(transformers, head)(tiny_config(**changes))
    actual = {name.removeprefix("transformer."): tuple(value.shape) for name, value in model.state_dict().items()}
    assert {**dict(body_shapes(model.config)), **head_shapes(head, model.config)} == actual


@pytest.mark.parametrize("head", HEADS)
def test_from_transformers_and_back_is_bitwise(head, tmp_path):
    torch.manual_seed(1)
    theirs = getattr(transformers, head)(tiny_config())
    theirs.save_pretrained(tmp_path / "theirs")
    ours, info = load(tmp_path / "theirs", head, output_loading_info=True)
    assert not any(info.values())
    assert not ours.training
    ours.save_pretrained(tmp_path / "ours")
    back = getattr(transformers, head).from_pretrained(tmp_path / "ours")
    assert same_tensors(theirs.state_dict(), ours.state_dict())
    assert same_tensors(theirs.state_dict(), back.state_dict())
    assert json.loads((tmp_path / "ours" / "config.json").read_text())["architectures"] == [head]


@pytest.mark.parametrize("head", HEADS)
def test_language_model_loads_into_every_head(head, pristine, language_model):
    model, info = load(pristine, head, output_loading_info=True)
    assert all(not name.startswith("transformer.") for name in info["missing_keys"])
    body = model if head == "GPT2Model" else model.transformer
    assert same_tensors(body.state_dict(), language_model.transformer.state_dict())


LOADS_AND_FORKS = """
import os, signal
import torch
import fastgpt

model, tokenizer = fastgpt.load_demo()
worker = os.fork()
if not worker:
    signal.alarm(30)
    model.generate(**tokenizer("ROMEO:", return_tensors="pt"), max_new_tokens=20)
    os._exit(0 if torch.get_num_threads() == 2 else 1)
_, status = os.waitpid(worker, 0)
raise SystemExit(status)
"""


def test_bug_a_process_forked_after_loading_never_answered():
    """A server loads a model and forks its workers, which torch allows until operations ran on several cores."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "2"}
    subprocess.run([sys.executable, "-c", LOADS_AND_FORKS], env=environment, check=True)


class OfAUser(fastgpt.GPT2LMHeadModel):
    """A class that the checks of headers do not know."""


@pytest.mark.parametrize("prefix", [PREFIX, ""])
@pytest.mark.parametrize("head", ["GPT2LMHeadModel", "GPT2DoubleHeadsModel", "OfAUser"])
def test_bug_the_tied_table_stored_as_the_head_alone_was_refused(head, prefix, saved, language_model):
    """`safetensors.torch.save_model` keeps the first name of a shared tensor, in alphabetical order."""
    save_model(language_model, str(saved / "model.safetensors"))
    assert "transformer.wte.weight" not in load_file(saved / "model.safetensors")
    rewrite(saved / "model.safetensors", lambda t: t.update({k.replace(PREFIX, prefix): t.pop(k) for k in [*t]}))
    model = OfAUser.from_pretrained(saved) if head == "OfAUser" else load(saved, head)
    assert model.lm_head.weight is model.transformer.wte.weight
    assert same_tensors(model.transformer.state_dict(), language_model.transformer.state_dict())


def test_the_head_alone_is_no_table_of_an_untied_model_or_of_one_without_a_head(saved, language_model):
    save_model(language_model, str(saved / "model.safetensors"))
    for head in set(HEADS) - {"GPT2LMHeadModel", "GPT2DoubleHeadsModel"}:
        refused(saved, "'wte.weight'", head=head)
    refused(saved, "'wte.weight'", config=tiny_config(tie_word_embeddings=False))


def test_sharded(sharded, language_model):
    assert same_tensors(load(sharded).state_dict(), language_model.state_dict())


@pytest.mark.parametrize("head", ["GPT2LMHeadModel", "GPT2Model"])
def test_bare_keys_and_old_mask_buffers_load_quietly(head, saved, language_model, monkeypatch):
    def as_first_released(tensors):
        for name in list(tensors):
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)
        for layer in range(2):
            tensors[f"h.{layer}.attn.bias"] = torch.ones(1, 1, 48, 48, dtype=torch.uint8)
            tensors[f"h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)

    rewrite(saved / "model.safetensors", as_first_released)
    warnings = []
    monkeypatch.setattr(logging.get_logger("transformers.modeling_utils"), "warning", warnings.append)
    model, info = load(saved, head, output_loading_info=True)
    assert not any(info.values())
    assert not warnings
    body = model if head == "GPT2Model" else model.transformer
    assert same_tensors(body.state_dict(), language_model.transformer.state_dict())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, "bfloat16"])
def test_dtype(dtype, pristine, language_model):
    model = load(pristine, dtype=dtype)
    expected = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    assert {tensor.dtype for tensor in model.parameters()} == {expected}
    assert torch.equal(model.lm_head.weight, language_model.lm_head.weight.to(expected))


def test_options_of_transformers_are_kept(pristine, tmp_path, language_model):
    expected = language_model.state_dict()
    shutil.copytree(pristine, tmp_path / "deep" / "er")
    assert same_tensors(load(tmp_path / "deep", subfolder="er").state_dict(), expected)
    assert same_tensors(load(str(pristine), config=tiny_config(), device_map="cpu").state_dict(), expected)
    assert same_tensors(load(pristine, config=pristine, use_safetensors=True).state_dict(), expected)
    assert same_tensors(load(None, config=tiny_config(), state_dict=language_model.state_dict()).state_dict(), expected)
    assert load(pristine, attn_implementation="eager").config._attn_implementation == "eager"
    assert load(pristine, resid_pdrop=0.25).transformer.h[0].mlp.dropout.p == 0.25
    assert load(pristine, n_layer=1).config.n_layer == 1
    language_model.save_pretrained(tmp_path / "variant", variant="fp16")
    assert same_tensors(load(tmp_path / "variant", variant="fp16").state_dict(), expected)


def test_key_mapping_is_left_to_transformers(saved, language_model):
    def rename(tensors):
        for name in list(tensors):
            tensors[name.replace("transformer.", "gpt.")] = tensors.pop(name)

    rewrite(saved / "model.safetensors", rename)
    refused(saved, saved / "model.safetensors", "'wte.weight'")
    model = load(saved, key_mapping={"^gpt.": "transformer."})
    assert same_tensors(model.state_dict(), language_model.state_dict())


def test_empty_state_dict_makes_a_new_model():
    model, info = load(None, config=tiny_config(), state_dict={}, output_loading_info=True)
    assert "transformer.wte.weight" in info["missing_keys"]
    assert not model.transformer.wte.weight.is_meta


def test_cross_attention_may_be_new_as_a_whole(saved, tmp_path):
    model, info = load(saved, add_cross_attention=True, output_loading_info=True)
    assert all("crossattention" in name or "ln_cross_attn" in name for name in info["missing_keys"])
    assert info["missing_keys"]
    model.save_pretrained(tmp_path / "captioner")
    assert same_tensors(load(tmp_path / "captioner").state_dict(), model.state_dict())
    name = "transformer.h.0.crossattention.q_attn.bias"
    rewrite(tmp_path / "captioner" / "model.safetensors", lambda tensors: tensors.pop(name))
    refused(tmp_path / "captioner", "model.safetensors", name.removeprefix("transformer."))


def test_adapter_directory_loads_its_base_checked(saved, tmp_path):
    adapted = peft.get_peft_model(load(saved), peft.LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True))
    adapted.save_pretrained(tmp_path / "adapter")
    loaded = load(tmp_path / "adapter")
    assert "lora_A" in " ".join(loaded.state_dict())
    rewrite(saved / "model.safetensors", lambda tensors: tensors.pop(KEY))
    refused(tmp_path / "adapter", saved / "model.safetensors", "h.1.mlp.c_fc.weight")


# --- configuration --------------------------------------------------------------------------------------------------

BAD_CONFIGS = [
    ({"n_embd": 66}, "n_embd 66 is not divisible by n_head 4"),
    ({"layer_norm_epsilon": 0.0}, "layer_norm_epsilon"),
    ({"layer_norm_epsilon": -1e-5}, "-1e-05"),
    ({"layer_norm_epsilon": float("nan")}, "nan"),
    ({"layer_norm_epsilon": float("inf")}, "inf"),
    ({"activation_function": "gelu_newer"}, "'gelu_newer'"),
    ({"attn_pdrop": 1.5}, "attn_pdrop"),
    *[({name: 0}, f"{name} must be") for name in ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head")],
    ({"n_inner": 0}, "n_inner must be"),
    ({"n_layer": -2}, "-2"),
    ({"vocab_size": 10**12}, "vocab_size"),
]


@pytest.mark.parametrize(("changes", "fragment"), BAD_CONFIGS)
@pytest.mark.parametrize("head", ["GPT2Model", "GPT2ForTokenClassification"])
def test_construction_refuses_an_impossible_configuration(changes, fragment, head):
    with pytest.raises(ValueError, match=r"^[^\n]+$") as caught:
        getattr(fastgpt, head)(tiny_config(**changes))
    assert fragment in str(caught.value)


@pytest.mark.parametrize(("changes", "fragment"), BAD_CONFIGS)
def test_loading_names_the_file_of_an_impossible_configuration(changes, fragment, saved):
    written = json.loads((saved / "config.json").read_text()) | changes
    (saved / "config.json").write_text(json.dumps(written))
    refused(saved, saved / "config.json", fragment)


@pytest.mark.parametrize(
    ("text", "fragment"),
    [
        ("", "not valid JSON"),
        ('{"n_embd": 64', "not valid JSON"),
        ("[1, 2]", "list"),
        ('{"n_embd": 64, "n_embd": 128}', "'n_embd'"),
        ('{"task_specific_params": {"a": {"b": 1, "b": 2}}}', "'b'"),
        ('{"n_embd": "wide"}', "n_embd"),
        ('{"dtype": "float99"}', "float99"),
        ('{"id2label": 3}', "describes no gpt2"),
        ("[" * 100_000, "not valid JSON"),
        (" " * 5_000_001, "larger than"),
    ],
)
def test_damaged_config_json(text, fragment, saved):
    (saved / "config.json").write_text(text)
    refused(saved, saved / "config.json", fragment)


def test_absent_config_json(saved):
    (saved / "config.json").unlink()
    refused(saved, saved / "config.json", "does not exist", error=CheckpointFileError)
    refused(saved, saved / "config.json", error=OSError)


def test_layers_beyond_counting_are_refused_at_once(saved):
    written = json.loads((saved / "config.json").read_text()) | {"n_layer": 10**9}
    (saved / "config.json").write_text(json.dumps(written))
    refused_within_a_second(saved, saved / "model.safetensors", "h.2.ln_1.weight")


# --- values ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("value", "name"), [(float("nan"), "NaN"), (float("inf"), "Inf"), (float("-inf"), "Inf")])
def test_values_that_are_not_finite(value, name, saved):
    rewrite(saved / "model.safetensors", lambda tensors: tensors[KEY][3].fill_(value))
    refused(saved, saved / "model.safetensors", KEY, name, "check_finite=False")
    assert not load(saved, check_finite=False).transformer.h[1].mlp.c_fc.weight.isfinite().all()


def test_values_that_overflow_the_asked_dtype(saved):
    rewrite(saved / "model.safetensors", lambda tensors: tensors[KEY][3].fill_(1e6))
    refused(saved, KEY, "Inf as torch.float16", dtype=torch.float16)
    assert load(saved, dtype=torch.bfloat16).dtype == torch.bfloat16


def test_finite_check_allocates_nothing_of_the_tensors_size():
    class Allocations(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            for value in result if isinstance(result, tuple | list) else [result]:
                if isinstance(value, torch.Tensor) and value.data_ptr() != big.data_ptr():
                    sizes.append(value.numel())
            return result

    sizes: list[int] = []
    big = torch.randn(1000, 100, requires_grad=True)
    with Allocations():
        assert not_finite(big) is None
    assert sizes
    assert max(sizes) == 1


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float16, torch.bfloat16, torch.float8_e5m2, torch.float8_e4m3fn]
)
def test_finite_check_of_every_dtype(dtype):
    assert not_finite(torch.tensor([1.0, -2.0]).to(dtype)) is None
    assert not_finite(torch.tensor([1.0, float("nan")]).to(dtype)) == "NaN"
    assert not_finite(torch.tensor([2**31, 5])) is None
    assert not_finite(torch.empty(0)) is None
