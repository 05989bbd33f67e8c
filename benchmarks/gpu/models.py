"""Steps of `benchmarks gpu` about whole models, each behind the parity gate of `fastgpt bench`.

Models choose their backend as they do for anyone: which it was stands in the result under "path".
"""

import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import GPT2LMHeadModel

from fastgpt import accounting
from fastgpt import bench as benchmark
from fastgpt import generate as engine
from fastgpt.accounting import Shape
from fastgpt.bench import BenchmarkOptions, parity, profiling, workloads
from fastgpt.bench.parity import ParityError
from fastgpt.bench.workloads import Work

from ..cpu import curves
from . import cold_start
from .run import Extent, Part, Run

# --- speed ----------------------------------------------------------------------------------------------------------


# A part with torch.compile in it compiles for a minute or two.
_LIMIT_S, _COMPILED_LIMIT_S = 120.0, 300.0


def decode(run: Run, size: str) -> Iterator[Part]:
    """Decoding: tokens/s of one sequence and of many, around one context."""
    extent = run.extent
    for n_batch in extent.decode_batches:
        peers = {f"fastgpt, {tier}": partial(_decode_on_tier, tier) for tier in extent.tiers}
        if n_batch == 1:  # random weights soon repeat themselves, which is the text that lookup is for
            peers["fastgpt, lookup 8"] = partial(_decode_with_lookup, 8)
        measure = partial(_bench, run, size, "decode", n_batch, extent.decode_prompt, extent.baselines, peers)
        yield Part(f"batch {n_batch}", measure, _LIMIT_S)


def decode_batches(run: Run, size: str) -> Iterator[Part]:
    """Decoding: tokens/s of the batch sizes between one and the largest."""
    extent = run.extent
    for n_batch in extent.more_decode_batches:
        measure = partial(_bench, run, size, "decode", n_batch, extent.decode_prompt, extent.baselines)
        yield Part(f"batch {n_batch}", measure, _LIMIT_S)


def prefill(run: Run, size: str) -> Iterator[Part]:
    """Prefill with all logits: tokens/s of many sequences and of one."""
    for n_batch in (run.extent.n_batch, 1):
        measure = partial(_bench, run, size, "prefill", n_batch, run.extent.n_tokens, run.extent.baselines)
        yield Part(f"batch {n_batch}", measure, _LIMIT_S)


def train(run: Run, size: str) -> Iterator[Part]:
    """A training step: tokens/s and peak memory."""
    n_batch = _training_batch(run.extent.shapes[size], run.extent.n_batch)
    measure = partial(_bench, run, size, "train", n_batch, run.extent.n_tokens, run.extent.baselines)
    yield Part(f"batch {n_batch}", measure, _LIMIT_S)


def compiled(run: Run, size: str) -> Iterator[Part]:
    """Decoding and prefill compared with torch.compile, which spends most of this step compiling."""
    extent = run.extent
    for workload, n_batch, n_tokens in (
        *(("decode", n_batch, extent.decode_prompt) for n_batch in extent.decode_batches),
        ("prefill", extent.n_batch, extent.n_tokens),
    ):
        measure = partial(_bench, run, size, workload, n_batch, n_tokens, extent.compiled_baselines)
        yield Part(f"{workload}, batch {n_batch}", measure, _COMPILED_LIMIT_S)


def _training_batch(shape: Shape, n_batch: int) -> int:
    """n_batch for the small model and fewer for larger ones, because activations grow with layers times channels."""
    return min(n_batch, max(2, n_batch * 12 * 768 // (shape.n_layer * shape.n_embd)))


def _bench(
    run: Run,
    size: str,
    workload: str,
    n_batch: int,
    prompt_tokens: int,
    baselines: tuple[str, ...],
    peers: Mapping[str, benchmark.MakeWork] | None = None,
) -> dict[str, Any]:
    """A result of `fastgpt bench`, with further contenders."""
    options = _options(run.extent, size, workload, n_batch, prompt_tokens, baselines)
    return benchmark.run_benchmark(options, None, peers, run.load(size), run.result["rates"])


def _options(
    extent: Extent, size: str, workload: str, n_batch: int, prompt_tokens: int, baselines: tuple[str, ...] = ()
) -> BenchmarkOptions:
    return BenchmarkOptions(
        model=extent.models[size],
        workloads=[workload],
        batch=n_batch,
        prompt_tokens=prompt_tokens,
        new_tokens=extent.n_new_tokens,
        device=extent.device.type,
        dtype=str(extent.dtype).removeprefix("torch."),
        baselines=baselines,
        runs=extent.n_runs,
    )


def profiles(run: Run, size: str) -> Iterator[Part]:
    """Where the time of one run goes: the most expensive kernels of a prefill, of a training step and of decoding."""
    extent = run.extent
    n_training = _training_batch(extent.shapes[size], extent.n_batch)
    for workload, n_batch, n_tokens in (
        ("train", n_training, extent.n_tokens),
        ("prefill", extent.n_batch, extent.n_tokens),
        *(("decode", n_batch, extent.decode_prompt) for n_batch in extent.decode_batches),
    ):
        options = _options(extent, size, workload, n_batch, n_tokens)
        yield Part(f"{workload}, batch {n_batch}", partial(_expenses, run, size, options), _LIMIT_S)


def _expenses(run: Run, size: str, options: BenchmarkOptions, n: int = 30) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        expenses = profiling.profile(options, f"{folder}/trace.json.gz", run.load(size)[0])
    return [asdict(expense) for expense in expenses[:n]]


def _decode_on_tier(
    tier: str, workload: str, base: GPT2LMHeadModel, ids: Tensor, n_new_tokens: int, dtype: torch.dtype
) -> Work:
    """Our decoding on one tier. Raises ParityError if its tokens are wrong, ValueError if the tier cannot run."""
    model = workloads.contender(workloads.OURS, base, ids.device, dtype)
    if ids.device.type == "cuda":
        with engine.tier(tier), torch.no_grad():
            obstacle = engine.obstacle(model, len(ids))  # type: ignore[arg-type]
        if obstacle is not None:
            raise ValueError(obstacle)
    work = workloads.decode(workloads.OURS, model, ids, n_new_tokens)

    def on_tier(function: Callable[[], Any]) -> Any:
        with engine.tier(tier):
            return function()

    check_greedy_tokens(base, on_tier(work.run)[:1], ids.shape[1], dtype)
    return replace(work, run=partial(on_tier, work.run), seconds=partial(on_tier, work.seconds))


def _decode_with_lookup(
    n_proposed: int, workload: str, base: GPT2LMHeadModel, ids: Tensor, n_new_tokens: int, dtype: torch.dtype
) -> Work:
    """Our decoding with prompt lookup. Raises ParityError if its tokens are wrong."""
    model = workloads.contender(workloads.OURS, base, ids.device, dtype)
    assert model.generation_config is not None
    model.generation_config.prompt_lookup_num_tokens = n_proposed
    work = workloads.decode(workloads.OURS, model, ids, n_new_tokens)
    check_greedy_tokens(base, work.run(), ids.shape[1], dtype)
    return work


@torch.no_grad()
def check_greedy_tokens(base: GPT2LMHeadModel, sequence: Tensor, n_prompt: int, dtype: torch.dtype) -> None:
    """Raise ParityError unless every new token is as likely as the likeliest, up to the rounding of dtype.

    base: the same model in float32. sequence: (1, T), the prompt and what was generated.
    """
    logits = base(sequence, use_cache=False).logits[0, n_prompt - 1 : -1]  # (T - n_prompt, V)
    shortfall = logits.max(-1).values - logits.gather(1, sequence[0, n_prompt:, None])[:, 0]
    allowed = (8 if dtype.itemsize == 2 else 64) * torch.finfo(dtype).eps * logits.abs().max()
    if not bool((shortfall <= allowed).all()):
        raise ParityError(f"a greedy token is {shortfall.max():.3g} below the likeliest, allowed {allowed:.3g}")


# --- curves ---------------------------------------------------------------------------------------------------------


def memory(run: Run, size: str) -> Iterator[Part]:
    """Peak memory against the batch."""
    extent = run.extent
    for workload in ("prefill", "train"):
        for n_batch in extent.memory_batches:
            yield Part(
                f"{workload}, batch {n_batch}",
                lambda workload=workload, n_batch=n_batch: curves.memory_at_batch(
                    run.load(size)[0], workload, n_batch, extent.n_tokens, extent.device, extent.dtype
                ),
            )


def latency(run: Run, size: str) -> Iterator[Part]:
    """Time of a generated token against the context."""
    extent = run.extent
    n_new_tokens = min(extent.n_new_tokens, 32)
    for context in extent.contexts:
        yield Part(
            f"context {context}",
            lambda context=context: curves.latency_at_context(
                run.load(size)[0], context, n_new_tokens, extent.n_runs, extent.device, extent.dtype
            ),
        )


# --- cold start -----------------------------------------------------------------------------------------------------


def cold_starts(run: Run, size: str) -> Iterator[Part]:
    """Seconds from the start of a process to its first token, with nothing compiled yet and then with all of it."""
    yield Part(size, partial(_cold_starts, run, size), 4 * cold_start.LIMIT_S)


def _cold_starts(run: Run, size: str) -> dict[str, Any]:
    extent = run.extent
    base, _ = run.load(size)
    ids = curves.random_tokens(base, 1, min(16, accounting.shape_of(base).n_positions // 2), extent.device)
    parity.check_inference(base, ids, 1, extent.dtype)
    ours = workloads.contender(workloads.OURS, base, extent.device, extent.dtype)
    expected = int(ours.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=1)[0, -1])  # type: ignore[operator]
    with tempfile.TemporaryDirectory() as folder:
        ours.save_pretrained(folder)
        start = partial(cold_start.measure, folder, ids[0].tolist(), extent.device, extent.dtype, expected)
        n_fresh, n_warm = extent.cold_starts
        fresh = [start(f"{folder}/kernels {i}") for i in range(n_fresh)]
        return {"fresh": fresh, "warm": [start(f"{folder}/kernels 0") for _ in range(n_warm)]}
