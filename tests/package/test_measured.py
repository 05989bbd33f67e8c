"""The table of measurements that `auto` follows: written by `fastgpt doctor --measure`, read once, ignored if unfit."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fastgpt_kernels
import pytest
import torch
from fastgpt_kernels import OPERATIONS
from fastgpt_kernels.common.precision import float32_products, tf32_is_allowed
from interpreter import only_interpreted, shuffled_grid
from paths import ROOT

from fastgpt import bench, cli, measured, ops
from fastgpt.accounting import shapes
from fastgpt.bench import operations
from fastgpt.bench.against_torch import PRECISIONS

GPU = torch.device("cuda")
EXPECTED = ("torch", "torch's products in float32 are expected to be faster")
KERNEL = ("triton", "kernel available")
# What a process on a machine with a GPU of this name decides, without and under torch.compile.
FRESH = """
import json, torch, fastgpt_kernels
from fastgpt import ops
fastgpt_kernels._fault = lambda device: None
fastgpt_kernels.architecture = lambda device: "sm_90"
torch.cuda.get_device_name = lambda device: "Test GPU/1"

def traced(x):
    return x + 1 if ops.explain("gelu_mlp", "cuda", torch.float32)[0] == "triton" else x

operations = fastgpt_kernels.OPERATIONS
choices = {name: [ops.explain(name, "cuda", dtype) for dtype in (torch.float32, torch.bfloat16)] for name in operations}
compiled = torch.compile(traced, backend="eager", fullgraph=True)(torch.zeros(1)).item()
print(json.dumps([choices, compiled]))
"""


@pytest.fixture(autouse=True)
def _simulated_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A GPU on which kernels run, and an empty cache folder."""
    monkeypatch.setattr(fastgpt_kernels, "architecture", lambda device: "sm_90")
    monkeypatch.setattr(fastgpt_kernels, "_fault", lambda device: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Test GPU/1")
    monkeypatch.setattr(measured, "_known", {})
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def table(**seconds: tuple[float, float]) -> dict[str, Any]:
    """A table of this machine. seconds: of the kernel's two passes in float32, by operation; torch takes one second."""
    rows = [
        {"operation": name, "precision": "float32", "pass": passed, "torch_s": 1.0, "kernel_s": taken}
        for name, both in seconds.items()
        for passed, taken in zip(("forward", "forward+backward"), both, strict=True)
    ]
    return {**measured.machine(GPU), "rows": rows}


def place() -> Path:
    return measured._path("Test GPU/1")


def in_float32(operation: str) -> tuple[str, str]:
    return ops.explain(operation, GPU, torch.float32)


# --- what auto does -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("taken", "backend", "reason"),
    [
        ((0.5, 0.75), "triton", "measured: its kernel takes 0.75 of torch's time, forward+backward"),
        ((1.0, 0.5), "triton", "measured: its kernel takes 1.00 of torch's time, forward"),
        ((1.5, 0.5), "torch", "measured: its kernel takes 1.50 of torch's time, forward"),
        ((0.5, 2.0), "torch", "measured: its kernel takes 2.00 of torch's time, forward+backward"),
    ],
)
def test_a_kernel_runs_where_neither_pass_is_slower(taken: tuple[float, float], backend: str, reason: str) -> None:
    measured.write(table(gelu_mlp=taken, layer_norm=taken))
    assert in_float32("gelu_mlp") == in_float32("layer_norm") == (backend, reason)
    assert in_float32("causal_attention") == EXPECTED
    assert ops.explain("gelu_mlp", GPU, torch.bfloat16) == ops.explain("gelu_mlp", GPU) == KERNEL
    assert measured.known(GPU).note == str(place())
    with ops.backend("triton"):
        assert in_float32("layer_norm") == ("triton", "asked for by name")


def test_tf32_is_measured_by_itself() -> None:
    measured.write(table(gelu_mlp=(0.5, 0.5)))
    with float32_products(tf32=True):
        assert in_float32("gelu_mlp") == ("torch", "torch's products in tf32 are expected to be faster")
        assert in_float32("layer_norm") == KERNEL
    assert in_float32("gelu_mlp")[0] == "triton"


def test_a_table_that_ships_counts_until_this_machine_has_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "shipped.json"
    other = {**table(gelu_mlp=(3.0, 3.0)), "gpu": "another"}
    shipped = [table(gelu_mlp=(0.5, 0.5), layer_norm=(2.0, 2.0)), other]
    file.write_text(json.dumps({"expected_in_torch": {"gelu_mlp": ["float32"]}, "tables": shipped}))
    monkeypatch.setattr(measured, "SHIPPED", file)
    assert (in_float32("gelu_mlp")[0], in_float32("layer_norm")[0]) == ("triton", "torch")
    measured.write(table(gelu_mlp=(4.0, 4.0)))
    assert (in_float32("gelu_mlp")[0], in_float32("layer_norm")[0]) == ("torch", "torch")


def test_what_ships_is_read() -> None:
    shipped = json.loads(measured.SHIPPED.read_text())
    assert set(shipped["expected_in_torch"]) <= set(OPERATIONS)
    for one in shipped["tables"]:
        assert measured._subject(one)
        assert measured._choices(one)
    for operation in OPERATIONS:
        assert in_float32(operation) == (EXPECTED if operation in ("causal_attention", "gelu_mlp") else KERNEL)
    assert measured.known(GPU).note == "none: fastgpt doctor --measure times every operation here"


def fresh_process() -> tuple[dict[str, list[list[str]]], float]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    finished = subprocess.run([sys.executable, "-c", FRESH], env=environment, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    return json.loads(finished.stdout)


def test_a_fresh_process_follows_it() -> None:
    choices, compiled = fresh_process()
    assert (choices["gelu_mlp"], choices["layer_norm"]) == ([list(EXPECTED), list(KERNEL)], [list(KERNEL)] * 2)
    assert compiled == 0.0
    measured.write(table(gelu_mlp=(0.5, 0.5), layer_norm=(2.0, 2.0)))
    choices, compiled = fresh_process()
    assert [backend for backend, _ in choices["gelu_mlp"]] == ["triton", "triton"]
    assert [backend for backend, _ in choices["layer_norm"]] == ["torch", "triton"]
    assert compiled == 1.0


def test_it_is_read_once_and_never_for_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    reads, read = [], measured._read
    monkeypatch.setattr(measured, "_read", lambda device: reads.append(device) or read(device))
    x = torch.ones(2, 4)
    ops.layer_norm(x, x[0], x[0])
    ops.explain("gelu_mlp", GPU)
    assert reads == []
    for _ in range(3):
        in_float32("gelu_mlp")
        ops.explain("layer_norm", GPU, torch.bfloat16)
    assert reads == [GPU]


# --- files that are no table ----------------------------------------------------------------------------------------

ROW = {"operation": "gelu_mlp", "precision": "float32", "pass": "forward", "torch_s": 1.0, "kernel_s": 0.5}
SUBJECT = {"gpu": "Test GPU/1", "torch": "2", "triton": "3"}
UNFIT: dict[str, bytes] = {
    "empty": b"",
    "cut": b'{"gpu": "Test',
    "not UTF-8": b"\xff\xfe",
    "a list": b"[]",
    "a number": b"7",
    "too deep": b"[" * 100_000,
    "no rows": json.dumps(SUBJECT).encode(),
    "rows that are none": json.dumps({**SUBJECT, "rows": 3}).encode(),
    "a row that is none": json.dumps({**SUBJECT, "rows": ["gelu_mlp"]}).encode(),
    **{
        f"{field} {value!r}": json.dumps({**SUBJECT, "rows": [{**ROW, field: value}]}).encode()
        for field, value in [("torch_s", 0), ("torch_s", "1"), ("kernel_s", float("nan")), ("kernel_s", -1.0),
                             ("kernel_s", None), ("kernel_s", 10**400), ("operation", [])]
    },
}  # fmt: skip


@pytest.mark.parametrize("content", UNFIT)
def test_a_file_that_is_no_table_is_ignored_and_told(content: str) -> None:
    place().parent.mkdir(parents=True)
    place().write_bytes(UNFIT[content])
    assert in_float32("gelu_mlp") == EXPECTED
    note = measured.known(GPU).note
    assert note.startswith(f"ignored: {place()} is no table (")
    assert note.endswith("): run fastgpt doctor --measure")
    assert "\n" not in note


def test_a_folder_in_its_place_is_ignored_and_told() -> None:
    place().mkdir(parents=True)
    assert in_float32("gelu_mlp") == EXPECTED
    assert measured.known(GPU).note.startswith("ignored: ")


@pytest.mark.parametrize("field", ["gpu", "torch", "triton"])
def test_a_table_of_something_else_is_ignored_and_told(field: str) -> None:
    place().parent.mkdir(parents=True)
    place().write_text(json.dumps({**table(gelu_mlp=(0.5, 0.5)), field: "another"}))
    assert in_float32("gelu_mlp") == EXPECTED
    note = measured.known(GPU).note
    assert note.startswith(f"ignored: {place()} is of gpu ")
    assert f"{field} another" in note


# --- how it is written ----------------------------------------------------------------------------------------------


def test_a_table_is_written_whole_or_not_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    measured.write(table(gelu_mlp=(0.5, 0.5)))

    def stop(file: Path, target: Path) -> None:
        assert json.loads(file.read_text())["rows"]
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", stop)
    with pytest.raises(OSError, match="No space left"):
        measured.write(table(gelu_mlp=(2.0, 2.0)))
    assert list(place().parent.iterdir()) == [place()]
    assert in_float32("gelu_mlp")[0] == "triton"


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Any, str, str]]:
    """The command, whose diagnosis prints nothing because no model runs on the simulated GPU."""
    monkeypatch.setattr(cli, "device_and_dtype", lambda device: (torch.device(device), torch.float32))
    monkeypatch.setattr(cli.checks, "diagnose", lambda device: {"parity": {"passed": True}})
    monkeypatch.setattr(cli.checks, "render", lambda diagnosis, console: None)

    def run_command(*arguments: str) -> tuple[Any, str, str]:
        with pytest.raises(SystemExit) as exited:
            cli.main(["doctor", *arguments])
        told = capsys.readouterr()
        return exited.value.code, told.out, told.err

    return run_command


def test_without_a_gpu_nothing_is_measured(run: Callable[..., tuple[Any, str, str]]) -> None:
    code, out, err = run("--measure", "--device", "cpu")
    assert (code, out) == (1, "")
    assert err == "error: doctor --measure needs a GPU: it times the kernels that run there\n"


def test_a_folder_that_cannot_be_written_is_told_before_the_work(
    run: Callable[..., tuple[Any, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "measure_against_torch", lambda *_: pytest.fail("it ran"))
    monkeypatch.setenv("XDG_CACHE_HOME", __file__)
    code, out, err = run("--measure", "--device", "cuda")
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert err.startswith(f"error: no table can be written to {__file__}/fastgpt (")
    assert err.endswith("): set XDG_CACHE_HOME to a folder of yours\n")


@pytest.mark.parametrize("environment", [{}, {"XDG_CACHE_HOME": "cache"}])
def test_bug_without_a_home_a_table_goes_to_the_current_folder(
    environment: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a container whose user has no entry in /etc/passwd."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("XDG_CACHE_HOME")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    with pytest.raises(OSError, match="no absolute path: set XDG_CACHE_HOME"):
        measured.check_writable()
    assert list(tmp_path.iterdir()) == []


@only_interpreted
def test_every_operation_is_checked_timed_and_written(
    run: Callable[..., tuple[Any, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the interpreter; the stand-in for a clock lets a call take two seconds where it launches kernels, else one."""
    cases, checked, rounded = operations.cases, [], []

    def on_the_cpu(shape: Any, n_batch: int, n_tokens: int, device: torch.device, dtype: torch.dtype) -> Any:
        return cases(shape, 1, n_tokens, torch.device("cpu"), dtype)

    def time_call(call: Callable[[], Any], device: torch.device, budget_s: float) -> dict[str, float]:
        rounded.append(tf32_is_allowed())
        with shuffled_grid(0) as launched:
            call()
        return {"median_s": 2.0 if launched else 1.0}

    check = operations.check
    monkeypatch.setitem(shapes.PRESETS, "tiny", operations.TINY["tiny"])
    monkeypatch.setattr(operations, "cases", on_the_cpu)
    monkeypatch.setattr(operations, "check", lambda case: checked.append(case.operation) or check(case))
    monkeypatch.setattr(operations, "time_call", time_call)
    code, out, err = run("--measure", "--device", "cuda", "--model", "tiny")
    assert (code, out) == (0, "")
    assert err.endswith(f"wrote {place()}\n")
    assert checked == 3 * list(OPERATIONS)
    assert rounded == [precision == "tf32" for precision in PRECISIONS for _ in range(4 * len(OPERATIONS))]
    assert not tf32_is_allowed()

    written = json.loads(place().read_text())
    assert (written["model"], written["batch"], written["tokens"]) == ("tiny", 4, 32)
    assert [(row["operation"], row["precision"], row["pass"]) for row in written["rows"]] == [
        (operation, precision, passed)
        for precision in PRECISIONS
        for operation in OPERATIONS
        for passed in ("forward", "forward+backward")
    ]
    assert {(row["torch_s"], row["kernel_s"]) for row in written["rows"]} == {(1.0, 2.0)}
    for operation in OPERATIONS:
        assert ops.explain(operation, GPU, torch.bfloat16)[0] == "torch"


def test_nothing_is_written_where_a_kernel_is_wrong(
    run: Callable[..., tuple[Any, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    case = operations.Case("gelu_mlp", (), {}, (0, 0), (0, 0))
    monkeypatch.setattr(operations, "cases", lambda *_: [case])
    monkeypatch.setattr(operations, "check", lambda case: "gelu_mlp: result 0 errs by 1, allowed 0")
    monkeypatch.setattr(operations, "time_call", lambda *_: pytest.fail("it was timed"))
    code, out, err = run("--measure", "--device", "cuda")
    told = "error: gelu_mlp: result 0 errs by 1, allowed 0 in float32: nothing was timed"
    assert (code, out, err.strip()) == (1, "", told)
    assert not place().exists()


def test_an_unknown_model_is_one_line(run: Callable[..., tuple[Any, str, str]]) -> None:
    code, _, err = run("--measure", "--device", "cuda", "--model", "gpt2-xxl")
    assert (code, err.strip().count("\n")) == (1, 0)
    assert "unknown model 'gpt2-xxl'" in err
