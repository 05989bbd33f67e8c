"""Checkpoints on disk: how the tests load them, change them, and see them refused."""

import json
import os
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import fastgpt
from fastgpt.checkpoint.headers import CheckpointError

KEY = "transformer.h.1.mlp.c_fc.weight"
INDEX = "model.safetensors.index.json"


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


def refused_within_a_second(path: Path, *fragments: object) -> None:
    """`refused`, before a file of any size costs time."""
    start = time.process_time()  # of this process: how busy the machine is says nothing
    refused(path, *fragments)
    assert time.process_time() - start < 1


def change_index(directory: Path, change) -> None:
    index = json.loads((directory / INDEX).read_text())
    change(index)
    (directory / INDEX).write_text(json.dumps(index))


def shard_of(directory: Path, name: str) -> Path:
    return directory / json.loads((directory / INDEX).read_text())["weight_map"][name]
