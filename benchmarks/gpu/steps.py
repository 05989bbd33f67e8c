"""A decode step and the choice of a token on the shapes of GPT-2, each alone, as cases that are checked and timed.

B rows, T slots of the cache, L layers, C channels, F channels of the MLP, V vocabulary.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from fastgpt_kernels.common import chip
from fastgpt_kernels.common.decode_weights import DecodeLayer, DecodeWeights
from fastgpt_kernels.common.dropout import seed_tensor
from fastgpt_kernels.operations.decode_step import reference as decode_reference
from fastgpt_kernels.operations.decode_step.op import DecodeStep
from fastgpt_kernels.operations.persistent_decode import tiles as persistent_tiles
from fastgpt_kernels.operations.persistent_decode.op import PersistentDecoder
from fastgpt_kernels.operations.sampling import op as sampling
from fastgpt_kernels.operations.sampling import reference as sampling_reference
from fastgpt_kernels.operations.sampling.reference import Rows, SamplingOptions
from torch import Tensor

from fastgpt.accounting import Shape
from fastgpt.bench.operations import Case

# Enough that gpt2's do not fit into the second-level cache, and few enough to be compiled and checked quickly.
N_LAYERS = 4
ACTIVATION = "gelu_new"
# How a token is chosen; all but the first draw it.
CHOICES: dict[str, dict[str, Any]] = {"greedy": {}, "sampled": {}, "top-k": {"top_k": 50}, "top-p": {"top_p": 0.9}}
_REPLAY = ("replay",)


def cases(
    shape: Shape, n_batches: tuple[int, ...], n_slots: int, device: torch.device, dtype: torch.dtype
) -> Iterator[Case]:
    """For each number of rows a decode step over a full cache and every choice, then the persistent kernel's step.

    On a CPU without the last, whose programs wait for each other.
    """
    for n_rows in n_batches:
        yield _decode_case(f"decode step, B={n_rows}", _kernel_step, shape, n_rows, n_slots, device, dtype)
        for name in CHOICES:
            yield _choice_case(name, shape, n_rows, device)
    sizes = shape.n_embd, shape.n_head, shape.hidden_width
    if device.type == "cuda" and PersistentDecoder.obstacle(1, *sizes, ACTIVATION, dtype, device) is None:
        yield persistent_case(shape, n_slots, device, dtype)


def persistent_case(shape: Shape, n_slots: int, device: torch.device, dtype: torch.dtype) -> Case:
    """A step of one row in the persistent kernel."""
    return _decode_case("persistent decode", _PersistentStep(), shape, 1, n_slots, device, dtype)


# --- decode steps ---------------------------------------------------------------------------------------------------


def _decode_case(
    name: str,
    step: Callable[..., Tensor],
    shape: Shape,
    n_rows: int,
    n_slots: int,
    device: torch.device,
    dtype: torch.dtype,
) -> Case:
    """inputs: the cache (L, 2, B, H, T, D), the newest tokens (B,), and the weights, of which the head is the table."""

    def random(*sizes: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(sizes, device=device) * scale).to(dtype)

    C, F, V, H = shape.n_embd, shape.hidden_width, shape.vocab_size, shape.n_head
    matrices = (C, 3 * C), (C, C), (C, F), (F, C)
    layers = []
    for _ in range(N_LAYERS):
        qkv, projection, fc, mlp_projection = (
            (random(*size, scale=size[0] ** -0.5), random(size[1])) for size in matrices
        )
        layers += [random(C), random(C), *qkv, *projection, random(C), random(C), *fc, *mlp_projection]
    table = random(V, C, scale=C**-0.5)
    cache = random(N_LAYERS, 2, n_rows, H, n_slots, C // H)
    inputs = cache, torch.randint(V, (n_rows,), device=device), table, random(n_slots, C), *layers, random(C), random(C)
    n_multiplied = N_LAYERS * sum(n_in * n_out for n_in, n_out in matrices) + V * C
    n_bytes = sum(x.nbytes for x in layers) + table.nbytes + cache.nbytes
    flops = 2 * n_rows * n_multiplied + 2 * cache.numel()
    contenders = {"fastgpt": step, "torch": _torch_step}
    contenders = {name: partial(function, shape.n_head) for name, function in contenders.items()}
    return Case(name, inputs, contenders, (n_bytes, flops), (0, 0), _REPLAY)


def _weights(n_heads: int, table: Tensor, wpe: Tensor, *others: Tensor) -> DecodeWeights:
    *layers, ln_f_weight, ln_f_bias = others
    scale = (table.shape[1] // n_heads) ** -0.5
    of_a_layer = len(layers) // N_LAYERS
    blocks = tuple(
        DecodeLayer._make((*layers[first : first + 4], scale, *layers[first + 4 : first + of_a_layer]))
        for first in range(0, len(layers), of_a_layer)
    )
    return DecodeWeights(table, wpe, blocks, ln_f_weight, ln_f_bias, table, 1e-5, n_heads, ACTIVATION)


def _torch_step(n_heads: int, cache: Tensor, tokens: Tensor, *weights: Tensor) -> Tensor:
    last = cache.shape[4] - 1
    positions = torch.full_like(tokens, last)[:, None]
    return decode_reference.decode_tokens(_weights(n_heads, *weights), cache, last, tokens[:, None], positions)[:, 0]


def _kernel_step(n_heads: int, cache: Tensor, tokens: Tensor, *weights: Tensor) -> Tensor:
    of_the_step = _weights(n_heads, *weights)
    step = DecodeStep(of_the_step, len(tokens), cache.shape[4])
    return _logits(partial(step.decode, of_the_step), cache, tokens, len(of_the_step.wte))


def _logits(decode: Callable[..., None], cache: Tensor, tokens: Tensor, n_vocabulary: int) -> Tensor:
    """Those of a step whose tokens stand at the end of the cache."""
    last, logits = torch.full_like(tokens, cache.shape[4] - 1), cache.new_empty(len(tokens), n_vocabulary).float()
    decode(cache, tokens, last, last, torch.zeros_like(tokens), logits)
    return logits


class _PersistentStep:
    """The step of the persistent kernel. The weights are packed at the first call, and again for another ring."""

    def __init__(self) -> None:
        self.packed: tuple[Any, PersistentDecoder] | None = None

    def __call__(self, n_heads: int, cache: Tensor, tokens: Tensor, *weights: Tensor) -> Tensor:
        table = weights[0]
        ring = persistent_tiles.persistent_ring(table.shape[1], table.dtype, chip.architecture(table.device))
        how = ring, persistent_tiles.PERSISTENT_KEYS_PER_SPLIT, persistent_tiles.PERSISTENT_MAX_SPLITS
        if self.packed is None or self.packed[0] != how:
            self.packed = None  # Frees the memory of the other one first.
            self.packed = how, PersistentDecoder(_weights(n_heads, *weights))
        return _logits(self.packed[1].decode, cache, tokens, len(table))


# --- choices --------------------------------------------------------------------------------------------------------


def _choice_case(name: str, shape: Shape, n_rows: int, device: torch.device) -> Case:
    """inputs: logits (B, V). Every contender returns the tokens (B,), which must be the reference's."""
    logits = 3 * torch.randn(n_rows, shape.vocab_size, device=device)
    seed = None if name == "greedy" else seed_tensor(1, device)
    options = SamplingOptions(**CHOICES[name], seed=seed)
    contenders = {"fastgpt": sampling.sample, "torch": sampling_reference.sample}
    return Case(
        f"choice, {name}, B={n_rows}",
        (logits,),
        {contender: partial(_chosen, choose, options) for contender, choose in contenders.items()},
        (logits.nbytes, logits.numel()),
        (0, 0),
        _REPLAY,
    )


def _chosen(choose: Callable[..., None], options: SamplingOptions, logits: Tensor) -> Tensor:
    n_rows = len(logits)

    def zeros(*sizes: int) -> Tensor:
        return torch.zeros(sizes, dtype=torch.int64, device=logits.device)

    sequences, finished = zeros(n_rows, 2), torch.zeros(n_rows, dtype=torch.bool, device=logits.device)
    rows = Rows(zeros(n_rows), zeros(n_rows), zeros(n_rows), finished, sequences, None)
    choose(logits.float(), rows, options, None, 0)
    return rows.tokens
