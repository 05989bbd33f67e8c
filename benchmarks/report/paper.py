"""Step times predicted, not measured, from bytes, FLOPs and launches, on one GPU; `scale` has those on many.

Letters as in `fastgpt.accounting`: L layers, C channels, F hidden width, V vocabulary, B batch, T tokens; N = B*T.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fastgpt import accounting
from fastgpt.accounting import PRESETS, Shape, count_parameters
from fastgpt.bench.workloads import OURS
from fastgpt.load import DTYPES

from .tables import describe_work, markdown_table

SIZES = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
DECODE_CONTEXT = 512
BATCH, TOKENS = 16, 1024


@dataclass(frozen=True)
class Machine:
    """Rates of one GPU.

    bandwidth: bytes/s of its memory. matrix_rate: FLOP/s of a large product. launch_s: seconds that a launch adds.
    """

    bandwidth: float
    matrix_rate: float
    launch_s: float


# Memory and products as accounting has them. Assumed: how long one kernel of a CUDA graph takes to drain and the next
# to fill the GPU.
H200 = Machine(accounting.H200_BANDWIDTH, accounting.H200_MATRIX_RATE, launch_s=3e-6)

# --- work -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Work:
    """The bytes and FLOPs of `n_launches` kernels together."""

    name: str
    n_bytes: int
    flops: int
    n_launches: int

    def seconds(self, machine: Machine) -> float:
        """The time if memory accesses and products overlap, and launches do not."""
        floor_s = max(self.n_bytes / machine.bandwidth, self.flops / machine.matrix_rate)
        return floor_s + self.n_launches * machine.launch_s

    def times(self, n: int) -> "Work":
        return replace(self, n_bytes=n * self.n_bytes, flops=n * self.flops, n_launches=n * self.n_launches)


def prefill_work(shape: Shape, batch: int, tokens: int, element_bytes: int = 2) -> list[Work]:
    """A forward pass over (B, T) tokens with all logits."""
    # Attention is causal, and each query and each key is read once.
    pairs = tokens * (tokens + 1) // 2
    return _forward_work(shape, batch, tokens, element_bytes, pairs, n_keys=tokens)


def decode_work(shape: Shape, batch: int, context: int, element_bytes: int = 2) -> list[Work]:
    """One token for each of B sequences, whose caches hold `context` tokens."""
    return _forward_work(shape, batch, 1, element_bytes, context, n_keys=context)


def _forward_work(shape: Shape, batch: int, tokens: int, element_bytes: int, pairs: int, n_keys: int) -> list[Work]:
    """The work of one forward pass. pairs: how many query-key pairs one head of one sequence multiplies."""
    C, F, V, L = shape.n_embd, shape.hidden_width, shape.vocab_size, shape.n_layer
    N, e = batch * tokens, element_bytes

    def product(name: str, n_in: int, n_out: int, n: int) -> Work:
        """The work of n products of (N, n_in) and (n_in, n_out)."""
        return Work(name, (N * (n_in + n_out) + n_in * n_out) * e, 2 * N * n_in * n_out, 1).times(n)

    return [
        Work("embedding", 3 * N * C * e, 0, 1),
        Work("layer_norm", 2 * N * C * e, 0, 1),
        Work("add_layer_norm", 4 * N * C * e, 0, 1).times(2 * L),
        product("qkv", C, 3 * C, L),
        Work("causal_attention", 2 * batch * (tokens + n_keys) * C * e, 4 * batch * pairs * C, 1).times(L),
        product("attention's output", C, C, L),
        product("gelu_mlp, up", C, F, L),
        product("gelu_mlp, down", F, C, L),
        product("head", C, V, 1),
    ]


def training_work(shape: Shape, batch: int, tokens: int, element_bytes: int = 2) -> list[Work]:
    """Forward and backward without AdamW. Backward is counted as twice the forward pass."""
    return [work.times(3) for work in prefill_work(shape, batch, tokens, element_bytes)]


def adamw_work(n_parameters: int) -> Work:
    """The work of one fused step in float32."""
    return Work("AdamW", accounting.adamw_bytes(n_parameters), 0, 1)


def seconds(works: Sequence[Work], machine: Machine) -> float:
    return sum(work.seconds(machine) for work in works)


# --- the page -------------------------------------------------------------------------------------------------------


def page(results: Sequence[Mapping[str, Any]]) -> str:
    """The tables of predictions, with the measured speeds where results of `fastgpt bench` have them."""
    blocks = [
        f"One GPU, at {H200.bandwidth / 1e12:.1f} TB/s, {H200.matrix_rate / 1e12:.0f} TFLOP/s and "
        f"{1e6 * H200.launch_s:.0f} us a launch, bfloat16; decoding one sequence at {DECODE_CONTEXT} tokens of "
        f"context, the rest on {BATCH} x {TOKENS} tokens:",
        _one_gpu_table(),
    ]
    if results:
        blocks += [
            "Held against what was measured, with the bandwidth and matrix rate of the same run"
            " (on a CPU without a price for launches):",
            _measured_table(results),
        ]
    return "\n\n".join(blocks)


def _one_gpu_table() -> str:
    rows = []
    for name in SIZES:
        shape = PRESETS[name]
        decode = decode_work(shape, 1, DECODE_CONTEXT)
        decode_s = seconds(decode, H200)
        prefill_s = seconds(prefill_work(shape, BATCH, TOKENS), H200)
        adamw = adamw_work(count_parameters(shape).total)
        train_s = seconds([*training_work(shape, BATCH, TOKENS), adamw], H200)
        launches = sum(work.n_launches for work in decode)
        rows.append(
            [
                name,
                f"{1e3 * decode_s:.3f} ms, {rounded(1 / decode_s)} tokens/s",
                f"{launches} ({launches * H200.launch_s / decode_s:.0%} of the time)",
                f"{1e3 * prefill_s:.1f} ms, {rounded(BATCH * TOKENS / prefill_s)} tokens/s",
                f"{1e3 * train_s:.1f} ms, {rounded(BATCH * TOKENS / train_s)} tokens/s",
            ]
        )
    return markdown_table(["predicted", "decode", "its launches", "prefill", "training step"], rows)


def _measured_table(results: Sequence[Mapping[str, Any]]) -> str:
    rows = []
    for result in results:
        for row in result["results"]:
            if row["contender"] != OURS:
                continue
            options, measured = result["options"], row["tokens_per_s"]["median"]
            predicted = predicted_speed(result, row["workload"])
            what = f"{Path(options['model']).name} on {options['device']}, {describe_work(result, row['workload'])}"
            rows.append([what, rounded(predicted), rounded(measured), f"{measured / predicted:.0%}"])
    return markdown_table(["workload", "predicted tokens/s", "measured tokens/s", "measured / predicted"], rows)


def rounded(speed: float) -> str:
    """Three digits, because a prediction is not more exact."""
    digits = max(0, 2 - math.floor(math.log10(speed)))
    return f"{float(f'{speed:.3g}'):,.{digits}f}"


def predicted_speed(result: Mapping[str, Any], workload: str) -> float:
    """tokens/s of a workload of a result of `fastgpt bench`, with the rates that it measured."""
    options, rates = result["options"], result["rates"]
    fields = Shape.__dataclass_fields__
    shape = Shape(**{name: value for name, value in result["model"].items() if name in fields})
    launch_s = H200.launch_s if result["machine"]["gpu"] else 0.0
    machine = Machine(rates["bandwidth"], rates["matrix_rate"], launch_s)
    batch, tokens, element_bytes = options["batch"], options["prompt_tokens"], DTYPES[options["dtype"]].itemsize
    if workload == "decode":
        # The middle of what is generated, as in the ceiling of `fastgpt bench`.
        context = tokens + options["new_tokens"] // 2
        return batch / seconds(decode_work(shape, batch, context, element_bytes), machine)
    works = prefill_work(shape, batch, tokens, element_bytes)
    if workload == "train":
        works = [*training_work(shape, batch, tokens, element_bytes), adamw_work(count_parameters(shape).total)]
    return batch * tokens / seconds(works, machine)
