"""Python's share of generation on kernels: the engine's own loop, with everything that it asks of a GPU stubbed.

    python -m benchmarks host --out host.json

Of a token, it bounds tokens/s from above wherever the GPU is faster. The calls of CUDA that remain (two graph launches,
a copy and an event per token) are not in it, because there need be no GPU. For a call, it is the time until its first
token, of which transformers' own preparation takes a part. Where no graph replays the prompt, it also has the launches
of the prompt's forward, in triton's launcher in C above a driver of stubs.
"""

import json
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from statistics import median
from typing import Annotated, Any
from unittest import mock

import torch
import typer
from fastgpt_kernels.operations.sampling import op as sampling
from rich.console import Console
from transformers import GPT2Config

import fastgpt
from fastgpt.bench import machine
from fastgpt.generate import streams, tier, workspace

from .launches import microseconds
from .stub_driver import stub_gpu

CALLS: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "sampled": {"do_sample": True, "top_k": 0, "seed": 1},
    "top-k": {"do_sample": True, "top_k": 50, "seed": 1},
    "top-p": {"do_sample": True, "top_k": 0, "top_p": 0.9, "seed": 1},
}


@contextmanager
def stubbed() -> Iterator[None]:
    """The engine as on a GPU on which every step and every graph takes no time and no call of the driver."""

    def launch(self: workspace.Workspace, weights: Any, n_new: int) -> None:
        self._steps[n_new] = object()

    with ExitStack() as stack:
        for owner, name, stub in (
            (workspace.Workspace, "_launch", launch),
            (sampling, "launch", lambda *arguments, **options: None),
            (streams.OwnStream, "can_record", property(lambda own: True)),
            (streams.OwnStream, "record", lambda own, work: lambda: None),
        ):
            stack.enter_context(mock.patch.object(owner, name, stub))
        stack.enter_context(fastgpt.backend("triton"))
        yield


def microseconds_per_token(model: Any, n_rows: int, call: dict[str, Any], n_tokens: int, n_rounds: int) -> float:
    """The median over rounds: the time of many tokens less that of one, per step."""
    ids = torch.ones(n_rows, 4, dtype=torch.int64)
    options = {"attention_mask": torch.ones_like(ids), "eos_token_id": 2, "pad_token_id": 0, **call}

    def seconds(n: int) -> float:
        return machine.seconds(lambda: model.generate(ids, max_new_tokens=n, **options), torch.device("cpu"))

    seconds(8)  # records
    return 1e6 * median((seconds(n_tokens) - seconds(1)) / (n_tokens - 1) for _ in range(n_rounds))


def microseconds_to_first_token(model: Any, tier_name: str, n_calls: int, n_rounds: int) -> float:
    """The processor's time for a call of one token after a prompt of 16, the least of several rounds."""
    ids = torch.ones(1, 16, dtype=torch.int64)
    options = {"attention_mask": torch.ones_like(ids), "eos_token_id": 2, "pad_token_id": 0, "do_sample": False}
    with tier(tier_name):
        return microseconds(lambda: model.generate(ids, max_new_tokens=1, **options), n_calls, n_rounds)


def main(
    out: Annotated[Path, typer.Option(help="JSON with all figures")],
    tokens: Annotated[int, typer.Option(help="generated in one call")] = 500,
    rounds: Annotated[int, typer.Option(help="of which the median counts")] = 7,
    layers: Annotated[int, typer.Option(help="of the model")] = 12,
) -> None:
    """Python's time per token and before the first one of the engine on kernels, with GPU work stubbed."""
    torch.set_num_threads(1)
    config = GPT2Config(
        n_layer=layers, n_embd=16, n_head=2, vocab_size=67, n_positions=1024, bos_token_id=0, eos_token_id=0
    )
    model = fastgpt.GPT2LMHeadModel(config).eval()
    figures, first = {}, {}
    # In the interpreter, kernels need no driver.
    driver = nullcontext() if os.environ.get("TRITON_INTERPRET") == "1" else stub_gpu()
    with driver, stubbed():
        for name, tier_name in (("prompt in a graph", "graph"), ("prompt launched", "eager")):
            first[name] = microseconds_to_first_token(model, tier_name, max(1, tokens // 50), rounds)
            Console(stderr=True).print(f"until the first token, {name}: {first[name]:.0f} us")
        for n_rows in (1, 8, 64):
            for name, call in CALLS.items():
                figures[f"{name}, batch {n_rows}"] = microseconds_per_token(model, n_rows, call, tokens, rounds)
                Console(stderr=True).print(f"{name}, batch {n_rows}: {figures[f'{name}, batch {n_rows}']:.1f} us")
    content = {
        "machine": machine.describe(torch.device("cpu")),
        "versions": machine.versions(),
        "us_per_token": figures,
        "us_to_first_token": first,
    }
    out.write_text(json.dumps(content, indent=1) + "\n")
