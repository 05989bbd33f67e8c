"""Faults put into a checkpoint: loading and `verify` agree about each, in one line, in bounded time and memory.

A part of the faults is tried always, all of them with --faults.
"""

import json
import random
import re
import resource
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from models import tiny_config
from safetensors.torch import load_file, save_file

import fastgpt
from fastgpt.checkpoint.headers import CheckpointError
from fastgpt.verify import verify_checkpoint

MOST_SECONDS, MOST_BYTES = 5, 200e6
VALUES = [
    None,
    "x",
    "",
    -1,
    0,
    3.5,
    True,
    [],
    {},
    [1, "a"],
    {"a": 1},
    10**9,
    10**30,
    float("nan"),
    [[[]]],
    "torch.int8",
]
MORE_KEYS = [
    *("num_labels", "id2label", "label2id", "dtype", "torch_dtype", "attn_implementation", "_attn_implementation"),
    *("quantization_config", "pruned_heads", "architectures", "transformers_weights", "n_inner", "problem_type"),
    *(
        "is_decoder",
        "is_encoder_decoder",
        "output_attentions",
        "output_hidden_states",
        "return_dict",
        "use_return_dict",
    ),
    *("chunk_size_feed_forward", "auto_map", "layer_types", "max_length", "temperature", "hidden_size", "name_or_path"),
    *("loss_type", "gradient_checkpointing", "rope_scaling", "text_config", "experts_implementation", "_commit_hash"),
]
SPECIAL = {
    "dtype": ["int8", "bool", "complex64", "float8_e4m3fn", "float16", "float64", "torch.bfloat16", "float99"],
    "attn_implementation": ["eager", "sdpa", "flash_attention_2", "flash_attention_4", "flex_attention", "fastgpt"],
    "quantization_config": [{"quant_method": method} for method in ("gptq", "awq", "bitsandbytes", "fp8", "none")],
    "architectures": [[head] for head in ("GPT2Model", "GPT2DoubleHeadsModel", "LlamaForCausalLM", "GPT2", 3)],
    "activation_function": ["relu", "gelu_python", "quick_gelu", "silu", "linear", "xielu"],
    "n_layer": [1, 3, 10**7],
    "n_head": [1, 64, 3],
}


def config_fault(key: str, value: Any) -> Callable[[Path], None]:
    def damage(directory: Path) -> None:
        file = directory / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}))

    return damage


def text_fault(name: str, text: str | bytes) -> Callable[[Path], None]:
    def damage(directory: Path) -> None:
        (directory / name).write_bytes(text if isinstance(text, bytes) else text.encode())

    return damage


def byte_fault(name: str, seed: int) -> Callable[[Path], None]:
    """A few bytes near the front changed."""

    def damage(directory: Path) -> None:
        file, draw = directory / name, random.Random(seed)
        content = bytearray(file.read_bytes())
        for _ in range(draw.randint(1, 3)):
            content[draw.randrange(min(len(content), 3000))] = draw.choice(b'0123456789{}[],:"\\x' + bytes([255, 0]))
        file.write_bytes(content)

    return damage


def tensor_fault(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def damage(directory: Path) -> None:
        tensors = load_file(directory / "model.safetensors")
        change(tensors)
        save_file(tensors, directory / "model.safetensors")

    return damage


def sparse(name: str) -> Callable[[Path], None]:
    def damage(directory: Path) -> None:
        with (directory / name).open("ab") as file:
            file.truncate(2**40)

    return damage


def folder(name: str) -> Callable[[Path], None]:
    def damage(directory: Path) -> None:
        (directory / name).unlink(missing_ok=True)
        (directory / name).mkdir()

    return damage


def all_faults() -> Iterator[tuple[str, Callable[[Path], None]]]:
    keys = sorted(tiny_config().to_dict().keys() | set(MORE_KEYS))
    for key in keys:
        for value in [*VALUES, *SPECIAL.get(key, [])]:
            yield f"config {key}={str(value)[:30]}", config_fault(key, value)
    for name in ("config.json", "generation_config.json", "model.safetensors"):
        for seed in range(40):
            yield f"bytes of {name} {seed}", byte_fault(name, seed)
        for text in ("", "{", "[]", "null", '{"a": 1, "a": 2}', '{"\\ud800": 1}', b"\xff\xfe", "[" * 10**5):
            yield f"{name} is {text[:9]!r}", text_fault(name, text)
        yield f"{name} is a folder", folder(name)
        yield f"{name} is sparse", sparse(name)
    yield "another file is sparse", sparse("notes.bin")
    yield "an adapter that does not parse", text_fault("adapter_config.json", "{")
    yield (
        "labels without end",
        text_fault("config.json", json.dumps({"id2label": {str(i): "x" for i in range(150_000)}})),
    )
    yield "100 MB of generation_config.json", text_fault("generation_config.json", b" " * 10**8 + b"{}")
    key = "transformer.h.0.mlp.c_fc.weight"
    for value in (float("nan"), float("inf"), 1e30):
        yield f"{key} holds {value}", tensor_fault(lambda tensors, value=value: tensors[key][0].fill_(value))
    for dtype in (torch.int8, torch.bool, torch.complex64, torch.float8_e4m3fn, torch.float16, torch.float64):
        yield (
            f"{key} is {dtype}",
            tensor_fault(lambda tensors, dtype=dtype: tensors.update({key: tensors[key].to(dtype)})),
        )
    yield "no tensor", tensor_fault(dict.clear)
    yield "a strange tensor", tensor_fault(lambda tensors: tensors.update(x=torch.full((2,), float("nan"))))
    for field in (
        "temperature",
        "max_new_tokens",
        "eos_token_id",
        "num_beams",
        "cache_implementation",
        "transformers_version",
    ):
        for value in VALUES:
            text = json.dumps({"_from_model_config": True, field: value})
            yield f"generation {field}={value}", text_fault("generation_config.json", text)


FAULTS = list(all_faults())


@pytest.fixture(scope="module")
def pristine(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("faults") / "sound"
    torch.manual_seed(0)
    transformers.GPT2LMHeadModel(tiny_config(n_embd=32, n_head=2, vocab_size=50)).save_pretrained(directory)
    return directory


def architecture_of(directory: Path) -> Any:
    """The class that a user would load it with."""
    try:
        named = json.loads((directory / "config.json").read_text())["architectures"][0]
        return getattr(fastgpt, named) if named.startswith("GPT2") else fastgpt.GPT2LMHeadModel
    except Exception:
        return fastgpt.GPT2LMHeadModel


@torch.no_grad()
def why_not_usable(directory: Path) -> str | None:
    try:
        model = architecture_of(directory).from_pretrained(directory)
    except CheckpointError as error:
        return str(error)
    try:
        model(torch.zeros(1, 1, dtype=torch.int64))
    except Exception as error:
        return f"forward: {error}"
    return None


def n_peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def assert_fault_is_told(name: str, damage: Callable[[Path], None], directory: Path) -> None:
    damage(directory)
    start = time.process_time()
    reason = why_not_usable(directory)
    report = verify_checkpoint(directory)
    assert time.process_time() - start < MOST_SECONDS, name
    assert (not report.problems) == (reason is None), (name, reason, report.problems)
    for line in [*report.problems, *([reason] if reason else [])]:
        assert "\n" not in line
        assert reason is None or reason.startswith("forward") or str(directory) in line, (name, line)


def faults_to_try(config: pytest.Config) -> list[tuple[str, Callable[[Path], None]]]:
    return FAULTS if config.getoption("--faults") else random.Random(0).sample(FAULTS, 60)


def test_loading_and_verify_agree_about_every_fault(pristine: Path, tmp_path: Path, pytestconfig) -> None:
    assert len(FAULTS) > 500
    assert not verify_checkpoint(pristine).problems
    before = n_peak_bytes()
    failures = []
    for number, (name, damage) in enumerate(faults_to_try(pytestconfig)):
        directory = shutil.copytree(pristine, tmp_path / str(number))
        try:
            assert_fault_is_told(name, damage, directory)
        except Exception as error:
            failures.append(f"{name}: {type(error).__name__}: {error}")
        shutil.rmtree(directory)
    assert not failures, "\n".join(failures)
    assert n_peak_bytes() - before < MOST_BYTES


@pytest.mark.parametrize(
    "name",
    [
        "generation_config.json is '{'",
        "config dtype=int8",
        "config dtype=complex64",
        "100 MB of generation_config.json",
        "labels without end",
    ],
)
def test_what_transformers_takes_is_refused(name: str, pristine: Path, tmp_path: Path) -> None:
    directory = shutil.copytree(pristine, tmp_path / "damaged")
    dict(FAULTS)[name](directory)
    with pytest.raises(CheckpointError, match=re.escape(str(directory))):
        fastgpt.GPT2LMHeadModel.from_pretrained(directory)


# --- fuzzed configurations ------------------------------------------------------------------------------------------


def any_json(draw: random.Random, depth: int = 2) -> Any:
    kinds = ["special", "special", "integer", "number", "text", *(["list", "object"] if depth else [])]
    match draw.choice(kinds):
        case "special":
            return draw.choice(VALUES)
        case "integer":
            return draw.choice([1, -1]) * draw.randrange(10 ** draw.randint(0, 20))
        case "number":
            return draw.choice([1e-300, -0.0, 1e300, draw.random(), float("inf"), float("-inf")])
        case "text":
            return "".join(draw.choices("ab_0.\x00é💥\ud800", k=draw.randint(0, 5)))
        case "list":
            return [any_json(draw, depth - 1) for _ in range(draw.randint(0, 3))]
        case _:
            return {str(any_json(draw, 0)): any_json(draw, depth - 1) for _ in range(draw.randint(0, 3))}


def fuzzed(fields: dict[str, Any], draw: random.Random) -> str:
    """config.json with some of its fields, or of others that transformers knows, changed; a few in their text."""
    fields = dict(fields)
    for _ in range(draw.randint(1, 4)):
        key = draw.choice([*fields, *MORE_KEYS, "model_type", "surprise"])
        if draw.random() < 0.2:
            fields.pop(key, None)
        else:
            fields[key] = draw.choice([*VALUES, *SPECIAL.get(key, []), *[any_json(draw) for _ in range(20)]])
    text = json.dumps(fields)
    if draw.random() < 0.1:
        place = draw.randrange(len(text))
        text = text[:place] + draw.choice('{}[],:"0e-x') + text[place + draw.randint(0, 3) :]
    return text


def test_fuzzed_configurations_raise_documented_errors_only(pristine: Path, tmp_path: Path, pytestconfig) -> None:
    """`from_pretrained` raises CheckpointError, `count_parameters` ValueError, each one line with the file."""
    directory = shutil.copytree(pristine, tmp_path / "fuzzed")
    file = directory / "config.json"
    fields, failures, n_refused, before = json.loads(file.read_text()), [], 0, n_peak_bytes()
    n_cases = 10_000 if pytestconfig.getoption("--faults") else 150
    for seed in range(n_cases):
        text = fuzzed(fields, random.Random(seed))
        file.write_text(text)
        start = time.process_time()
        for use, documented in (
            (fastgpt.GPT2LMHeadModel.from_pretrained, CheckpointError),
            (fastgpt.count_parameters, ValueError),
        ):
            try:
                use(directory)
            except documented as error:
                n_refused += 1
                message = str(error)
                if "\n" in message or str(directory) not in message:
                    failures.append(f"{seed}: {message}")
            except Exception as error:
                failures.append(f"{seed}: {use.__qualname__}: {type(error).__name__}: {error} from {text}")
        if time.process_time() - start > MOST_SECONDS:
            failures.append(f"{seed}: took too long: {text}")
    assert not failures, f"{len(failures)}:\n" + "\n".join(failures[:20])
    assert n_cases / 4 < n_refused < 2 * n_cases
    assert n_peak_bytes() - before < MOST_BYTES
