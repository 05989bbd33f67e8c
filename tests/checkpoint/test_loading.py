"""Loading: what must load loads bit for bit, and each fault put into a checkpoint is refused in one clear line."""

import json
import os
import pickle
import shutil
import socket
import threading
import time
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
import transformers
from huggingface_hub import constants
from hypothesis import given, settings
from hypothesis import strategies as st
from models import HEADS, tiny_config
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.utils import logging

import fastgpt
from fastgpt.checkpoint import loading
from fastgpt.checkpoint.fit import body_shapes, head_shapes, not_finite
from fastgpt.checkpoint.headers import MAX_HEADER_BYTES, CheckpointError, CheckpointFileError, CheckpointShapeError

KEY = "transformer.h.1.mlp.c_fc.weight"


@pytest.fixture(scope="session")
def language_model():
    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel(tiny_config()).eval()


@pytest.fixture(scope="session")
def pristine(language_model, tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("pristine")
    language_model.save_pretrained(directory)
    return directory


@pytest.fixture
def saved(pristine, tmp_path) -> Path:
    """A directory with a sound checkpoint, to be damaged."""
    return shutil.copytree(pristine, tmp_path / "model")


@pytest.fixture
def sharded(language_model, tmp_path) -> Path:
    directory = tmp_path / "sharded"
    language_model.save_pretrained(directory, max_shard_size="150KB")
    assert len(list(directory.glob("*.safetensors"))) > 2
    return directory


def global_state() -> tuple:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    return torch.get_default_dtype(), torch.get_default_device(), constants.HF_HUB_OFFLINE, environment


@pytest.fixture(autouse=True)
def _nothing_global_changes():
    before = global_state()
    yield
    assert global_state() == before


def load(path, head: str = "GPT2LMHeadModel", **kwargs):
    return getattr(fastgpt, head).from_pretrained(path, **kwargs)


def refused(path, *fragments: object, error: type[Exception] = CheckpointError, **kwargs) -> None:
    """Loading raises `error`, on one line, with every fragment in it, having left the default dtype alone."""
    with pytest.raises(error) as caught:
        load(path, **{"dtype": torch.float16, **kwargs})
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 1000
    told = message.replace(str(path), "") if path and os.path.exists(path) else message  # it bears the test's name
    for fragment in fragments:
        assert str(fragment) in (message if isinstance(fragment, Path) else told)
    assert torch.get_default_dtype() == torch.float32


def same_tensors(left: dict, right: dict) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def read_parts(file: Path) -> tuple[dict, bytes]:
    content = file.read_bytes()
    stop = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:stop]), content[stop:]


def write_parts(file: Path, header: dict | bytes, data: bytes) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data)


def rewrite(file: Path, change) -> None:
    """Store the tensors again after `change(tensors)`."""
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


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
    peft = pytest.importorskip("peft")
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


# --- safetensors files ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 7, 8, 500, -20_000, -1])
def test_truncated_file(size, saved):
    file = saved / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:size])
    refused(saved, file, "truncated")


def test_bytes_after_the_last_tensor(saved):
    file = saved / "model.safetensors"
    file.write_bytes(file.read_bytes() + b"more")
    refused(saved, file, "4 bytes after the last tensor")


@pytest.mark.parametrize(
    ("text", "fragment"),
    [
        (b"\x93NUMPY", "not valid JSON"),
        (b'{"a": \xff}', "not valid JSON"),
        (b"[]", "list"),
        (b'{"a": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]},' * 2 + b'"b": {}}', "not valid JSON"),
        (b'{"a": {}, "a": {}}', "'a'"),
        (b'{"\\ud800": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}', "surrogates not allowed"),
        (b'{"a": {"dtype": "F32", "dtype": "F16", "shape": [0], "data_offsets": [0, 0]}}', "'dtype'"),
    ],
)
def test_damaged_header(text, fragment, saved):
    file = saved / "model.safetensors"
    write_parts(file, text, read_parts(file)[1])
    refused(saved, file, "header", fragment)


def test_repeated_tensor(saved):
    file = saved / "model.safetensors"
    header, data = read_parts(file)
    repeated = json.dumps(header)[:-1] + f', "{KEY}": {json.dumps(header[KEY])}}}'
    write_parts(file, repeated.encode(), data)
    refused(saved, file, KEY, "more than once")


@pytest.mark.parametrize(
    ("change", "fragments"),
    [
        ({"dtype": "F99"}, ["'F99'"]),
        ({"dtype": ["F32"]}, ["dtype"]),
        ({"dtype": "F16"}, ["(64, 256)", "F16", "65536"]),
        ({"dtype": "I32"}, ["I32", "floating-point"]),
        ({"shape": [64, -256]}, ["no valid shape"]),
        ({"shape": [64, 256.0]}, ["no valid shape"]),
        ({"shape": [64, True]}, ["no valid shape"]),
        ({"shape": [64, 2**70]}, ["no valid shape"]),
        ({"shape": [1] * 1000}, ["no valid shape"]),
        ({"shape": None}, ["no valid shape"]),
        ({"data_offsets": [8]}, ["no valid data_offsets"]),
        ({"data_offsets": [65536, 0]}, ["no valid data_offsets"]),
        ({"data_offsets": "all"}, ["no valid data_offsets"]),
        ({"strides": [1]}, ["dtype, shape and data_offsets"]),
    ],
)
def test_damaged_entry_in_the_header(change, fragments, saved):
    file = saved / "model.safetensors"
    header, data = read_parts(file)
    header[KEY] |= change
    write_parts(file, header, data)
    refused(saved, file, KEY.removeprefix("transformer."), *fragments)


@pytest.mark.parametrize(("shift", "fragment"), [(-4, "overlaps"), (4, "hole of 4 bytes"), (2**40, "ends at byte")])
def test_offsets_that_do_not_join(shift, fragment, saved):
    file = saved / "model.safetensors"
    header, data = read_parts(file)
    header[KEY]["data_offsets"] = [offset + shift for offset in header[KEY]["data_offsets"]]
    write_parts(file, header, data)
    refused(saved, file, KEY, fragment)


def test_wrong_shape(saved):
    rewrite(saved / "model.safetensors", lambda tensors: tensors.update({KEY: torch.zeros(64, 255)}))
    refused(saved, saved / "model.safetensors", KEY.removeprefix("transformer."), "(64, 255)", "(64, 256)")
    refused(saved, error=CheckpointShapeError)
    refused(saved, error=RuntimeError)
    model = load(saved, ignore_mismatched_sizes=True)
    assert model.transformer.h[1].mlp.c_fc.weight.shape == (64, 256)


@pytest.mark.parametrize("head", ["GPT2ForSequenceClassification", "GPT2ForTokenClassification"])
def test_wrong_shape_of_a_head(head, tmp_path):
    getattr(transformers, head)(tiny_config()).save_pretrained(tmp_path)
    name = "score.weight" if "Sequence" in head else "classifier.weight"
    refused(tmp_path, tmp_path / "model.safetensors", name, "(2, 64)", "(7, 64)", head=head, num_labels=7)
    assert load(tmp_path, head, num_labels=7, ignore_mismatched_sizes=True).num_labels == 7


def test_class_of_the_user_has_its_own_head(pristine, tmp_path):
    class GPT2ForSequenceClassification(fastgpt.GPT2ForSequenceClassification):
        def __init__(self, config):
            super().__init__(config)
            self.score = torch.nn.Linear(config.n_embd, 11, bias=False)
            self.post_init()

    own = GPT2ForSequenceClassification(tiny_config())
    own.save_pretrained(tmp_path / "own")
    same = GPT2ForSequenceClassification.from_pretrained(tmp_path / "own")
    assert same_tensors(same.state_dict(), own.state_dict())
    assert GPT2ForSequenceClassification.from_pretrained(pristine).score.weight.shape == (11, 64)
    fastgpt.GPT2ForSequenceClassification(tiny_config()).save_pretrained(tmp_path / "other")
    with pytest.raises(CheckpointShapeError, match=r"model.safetensors: tensor 'score.weight' .*\(2, 64\).*\(11, 64\)"):
        GPT2ForSequenceClassification.from_pretrained(tmp_path / "other")


@pytest.mark.parametrize("name", [KEY, "transformer.wte.weight", "transformer.ln_f.bias"])
def test_missing_key_of_the_body(name, saved):
    rewrite(saved / "model.safetensors", lambda tensors: tensors.pop(name))
    refused(saved, saved / "model.safetensors", name.removeprefix("transformer."))


def test_missing_key_in_a_state_dict(language_model):
    tensors = language_model.state_dict()
    del tensors[KEY]
    refused(None, KEY.removeprefix("transformer."), config=tiny_config(), state_dict=tensors)


def test_weight_stored_under_two_names(saved):
    extra = {KEY.removeprefix("transformer."): torch.zeros(64, 256)}
    rewrite(saved / "model.safetensors", lambda tensors: tensors.update(extra))
    refused(saved, saved / "model.safetensors", KEY, "second time")


def test_all_problems_are_counted(saved):
    rewrite(saved / "model.safetensors", lambda tensors: [tensors.pop(KEY), tensors.pop("transformer.wpe.weight")])
    refused(saved, "1 more", "fastgpt verify", saved)


# --- sizes that must not cost time ----------------------------------------------------------------------------------


def refused_within_a_second(path: Path, *fragments: object) -> None:
    start = time.process_time()  # of this process: how busy the machine is says nothing
    refused(path, *fragments)
    assert time.process_time() - start < 1


def test_header_of_200_mb(saved):
    file = saved / "model.safetensors"
    with file.open("wb") as content:
        content.write((200 * 10**6).to_bytes(8, "little") + b'{"a":')
        content.truncate(250 * 10**6)
    refused_within_a_second(saved, file, "200000000")


def test_header_of_a_million_tensors(saved):
    file = saved / "model.safetensors"
    entry = ',"%d":{"dtype":"F32","shape":[],"data_offsets":[0,0]}'
    write_parts(file, ("{" + (entry * 10**6 % tuple(range(10**6)))[1:] + "}").encode(), b"")
    refused_within_a_second(saved, file, "header")


def test_largest_header_that_is_read(saved):
    file = saved / "model.safetensors"
    entry = ',"%d":{"dtype":"F32","shape":[],"data_offsets":[0,0]}'
    n_entries = MAX_HEADER_BYTES // 57
    header = ("{" + (entry * n_entries % tuple(range(n_entries)))[1:] + "}").encode()
    assert 0.9 * MAX_HEADER_BYTES < len(header) <= MAX_HEADER_BYTES
    write_parts(file, header, b"")
    refused_within_a_second(saved, file, "tensor '0'", "takes 4 bytes")


@pytest.mark.parametrize("claimed", [2**63 - 1, 2**64 - 1])
def test_header_larger_than_the_file(claimed, saved):
    file = saved / "model.safetensors"
    file.write_bytes(claimed.to_bytes(8, "little") + b"{}")
    refused_within_a_second(saved, file, claimed)


# --- any damage -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def victim(pristine, tmp_path_factory) -> tuple[Path, bytes]:
    directory = shutil.copytree(pristine, tmp_path_factory.mktemp("victim") / "model")
    return directory, (directory / "model.safetensors").read_bytes()


@settings(max_examples=max(100, settings().max_examples))
@given(data=st.data())
def test_any_damage_to_the_header_is_refused_or_harmless(data, victim, language_model):
    directory, content = victim
    stop = 8 + int.from_bytes(content[:8], "little")
    damaged = bytearray(content)
    for _ in range(data.draw(st.integers(1, 3))):
        position = data.draw(st.integers(0, min(stop, len(damaged)) - 1))
        match data.draw(st.sampled_from(["set", "digit", "drop", "insert", "cut"])):
            case "set":
                damaged[position] = data.draw(st.integers(0, 255))
            case "digit":
                damaged[position] = data.draw(st.sampled_from(b'0123456789{}[],:"'))
            case "drop":
                del damaged[position]
            case "insert":
                damaged.insert(position, data.draw(st.integers(0, 255)))
            case "cut":
                del damaged[position:]
                damaged += content[stop:] if data.draw(st.booleans()) else b" " * 8
    (directory / "model.safetensors").write_bytes(damaged)
    try:
        model, message = load(directory), ""
    except CheckpointError as error:
        model, message = None, str(error)
    if model is None:
        assert "model.safetensors" in message
        assert "\n" not in message
    else:
        assert same_tensors(model.state_dict(), language_model.state_dict())


# --- sharded --------------------------------------------------------------------------------------------------------

INDEX = "model.safetensors.index.json"


def change_index(directory: Path, change) -> None:
    index = json.loads((directory / INDEX).read_text())
    change(index)
    (directory / INDEX).write_text(json.dumps(index))


def shard_of(directory: Path, name: str) -> Path:
    return directory / json.loads((directory / INDEX).read_text())["weight_map"][name]


def test_index_names_a_missing_shard(sharded):
    shard = shard_of(sharded, KEY)
    shard.unlink()
    refused(sharded, sharded / INDEX, shard.name, "does not exist", error=OSError)


def test_index_names_a_missing_key(sharded):
    shard = shard_of(sharded, KEY)
    rewrite(shard, lambda tensors: tensors.pop(KEY))
    refused(sharded, shard, KEY)


def test_index_lacks_a_key_of_the_body(sharded):
    rewrite(shard_of(sharded, KEY), lambda tensors: tensors.pop(KEY))
    change_index(sharded, lambda index: index["weight_map"].pop(KEY))
    refused(sharded, sharded / INDEX, KEY.removeprefix("transformer."))


def test_key_in_two_shards(sharded):
    other = next(path for path in sharded.glob("*.safetensors") if path != shard_of(sharded, KEY))
    rewrite(other, lambda tensors: tensors.update({KEY: torch.zeros(64, 256)}))
    refused(sharded, KEY, other.name, shard_of(sharded, KEY).name)


def test_truncated_shard(sharded):
    shard = shard_of(sharded, KEY)
    shard.write_bytes(shard.read_bytes()[:-1])
    refused(sharded, shard, "truncated")


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "pytorch_model.bin", "", "."])
def test_shard_that_is_no_safetensors_file_beside_the_index(name, sharded):
    shutil.copy(shard_of(sharded, KEY), sharded.parent / "model.safetensors")
    change_index(sharded, lambda index: index["weight_map"].update({KEY: name}))
    refused(sharded, sharded / INDEX, repr(name), "beside the index")


@pytest.mark.parametrize(
    ("text", "fragment"),
    [
        ("{", "not valid JSON"),
        ('{"metadata": {}, "weight_map": {"a": "x", "a": "y"}}', "'a'"),
        ('{"metadata": {}}', "'weight_map'"),
        ('{"metadata": {}, "weight_map": {}}', "names no tensor"),
        ('{"weight_map": {"a": "x"}}', "'metadata'"),
        ('{"metadata": {}, "weight_map": {"wte.weight": 3}}', "'wte.weight'"),
    ],
)
def test_damaged_index(text, fragment, sharded):
    (sharded / INDEX).write_text(text)
    refused(sharded, sharded / INDEX, fragment)


# --- pickle ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def pickled(saved) -> Path:
    torch.save(load_file(saved / "model.safetensors"), saved / "pytorch_model.bin")
    (saved / "model.safetensors").unlink()
    return saved


class Intruder:
    """Unpickling it touches a file."""

    def __init__(self, trace: Path):
        self.trace = trace

    def __reduce__(self):
        return Path.touch, (self.trace,)


def test_pickle_is_loaded_only_when_asked_for(pickled, language_model):
    refused(pickled, pickled / "pytorch_model.bin", "use_safetensors=False")
    refused(pickled, error=OSError, use_safetensors=True)
    assert same_tensors(load(pickled, use_safetensors=False).state_dict(), language_model.state_dict())
    with pytest.raises(ValueError, match="weights_only"):
        load(pickled, use_safetensors=False, weights_only=False)


@pytest.mark.parametrize("dtype", [None, "auto", torch.bfloat16])
@pytest.mark.parametrize("is_zip", [True, False])
def test_pickle_runs_no_code(dtype, is_zip, pickled, tmp_path):
    trace, file = tmp_path / "trace", pickled / "pytorch_model.bin"
    content = {"transformer.wte.weight": Intruder(trace)}
    if is_zip:
        torch.save(content, file)
    else:
        file.write_bytes(pickle.dumps(content, protocol=2))
    written = json.loads((pickled / "config.json").read_text())
    del written["dtype"]
    (pickled / "config.json").write_text(json.dumps(written))

    refused(pickled)
    refused(pickled, file, use_safetensors=False, dtype=dtype)
    assert not trace.exists()
    pickle.loads(pickle.dumps(content))
    assert trace.exists()


def test_damaged_pickles(pickled):
    file = pickled / "pytorch_model.bin"
    tensors = torch.load(file)
    for content, fragment in [
        ({**tensors, "epoch": 3}, "'epoch'"),
        ([tensors], "list"),
        ({name: value for name, value in tensors.items() if name != KEY}, KEY.removeprefix("transformer.")),
        ({**tensors, KEY: torch.zeros(3)}, "(3,)"),
    ]:
        torch.save(content, file)
        refused(pickled, file, fragment, use_safetensors=False)
    for content in (b"", b"nothing of the kind", file.read_bytes()[:-1000]):
        file.write_bytes(content)
        refused(pickled, file, use_safetensors=False)


def test_pickles_that_take_more_memory_than_their_bytes(pickled):
    file = pickled / "pytorch_model.bin"
    with zipfile.ZipFile(file) as archive:
        entries = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    refused(pickled, file, "is compressed", use_safetensors=False)
    torch.save({"transformer.wte.weight": bytearray(3)}, file)
    refused(pickled, file, "bytearray", use_safetensors=False)


def test_old_pickles_load(pickled, language_model):
    file = pickled / "pytorch_model.bin"
    torch.save(torch.load(file), file, _use_new_zipfile_serialization=False)
    assert same_tensors(load(pickled, use_safetensors=False).state_dict(), language_model.state_dict())


def test_sharded_pickle(sharded, language_model):
    for shard in list(sharded.glob("*.safetensors")):
        torch.save(load_file(shard), shard.with_suffix(".bin"))
        shard.unlink()
    index = (sharded / INDEX).read_text().replace(".safetensors", ".bin")
    (sharded / INDEX).unlink()
    (sharded / "pytorch_model.bin.index.json").write_text(index)
    refused(sharded, "pytorch_model.bin.index.json", "use_safetensors=False")
    assert same_tensors(load(sharded, use_safetensors=False).state_dict(), language_model.state_dict())


def test_safetensors_index_cannot_smuggle_a_pickle(sharded, tmp_path):
    torch.save({KEY: Intruder(tmp_path / "trace")}, sharded / "pytorch_model.bin")
    change_index(sharded, lambda index: index["weight_map"].update({KEY: "pytorch_model.bin"}))
    refused(sharded, "'pytorch_model.bin'")
    assert not (tmp_path / "trace").exists()


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


# --- what cannot be found -------------------------------------------------------------------------------------------


def test_directory_without_weights(saved):
    (saved / "model.safetensors").unlink()
    refused(saved, saved, "model.safetensors and model.safetensors.index.json", error=OSError)
    refused(saved, "pytorch_model.bin", use_safetensors=False)
    refused(saved, "model.fp16.safetensors", variant="fp16")


def test_empty_directory(tmp_path):
    refused(tmp_path, "config.json", "model.safetensors", error=OSError)


def test_weight_file_is_no_directory(pristine):
    refused(pristine / "model.safetensors", pristine / "model.safetensors", "give the directory", error=OSError)


@pytest.mark.parametrize("path", ["./no/such/directory", "/no/such/directory", Path("no") / "such" / "directory", "\0"])
def test_path_that_does_not_exist(path):
    refused(path, repr(str(path)), "--model demo", error=CheckpointFileError)


def test_overlong_name():
    refused("x" * 5000, "'xxx", error=CheckpointFileError)


def test_offline_mode_is_named(tmp_path):
    refused(
        "nobody/nothing", "'nobody/nothing'", "not asked (HF_HUB_OFFLINE", tmp_path, "--model demo", cache_dir=tmp_path
    )


@pytest.fixture
def online(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    return monkeypatch


@pytest.fixture
def silent_server():
    """The address of a server that accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


def test_unreachable_hub_fails_fast(online, tmp_path, silent_server):
    online.setattr(loading, "HUB_TIMEOUT_S", 0.2)
    for endpoint in ("http://127.0.0.1:1", silent_server):
        online.setattr(constants, "ENDPOINT", endpoint)
        start = time.perf_counter()
        refused("nobody/nothing", endpoint, "cannot be reached", "directory", "--model demo", cache_dir=tmp_path)
        assert time.perf_counter() - start < 3


class EmptyHub(BaseHTTPRequestHandler):
    """A hub that is well and holds no model."""

    def do_HEAD(self):
        is_front_page = self.path == "/"
        self.send_response(200 if is_front_page else 404)
        if not is_front_page:
            self.send_header("X-Error-Code", "RepoNotFound")
        self.end_headers()

    do_GET = do_HEAD

    def log_message(self, *args):
        pass


def test_model_that_the_hub_does_not_have(online, tmp_path):
    with ThreadingHTTPServer(("127.0.0.1", 0), EmptyHub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        endpoint = f"http://127.0.0.1:{server.server_port}"
        online.setattr(constants, "ENDPOINT", endpoint)
        online.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}")
        refused("nobody/nothing", "'nobody/nothing'", f"{endpoint} gave", "--model demo", cache_dir=tmp_path)
        server.shutdown()


def test_local_files_only_asks_nobody(online, tmp_path):
    online.setattr(loading, "_why_unreachable", pytest.fail)
    refused("nobody/nothing", "local_files_only", local_files_only=True, cache_dir=tmp_path)


@pytest.fixture
def cached(saved, tmp_path) -> tuple[Path, Path]:
    """(cache, snapshot) in which somebody/model was downloaded before."""
    commit, repository = "0" * 40, tmp_path / "cache" / "models--somebody--model"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    snapshot = shutil.copytree(saved, repository / "snapshots" / commit)
    return tmp_path / "cache", snapshot


def test_cached_model_loads_when_the_hub_cannot_be_reached(online, cached, language_model):
    online.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    model = load("somebody/model", cache_dir=cached[0])
    assert same_tensors(model.state_dict(), language_model.state_dict())


def test_cached_model_is_checked_after_loading(cached):
    cache, snapshot = cached
    file = snapshot / "model.safetensors"
    content = file.read_bytes()
    for change, fragment in [
        (lambda tensors: tensors.pop(KEY), KEY.removeprefix("transformer.")),
        (lambda tensors: tensors.update({KEY: torch.zeros(64, 255)}), "(64, 255)"),
        (lambda tensors: tensors[KEY].fill_(float("nan")), "NaN"),
    ]:
        file.write_bytes(content)
        rewrite(file, change)
        refused("somebody/model", "somebody/model", KEY.removeprefix("transformer."), fragment, cache_dir=cache)
    file.write_bytes(content[:-1])
    refused("somebody/model", "somebody/model", cache_dir=cache)
    file.rename(snapshot / "pytorch_model.bin")
    refused("somebody/model", "model.safetensors", cache_dir=cache)
