"""Where the command line writes: standard output, files and notes, also where one of them cannot be written."""

import io
import json
import os
import subprocess
import sys

import pytest
import transformers
from commands import assert_one_line_error, in_process
from rich.console import Console

import fastgpt
from fastgpt import cli, terminal
from fastgpt.progress import progress_bar

needs_dev_full = pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")


def test_characters_that_the_output_cannot_hold_are_escaped(monkeypatch: pytest.MonkeyPatch) -> None:
    output = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", output)
    with pytest.raises(SystemExit, match="0"):
        cli.main(["generate", "Juli\u00e9t:", "--seed", "1", "--max-new-tokens", "3"])
    assert output.buffer.getvalue().startswith(b"Juli\\xe9t:")  # type: ignore[attr-defined]


@pytest.mark.parametrize("option", ["--json", "--plot", "--profile"])
def test_bench_checks_where_results_go_before_it_runs(run, option: str, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("fastgpt.bench.run_series", lambda *_: pytest.fail("it ran"))
    for file in (tmp_path, tmp_path / "none" / "file"):
        assert_one_line_error(run("bench", "--model", "demo", option, str(file)), 2, option, str(file.parent))


def test_bench_refuses_one_file_for_two_results(run, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("fastgpt.bench.run_series", lambda *_: pytest.fail("it ran"))
    files = "--json", str(tmp_path / "result"), "--plot", str(tmp_path / "." / "result")
    assert_one_line_error(run("bench", "--model", "demo", *files), 2, "--json", "--plot", "result")


def test_bench_writes_its_files_when_nobody_reads_its_tables(run, tmp_path, monkeypatch) -> None:
    def render(*_) -> None:
        raise BrokenPipeError

    monkeypatch.setattr("fastgpt.bench.run_series", lambda *_: [{"schema": 1}])
    monkeypatch.setattr("fastgpt.bench.render", render)
    file = tmp_path / "result.json"
    assert run("bench", "--model", "demo", "--json", str(file)).code == 1
    assert json.loads(file.read_text()) == {"schema": 1}


@needs_dev_full
def test_bench_shows_its_tables_when_a_file_cannot_be_written(run, monkeypatch) -> None:
    monkeypatch.setattr("fastgpt.bench.run_series", lambda *_: [{"schema": 1}])
    monkeypatch.setattr("fastgpt.bench.render", lambda *_: print("a table"))
    result = run("bench", "--model", "demo", "--json", "/dev/full")
    assert (result.code, result.out) == (1, "a table\n")


def test_nothing_is_written_before_a_call_turned_out_to_be_valid(run, monkeypatch) -> None:
    monkeypatch.setattr(fastgpt.GPT2LMHeadModel, "forward", lambda *_, **__: 1 / 0)
    assert_one_line_error(run("generate", "hi", "--max-new-tokens", "2"), 1, "division")


def test_json_has_no_numbers_without_end(run) -> None:
    assert json.loads(terminal.strict_json({"a": [float("nan"), 1.5, {"b": float("-inf")}]})) == {
        "a": [None, 1.5, {"b": None}]
    }
    result = run("params", "gpt2", "--bandwidth", "1e308", "--batch", "1000000", "--json")
    json.loads(result.out, parse_constant=pytest.fail)


@needs_dev_full
def test_output_that_cannot_be_written() -> None:
    with open("/dev/full", "w") as full:
        full_disk = in_process(["params", "gpt2", "--json"], stdout=full)
    closed_pipe = in_process(["params", "gpt2", "--json"], stdout=subprocess.PIPE)
    assert closed_pipe.stdout is not None
    closed_pipe.stdout.close()
    assert closed_pipe.wait(120) == 1
    assert closed_pipe.stderr.read() == ""  # type: ignore[union-attr]
    assert full_disk.wait(120) == 1
    assert full_disk.stderr.read() == "error: [Errno 28] No space left on device\n"  # type: ignore[union-attr]


def in_shell(redirection: str, *arguments: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = ["sh", "-c", f'exec "$@" {redirection}', "sh", sys.executable, "-m", "fastgpt", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


@pytest.mark.skipif(os.name != "posix", reason="needs a POSIX shell")
def test_closed_standard_output() -> None:
    done = in_shell(">&-", "params", "gpt2")
    assert (done.returncode, done.stderr) == (0, "")


@needs_dev_full
def test_bug_notes_that_cannot_be_written_fail_the_work() -> None:
    done = in_shell("2>/dev/full", "generate", "ROMEO:", "--max-new-tokens", "3", "--json")
    assert done.returncode == 0
    assert json.loads(done.stdout)["n_new_tokens"] == 3
    assert in_shell("2>/dev/full", "params", "gpt2", "--nonsense").returncode == 2


def test_only_one_bar_is_drawn_at_a_time() -> None:
    """At each checkpoint of a training run, transformers drew a bar across the run's own."""
    was_enabled = transformers.logging.is_progress_bar_enabled()
    transformers.logging.enable_progress_bar()
    try:
        with progress_bar(Console(file=io.StringIO(), force_terminal=True)):
            assert not transformers.logging.is_progress_bar_enabled()
        assert transformers.logging.is_progress_bar_enabled()
    finally:
        if not was_enabled:
            transformers.logging.disable_progress_bar()
