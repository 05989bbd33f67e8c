"""Every fault put into a safetensors file is refused in one clear line, and quickly."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from checkpoints import KEY, load, read_parts, refused, refused_within_a_second, rewrite, same_tensors, write_parts
from hypothesis import given, settings
from hypothesis import strategies as st
from models import tiny_config

import fastgpt
from fastgpt.checkpoint.headers import MAX_HEADER_BYTES, CheckpointError, CheckpointShapeError

pytestmark = pytest.mark.usefixtures("nothing_global_changes")


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
