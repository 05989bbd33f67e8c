"""The bundled model and the recipe that made it."""

import functools
import math
import re
from importlib import resources
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import DATA

import fastgpt
from fastgpt.demo import train
from fastgpt.evaluation import mean_loss


@pytest.fixture(scope="module")
def demo():
    return fastgpt.load_demo()


def folder() -> Path:
    return Path(str(resources.files("fastgpt.demo")))


def losses_on_the_card(card: str) -> tuple[float, float]:
    """The held-out losses of the model and of the bigram model, in nats per token."""
    model, bigram = re.findall(r"^\| (?:this model|bigram model[^|]*) \| ([\d.]+) \|", card, flags=re.MULTILINE)
    return float(model), float(bigram)


def test_it_is_small_and_ready(demo) -> None:
    model, tokenizer = demo
    assert type(model) is fastgpt.GPT2LMHeadModel
    assert not model.training
    assert model.dtype == torch.float32
    assert sum(file.stat().st_size for file in folder().glob("*.safetensors")) <= 8_000_000
    assert len(tokenizer) == model.config.vocab_size
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        assert getattr(model.config, name) == getattr(tokenizer, name) < model.config.vocab_size


def test_card_shows_a_loss_clearly_better_than_the_bigram_model() -> None:
    model, bigram = losses_on_the_card((folder() / "README.md").read_text())
    assert model < bigram - 0.2


def test_loss_on_held_out_text_is_what_the_card_says(demo) -> None:
    """On an excerpt of the held-out part: near the card's figure for all of it, and below the bigram model's."""
    model, tokenizer = demo
    ids = train.encode(tokenizer, (DATA / "held_out.txt").read_text())
    loss = mean_loss(model, ids)
    on_the_card, bigram = losses_on_the_card((folder() / "README.md").read_text())
    assert loss == pytest.approx(on_the_card, abs=0.15)
    assert loss < bigram < math.log(model.config.vocab_size)


def test_text_is_reproducible_and_looks_like_a_play(demo) -> None:
    model, tokenizer = demo
    texts = [train.sample(model, tokenizer, "ROMEO:", seed) for seed in (0, 0, 1)]
    assert texts[0] == texts[1] != texts[2]
    assert re.search(r"\n\n[A-Z][A-Za-z ]+:\n", texts[0]), "no new speaker"


@functools.cache
def demo_tokenizer():
    return fastgpt.load_demo()[1]


@given(st.text())
def test_any_string_survives_the_tokenizer(text: str) -> None:
    tokenizer = demo_tokenizer()
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def recipe(text_file: Path, out: Path, *options: str) -> None:
    small = ["--vocab-size", "300", "--n-layer", "1", "--n-embd", "16", "--n-head", "2", "--context", "16"]
    train.main([str(text_file), "--out", str(out), *small, "--steps", "4", "--batch-size", "2", *options])


def test_recipe_runs_on_any_text(tmp_path: Path) -> None:
    text_file = tmp_path / "text.txt"
    text_file.write_text("".join(f"Line {i}: grüße, {i * i} and so on.\n\n" for i in range(400)))
    with pytest.raises(SystemExit) as exit_info:
        recipe(text_file, tmp_path / "model")
    assert not exit_info.value.code
    card = (tmp_path / "model" / "README.md").read_text()
    model_loss_shown, bigram_loss_shown = losses_on_the_card(card)
    assert 0 < bigram_loss_shown < model_loss_shown < 8, "four steps do not beat a bigram model"
    assert str(tmp_path) not in card
    model = fastgpt.GPT2LMHeadModel.from_pretrained(tmp_path / "model")
    assert model.config.n_embd == 16


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        (None, [], "no file .*text.txt"),
        ("too short", [], "text is too short: its .* part"),
        (b"\xff\xfe\x00", [], "UTF-8"),
        ("words " * 2000, ["--vocab-size", "10"], "vocabulary of 10"),
        ("words " * 2000, ["--n-head", "3"], "n_head 3"),
    ],
)
def test_recipe_refuses_in_one_line(
    content: str | bytes | None, options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text_file = tmp_path / "text.txt"
    if content is not None:
        text_file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(SystemExit) as exit_info:
        recipe(text_file, tmp_path / "model", *options)
    assert exit_info.value.code == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.search(message, error), error
    assert not (tmp_path / "model").exists()
