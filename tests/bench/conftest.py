"""A small checkpoint to benchmark."""

import pytest
import torch
from models import lively, tiny_config
from transformers import GPT2LMHeadModel


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    lively(GPT2LMHeadModel(tiny_config(resid_pdrop=0.1))).save_pretrained(path)  # type: ignore[attr-defined]
    return str(path)
