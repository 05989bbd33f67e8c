"""`fastgpt train`: it learns, what it writes can be used, and what goes wrong is one line."""

import json
import os
import resource
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from commands import assert_one_line_error

import fastgpt
from fastgpt import accounting, cli, corpus, trainer

from .runs import CONTEXT, at_step, log_of

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


def test_bug_a_run_of_one_step_learned_nothing(inputs: list[str], run, tmp_path: Path) -> None:
    """It was all warm-up, whose first step has a learning rate of zero."""
    assert run("train", *inputs, "--steps", "1", "--every", "1", "--out", str(tmp_path / "out")).code == 0
    before, after = (entry["eval_loss"] for entry in log_of(tmp_path / "out") if "eval_loss" in entry)
    assert after < before


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


def test_rounded_weights_are_refused_and_leave_no_folder(inputs, run, tmp_path: Path, capsys) -> None:
    folder, out = tmp_path / "int8", tmp_path / "out"
    model = fastgpt.GPT2LMHeadModel.from_pretrained(inputs[2])
    fastgpt.quantize(model).save_pretrained(folder)
    shutil.copytree(inputs[2], folder, ignore=lambda *_: os.listdir(folder), dirs_exist_ok=True)
    arguments = [inputs[0], "--model", str(folder), *inputs[3:], "--out", str(out)]
    capsys.readouterr()  # transformers' progress
    assert_one_line_error(run("train", *arguments), 1, "has int8 weights, which get no gradient")
    assert not out.exists()


def test_without_accelerate_it_says_what_to_install(inputs, run, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(cli, "find_spec", lambda name: None)
    assert_one_line_error(run("train", *inputs, "--out", str(tmp_path)), 2, "pip install accelerate")
