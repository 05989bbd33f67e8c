"""`fastgpt train`: it learns, what it writes can be used, and a run that was broken off goes on bitwise."""

import json
import os
import pickle
import resource
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from commands import assert_one_line_error
from models import DATA, tiny_config
from paths import ROOT

import fastgpt
from fastgpt import accounting, cli, corpus, train, trainer

CONTEXT = 32
# 8 steps of 2 * 4 sequences; the 6th begins the second pass.
OPTIONS = ["--context", str(CONTEXT), "--steps", "8", "--batch", "4", "--accumulate", "2", "--every", "2"]
OPTIONS += ["--learning-rate", "0.01", "--seed", "3"]


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


def log_of(out: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def assert_same_model(out: Path, whole: Path) -> None:
    for file in ("model.safetensors", "config.json"):
        assert (out / file).read_bytes() == (whole / file).read_bytes()
    losses = [[entry.get("loss") or entry["eval_loss"] for entry in log_of(folder)] for folder in (out, whole)]
    assert losses[0] == losses[1]


def at_step(monkeypatch: pytest.MonkeyPatch, step: int, act: Callable[[], object]) -> None:
    """Do something at the end of a step, before anything is saved."""
    on_step_end = trainer.Report.on_step_end

    def and_act(self, args, state, *more, **named) -> None:
        on_step_end(self, args, state, *more, **named)
        if state.global_step == step:
            act()

    monkeypatch.setattr(trainer.Report, "on_step_end", and_act)


# --- a run ----------------------------------------------------------------------------------------------------------


def test_it_learns_and_stock_transformers_loads_the_result(whole: Path, run) -> None:
    losses = {entry["step"]: entry["eval_loss"] for entry in log_of(whole) if "eval_loss" in entry}
    assert list(losses) == [0, 2, 4, 6, 8]
    assert losses[8] < losses[0] - 0.2
    stock = transformers.AutoModelForCausalLM.from_pretrained(whole).eval()
    ours = fastgpt.GPT2LMHeadModel.from_pretrained(whole).eval()
    assert stock.config.use_cache
    ids = torch.arange(10)[None]
    torch.testing.assert_close(ours(ids).logits, stock(ids).logits)
    assert run("generate", "ROMEO:", "--model", str(whole), "--max-new-tokens", "4").code == 0
    assert sorted(folder.name for folder in whole.glob("checkpoint-*")) == ["checkpoint-6", "checkpoint-8"]
    assert (whole / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_the_validation_loss_is_that_of_eval(inputs: list[str], run, tmp_path: Path, monkeypatch) -> None:
    """The one of the model that is saved, on a text of its own; the others are trained on in order of their names."""
    monkeypatch.setattr(accounting, "peak_rate", lambda name: 1e12)
    for name, text in {"b.txt": "second " * 200, "a.txt": "first " * 200, "c.md": "no text"}.items():
        (tmp_path / name).write_text(text)
    measured, out = tmp_path / "c.md", tmp_path / "out"
    measured.write_text("What light through yonder window breaks?" * 5)
    options = ["--validation", str(measured), "--every", "3", "--out", str(out)]
    result = run("train", str(tmp_path), *inputs[1:], *options)
    assert result.code == 0
    assert "step 8 of 8: training loss" in result.err
    assert "MFU" in result.err
    window = ["--context", str(CONTEXT), "--stride", str(CONTEXT)]
    evaluated = json.loads(run("eval", str(measured), "--model", str(out), "--json", *window).out)
    entries = log_of(out)
    assert entries[-1]["eval_loss"] == pytest.approx(evaluated["loss"], rel=1e-6)
    assert f"validation loss {evaluated['loss']:.4f}" in result.out
    shape = accounting.shape_of(fastgpt.GPT2LMHeadModel.from_pretrained(out))
    flops = accounting.training_flops(shape, CONTEXT) / CONTEXT
    for entry in entries:
        if "loss" in entry:
            assert entry["mfu"] == pytest.approx(entry["tokens_per_s"] * flops / 1e12)


def test_sequences_are_packed_with_an_end_of_text_token_before_each_text() -> None:
    tokenizer = fastgpt.load_demo()[1]
    texts = ["ROMEO:\n" * 9, "JULIET:\n" * 9]
    ids = torch.cat([torch.tensor([tokenizer.eos_token_id, *tokenizer(text)["input_ids"]]) for text in texts])
    packed = corpus.pack(texts, tokenizer, 8, held_out=0.2)
    assert packed.training.shape[1] == 8
    assert torch.equal(torch.cat([packed.training.flatten(), packed.validation]), ids)
    n_sequences = len(ids) // 8
    assert len(packed.training) == n_sequences - round(0.2 * n_sequences)
    apart = corpus.pack(texts, tokenizer, 8, held_out=0.2, validation="ROMEO:")
    assert torch.equal(apart.training.flatten(), ids[: n_sequences * 8])
    assert apart.validation.tolist() == [tokenizer.eos_token_id, *tokenizer("ROMEO:")["input_ids"]]
    assert len({packed.digest(), apart.digest()}) == 2


def test_peak_rates_belong_to_whole_names() -> None:
    assert accounting.peak_rate("NVIDIA H200") == accounting.peak_rate("NVIDIA H100 80GB HBM3") == 989e12
    assert accounting.peak_rate("NVIDIA A100-SXM4-80GB") == 312e12
    assert accounting.peak_rate("NVIDIA L4") != accounting.peak_rate("NVIDIA L40S")
    assert accounting.peak_rate("NVIDIA GH200 480GB") is accounting.peak_rate("") is None


# --- broken off and resumed -----------------------------------------------------------------------------------------

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


# --- what goes wrong ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("every", [2, 40])
def test_a_loss_that_is_not_a_number_stops_it(every: int, inputs, run, tmp_path: Path, monkeypatch) -> None:
    """With 40, losses are looked at in step 8 for the first time, and Ctrl-C in step 5 asks for a checkpoint."""
    compute_loss = trainer.RunTrainer.compute_loss

    def spoilt(self, *call, **named):
        loss: Any = compute_loss(self, *call, **named)
        return loss * (float("nan") if self.state.global_step == 4 else 1)

    monkeypatch.setattr(trainer.RunTrainer, "compute_loss", spoilt)
    if every == 40:
        at_step(monkeypatch, 5, lambda: signal.raise_signal(signal.SIGINT))
    out = tmp_path / "out"
    result = run("train", *inputs, "--every", str(every), "--out", str(out))
    assert result.code == 1
    message = result.err.splitlines()[-1]
    assert message.startswith("error: the loss of step 5 is nan: training stopped")
    if every == 40:
        assert message.endswith("there is no checkpoint before it")
        assert not list(out.glob("checkpoint-*"))
    else:
        assert message.endswith(f"the last good checkpoint is {out / 'checkpoint-4'}")
        assert fastgpt.GPT2LMHeadModel.from_pretrained(out / "checkpoint-4").lm_head.weight.isfinite().all()


def test_weights_that_are_not_finite_are_not_saved(inputs, run, tmp_path: Path) -> None:
    result = run("train", *inputs, "--out", str(tmp_path / "out"), "--learning-rate", "1e38", "--every", "1")
    assert result.code == 1
    assert "not finite after step" in result.err or "the loss of step" in result.err
    for weights in (tmp_path / "out").glob("checkpoint-*"):
        assert all(p.isfinite().all() for p in fastgpt.GPT2LMHeadModel.from_pretrained(weights).parameters())


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.pt"])
def test_a_full_disk_is_one_line_and_keeps_the_last_checkpoint(
    file: str, inputs, whole: Path, run, tmp_path: Path, monkeypatch
) -> None:
    n_bytes, limits = (whole / "checkpoint-8" / file).stat().st_size, resource.getrlimit(resource.RLIMIT_FSIZE)
    at_step(monkeypatch, 3, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes - 1000, limits[1])))
    out = tmp_path / "out"
    try:
        result = run("train", *inputs, "--out", str(out))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert result.code == 1
    message = result.err.splitlines()[-1]
    assert message.startswith(f"error: {out / 'checkpoint-4'} could not be saved: ")
    assert message.endswith(f"the last good checkpoint is {out / 'checkpoint-2'}")
    assert not (out / "checkpoint-4").exists()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
@pytest.mark.parametrize(
    ("file", "words"),
    [
        ("log.jsonl", "the log could not be written: [Errno 28] No space left on device; the last good checkpoint is "),
        ("loss.png", "loss.png could not be drawn: [Errno 28] No space left on device; all else is saved"),
    ],
)
def test_bug_a_full_disk_is_an_error_without_a_name(
    file: str, words: str, inputs, run, tmp_path: Path, monkeypatch
) -> None:
    out = tmp_path / "out"
    at_step(monkeypatch, 3, lambda: [(out / file).unlink(missing_ok=True), (out / file).symlink_to("/dev/full")])
    result = run("train", *inputs, "--out", str(out))
    assert result.code == 1
    assert words in result.err.splitlines()[-1]
    assert (out / "model.safetensors").exists() == (file == "loss.png")


@pytest.mark.parametrize(
    ("content", "arguments", "words"),
    [
        (None, [], ["no file", "text.txt"]),
        (b"", [], ["text.txt is empty"]),
        (b"\xff\xfe", [], ["text.txt", "UTF-8"]),
        (b"too short", [], ["too short", "tokens", "64 are the least"]),
        (b"words " * 200, ["--validation", "nowhere.txt"], ["no file nowhere.txt"]),
        (b"words " * 200, ["--context", "49"], ["context", "[1, 48]"]),
        (b"words " * 200, ["--context", "1"], ["context must be 2 or more, not 1"]),
        (b"words " * 200, ["--steps", "0"], ["steps must be 1 or more, not 0"]),
        (b"words " * 200, ["--batch", "-3"], ["batch must be 1 or more, not -3"]),
        (b"words " * 200, ["--epochs", "nan"], ["epochs must be above 0", "nan"]),
        (b"words " * 200, ["--epochs", "1e308"], ["epochs must be above 0 and below 1e+09", "1e+308"]),
        (b"words " * 200, ["--learning-rate", "0"], ["learning_rate must be above 0"]),
        (b"words " * 200, ["--weight-decay", "nan"], ["weight_decay must be 0 or more"]),
        (b"words " * 200, ["--held-out", "1"], ["held_out must be above 0 and below 1"]),
        (b"words " * 200, ["--seed", "-1"], ["seed must be in"]),
        (b"words " * 200, ["--recompute", "all"], ["recompute must be one of nothing, norms, blocks, not 'all'"]),
        (b"words " * 200, ["--device", "tpu9"], ["tpu9"]),
    ],
)
def test_wrong_usage_is_one_line(content, arguments, words, inputs, run, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(trainer.RunTrainer, "train", lambda *_, **__: pytest.fail("it trained"))
    file, out = tmp_path / "text.txt", tmp_path / "out"
    if content is not None:
        file.write_bytes(content)
    result = run("train", str(file), *inputs[1:], "--out", str(out), *arguments)
    assert_one_line_error(result, 2, *words)
    assert not out.exists()


def test_folders_that_cannot_be_used(inputs, whole: Path, run, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert_one_line_error(run("train", *inputs, "--out", str(tmp_path / "file")), 2, "cannot be written")
    assert_one_line_error(run("train", *inputs, "--out", str(tmp_path / "file" / "out")), 2, "cannot be written")
    assert_one_line_error(run("train", *inputs, "--out", str(whole)), 2, "not empty", "--resume")
    assert_one_line_error(
        run("train", str(tmp_path / "out"), *inputs[1:], "--out", str(tmp_path / "out")), 2, "no file"
    )
    (tmp_path / "none").mkdir()
    assert_one_line_error(run("train", str(tmp_path / "none"), *inputs[1:], "--out", str(tmp_path / "out")), 2, "*.txt")


def test_several_processes_are_refused(inputs, run, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert_one_line_error(run("train", *inputs, "--out", str(tmp_path)), 1, "one process", "examples/ddp.py")


def test_without_accelerate_it_says_what_to_install(inputs, run, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(cli, "find_spec", lambda name: None)
    assert_one_line_error(run("train", *inputs, "--out", str(tmp_path)), 2, "pip install 'fastgpt[train]'")
