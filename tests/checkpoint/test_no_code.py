"""No command and no loader runs, or offers to run, Python code that a checkpoint brings."""

import ast
import builtins
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from models import HEADS
from paths import ROOT

import fastgpt
from fastgpt import accounting, cli, load
from fastgpt.bench import workloads
from fastgpt.verify import verify_checkpoint

AUTO_MAP = {
    "AutoConfig": "planted.PlantedConfig",
    "AutoModel": "planted.PlantedModel",
    "AutoModelForCausalLM": "planted.PlantedModel",
    "AutoTokenizer": ["planted.PlantedTokenizer", "planted.PlantedTokenizer"],
}
PLANTED = """
import transformers
open({mark!r}, "w").write(__file__)
class PlantedConfig(transformers.GPT2Config): model_type = "planted"
class PlantedModel(transformers.GPT2LMHeadModel): config_class = PlantedConfig
class PlantedTokenizer(transformers.PreTrainedTokenizerFast): pass
def generate(model, *args, **kwargs): return model
"""


class Checkpoint:
    """The demo with code beside it; with model_type "planted", only that code knows what it is."""

    def __init__(self, folder: Path, model_type: str):
        self.folder, self.mark = folder, folder.parent / "code-was-run"
        demo = Path(fastgpt.demo.__file__).parent
        shutil.copytree(demo, folder, ignore=shutil.ignore_patterns("*.py", "__pycache__"))
        (folder / "custom_generate").mkdir()
        for file in ("planted.py", "custom_generate/generate.py"):
            (folder / file).write_text(PLANTED.format(mark=str(self.mark)))
        self._change("config.json", model_type=model_type)
        self._change("generation_config.json", custom_generate=str(folder), trust_remote_code=True)
        self._change("tokenizer_config.json", tokenizer_class="PlantedTokenizer")

    def _change(self, file: str, **fields: Any) -> None:
        path = self.folder / file
        path.write_text(json.dumps(json.loads(path.read_text()) | fields | {"auto_map": AUTO_MAP}))


@pytest.fixture(params=["gpt2", "planted"])
def checkpoint(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Checkpoint:
    made = Checkpoint(tmp_path / "model", request.param)

    def ask(question: str = "") -> str:
        pytest.fail(f"a question was asked: {question}")

    monkeypatch.setattr(builtins, "input", ask)
    return made


BENCH = ["bench", "--workload=prefill", "--prompt-tokens=8", "--runs=5", "--baselines=hf-eager"]
COMMANDS: dict[str, list[str]] = {
    "generate": ["generate", "ROMEO:", "--max-new-tokens", "2", "--model"],
    "bench": [*BENCH, "--model"],
    "bench --random-weights": [*BENCH, "--random-weights", "--model"],
    "params": ["params"],
    "verify": ["verify"],
    "eval": ["eval", str(ROOT / "LICENSE"), "--model"],
    "train": ["train", str(ROOT / "LICENSE"), "--context=32", "--steps=1", "--out=OUT", "--model"],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_no_command_runs_it(command: str, checkpoint: Checkpoint, capsys: pytest.CaptureFixture[str]) -> None:
    words = [word.replace("OUT", str(checkpoint.folder.parent / "out")) for word in COMMANDS[command]]
    with pytest.raises(SystemExit) as exit_info:
        cli.main([*words, str(checkpoint.folder)])
    assert exit_info.value.code in (0, 1), capsys.readouterr().err
    assert not checkpoint.mark.exists()
    assert "trust_remote_code" not in "".join(capsys.readouterr())


def test_every_command_that_takes_a_checkpoint_is_tried() -> None:
    assert {words[0] for words in COMMANDS.values()} | {"doctor"} == {
        command.name or command.callback.__name__ for command in cli.app.registered_commands if command.callback
    }


LOADERS: dict[str, Callable[[Path], Any]] = {
    **{head: getattr(fastgpt, head).from_pretrained for head in HEADS},
    "count_parameters": fastgpt.count_parameters,
    "report": lambda folder: accounting.report(str(folder)),
    "load_model_and_tokenizer": lambda folder: load.load_model_and_tokenizer(str(folder)),
    "load_base": lambda folder: workloads.load_base(str(folder)),
    "verify_checkpoint": verify_checkpoint,
}


@pytest.mark.parametrize("loader", LOADERS)
def test_no_loader_runs_it(loader: str, checkpoint: Checkpoint) -> None:
    with suppress(ValueError):  # what it refuses is refused
        LOADERS[loader](checkpoint.folder)
    assert not checkpoint.mark.exists()


@pytest.mark.parametrize("head", HEADS)
def test_asking_for_it_is_refused(head: str, checkpoint: Checkpoint) -> None:
    with pytest.raises(ValueError, match="fastgpt runs none"):
        getattr(fastgpt, head).from_pretrained(checkpoint.folder, trust_remote_code=True)
    assert not checkpoint.mark.exists()


def test_a_yes_on_standard_input_changes_nothing(tmp_path: Path) -> None:
    checkpoint = Checkpoint(tmp_path / "model", "planted")
    command = [sys.executable, "-m", "fastgpt", *COMMANDS["generate"], str(checkpoint.folder)]
    finished = subprocess.run(command, cwd=ROOT, env=_environment(), input="y\n" * 9, capture_output=True, text=True)
    assert finished.returncode == 1
    assert finished.stdout == ""
    assert finished.stderr.splitlines()[-1].startswith(f"error: {checkpoint.folder}")
    assert not checkpoint.mark.exists()


def _environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": os.pathsep.join([".", "kernels", os.environ.get("PYTHONPATH", "")])}


@pytest.mark.parametrize("root", ["fastgpt", "benchmarks"])
def test_every_automatic_class_is_told_so(root: str) -> None:
    """transformers' Auto classes are the ones that import what `auto_map` names."""
    for file in (ROOT / root).rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                owner, method = ast.unparse(node.func.value), node.func.attr
                if owner.lower().startswith("auto") and method in ("from_pretrained", "from_config"):
                    given = {word.arg: ast.unparse(word.value) for word in node.keywords}
                    assert given.get("trust_remote_code") == "False", f"{file}:{node.lineno}"
