"""The stream that owns a workspace's memory and its graphs, and how calls on other streams take turns with it."""

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any
from weakref import WeakSet

import torch

# torch hands out the streams of a GPU in turn, and the 33rd is the first again.
_STREAMS_OF_TORCH = 32
_owned: WeakSet[Any] = WeakSet()
# One capture at a time in a process, as torch asks for.
_capturing = threading.Lock()


class OwnStream:
    """A stream of a GPU that no other workspace has; on a CPU, nothing.

    Memory that is allocated `inside` belongs to it, so that it may be freed at any time: whoever gets it next comes
    after the calls, for which the stream has waited. Graphs are captured on it, because one that torch chooses lies on
    the GPU that captured first, and because torch frees the workspaces that cuBLAS has on a graph's stream with the
    graph, though other graphs of that stream still use them (pytorch issue 193402).
    """

    def __init__(self, device: torch.device):
        self.device = device
        self._stream: Any = None
        if device.type == "cuda":
            taken = {(stream.device, stream.cuda_stream) for stream in _owned}
            candidates = (torch.cuda.Stream(device) for _ in range(_STREAMS_OF_TORCH))
            self._stream = next((x for x in candidates if (x.device, x.cuda_stream) not in taken), None)
            if self._stream is None:
                raise RuntimeError(
                    f"{_STREAMS_OF_TORCH} models keep memory on {device}: free some by fastgpt.release(model)"
                )
            _owned.add(self._stream)

    def inside(self) -> AbstractContextManager[Any]:
        """Work goes to this stream, on its GPU."""
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    def come_first(self) -> None:
        """What the caller's stream does next waits for what this stream was given."""
        if self._stream is not None:
            torch.cuda.current_stream(self.device).wait_stream(self._stream)

    def come_after(self) -> None:
        """What this stream does next waits for what the caller's stream was given."""
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self.device))

    @contextmanager
    def capture(self, graph: Any) -> Iterator[None]:
        """Work goes into a graph. Raises as torch does where something in it cannot be captured."""
        # torch empties caches of the current GPU and waits for it before it changes to the stream.
        on_stream = torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local")
        with _capturing, torch.cuda.device(self.device), on_stream:
            yield
