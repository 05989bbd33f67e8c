"""Cooperative launches: every program is a thread, and one thread runs at a time."""

import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder, TensorHandle, interpreter_builder

# Deadlock: in this many turns per program, none has arrived at a barrier or ended.
_MAX_IDLE_TURNS = 50


class DeadlockError(RuntimeError):
    """Every live program polls a barrier, and no arrival can come."""


class _AbandonedError(BaseException):
    """Ends the thread of a waiting program after another one has failed."""


class _Program(threading.Thread):
    """One program. `resume` runs it to its next `wait` or to its end."""

    def __init__(self, index: tuple[int, int, int], body: Callable[[], None]):
        super().__init__(daemon=True)
        self.index, self.body = index, body
        self.failure: BaseException | None = None
        self._may_run, self._has_stopped = threading.Semaphore(0), threading.Semaphore(0)
        self._abandoned = self.ended = False

    def run(self) -> None:
        self._may_run.acquire()
        try:
            if not self._abandoned:
                self.body()
        except BaseException as error:
            self.failure = error
        self.ended = True
        self._has_stopped.release()

    def resume(self) -> None:
        self._may_run.release()
        self._has_stopped.acquire()

    def wait(self) -> None:
        """Let another program run; called by the program itself."""
        self._has_stopped.release()
        self._may_run.acquire()
        if self._abandoned:
            raise _AbandonedError

    def abandon(self) -> None:
        self._abandoned = True
        self.resume()
        self.join()


class _Grid:
    """Collects the programs of a launch and then interleaves them."""

    def __init__(self, executor: GridExecutor, order: random.Random):
        self.executor, self.order, self.launch = executor, order, executor.fn
        self.index: tuple[int, int, int] = (0, 0, 0)
        self.n_programs, self.n_arrivals = 0, 0
        self.programs: list[_Program] = []

    def collect(self, **arguments: Any) -> None:
        self.programs.append(_Program(self.index, lambda: self.launch(**arguments)))
        if len(self.programs) == self.n_programs:
            self.executor.fn = self.launch
            self._run()

    def _run(self) -> None:
        live = list(self.programs)
        for program in live:
            program.start()
        n_idle_turns = 0
        try:
            while live:
                program, n_arrivals = self.order.choice(live), self.n_arrivals
                interpreter_builder.grid_idx = program.index
                program.resume()
                if program.failure is not None:
                    raise program.failure
                if program.ended:
                    live.remove(program)
                n_idle_turns = 0 if program.ended or self.n_arrivals > n_arrivals else n_idle_turns + 1
                if n_idle_turns > _MAX_IDLE_TURNS * len(live):
                    raise DeadlockError(f"{len(live)} of {self.n_programs} programs wait forever")
        finally:
            for program in self.programs:
                if not program.ended:
                    program.abandon()


@contextmanager
def cooperative_grid(seed: int) -> Iterator[None]:
    """Run launches whose programs wait for each other by polling with atomic additions of zero.

    At each poll, the seed decides whether another program runs or the same one goes on. So a program that does not wait
    long enough reads values that are not written yet, or overwrites values that others need. Raises DeadlockError when
    all programs wait for an arrival that cannot come.
    """
    set_extents, set_index = InterpreterBuilder.set_grid_dim, InterpreterBuilder.set_grid_idx
    add, launch = InterpreterBuilder.create_atomic_rmw, GridExecutor.__call__
    order = random.Random(seed)
    grids: list[_Grid] = []

    def launch_together(executor: GridExecutor, *args: Any, **kwargs: Any) -> None:
        grids.append(_Grid(executor, order))
        try:
            launch(executor, *args, **kwargs)
        finally:
            grids.pop()

    def take_over(builder: InterpreterBuilder, x: int, y: int, z: int) -> None:
        # After this, the executor only calls its function once per program.
        set_extents(builder, x, y, z)
        grids[-1].n_programs = x * y * z
        grids[-1].executor.fn = grids[-1].collect

    def note_index(builder: InterpreterBuilder, x: int, y: int, z: int) -> None:
        set_index(builder, x, y, z)
        grids[-1].index = x, y, z

    def arrive_or_wait(
        builder: InterpreterBuilder, operation: Any, pointers: TensorHandle, value: TensorHandle, *rest: Any
    ) -> TensorHandle:
        if np.any(value.data):
            grids[-1].n_arrivals += 1
        elif order.random() < 0.5:
            program = threading.current_thread()
            assert isinstance(program, _Program)
            program.wait()
        return add(builder, operation, pointers, value, *rest)

    hooks = {"set_grid_dim": take_over, "set_grid_idx": note_index, "create_atomic_rmw": arrive_or_wait}
    with mock.patch.multiple(InterpreterBuilder, **hooks), mock.patch.object(GridExecutor, "__call__", launch_together):
        yield
