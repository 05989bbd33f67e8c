"""An interrupted run of `fastgpt train` continues bit for bit, from the newest checkpoint that is whole."""

import os
import pickle
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from commands import assert_one_line_error
from paths import ROOT

from fastgpt import train, trainer

from .runs import assert_same_model, at_step

KILLED = """
import os, signal
from fastgpt import cli, trainer

save = trainer.RunTrainer._save_rng_state
def save_or_die(self, folder):
    if self.state.global_step == 6:
        os.kill(os.getpid(), signal.SIGKILL)
    save(self, folder)
trainer.RunTrainer._save_rng_state = save_or_die
cli.main({arguments})
"""


def test_killed_while_it_saves_and_resumed_equals_the_whole_run(inputs, whole: Path, run, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ["train", *inputs, "--out", str(out)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", KILLED.format(arguments=arguments)]
    killed = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert {"checkpoint-4", "checkpoint-6"} <= {folder.name for folder in out.iterdir()}
    assert not (out / "model.safetensors").exists()
    resumed = run(*arguments, "--resume")
    assert resumed.code == 0, resumed.err
    assert "step 4 of 8" not in resumed.err
    assert "step 6 of 8" in resumed.err
    assert_same_model(out, whole)


@pytest.mark.parametrize(
    ("step", "recompute", "number", "code"), [(2, "norms", signal.SIGINT, 130), (5, "blocks", signal.SIGTERM, 143)]
)
def test_a_signal_saves_and_says_how_to_go_on(
    step: int, recompute: str, number: int, code: int, inputs, whole: Path, run, tmp_path: Path, monkeypatch
) -> None:
    """Ctrl-C, or a scheduler's. And whatever backward computes again, the result keeps every bit."""
    out, handler = tmp_path / "with space", signal.getsignal(number)  # of a background job SIGINT has none
    train, asked = trainer.RunTrainer.train, []

    def and_note(self: Any, **named: Any) -> Any:
        norms = getattr(self.model.config, "recompute_norms", False)
        output = train(self, **named)
        asked.append({"norms": norms, "blocks": self.model.transformer.gradient_checkpointing})
        return output

    with monkeypatch.context() as patch:
        patch.setattr(trainer.RunTrainer, "train", and_note)
        at_step(patch, step, lambda: signal.raise_signal(number))
        result = run("train", *inputs[1:], "--out", str(out), "--recompute", recompute, "--", inputs[0])
    assert asked == [{name: name == recompute for name in ("norms", "blocks")}]
    assert result.code == code
    assert signal.getsignal(number) is handler
    message = result.err.splitlines()[-1]
    assert message.startswith(f"error: interrupted and saved at step {step} of 8; to go on: fastgpt train ")
    assert not (out / "model.safetensors").exists()
    assert run(*shlex.split(message.partition("fastgpt ")[2])).code == 0
    assert_same_model(out, whole)


def test_a_second_ctrl_c_ends_it_at_once(inputs, run, tmp_path: Path, monkeypatch) -> None:
    at_step(monkeypatch, 3, lambda: [signal.raise_signal(signal.SIGINT) for _ in range(2)])
    result = run("train", *inputs, "--out", str(tmp_path / "out"))
    assert (result.code, result.err.splitlines()[-1]) == (130, "error: interrupted")
    assert [folder.name for folder in (tmp_path / "out").glob("checkpoint-*")] == ["checkpoint-2"]


def test_a_finished_run_is_resumed_by_saving_it_again(inputs, whole: Path, run, tmp_path: Path) -> None:
    """It may have been killed between its last checkpoint and its end."""
    kept = (whole / "model.safetensors").read_bytes()
    (whole / "model.safetensors").unlink()
    assert run("train", *inputs, "--out", str(whole), "--resume").code == 0
    assert (whole / "model.safetensors").read_bytes() == kept
    assert not (whole / "checkpoint-9").exists()


def test_a_run_is_resumed_with_its_own_options(inputs, whole: Path, run, tmp_path: Path) -> None:
    other_rate = run("train", *inputs, "--out", str(whole), "--resume", "--learning-rate", "0.02")
    assert_one_line_error(other_rate, 1, "learning_rate 0.01, not 0.02")
    assert run("train", *inputs, "--out", str(whole), "--resume", "--keep", "1").code == 0
    other = tmp_path / "other.txt"
    other.write_text("other words " * 2000)
    assert_one_line_error(run("train", str(other), *inputs[1:], "--out", str(whole), "--resume"), 1, "began with text")


def begun(out: Path, whole: Path, *checkpoints: str) -> list[str]:
    """Make `out` the folder of a run that reached checkpoints of `whole`. Returns the arguments that go on with it."""
    out.mkdir()
    for name in checkpoints:
        shutil.copytree(whole / name, out / name)
    shutil.copy(whole / "options.json", out)
    return ["--out", str(out), "--resume"]


def test_bug_a_checkpoint_that_is_not_whole_outlives_the_last_good_one(
    inputs, whole: Path, run, tmp_path: Path, monkeypatch
) -> None:
    """A run was killed while it saved step 8, and is interrupted at 7. The times are those after a clock's return."""
    arguments = begun(tmp_path / "out", whole, "checkpoint-6")
    broken = tmp_path / "out" / "checkpoint-8"
    broken.mkdir()
    shutil.copy(whole / "checkpoint-8" / "model.safetensors", broken)
    os.utime(broken, (2**32, 2**32))
    at_step(monkeypatch, 7, lambda: signal.raise_signal(signal.SIGINT))
    assert run("train", *inputs, *arguments, "--keep", "1").code == 130
    assert [folder.name for folder in (tmp_path / "out").glob("checkpoint-*")] == ["checkpoint-7"]


def test_bug_a_clock_that_was_put_back_costs_the_newest_checkpoint(inputs, whole: Path, run, tmp_path: Path) -> None:
    arguments = begun(tmp_path / "out", whole, "checkpoint-6")
    os.utime(tmp_path / "out" / "checkpoint-6", (2**32, 2**32))
    assert run("train", *inputs, *arguments, "--keep", "1").code == 0
    assert [folder.name for folder in (tmp_path / "out").glob("checkpoint-*")] == ["checkpoint-8"]


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"global_step": null}', '{"global_step": "six"}'])
def test_bug_a_damaged_state_of_a_checkpoint_stops_resuming(content: str, tmp_path: Path) -> None:
    for name, state in (("checkpoint-6", '{"global_step": 6}'), ("checkpoint-8", content)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "trainer_state.json").write_text(state)
    assert trainer.last_checkpoint(tmp_path) == tmp_path / "checkpoint-6"


@pytest.mark.parametrize("content", ["", "[]"])
def test_bug_damaged_options_are_an_error_without_a_name(
    content: str, inputs, whole: Path, run, tmp_path: Path
) -> None:
    arguments = begun(tmp_path / "out", whole)
    (tmp_path / "out" / "options.json").write_text(content)
    assert_one_line_error(run("train", *inputs, *arguments), 1, str(tmp_path / "out" / "options.json"), "JSON")


def test_bug_options_are_half_written_where_the_disk_is_full(inputs, run, tmp_path: Path, monkeypatch) -> None:
    def write_half(file: Path, text: str) -> None:
        with file.open("w") as stream:
            stream.write(text[: len(text) // 2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", write_half)
    result = run("train", *inputs, "--out", str(tmp_path / "out"))
    assert_one_line_error(result, 1, "No space left on device")
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.skipif(os.name != "posix", reason="needs locks of POSIX")
def test_bug_two_runs_write_into_one_folder(inputs, whole: Path, run, tmp_path: Path) -> None:
    arguments = begun(tmp_path / "out", whole, "checkpoint-6")
    with train.alone_in(tmp_path / "out"):
        assert_one_line_error(run("train", *inputs, *arguments), 1, f"another run writes into {tmp_path / 'out'}")
    with train.alone_in(tmp_path / "out"):
        pass


class _Planted:
    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def test_resuming_runs_no_code(inputs, whole: Path, run, tmp_path: Path) -> None:
    out, mark = tmp_path / "out", tmp_path / "code-was-run"
    (out / "checkpoint-6").mkdir(parents=True)
    for file in (whole / "checkpoint-6").iterdir():
        (out / "checkpoint-6" / file.name).write_bytes(file.read_bytes())
    for file in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"):
        (out / "checkpoint-6" / file).write_bytes(pickle.dumps(_Planted(mark), protocol=2))
    assert run("train", *inputs, "--out", str(out), "--resume").code == 1
    assert not mark.exists()
