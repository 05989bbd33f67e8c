"""A text and a model to train, and a run that nothing disturbed."""

from pathlib import Path

import pytest
import torch
from models import DATA, tiny_config

import fastgpt
from fastgpt import cli

from .runs import OPTIONS


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A text, and a model of two layers with dropout that reads it with the demo's tokenizer."""
    folder = tmp_path_factory.mktemp("inputs")
    text = folder / "text.txt"
    text.write_text((DATA / "held_out.txt").read_text()[:3200])
    tokenizer = fastgpt.load_demo()[1]
    torch.manual_seed(0)
    dropout = {"resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1}
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = tiny_config(n_embd=16, n_head=2, vocab_size=len(tokenizer), **dropout, **special)
    fastgpt.GPT2LMHeadModel(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    return [str(text), "--model", str(folder / "model"), *OPTIONS]


@pytest.fixture(scope="module")
def whole(inputs: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nothing disturbed."""
    out = tmp_path_factory.mktemp("whole") / "run"
    with pytest.raises(SystemExit) as exit_info:
        cli.main(["train", *inputs, "--out", str(out)])
    assert exit_info.value.code == 0
    return out
