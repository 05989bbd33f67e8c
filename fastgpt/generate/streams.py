"""The CUDA stream that owns a workspace's memory and graphs, and how it is ordered with the streams of callers."""

import gc
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any
from weakref import WeakSet

import torch

# torch hands out 32 streams of each priority and GPU in turn: the 33rd is the first again. Of the ordinary ones, a
# program that makes more, such as one for each request, would soon work on a workspace's.
_STREAMS_OF_TORCH, _PRIORITY = 32, -1
_owned: WeakSet[Any] = WeakSet()
# torch allows one capture at a time in a process.
_capturing = threading.Lock()


class OwnStream:
    """A stream of a GPU that no other workspace has; on a CPU, nothing.

    Memory allocated `inside` belongs to this stream, so it may be freed at any time: the stream has waited for the
    calls that used it, and its next owner comes after them. Graphs are captured on this stream for two reasons. The
    stream that torch would choose lies on the GPU that captured first. And when torch frees a graph, it frees the
    workspaces of cuBLAS on the graph's stream, even if other graphs of that stream still use them (pytorch issue
    193402). That is harmless where those workspaces were allocated during a capture: they then lie in the memory of
    the graphs, which only later captures use. So nothing but captures may call cuBLAS on this stream.

    All graphs allocate in one pool. What one of them computes there is gone when the next one replays.
    n_bytes: the size of the pool.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self._stream: Any = None
        self._caller: Any = None  # the caller's stream where work was queued last
        self._pool: Any = None
        self.n_bytes = 0
        if device.type == "cuda":
            taken = {(stream.device, stream.cuda_stream) for stream in _owned}
            candidates = (torch.cuda.Stream(device, _PRIORITY) for _ in range(_STREAMS_OF_TORCH))
            self._stream = next((x for x in candidates if (x.device, x.cuda_stream) not in taken), None)
            if self._stream is None:
                raise RuntimeError(
                    f"{_STREAMS_OF_TORCH} models keep memory on {device}: free some by fastgpt.release(model)"
                )
            _owned.add(self._stream)
            self._pool = torch.cuda.graph_pool_handle()

    def inside(self) -> AbstractContextManager[Any]:
        """Work inside the block goes to this stream, on its GPU."""
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    def make_caller_wait(self) -> None:
        """Make the caller's stream wait for all work queued on this stream."""
        if self._stream is not None:
            self._caller = torch.cuda.current_stream(self.device)
            self._caller.wait_stream(self._stream)

    def follow(self) -> None:
        """Make the caller's stream wait for the one that the same call used before, where that was another.

        A caller who iterates over tokens may change streams between them, and leave the iterator to another thread.
        """
        if self._stream is not None and (current := torch.cuda.current_stream(self.device)) != self._caller:
            current.wait_stream(self._caller)
            self._caller = current

    def wait_for_caller(self) -> None:
        """Make this stream wait for all work that the call has queued on the caller's streams."""
        if self._stream is not None:
            self.follow()
            self._stream.wait_stream(self._caller)

    @property
    def can_record(self) -> bool:
        """Whether work can be recorded in graphs: not where torch keeps no memory, as for compute-sanitizer.

        It refuses to allocate in a capture then.
        """
        return self._stream is not None and "PYTORCH_NO_CUDA_MEMORY_CACHING" not in os.environ

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        """Record work in a graph, and return what replays it. Raises as `capture` does."""
        graph = torch.cuda.CUDAGraph()
        try:
            with self.capture(graph):
                n_bytes = torch.cuda.memory_reserved(self.device)
                work()
                self.n_bytes += torch.cuda.memory_reserved(self.device) - n_bytes
        except BaseException:
            # torch refuses a pool whose only graph is gone while cuBLAS still has its workspace there.
            self._pool = torch.cuda.graph_pool_handle()
            raise
        return graph.replay

    @contextmanager
    def capture(self, graph: Any) -> Iterator[None]:
        """Record the work inside the block in a graph. Raises torch's error for work that cannot be captured."""
        # Before it changes to the stream, torch waits for the current GPU and empties its caches.
        on_stream = torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local")
        with _capturing, _uncollected(), torch.cuda.device(self.device):
            torch.cuda.current_blas_handle()  # Makes it, which no capture allows, where this thread has none yet.
            with self.inside(), on_stream:  # After a capture that failed, torch does not change the stream back.
                yield


@contextmanager
def _uncollected() -> Iterator[None]:
    """Keep Python's collector from freeing anything inside the block: another graph, freed there, breaks a capture."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
