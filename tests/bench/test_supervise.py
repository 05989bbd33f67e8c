"""The supervisor of `python -m benchmarks gpu` survives what it measures, in processes of its own."""

import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from benchmarks.gpu import run as gpu_run
from benchmarks.gpu import supervise
from benchmarks.gpu.run import Part, Run
from benchmarks.gpu.supervise import OutOfTime, Supervisor
from benchmarks.report import records
from fastgpt.bench.parity import ParityError


@pytest.fixture
def supervisor(tmp_path: Path) -> Iterator[Supervisor]:
    stop_at = time.monotonic() + 600
    supervisor = Supervisor(gpu_run.dry(), stop_at, tmp_path / "result.json", {"seconds": {}}, print)
    yield supervisor
    supervisor.close()


def written(supervisor: Supervisor) -> dict[str, Any]:
    return json.loads(supervisor.file.read_text())


# Steps are functions of a module, because a worker gets them by name.


def three_parts(run: Run) -> Iterator[Part]:
    yield Part("first", partial(int, 1))
    yield Part("second", partial(int, 2))
    yield Part("third", partial(len, run.result["known"]))


def slow_part(run: Run) -> Iterator[Part]:
    yield Part("fast", partial(int, 1))
    yield Part("slow", partial(time.sleep, 600))


def bad_parts(run: Run) -> Iterator[Part]:
    """One that is wrong, one that hangs with a process of its own, one that exits, one that takes all memory."""
    yield Part("wrong", wrong_part)
    yield Part("hangs", partial(subprocess.run, [sys.executable, "-c", HANGS]), 2.0)
    yield Part("exits", partial(os._exit, 7))
    yield Part("takes all memory", partial(torch.empty, 2**55))
    yield Part("right", partial(int, 1))


def wrong_part() -> None:
    raise ParityError("result 0 errs by 1\nand more, at last the cause")


HANGS = "import time; time.sleep(4321.5)"


def breaks_between_parts(run: Run) -> Iterator[Part]:
    yield Part("first", partial(int, 1))
    raise RuntimeError("out of memory while the next case was made")


def dies_at_once(run: Run) -> Iterator[Part]:
    os._exit(3)
    yield


def loses_the_gpu(run: Run) -> Iterator[Part]:
    yield Part("breaks", lost_gpu)
    yield Part("next", os.getpid)


def lost_gpu() -> None:
    """As a kernel that reads outside its memory: from then on every call of this process fails."""

    def fail(*arguments: Any) -> None:
        raise torch.AcceleratorError("an illegal memory access was encountered")

    supervise._clean = fail
    fail()


def breaks_torch(run: Run) -> Iterator[Part]:
    yield Part("breaks", broken_torch)
    yield Part("next", os.getpid)


def broken_torch() -> None:
    """As a CUDA graph whose capture failed: from then on torch frees no memory of this process."""

    def fail() -> None:
        raise RuntimeError("captures_underway.empty() INTERNAL ASSERT FAILED")

    torch.compiler.reset = fail


def process(run: Run) -> Iterator[Part]:
    yield Part("process", os.getpid)


def test_a_step_goes_on_with_what_the_result_does_not_have(supervisor: Supervisor) -> None:
    supervisor.result |= {"step": {"first": "as it was"}, "known": {"a": 1, "b": 2}}
    supervisor.take({"step": three_parts})
    assert written(supervisor)["step"] == {"first": "as it was", "second": 2, "third": 2}
    assert list(written(supervisor)["seconds"]) == ["step"]


def test_time_that_runs_out_stops_a_part_and_leaves_no_trace_of_it(supervisor: Supervisor) -> None:
    supervisor.take({"warm": process})
    supervisor.stop_at = time.monotonic() + 2
    with pytest.raises(OutOfTime):
        supervisor.take({"step": slow_part})
    assert time.monotonic() - supervisor.stop_at < 5
    assert written(supervisor)["step"] == {"fast": 1}
    assert "step" not in written(supervisor)["seconds"]


def test_what_fails_hangs_exits_or_is_too_large_costs_its_own_part(supervisor: Supervisor) -> None:
    of_others = hanging()
    supervisor.take({"step": bad_parts})
    parts = written(supervisor)["step"]
    faults = {name: part["fault"] for name, part in parts.items() if part != 1}
    assert parts["right"] == 1
    assert faults["wrong"] == "ParityError: result 0 errs by 1"
    assert parts["wrong"]["traceback"].startswith("Traceback")
    assert parts["wrong"]["traceback"].endswith("and more, at last the cause\n")
    assert faults["hangs"] == "stopped after 2 s"
    assert faults["exits"] == "its process ended with 7"
    assert "allocate" in faults["takes all memory"] or "memory" in faults["takes all memory"]
    assert len(records.faults(supervisor.result)) == 4
    assert list(written(supervisor)["seconds"]) == ["step"]
    assert hanging() <= of_others  # what a part started ends with it


def hanging() -> set[int]:
    """The processes that a part started which hangs, here or in another run of the tests."""
    return {
        process.pid for process in psutil.process_iter(["cmdline"]) if HANGS in " ".join(process.info["cmdline"] or [])
    }


def test_a_step_that_breaks_between_its_parts_is_a_fault(supervisor: Supervisor) -> None:
    supervisor.take({"step": breaks_between_parts})
    assert written(supervisor)["step"] == {
        "first": 1,
        "after first": written(supervisor)["step"]["after first"],
    }
    assert "out of memory while the next case was made" in records.faults(supervisor.result)[0]


def test_a_step_that_kills_every_process_is_given_up(supervisor: Supervisor) -> None:
    supervisor.take({"step": dies_at_once})
    assert "died twice" in written(supervisor)["step"]["start"]["fault"]


def test_a_lost_gpu_costs_its_part_and_its_process(supervisor: Supervisor) -> None:
    supervisor.take({"before": process})
    supervisor.take({"step": loses_the_gpu})
    found = written(supervisor)
    assert "illegal memory access" in found["step"]["breaks"]["fault"]
    assert found["step"]["next"] != found["before"]["process"]


def test_bug_a_part_that_breaks_torch_cost_all_parts_after_it(supervisor: Supervisor) -> None:
    supervisor.take({"before": process})
    supervisor.take({"step": breaks_torch})
    found = written(supervisor)
    assert found["step"].keys() == {"breaks", "next"}
    assert found["step"]["next"] != found["before"]["process"]


def test_steps_side_by_side_have_processes_of_their_own(supervisor: Supervisor) -> None:
    supervisor.extent = dataclasses.replace(supervisor.extent, n_processes=2)
    supervisor.take({"one": process, "two": process})
    found = written(supervisor)
    assert len({found["one"]["process"], found["two"]["process"], os.getpid()}) == 3
