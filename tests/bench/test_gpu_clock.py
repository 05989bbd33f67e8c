"""What a GPU takes for a call is timed without the launches, on a stand-in for a GPU and the time that it lives in."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import pytest
import torch

from fastgpt.bench import machine, operations

CLEAR_S, LAUNCH_S = 64e-6, 4e-6


class Gpu:
    """Its work starts when it is launched and what came before is done. Times in s."""

    def __init__(self) -> None:
        self.host = self.done = 0.0
        self.current = torch.device("cuda:0")
        self.n_cleared = 0

    def launch(self, seconds: float, launch_s: float = LAUNCH_S) -> None:
        self.host += launch_s
        self.done = max(self.done, self.host) + seconds

    def synchronize(self, *_: Any) -> None:
        self.host = max(self.host, self.done)

    @contextmanager
    def device(self, device: torch.device) -> Iterator[None]:
        before, self.current = self.current, device
        yield
        self.current = before

    def event(self, **_: Any) -> "Event":
        return Event(self)

    def memory(self, *_: Any, **__: Any) -> "Memory":
        return Memory(self)


class Event:
    def __init__(self, gpu: Gpu):
        self.gpu = gpu

    def record(self) -> None:
        assert self.gpu.current == DEVICE
        self.gpu.launch(0.0)
        self.time = self.gpu.done

    def elapsed_time(self, end: "Event") -> float:
        return 1000 * (end.time - self.time)


class Memory:
    def __init__(self, gpu: Gpu):
        self.gpu = gpu

    def zero_(self) -> None:
        self.gpu.launch(CLEAR_S)
        self.gpu.n_cleared += 1


# The second one, because events are recorded on the current one.
DEVICE = torch.device("cuda:1")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    gpu = Gpu()
    for place, name, stand_in in (
        (torch, "empty", gpu.memory),
        (torch.cuda, "Event", gpu.event),
        (torch.cuda, "device", gpu.device),
        (torch.cuda, "synchronize", gpu.synchronize),
        (time, "perf_counter", lambda: gpu.host),
        (machine, "peak_growth", lambda *_: (0, "")),
    ):
        monkeypatch.setattr(place, name, stand_in)
    return gpu


def calling(gpu: Gpu, n_kernels: int, kernel_s: float, launch_s: float) -> Callable[[], None]:
    def call() -> None:
        for _ in range(n_kernels):
            gpu.launch(kernel_s, launch_s)

    return call


@pytest.mark.parametrize(("n_kernels", "kernel_s", "launch_s"), [(3, 5e-6, 50e-6), (1, 3e-3, 5e-6), (1, 2e-6, 5e-6)])
def test_bug_a_gpu_was_timed_while_it_waited_for_launches(
    gpu: Gpu, n_kernels: int, kernel_s: float, launch_s: float
) -> None:
    """A backward pass of a few small kernels takes Python longer than the GPU: a launch every 50 us."""
    figures = operations.time_call(calling(gpu, n_kernels, kernel_s, launch_s), DEVICE, 0.1)
    assert figures["median_s"] == pytest.approx(n_kernels * kernel_s, rel=1e-3)
    assert figures["launch_s"] == pytest.approx(n_kernels * launch_s)
    assert gpu.host < 0.2  # the budget, and what it takes to know how many runs that is


def test_every_run_finds_the_cache_empty(gpu: Gpu) -> None:
    n_cleared = []
    operations.time_call(lambda: n_cleared.append(gpu.n_cleared) or gpu.launch(1e-5), DEVICE, 0.01)
    timed = n_cleared[7:]  # after the first call, that for the memory, and five for the launch
    assert len(timed) > 20
    assert all(earlier < later for earlier, later in pairwise(timed))
