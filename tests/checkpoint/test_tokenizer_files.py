"""A damaged tokenizer is refused in one line that names the file."""

import json
import shutil
import time
from pathlib import Path

import pytest
from models import tiny_config

import fastgpt
from fastgpt.checkpoint.headers import MAX_TOKENIZER_BYTES, CheckpointError
from fastgpt.checkpoint.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def pristine(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("tokenizer") / "sound"
    fastgpt.load_demo()[1].save_pretrained(directory)
    return directory


@pytest.fixture
def saved(pristine: Path, tmp_path: Path) -> Path:
    return shutil.copytree(pristine, tmp_path / "model")


def test_sound_tokenizer(saved: Path) -> None:
    assert load_tokenizer(str(saved))("ROMEO:").input_ids == fastgpt.load_demo()[1]("ROMEO:").input_ids


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("text", ["", "{", "[]", "3", "\\udcff", '{"a": 1, "a": 2}', '{"a": "\\ud800"}'])
def test_files_that_are_no_json_object(name: str, text: str, saved: Path) -> None:
    (saved / name).write_bytes(text.encode())
    with pytest.raises(CheckpointError, match=rf"^\S*{name}: [^\n]+$"):
        load_tokenizer(str(saved))


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        *[("tokenizer.json", key, value) for key in ("model", "added_tokens", "version") for value in (3, "x", {})],
        *[("tokenizer.json", key, [3]) for key in ("pre_tokenizer", "decoder", "normalizer", "post_processor")],
        *[("tokenizer_config.json", "tokenizer_class", value) for value in (3, [], {})],
        *[("tokenizer_config.json", "added_tokens_decoder", value) for value in (3, [1], {"x": 1})],
        ("tokenizer_config.json", "eos_token", 3),
        ("tokenizer_config.json", "eos_token", [[]]),
    ],
)
def test_fields_of_a_wrong_type_are_harmless_or_told(name: str, key: str, value: object, saved: Path) -> None:
    file = saved / name
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}))
    told = ""
    try:
        assert load_tokenizer(str(saved))("ROMEO:").input_ids
    except CheckpointError as error:
        told = str(error)
    assert not told or str(file) in told
    assert "\n" not in told


def test_sizes_beyond_reason_are_refused_at_once(saved: Path) -> None:
    with (saved / "tokenizer.json").open("ab") as file:
        file.truncate(4 * MAX_TOKENIZER_BYTES)
    start = time.process_time()
    with pytest.raises(CheckpointError, match=rf"tokenizer.json: larger than {MAX_TOKENIZER_BYTES} bytes"):
        load_tokenizer(str(saved))
    assert time.process_time() - start < 1


def test_no_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=str(tmp_path)):
        load_tokenizer(str(tmp_path))


def test_bug_a_model_without_a_tokenizer_made_every_prompt_empty(tmp_path: Path) -> None:
    """transformers makes a tokenizer without a vocabulary of the configuration alone."""
    fastgpt.GPT2LMHeadModel(tiny_config()).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=f"^{tmp_path}: holds no tokenizer: save one there"):
        load_tokenizer(str(tmp_path))
