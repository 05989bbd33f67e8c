"""Every workspace has a stream of its own on its GPU: by stand-ins for torch's, and on GPUs where there are some."""

import gc
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from models import pair, tiny_config, token_ids

import fastgpt
from fastgpt.generate import kept, streams, view_weights, workspace
from fastgpt.generate.streams import OwnStream

GREEDY = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "max_new_tokens": 12}
N_GPUS = torch.cuda.device_count()


class Stream:
    """Stands in for torch's, of which there are 32 of a priority on a device."""

    n_made: ClassVar[Counter[int]] = Counter()

    def __init__(self, device: torch.device, priority: int = 0):
        self.device, self.cuda_stream, self.waited_for = device, (priority, Stream.n_made[priority] % 32), []
        Stream.n_made[priority] += 1

    def wait_stream(self, other: "Stream") -> None:
        self.waited_for.append(other)


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Any:
    """What was asked of torch.cuda, in order; the current stream is `cuda.current`."""
    asked = SimpleNamespace(calls=[], current=Stream(torch.device("cuda:1")))

    def note(name: str) -> Any:
        return lambda *args, **options: asked.calls.append((name, *args, *options.values())) or nullcontext()

    monkeypatch.setattr(streams, "_owned", type(streams._owned)())
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: asked.current)
    for name in ("stream", "device", "graph", "current_blas_handle"):
        monkeypatch.setattr(torch.cuda, name, note(name))
    pools = iter(range(99))
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: next(pools))
    return asked


def test_streams_lie_on_the_device_and_are_shared_by_nobody(cuda) -> None:
    device = torch.device("cuda:1")
    owners = [OwnStream(device) for _ in range(32)]
    taken = {owner._stream.cuda_stream for owner in owners if owner._stream.device == device}
    assert len(taken) == 32
    with pytest.raises(RuntimeError, match=r"32 models keep memory on cuda:1: free some by fastgpt.release\(model\)"):
        OwnStream(device)
    freed = owners.pop(3)._stream.cuda_stream
    assert OwnStream(device)._stream.cuda_stream == freed


def test_bug_a_program_that_makes_many_streams_worked_on_a_workspaces(cuda) -> None:
    device = torch.device("cuda:1")
    own = OwnStream(device)
    assert own._stream.cuda_stream not in {Stream(device).cuda_stream for _ in range(99)}


def test_callers_and_the_stream_wait_for_each_other(cuda) -> None:
    own = OwnStream(torch.device("cuda:1"))
    own.make_caller_wait()
    assert cuda.current.waited_for == [own._stream]
    own.follow()
    own.wait_for_caller()
    assert cuda.current.waited_for == [own._stream]
    assert own._stream.waited_for == [cuda.current]


@pytest.mark.parametrize("n_steps", [0, 1])
def test_bug_a_step_on_another_stream_did_not_wait_for_the_one_before(cuda, n_steps: int) -> None:
    """And what was queued on the first stream was not waited for at the end."""
    own, first, second = OwnStream(torch.device("cuda:1")), cuda.current, Stream(torch.device("cuda:1"))
    own.make_caller_wait()
    cuda.current = second
    for _ in range(n_steps):
        own.follow()
        assert second.waited_for == [first]
    own.wait_for_caller()
    assert second.waited_for == [first]
    assert own._stream.waited_for == [second]


def test_capture_is_on_the_stream_and_its_device_and_alone(cuda) -> None:
    own, graph = OwnStream(torch.device("cuda:1")), object()
    with own.capture(graph):
        assert streams._capturing.locked()
        graph_call = "graph", graph, own._pool, own._stream, "thread_local"
        on_stream = "stream", own._stream
        assert cuda.calls == [graph_call, ("device", own.device), ("current_blas_handle",), on_stream]
    assert not streams._capturing.locked()


def test_bug_a_failed_capture_left_its_stream_current(cuda, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.cuda.graph goes back to the stream before it only after the end of the capture, which raises."""

    @contextmanager
    def stream(one: Stream) -> Iterator[None]:
        before, cuda.current = cuda.current, one
        try:
            yield
        finally:
            cuda.current = before

    class Failing:
        def __init__(self, graph: Any, pool: Any, stream: Stream, capture_error_mode: str):
            self.stream = stream

        def __enter__(self) -> None:
            cuda.current = self.stream

        def __exit__(self, *_: Any) -> None:
            raise RuntimeError("operation failed due to a previous error during capture")

    own, caller = OwnStream(torch.device("cuda:1")), cuda.current
    monkeypatch.setattr(torch.cuda, "graph", Failing)
    monkeypatch.setattr(torch.cuda, "stream", stream)
    with pytest.raises(RuntimeError, match="during capture"), own.capture(object()):
        assert cuda.current is own._stream
    assert cuda.current is caller


@pytest.mark.parametrize("collects", [True, False])
def test_bug_the_collector_freed_another_graph_in_a_capture(cuda, collects: bool) -> None:
    """Which ends it with an error: pytorch 161037."""
    own = OwnStream(torch.device("cuda:1"))
    (gc.enable if collects else gc.disable)()
    try:
        with own.capture(object()):
            assert not gc.isenabled()
        assert gc.isenabled() == collects
    finally:
        gc.enable()


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, KeyboardInterrupt])
def test_bug_a_capture_that_was_tried_again_got_a_pool_that_torch_refuses(cuda, monkeypatch, error: Any) -> None:
    own = OwnStream(torch.device("cuda:1"))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=lambda: None))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 0)

    def fail() -> None:
        raise error

    with pytest.raises(error):
        own.record(fail)
    own.record(lambda: None)
    before, after = (call[2] for call in cuda.calls if call[0] == "graph")
    assert before != after == own._pool


def test_bug_torch_refused_to_capture_where_it_keeps_no_memory(cuda, monkeypatch: pytest.MonkeyPatch) -> None:
    own = OwnStream(torch.device("cuda:1"))
    assert own.can_record
    monkeypatch.setenv("PYTORCH_NO_CUDA_MEMORY_CACHING", "1")
    assert not own.can_record


def test_graphs_of_a_stream_share_one_pool_whose_size_is_known(cuda, monkeypatch: pytest.MonkeyPatch) -> None:
    own, other = OwnStream(torch.device("cuda:1")), OwnStream(torch.device("cuda:1"))
    reserved, graph = [100], SimpleNamespace(replay=lambda: None)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: graph)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: reserved[0])
    for n_bytes in (30, 0, 12):
        own.record(lambda n_bytes=n_bytes: reserved.append(reserved.pop() + n_bytes))
    assert own.n_bytes == 42
    assert {call[2] for call in cuda.calls if call[0] == "graph"} == {own._pool} != {other._pool}


def test_a_workspace_allocates_on_its_stream_and_calls_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Allocated inside; the caller's stream waits at a call's start, and is waited for at its end."""
    log: list[str] = []

    class Noted(OwnStream):
        def inside(self) -> Any:
            log.append("inside")
            return super().inside()

        def make_caller_wait(self) -> None:
            log.append("caller waits")

        def wait_for_caller(self) -> None:
            log.append("waits for caller")

    class Step:
        def __init__(self, *arguments: Any, **options: Any):
            log.append("new step")

        def decode(self, *arguments: Any) -> None:
            log.append("step")

    monkeypatch.setattr(workspace, "OwnStream", Noted)
    monkeypatch.setattr(workspace, "_decoders", lambda: (Step, Step))
    _, ours = pair(tiny_config())
    weights = view_weights(ours)
    with kept.workspace(ours, weights, 1, 8) as work:
        for _ in range(2):
            work.decode(weights)
        work.own_stream.n_bytes = 7
        assert work.n_bytes == work.cache.memory.nbytes + 7
    assert log == [
        *("inside", "caller waits"),
        *("waits for caller", "inside", "new step", "caller waits"),
        *("step", "step", "waits for caller"),
    ]
    log.clear()
    with pytest.raises(KeyboardInterrupt), kept.workspace(ours, weights, 1, 8):
        raise KeyboardInterrupt
    assert log == ["caller waits", "waits for caller"]


@pytest.mark.skipif(N_GPUS == 0, reason="needs a GPU")
def test_two_models_at_batch_6_outlive_each_others_graphs() -> None:
    prompts = token_ids(6, 5, 131).cuda()
    (theirs, first), (_, second) = (pair(tiny_config()) for _ in range(2))
    expected = theirs.cuda().generate(prompts, **GREEDY).tolist()
    for _ in range(2):
        for model in (first, second):
            assert model.cuda().generate(prompts, **GREEDY).tolist() == expected
    for _ in range(2):
        assert first.generate(prompts, **GREEDY).tolist() == expected
        fastgpt.release(second)
        torch.cuda.empty_cache()
        assert first.generate(prompts, **GREEDY).tolist() == expected
        assert second.generate(prompts, **GREEDY).tolist() == expected


@pytest.mark.skipif(N_GPUS == 0, reason="needs a GPU")
def test_a_call_on_another_stream_follows_the_one_before() -> None:
    prompts = token_ids(2, 5, 131).cuda()
    theirs, ours = pair(tiny_config())
    expected = theirs.cuda().generate(prompts, **GREEDY).tolist()
    ours.cuda()
    torch.cuda.synchronize()
    for _ in range(6):
        with torch.cuda.stream(torch.cuda.Stream()):
            assert ours.generate(prompts, **GREEDY).tolist() == expected


@pytest.mark.skipif(N_GPUS == 0, reason="needs a GPU")
def test_a_call_that_changes_streams_between_its_tokens() -> None:
    prompts = token_ids(2, 5, 131).cuda()
    theirs, ours = pair(tiny_config())
    expected = theirs.cuda().generate(prompts, **GREEDY)[:, 5:].tolist()
    ours.cuda()
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(3)]
    for _ in range(6):
        steps, found = ours.stream(prompts, **GREEDY), []
        for number in range(12):
            with torch.cuda.stream(streams[number % 3]):
                found.append(next(steps).tolist())
        assert list(map(list, zip(*found, strict=True))) == expected


@pytest.mark.skipif(N_GPUS < 2, reason="needs two GPUs")
@pytest.mark.parametrize("n_rows", [1, 6])
def test_one_model_on_each_gpu(n_rows: int) -> None:
    theirs, ours = pair(tiny_config())
    expected = theirs.generate(token_ids(n_rows, 5, 131), **GREEDY).tolist()
    for device in ("cuda:0", "cuda:1"):
        model = fastgpt.GPT2LMHeadModel(ours.config).eval()
        model.load_state_dict(ours.state_dict())
        model.to(device)  # type: ignore[arg-type]
        for _ in range(2):
            found: Any = model.generate(token_ids(n_rows, 5, 131).to(device), **GREEDY)  # type: ignore[misc]
            assert found.tolist() == expected
