"""`fastgpt eval`: every token is predicted once, and the loss is that of transformers' model over the same windows."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from commands import assert_one_line_error
from hypothesis import given
from hypothesis import strategies as st
from models import pair, tiny_config, token_ids

import fastgpt
from fastgpt import corpus
from fastgpt.evaluation import evaluate_text, mean_loss, settle_windows, windows

DEMO_TOKENIZER = fastgpt.load_demo()[1]


@given(st.integers(2, 200), st.integers(1, 40), st.data())
def test_every_token_after_the_first_is_predicted_once(n_ids: int, context: int, data: st.DataObject) -> None:
    stride = data.draw(st.integers(1, context))
    predicted = []
    for start, end, n in windows(n_ids, context, stride):
        assert 1 <= n <= end - start <= context
        for target in range(end + 1 - n, end + 1):
            assert target - start >= min(target, context - stride + 1), "too few tokens before it"
            predicted.append(target)
    assert predicted == list(range(1, n_ids))


@pytest.mark.parametrize(
    ("context", "stride", "n_ids"), [(48, 24, 301), (20, 7, 99), (48, 48, 145), (5, 1, 9), (48, 1, 2)]
)
def test_loss_is_that_of_transformers(context: int, stride: int, n_ids: int) -> None:
    theirs, ours = pair(tiny_config())
    ids = token_ids(1, n_ids, 131)[0]
    total, n_settled = 0.0, 1
    for start in range(0, n_ids, stride):
        window = ids[start : start + context + 1]  # as many tokens as predict, and the last one's target
        end = start + len(window)
        with torch.no_grad():
            logits = theirs(window[None, :-1]).logits[0]
        losses = F.cross_entropy(logits.double(), window[1:], reduction="none")
        total += losses[n_settled - end :].sum().item()
        n_settled = end
        if end == n_ids:
            break
    assert mean_loss(ours, ids, context=context, stride=stride, batch=3) == pytest.approx(total / (n_ids - 1), rel=1e-6)


def test_no_logits_of_all_tokens_are_made() -> None:
    model = fastgpt.GPT2LMHeadModel(tiny_config()).eval()
    model.lm_head.register_forward_hook(lambda *_: pytest.fail("the head made logits"))
    assert mean_loss(model, token_ids(1, 100, 131)[0]) == pytest.approx(math.log(131), abs=0.2)


@given(st.text(st.sampled_from("ab \n\t\r'é1.\u2028"), max_size=60), st.integers(1, 20))
def test_pieces_give_the_tokens_of_the_whole(text: str, n_characters: int) -> None:
    cut = list(corpus.pieces(text, n_characters))
    assert "".join(cut) == text
    assert [i for piece in cut for i in DEMO_TOKENIZER(piece)["input_ids"]] == DEMO_TOKENIZER(text)["input_ids"]


def test_bug_a_text_without_tokens_makes_numbers_of_the_tokens_of_others() -> None:
    """BERT's tokenizer has no end-of-text token, and drops control characters."""

    class Tokenizer:
        eos_token_id = None

        def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
            return {"input_ids": [ord(letter) for letter in text if letter.isprintable()]}

    tokenizer: Any = Tokenizer()
    packed = corpus.pack(["\x01", "words " * 20], tokenizer, 8, held_out=0.1)
    assert packed.training.dtype == packed.validation.dtype == torch.int64


def test_a_text_starts_after_an_end_of_text_token() -> None:
    ids = corpus.encode(DEMO_TOKENIZER, "ROMEO:\n" * 20_000)
    assert ids[0] == DEMO_TOKENIZER.eos_token_id
    assert DEMO_TOKENIZER.decode(ids[1:]) == "ROMEO:\n" * 20_000


def test_text_as_windows_writes_it(tmp_path: Path) -> None:
    """Line ends belong to the text, a byte order mark does not."""
    file = tmp_path / "text.txt"
    file.write_bytes(b"\xef\xbb\xbfROMEO:\r\nI go.\r\n")
    assert corpus.read_text(file) == "ROMEO:\r\nI go.\r\n"


def test_the_figures_belong_together() -> None:
    model, tokenizer = fastgpt.load_demo()
    text = "ROMEO:\nWhat light through yonder window breaks? " * 3
    steps = []
    result = evaluate_text(text, model, tokenizer, context=32, batch=2, progress=lambda *step: steps.append(step))
    assert (result.context, result.stride) == (32, 16)
    assert result.n_bytes == len(text)
    assert result.n_tokens == len(tokenizer(text)["input_ids"])
    assert result.perplexity == pytest.approx(math.exp(result.loss))
    assert result.bits_per_byte * result.n_bytes * math.log(2) == pytest.approx(result.loss * result.n_tokens)
    assert result.tokens_per_s * result.seconds == pytest.approx(result.n_tokens)
    assert steps[0] == ("tokenising", len(text), len(text))
    assert steps[-1][1] == steps[-1][2]


def test_one_token_predicts_nothing() -> None:
    with pytest.raises(ValueError, match="1 token in the text"):
        mean_loss(fastgpt.GPT2LMHeadModel(tiny_config()), torch.tensor([3]))


def test_windows_that_leave_tokens_out_are_refused() -> None:
    assert settle_windows(1024) == (1024, 512)
    assert settle_windows(1) == (1, 1)
    for context, stride in ((0, 1), (9, 1), (8, 9), (8, 0)):
        with pytest.raises(ValueError, match="must be in"):
            settle_windows(8, context, stride)


def test_the_command_prints_what_it_measured(run, tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text("ROMEO:\nWhat light through yonder window breaks?\n")
    as_text, as_json = run("eval", str(file)), run("eval", str(file), "--json")
    result = json.loads(as_json.out)
    assert f"perplexity {result['perplexity']:.2f}" in as_text.out
    assert f"{result['n_tokens']} tokens" in as_text.out
    assert "tokens/s (torch path on cpu, float32)" in as_text.err


@pytest.mark.parametrize(
    ("content", "arguments", "code", "words"),
    [
        (None, [], 2, ["no file", "text.txt"]),
        (b"", [], 2, ["text.txt is empty"]),
        (b" \n", [], 2, ["text.txt is empty"]),
        (b"caf\xe9 au lait", [], 2, ["text.txt", "UTF-8", "byte 3", "iconv"]),
        (b"some text", ["--stride", "300"], 2, ["stride", "[1, 256]", "300"]),
        (b"some text", ["--context", "257"], 2, ["context", "256", "257"]),
        (b"some text", ["--context", "0"], 2, ["--context"]),
        (b"some text", ["--batch", "0"], 2, ["--batch"]),
        (b"some text", ["--dtype", "float8"], 2, ["float8"]),
        (b"some text", ["--model", "nobody/no-such-model"], 1, ["nobody/no-such-model", "--model demo"]),
    ],
)
def test_errors_are_one_line(run, tmp_path: Path, content, arguments, code, words) -> None:
    file = tmp_path / "text.txt"
    if content is not None:
        file.write_bytes(content)
    assert_one_line_error(run("eval", str(file), *arguments), code, *words)
