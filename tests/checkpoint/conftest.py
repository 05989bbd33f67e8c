"""Sound checkpoints, to be loaded or damaged."""

import os
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from huggingface_hub import constants
from models import tiny_config


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


@pytest.fixture
def nothing_global_changes():
    before = global_state()
    yield
    assert global_state() == before
