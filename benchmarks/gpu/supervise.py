"""Runs the steps of `benchmarks gpu` in processes of their own, and survives what they do.

A worker process takes a step and says when each part starts and what it found. Where a part hangs, exits or leaves the
GPU unusable, the worker is killed or dies, the part is recorded as a fault, and a new worker goes on after it. The
result is written after every part, by the one process that measures nothing.
"""

import contextlib
import gc
import json
import os
import signal
import time
import traceback
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib import import_module
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from threading import Lock
from typing import Any

import torch

from fastgpt.bench import machine
from fastgpt.messages import first_line

from .run import Extent, Part, Run, Step

# A worker imports torch, transformers and triton, and a step may load a model before its first part.
_START_S = 120.0
# Of a fault's traceback, whose end says the most.
_MOST_CHARACTERS = 8000


class OutOfTime(Exception):
    """The time is used up: no further part may start."""


class _Unusable(Exception):
    """A part has left torch or the GPU unusable to its process."""


# --- in the worker --------------------------------------------------------------------------------------------------


def _serve(connection: Connection, extent: Extent) -> None:
    """Take steps until the connection ends. Every answer is (what, name of the part, value)."""
    os.setsid()  # what a part starts is killed with this process
    signal.signal(signal.SIGINT, signal.default_int_handler)  # A shell's `&` ignores it, for what a part starts too.
    gc.freeze()  # What was imported is not looked through again, which takes 0.2 s for every row that is timed.
    if extent.is_dry:
        torch.set_num_threads(1)  # more gain nothing at this size, and cost much where other processes are busy
        import_module("interpreter")  # of the tests: it mends triton's own where that computes otherwise than a GPU
    run = Run(extent, {}, lambda text: connection.send(("says", text, None)))
    with contextlib.suppress(EOFError, BrokenPipeError):
        while True:
            step, run.result, found = connection.recv()
            last = "start"
            try:
                for part in step(run):
                    last, measure, limit_s = Part(*part)
                    if last not in found:
                        connection.send(("starts", last, limit_s))
                        connection.send(("ends", last, _measured(measure)))
                        _clean(extent.device)
            except (torch.AcceleratorError, _Unusable):
                raise
            except Exception as error:  # of the step itself, between two parts
                connection.send(("ends", f"after {last}", _fault(error)))
            connection.send(("done", None, None))


def _measured(measure: Callable[[], Any]) -> Any:
    try:
        return measure()
    except Exception as error:  # A kernel, a compiler or a driver may fail in more ways than can be named.
        return _fault(error)


def _fault(error: Exception) -> dict[str, str]:
    where = traceback.extract_tb(error.__traceback__)[-1]
    return {
        "fault": first_line(error),
        "where": f"{Path(where.filename).name}:{where.lineno}",
        # A compiler begins with a place in the source and ends with what is wrong there.
        "traceback": "".join(traceback.format_exception(error))[-_MOST_CHARACTERS:],
    }


def _clean(device: torch.device) -> None:
    """Free what a part has left. Raises _Unusable where that fails, as after a kernel's fault or a broken capture."""
    try:
        gc.collect()
        torch.compiler.reset()  # compiled graphs hold memory
        if device.type == "cuda":
            torch.cuda.empty_cache()
            machine.synchronize(device)
    except Exception as error:
        raise _Unusable from error


# --- in the command -------------------------------------------------------------------------------------------------


class _Worker:
    """A process that takes steps. It is started when it is first needed."""

    def __init__(self, extent: Extent):
        # A process that has touched a GPU cannot be forked. Without one, copies of a server that has imported
        # everything start at once.
        context = get_context("forkserver") if extent.is_dry else get_context("spawn")
        if extent.is_dry:
            context.set_forkserver_preload(["transformers", "triton", "fastgpt", __name__])
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, extent), daemon=True)
        self.process.start()
        theirs.close()  # or its end could not be seen

    def kill(self) -> None:
        """End it and all that it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)  # type: ignore[arg-type]
        self.process.kill()  # before it had a process group of its own
        self.process.join()
        self.connection.close()


@dataclass
class Supervisor:
    """Takes steps one after the other or several at once. file: of the result. stop_at: in time.monotonic()."""

    extent: Extent
    stop_at: float
    file: Path
    result: dict[str, Any]
    say: Callable[[str], None]
    _worker: _Worker | None = None
    _lock: Lock = field(default_factory=Lock)

    def close(self) -> None:
        if self._worker is not None:
            self._worker.kill()
            self._worker = None

    def take(self, steps: Mapping[str, Step]) -> None:
        """Run steps by name without the parts that the result already has. Raises OutOfTime.

        Several run side by side, each in a process of its own, so that their times count nothing, unless the extent
        allows one process alone. Only a step with all its parts is listed under "seconds".
        """
        if len(steps) <= 1 or self.extent.n_processes == 1:
            for name, step in steps.items():
                self._take_one(name, step)
            return
        with ThreadPoolExecutor(min(len(steps), self.extent.n_processes)) as pool:
            pending = [pool.submit(self._take_alone, name, step) for name, step in steps.items()]
        for one in pending:
            one.result()

    @property
    def seconds_left(self) -> float:
        return self.stop_at - time.monotonic()

    def _take_alone(self, name: str, step: Step) -> None:
        alone = Supervisor(self.extent, self.stop_at, self.file, self.result, self.say, _lock=self._lock)
        try:
            alone._take_one(name, step)
        finally:
            alone.close()

    def _take_one(self, name: str, step: Step) -> None:
        start = time.monotonic()
        has_progress = True
        while True:
            if self.seconds_left <= 0:
                raise OutOfTime
            self._worker = self._worker or _Worker(self.extent)
            n_before = len(self.result.get(name, {}))
            if self._take_on(self._worker, name, step):
                break
            self.close()
            had_progress, has_progress = has_progress, len(self.result.get(name, {})) > n_before
            if not has_progress and not had_progress:  # It dies before its first part, whatever it is given.
                self._write(name, "start", {"fault": "the process died twice before a part had started"})
                break
        with self._lock:
            self.result["seconds"][name] = round(time.monotonic() - start, 1)
            self._save()

    def _take_on(self, worker: _Worker, name: str, step: Step) -> bool:
        """Whether the worker came to the end of the step; otherwise it is of no more use. Raises OutOfTime."""
        with self._lock:
            known = json.loads(json.dumps(self.result))
        part, limit_s = None, _START_S
        started = time.monotonic()
        try:
            worker.connection.send((step, known, list(known.get(name, {}))))
            while True:
                left_s = min(started + limit_s - time.monotonic(), self.seconds_left)
                if not worker.connection.poll(max(0.0, left_s)):
                    if self.seconds_left <= 0:
                        self.close()
                        raise OutOfTime
                    self._write(name, part or "start", {"fault": f"stopped after {limit_s:.0f} s"})
                    return False
                what, word, value = worker.connection.recv()
                if what == "done":
                    return True
                if what == "says":
                    self.say(word)
                elif what == "starts":
                    part, limit_s, started = word, value, time.monotonic()
                    self.say(f"  {name}, {part} (at most {limit_s:.0f} s)")
                else:
                    part, limit_s, started = None, _START_S, time.monotonic()
                    self._write(name, word, value)
        except (EOFError, ConnectionError):
            worker.process.join()
            if part is not None:
                self._write(name, part, {"fault": f"its process ended with {worker.process.exitcode}"})
            return False

    def _write(self, name: str, part: str, value: Any) -> None:
        if isinstance(value, dict) and "fault" in value:
            self.say(f"  {name}, {part}: {value['fault']}")
        with self._lock:
            self.result.setdefault(name, {})[part] = value
            self._save()

    def _save(self) -> None:
        """Replace the whole file at once, so that it is valid whenever the process ends."""
        unfinished = self.file.with_suffix(".part")
        unfinished.write_text(json.dumps(self.result, indent=1))
        unfinished.replace(self.file)
