"""Commands on checkpoints with each kind of tokenizer that the family has."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import BertTokenizer, GPT2Config, GPT2LMHeadModel, GPT2Tokenizer, PreTrainedTokenizerFast

import fastgpt
from fastgpt.checkpoint.tokenizer import load_tokenizer
from fastgpt.text import encode_prompt

WORDS = ["the", "king", "is", "dead", "long", "live", "##ly", "##s", ",", ".", "王", "死"]


def _word_pieces() -> Any:
    """As Chinese GPT-2 has it: [CLS] before a text, [SEP] behind it, token types, no end-of-text token."""
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    return BertTokenizer(vocab={word: i for i, word in enumerate(vocabulary)})


def _sentence_pieces() -> Any:
    """As Japanese GPT-2 has it: a space before the first word, which decoding drops, and </s> behind a text."""
    pieces = [("<unk>", 0.0), ("</s>", 0.0), *[("▁" + word, -2.0) for word in WORDS], *[(word, -3.0) for word in WORDS]]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>")


def _bytes() -> Any:
    """GPT-2's own, which has no padding token."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    return GPT2Tokenizer(vocab={letter: i for i, letter in enumerate([*letters, "<|endoftext|>"])}, merges=[])


TOKENIZERS = {"bytes": _bytes, "word pieces": _word_pieces, "sentence pieces": _sentence_pieces}


@pytest.fixture(params=TOKENIZERS)
def saved(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A random model with one of them. Its configuration has the default end token 50256, as most have."""
    tokenizer = TOKENIZERS[request.param]()
    torch.manual_seed(0)
    shape: dict[str, Any] = {"n_layer": 1, "n_embd": 32, "n_head": 2, "n_positions": 64, "vocab_size": len(tokenizer)}
    GPT2LMHeadModel(GPT2Config(**shape, initializer_range=0.5)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    return tmp_path


PROMPT = "the king is"


def test_a_prompt_is_not_ended(saved: Path) -> None:
    tokenizer = load_tokenizer(str(saved))
    whole = tokenizer(PROMPT)["input_ids"]
    ids = encode_prompt(tokenizer, PROMPT)
    if isinstance(tokenizer, GPT2Tokenizer):
        assert ids.tolist() == [whole]
    else:
        assert ids.tolist() == [whole[:-1]]
        assert whole[-1] in tokenizer.all_special_ids
    assert encode_prompt(tokenizer, "").numel() == 0


def test_the_text_is_that_of_the_tokens(saved: Path, run, caplog: pytest.LogCaptureFixture) -> None:
    model, tokenizer = fastgpt.GPT2LMHeadModel.from_pretrained(saved), load_tokenizer(str(saved))
    options = {"max_new_tokens": 12, "do_sample": False}
    expected: Any = tokenizer.decode(model.generate(encode_prompt(tokenizer, PROMPT), **options)[0])  # type: ignore[arg-type]
    command = "generate", PROMPT, "--model", str(saved), "--max-new-tokens", "12", "--temperature", "0"
    with caplog.at_level(logging.DEBUG, "fastgpt"):
        streamed = run(*command)
    assert streamed.code == 0, streamed.err
    assert "generate: the engine" in caplog.messages  # the end and padding tokens of the configuration do not exist
    assert streamed.out.rstrip("\n") == expected[expected.index(PROMPT) :]
    fields = json.loads(run(*command, "--json").out)
    assert fields["prompt"] + fields["text"] == streamed.out.rstrip("\n")


def test_a_text_is_scored_and_trained_on(saved: Path, run, tmp_path: Path) -> None:
    file, out = tmp_path / "text.txt", tmp_path / "out"
    file.write_text("the king is dead , long live the king .\n" * 40)
    before = json.loads(run("eval", str(file), "--model", str(saved), "--json").out)
    assert before["n_tokens"] >= 399
    training = "--model", str(saved), "--out", str(out), "--context", "32", "--epochs", "1", "--learning-rate", "0.01"
    result = run("train", str(file), *training)
    assert result.code == 0, result.err
    after = json.loads(run("eval", str(file), "--model", str(out), "--json").out)
    assert after["loss"] < before["loss"]
