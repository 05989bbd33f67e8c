"""Host time of the operations and of whole models: Python, torch and triton's launcher in C, above a driver of stubs.

    python -m benchmarks launches --out launches.json

Sizes are tiny, because what torch computes is computed by the CPU; kernels are not run. Times are of the processor, the
smallest of several rounds, because other processes only add to them.
"""

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import fastgpt_kernels
import torch
import typer
from rich.console import Console
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

import fastgpt
from fastgpt.bench import machine

from .stub_driver import stub_gpu

DTYPE = torch.bfloat16
B, T, H, D, N_VOCAB = 1, 4, 2, 16, 67
C = H * D


def microseconds(run: Callable[[], Any], n_calls: int, n_rounds: int) -> float:
    """The processor's time for one call."""

    def one_round() -> float:
        started = time.process_time()
        for _ in range(n_calls):
            run()
        return time.process_time() - started

    one_round()  # compiles
    return 1e6 * min(one_round() for _ in range(n_rounds)) / n_calls


def operations(requires_grad: bool) -> Iterator[tuple[str, Callable[[], Any]]]:
    """A call of every operation. Its leaves keep their gradients, so that backward adds to them."""

    def new(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=DTYPE).requires_grad_(requires_grad)

    x, residual, weight, bias = new(B, T, C), new(B, T, C), new(C), new(C)
    q, k, v = (heads.transpose(1, 2) for heads in new(B, T, 3, H, D).unbind(2))
    layers = new(C, 4 * C), new(4 * C), new(4 * C, C), new(C)
    hidden, head, labels = new(B * T, C), new(N_VOCAB, C), torch.zeros(B * T, dtype=torch.int64)
    yield "layer_norm", lambda: fastgpt_kernels.kernel("layer_norm")(x, weight, bias)
    yield "add_layer_norm", lambda: fastgpt_kernels.kernel("add_layer_norm")(x, residual, weight, bias)
    yield "causal_attention", lambda: fastgpt_kernels.kernel("causal_attention")(q, k, v)
    yield "gelu_mlp", lambda: fastgpt_kernels.kernel("gelu_mlp")(x, *layers, residual=residual)
    yield "linear_cross_entropy", lambda: fastgpt_kernels.kernel("linear_cross_entropy")(hidden, head, labels)


def _with_backward(run: Callable[[], Any]) -> Callable[[], None]:
    def both() -> None:
        outputs = run()
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        torch.autograd.backward(outputs, [torch.ones_like(output) for output in outputs], retain_graph=True)

    return both


def models() -> Iterator[tuple[str, str, torch.nn.Module]]:
    """A name, a backend and 12 tiny layers."""
    config = GPT2Config(
        n_layer=12, n_embd=C, n_head=H, vocab_size=N_VOCAB, n_positions=64, bos_token_id=0, eos_token_id=0,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    yield "transformers sdpa", "torch", GPT2LMHeadModel._from_config(config, attn_implementation="sdpa")
    yield "fastgpt kernels", "triton", fastgpt.GPT2LMHeadModel(config)
    yield "fastgpt torch", "torch", fastgpt.GPT2LMHeadModel(config)


def main(
    out: Annotated[Path, typer.Option(help="JSON with all figures")],
    calls: Annotated[int, typer.Option(help="of an operation in a round; of a model a tenth of it")] = 200,
    rounds: Annotated[int, typer.Option(help="of which the smallest counts")] = 15,
) -> None:
    """Host time of the operations and of whole models, with a GPU's driver stubbed."""
    torch.set_num_threads(1)
    torch.backends.mkldnn.enabled = False  # type: ignore[assignment] - its products start slowly
    figures: dict[str, dict[str, float]] = {}

    def show(name: str, forward: float, both: float) -> None:
        figures[name] = {"forward": forward, "forward+backward": both}
        Console(stderr=True).print(f"{name:24} forward {forward:8.1f} us, forward+backward {both:8.1f} us")

    with stub_gpu():
        for (name, run), (_, run_with_graph) in zip(operations(False), operations(True), strict=True):
            with torch.no_grad():
                forward = microseconds(run, calls, rounds)
            show(name, forward, microseconds(_with_backward(run_with_graph), calls, rounds))
        ids = torch.ones(B, T, dtype=torch.int64)
        for name, backend, model in models():
            model.to(DTYPE).train()

            def step(model: torch.nn.Module = model) -> None:
                model(ids, labels=ids, use_cache=False).loss.backward()
                model.zero_grad()

            def score(model: torch.nn.Module = model) -> None:
                with torch.no_grad():
                    model(ids, use_cache=False)

            with fastgpt.backend(backend):
                show(name, microseconds(score, calls // 10, rounds), microseconds(step, calls // 10, rounds))
    content = {"machine": machine.describe(torch.device("cpu")), "versions": machine.versions(), "us": figures}
    out.write_text(json.dumps(content, indent=1) + "\n")
