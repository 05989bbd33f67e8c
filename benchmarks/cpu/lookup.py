"""What prompt lookup gains: whole generations with and without it, and what a forward of several tokens costs.

python -m benchmarks lookup --out benchmarks/results/cpu/DATE-lookup.json
"""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any
from unittest.mock import patch

import torch
import typer
from rich.console import Console
from torch import Tensor

from fastgpt import bench as benchmark
from fastgpt import generate as engine
from fastgpt import load_demo
from fastgpt.bench import Progress, machine, rotated, spread, workloads
from fastgpt.bench.parity import ParityError
from fastgpt.generate.products import Products
from fastgpt.load import DTYPES

from ..report.tables import publish

N_PROPOSED = (0, 4, 8, 16)
PASSAGE = (
    "MENENIUS: I tell you, friends, most charitable care have the patricians of you. For your wants, your suffering in "
    "this dearth, you may as well strike at the heaven with your staves.\n"
)
SAMPLED = {"do_sample": True, "temperature": 0.8, "top_k": 50, "seed": 3}
# What is continued, how many tokens are added, and how they are chosen.
TEXTS: dict[str, tuple[str, int, Mapping[str, Any]]] = {
    "greedy, which falls into repeating itself": ("ROMEO:", 200, {"do_sample": False}),
    "greedy after a passage that stands there twice": (PASSAGE * 2, 100, {"do_sample": False}),
    "sampled at temperature 0.8, which repeats little": ("ROMEO:", 200, SAMPLED),
}
TOKENS_OF_A_FORWARD = (1, 2, 3, 5, 9, 17)


def measure_texts(dtype: torch.dtype, n_runs: int, progress: Progress) -> list[dict[str, Any]]:
    """A row for each text and number of proposed tokens (0: without lookup), of the demo model on a CPU.

    tokens_per_s: of a whole call, its prompt included. Raises ParityError when float32 gives other tokens with lookup.
    """
    model: Any
    model, tokenizer = load_demo()
    model.to(dtype)
    rows = []
    for number, (name, (text, n_new, how)) in enumerate(TEXTS.items()):
        progress(f"{dtype}, {name}", number, len(TEXTS))
        ids = tokenizer(text, return_tensors="pt").input_ids
        options = {"max_new_tokens": n_new, "pad_token_id": 0, "eos_token_id": None, **how}
        calls = {n: partial(model.generate, ids, prompt_lookup_num_tokens=n or None, **options) for n in N_PROPOSED}
        plain = calls[0]()
        for n, taken in in_turns(calls, n_runs).items():
            sequence, n_forwards = _count_forwards(calls[n]) if n else (plain, n_new)
            n_equal = int((sequence == plain).long().cumprod(1).sum()) - ids.shape[1]
            if dtype == torch.float32 and n_equal < n_new:
                raise ParityError(f"{name}: token {n_equal} is another one with {n} proposed tokens")
            row = {"text": name, "dtype": str(dtype).removeprefix("torch."), "prompt_tokens": ids.shape[1]}
            row |= {"proposed": n, "new_tokens": n_new, "equal_tokens": n_equal}
            row |= {"tokens_per_forward": n_new / n_forwards, "tokens_per_s": spread([n_new / s for s in taken])}
            rows.append(row | {"samples_s": taken})
    return rows


def in_turns(calls: Mapping[Any, Callable[[], Any]], n_runs: int) -> dict[Any, list[float]]:
    """Seconds of each call on the CPU. One call runs before, untimed."""
    samples: dict[Any, list[float]] = {name: [] for name in calls}
    for turn in range(n_runs + 1):
        for name in rotated(list(calls), turn):
            samples[name].append(machine.seconds(calls[name], torch.device("cpu")))
    return {name: taken[1:] for name, taken in samples.items()}


def _count_forwards(call: Callable[[], Tensor]) -> tuple[Tensor, int]:
    """The result of a generation with lookup, and its number of forwards, including the prompt's."""
    with patch.object(engine.lookup, "decode_tokens", wraps=engine.decode_tokens) as decode:
        return call(), 1 + decode.call_count


def measure_forwards(model: str, dtype: torch.dtype, context: int, n_runs: int) -> list[dict[str, Any]]:
    """A row for each number of tokens in a forward of the engine: its seconds, in turns, on a CPU."""
    base, _ = workloads.load_base(model)
    ours: Any = workloads.contender(workloads.OURS, base, torch.device("cpu"), dtype)
    weights = engine.view_weights(ours)
    cache = engine.KVCache.allocate(ours, 1, context + max(TOKENS_OF_A_FORWARD))
    ids = torch.randint(base.config.vocab_size, (1, cache.memory.shape[-2]), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(ids.shape[1])[None]
    with torch.no_grad():
        engine.prefill(ours, cache, ids[:, :context], None, positions[:, :context])

    # As in a long generation, in which each product takes the fastest implementation.
    products = {n: Products(weights, n, n_steps=context) for n in TOKENS_OF_A_FORWARD}

    def forward(n_new: int) -> Tensor:
        cache.n_tokens, new = context, slice(context, context + n_new)
        return engine.decode_tokens(weights, cache, ids[:, new], positions[:, new], products[n_new])

    samples = in_turns({n: partial(forward, n) for n in TOKENS_OF_A_FORWARD}, n_runs)
    return [{"tokens": n, "context": context, "seconds": spread(s), "samples_s": s} for n, s in samples.items()]


def main(
    out: Annotated[Path, typer.Option(help="the result")],
    model: Annotated[
        str, typer.Option(help="whose forwards are timed: a preset's name, a directory, a Hub id")
    ] = "gpt2",
    dtypes: Annotated[str, typer.Option(help="comma-separated")] = "float32,bfloat16",
    context: Annotated[int, typer.Option(min=1, help="tokens before those forwards")] = 512,
    runs: Annotated[int, typer.Option(min=5, help="timed runs of each")] = 9,
) -> None:
    """Measure prompt lookup on a CPU."""
    chosen = {name: DTYPES[name] for name in dtypes.split(",")}
    with benchmark.progress_bar(Console(stderr=True)) as progress:
        texts = [row for dtype in chosen.values() for row in measure_texts(dtype, runs, progress)]
        forwards = {name: measure_forwards(model, dtype, context, runs) for name, dtype in chosen.items()}
    publish(out, {"lookup demo": {"texts": texts}, f"forwards {Path(model).name}": forwards})
