"""Checkpoints of several files, and pickles, which are loaded only when asked for and run no code."""

import json
import pickle
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
from checkpoints import INDEX, KEY, change_index, load, refused, rewrite, same_tensors, shard_of
from safetensors.torch import load_file

pytestmark = pytest.mark.usefixtures("nothing_global_changes")


# --- sharded --------------------------------------------------------------------------------------------------------


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
