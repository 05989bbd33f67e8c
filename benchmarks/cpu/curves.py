"""How peak memory grows with the batch and the time of a decode step with the context, compared with transformers.

python -m benchmarks curves --model gpt2 --out benchmarks/results/cpu/DATE-gpt2-curves.json     # in float32 on a CPU
"""

from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import typer
from rich.console import Console
from torch import Tensor
from transformers import GPT2LMHeadModel

from fastgpt import accounting
from fastgpt import bench as benchmark
from fastgpt.bench import parity, rotated, spread, workloads

from ..report.tables import publish
from . import memory

CONTENDERS = (workloads.OURS, "hf-sdpa")


def random_tokens(base: GPT2LMHeadModel, n_batch: int, n_tokens: int, device: torch.device) -> Tensor:
    """(B, T) random tokens."""
    generator = torch.Generator().manual_seed(0)
    vocab_size = accounting.shape_of(base).vocab_size
    return torch.randint(vocab_size, (n_batch, n_tokens), generator=generator).to(device)


def memory_at_batch(
    base: GPT2LMHeadModel, workload: str, n_batch: int, n_tokens: int, device: torch.device, dtype: torch.dtype
) -> list[dict[str, Any]]:
    """A row for each contender: the peak of a prefill or of a training step, in bytes. Raises ParityError.

    A contender for which the memory does not suffice has its reason.
    """
    ids = random_tokens(base, n_batch, n_tokens, device)
    if workload == "train":
        parity.check_training(base, ids[:1], dtype)
    else:
        parity.check_inference(base, ids[:1], 1, dtype)
    rows = []
    for name in CONTENDERS:
        row: dict[str, Any] = {"workload": workload, "contender": name, "batch": n_batch, "tokens": n_tokens}
        try:
            rows.append(row | memory.peak(workload, name, base, ids, dtype))
        except torch.OutOfMemoryError as error:
            rows.append(row | {"skipped": str(error).splitlines()[0]})
    return rows


def latency_at_context(
    base: GPT2LMHeadModel,
    context: int,
    n_new_tokens: int,
    n_runs: int,
    device: torch.device,
    dtype: torch.dtype,
) -> list[dict[str, Any]]:
    """A row for each contender: seconds of each token that follows a prompt, batch 1, in turns. Raises ParityError."""
    ids = random_tokens(base, 1, context, device)
    parity.check_inference(base, ids, n_new_tokens, dtype)
    works = {name: workloads.make_work("decode", name, base, ids, n_new_tokens, dtype) for name in CONTENDERS}
    samples: dict[str, list[float]] = {name: [] for name in works}
    for work in works.values():
        work.seconds()
    for turn in range(n_runs):
        for name in rotated(list(works), turn):
            samples[name].append(works[name].seconds() / works[name].n_tokens)
    return [
        {"contender": name, "batch": 1, "context": context, "seconds_per_token": spread(taken), "samples_s": taken}
        for name, taken in samples.items()
    ]


def main(
    out: Annotated[Path, typer.Option(help="the result")],
    model: Annotated[str, typer.Option(help="demo, a preset's name, a directory, or a Hub id")] = "gpt2",
    batches: Annotated[str, typer.Option(help="peak memory of prefill and training at these")] = "1,2,4,8",
    prompt_tokens: Annotated[int, typer.Option(help="tokens of each of those sequences")] = 1024,
    contexts: Annotated[str, typer.Option(help="time of a token after this many; or none")] = "64,256,512,768,992",
    runs: Annotated[int, typer.Option(min=5, help="timed runs of each contender")] = 5,
) -> None:
    """Count the memory and measure the time, both in float32 on a CPU, compared with transformers' sdpa."""
    transformers.logging.set_verbosity_error()
    device, dtype = torch.device("cpu"), torch.float32
    base, _ = workloads.load_base(model)
    name = Path(model).name
    peaks, latency = {}, {}
    after = [int(number) for number in contexts.split(",") if number]
    works = [(workload, int(number)) for workload in ("prefill", "train") for number in batches.split(",")]
    with benchmark.progress_bar(Console(stderr=True)) as progress:
        for number, (workload, n_batch) in enumerate(works):
            part = f"{workload}, batch {n_batch}"
            progress(f"memory of {part}", number, len(works))
            peaks[part] = memory_at_batch(base, workload, n_batch, prompt_tokens, device, dtype)
        for number, context in enumerate(after):
            progress(f"time of a token after {context}", number, len(after))
            latency[f"context {context}"] = latency_at_context(base, context, 16, runs, device, dtype)
    publish(out, {f"memory {name}": peaks} | ({f"latency {name}": latency} if after else {}))
