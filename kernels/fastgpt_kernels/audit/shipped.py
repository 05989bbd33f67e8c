"""What ships: every operation in the forms and at the widths in which models of this family call it.

The calls are real, on small tensors in the CPU's memory. `audit` records their launches for a chip that need not be
present, so that it compiles what is launched. A tile depends on dtype, width and chip. Numbers of rows and vocabulary
sizes change the machine code only by their divisibility, so those of GPT-2 stand for others.
"""

from collections.abc import Callable, Iterator
from functools import cache, partial
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..common import chip
from ..common.decode_weights import DecodeLayer, DecodeWeights, Matrix
from ..common.int4 import Int4Matrix
from ..common.int8 import Int8Matrix
from ..common.precision import float32_products
from ..operations.attention import op as attention
from ..operations.decode_step.op import DecodeStep
from ..operations.gelu_mlp import op as gelu_mlp
from ..operations.layer_norm import op as layer_norm
from ..operations.linear_cross_entropy import op as linear_cross_entropy
from ..operations.persistent_decode import tiles as persistent_decode_tiles
from ..operations.persistent_decode.op import PersistentDecoder
from ..operations.sampling import op as sampling
from ..operations.sampling.reference import Rows, SamplingOptions

# How labels of float32 begin where torch may round it to tf32.
TF32 = "fp32 as tf32"
_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.float64: "fp64"}
# Channels and heads of the four sizes.
_SIZES = {"small": (768, 12), "medium": (1024, 16), "large": (1280, 20), "xl": (1600, 25)}
_VOCABULARY, _CONTEXT = 50257, 1024
# Sequences, and tokens per sequence: their product is a multiple of 16, as in training.
_BATCH, _TOKENS = 2, 16


class Call(NamedTuple):
    """One call of an operation, forward and, if there is one, backward, with a label that tells it from others."""

    operation: str
    label: str
    run: Callable[[], object]


def calls(architecture: str) -> Iterator[Call]:
    """All calls that ship for a chip. The caller runs them inside `chip.assume`."""
    for part in (_layer_norm, _attention, _linear_cross_entropy, _gelu_mlp, _decode, _persistent_decode, _sample):
        yield from part(architecture)


def _random(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, dtype=dtype, requires_grad=dtype.is_floating_point)


def _with_backward(operation: Callable[..., Any], *args: Any, **options: Any) -> Callable[[], None]:
    def run() -> None:
        outputs = operation(*args, **options)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        torch.autograd.backward(outputs, [torch.ones_like(output) for output in outputs])

    return run


def _without_gradients(operation: Callable[..., Any], *args: Any, **options: Any) -> Callable[[], Any]:
    return torch.no_grad()(partial(operation, *args, **options))


def _with_tf32(call: Call) -> Iterator[Call]:
    """A call, and if it multiplies float32 in a kernel the same where torch may round float32 to tf32."""
    yield call
    if not call.label.startswith("fp32"):
        return

    def run() -> None:
        with float32_products(tf32=True):
            call.run()

    yield call._replace(label=call.label.replace("fp32", TF32, 1), run=run)


# --- operations -----------------------------------------------------------------------------------------------------

# float16 differs from bfloat16 only in conversions.
_DTYPES = torch.bfloat16, torch.float32, torch.float64


def _layer_norm(_: str) -> Iterator[Call]:
    widths = 256, 512, 768, 1600, 4096
    kinds = *product((torch.bfloat16, torch.float32), widths, [None]), (torch.float64, 2048, None)
    # Under autocast, the product that reads a norm takes half precision, and another adds half precision to the stream.
    for dtype, width, result in (*kinds, *product([torch.float32], (768, 1600, 4096), [torch.bfloat16])):
        x, weight, bias = (_random(*n, width, dtype=dtype) for n in ((32,), (), ()))
        added = _random(32, width, dtype=result or dtype)
        label = f"{_NAMES[dtype]} C={width}" + ("" if result is None else f" to {_NAMES[result]}")
        for operation, inputs in (
            (layer_norm.layer_norm, (x, weight, bias)),
            (layer_norm.add_layer_norm, (added, x, weight, bias)),
            (layer_norm.add_layer_norm, (None, x, weight, bias)),  # the first norm of a block, beside the stream
        ):
            yield Call(operation.__name__, label, _with_backward(operation, *inputs, dtype=result))


def _attention(_: str) -> Iterator[Call]:
    mask = torch.ones(_BATCH, _TOKENS, dtype=torch.bool)
    # Heads of other sizes are masked like those of 80, in tiles of the same width or narrower.
    for dtype, head_dim in (
        (torch.bfloat16, 64),
        (torch.bfloat16, 80),
        (torch.bfloat16, 128),
        (torch.float32, 64),
        (torch.float32, 80),
        (torch.float32, 128),
    ):
        for has_mask, dropout_p in product((False, True), (0.0, 0.1)):
            packed = _random(_BATCH, _TOKENS, 3, 2, head_dim, dtype=dtype)
            options = {"key_padding_mask": mask if has_mask else None, "dropout_p": dropout_p, "seed": 0}
            heads = (packed[:, :, part].transpose(1, 2) for part in range(3))
            label = f"{_NAMES[dtype]} D={head_dim}{' mask' * has_mask}{' dropout' * (dropout_p > 0)}"
            yield from _with_tf32(
                Call("causal_attention", label, _with_backward(attention.causal_attention, *heads, **options))
            )


def _linear_cross_entropy(_: str) -> Iterator[Call]:
    labels = torch.zeros(32, dtype=torch.int64)
    terms = {"": {}, ", smoothing and z-loss": {"label_smoothing": 0.1, "z_loss": 1e-4}}
    for dtype, reduction, more in product(_DTYPES, ("mean", "none"), terms):
        hidden, weight = _random(32, 64, dtype=dtype), _random(131, 64, dtype=dtype)
        options = {"reduction": reduction, **terms[more]}
        run = _with_backward(linear_cross_entropy.linear_cross_entropy, hidden, weight, labels, **options)
        yield Call("linear_cross_entropy", f"{_NAMES[dtype]} {reduction}{more}", run)


def _gelu_mlp(architecture: str) -> Iterator[Call]:
    # Multiples of 16 go through tensor descriptors where the chip has them, odd widths through pointers.
    sizes = (torch.float64, 64), *product((torch.bfloat16, torch.float32), (64, 65))
    for dtype, width in sizes:
        for form, options in _mlp_forms(dtype):
            label = f"{_NAMES[dtype]} {form}{' odd' * (width % 2)}"
            yield from _with_tf32(
                Call("gelu_mlp", label, partial(_run_gelu_mlp, 32, width, 4 * width, dtype, **options))
            )
    if architecture == "sm_90":  # whose products of many rows have a tile of their own
        for form, options in _mlp_forms(torch.bfloat16):
            yield Call("gelu_mlp", f"bf16 {form} many rows", partial(_run_large_gelu_mlp, torch.bfloat16, **options))


def _mlp_forms(dtype: torch.dtype) -> Iterator[tuple[str, dict[str, Any]]]:
    """Labels and options. Among the activations the exact GELU takes the most registers."""
    yield "gelu_new", {"activation": "gelu_new"}
    training = {"activation": "gelu", "dropout_p": 0.1, "seed": 0}
    yield "gelu residual dropout", training | {"residual_dtype": dtype}
    yield "gelu_new residual in evaluation", {"activation": "gelu_new", "residual_dtype": dtype, "with_backward": False}
    if dtype == torch.bfloat16:  # Under autocast the stream stays in float32.
        yield "gelu fp32 residual dropout", training | {"residual_dtype": torch.float32}
        yield "gelu_new fp32 residual", {"activation": "gelu_new", "residual_dtype": torch.float32}


def _run_gelu_mlp(
    n_rows: int, width: int, n_hidden: int, dtype: torch.dtype, *,
    residual_dtype: torch.dtype | None = None, with_backward: bool = True, **options: Any,
) -> None:  # fmt: skip
    shapes = (n_rows, width), (width, n_hidden), (n_hidden,), (n_hidden, width), (width,)
    inputs = [_random(*shape, dtype=dtype) for shape in shapes]
    options["residual"] = None if residual_dtype is None else _random(n_rows, width, dtype=residual_dtype)
    run = _with_backward if with_backward else _without_gradients
    run(gelu_mlp.gelu_mlp, *inputs, **options)()


def _run_large_gelu_mlp(dtype: torch.dtype, **options: Any) -> None:
    """As few rows as make products large in the narrowest layers that can."""
    n_multiprocessors = chip.chip(torch.get_default_device()).n_multiprocessors
    _run_gelu_mlp(128 * (2 * n_multiprocessors + 1), 256, 256, dtype, **options)


# --- decoding -------------------------------------------------------------------------------------------------------


def _decode_weights(n_channels: int, n_heads: int, dtype: torch.dtype, kind: str = "") -> DecodeWeights:
    """kind: of the matrices, int8, int4 in groups of 64, or empty for dtype."""

    def new(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=dtype)

    def rounded(matrix: Tensor) -> Matrix:
        if kind == "int4":  # Searching steps for weights that no kernel reads here would take minutes.
            n_in, n_out = matrix.shape
            values = torch.zeros(n_out, n_in // 2, dtype=torch.uint8)
            return Int4Matrix(values, torch.zeros(n_out, n_in // 64, dtype=torch.int8), torch.ones(n_out))
        return Int8Matrix.nearest(matrix) if kind == "int8" else matrix

    def product_of(n_in: int, n_out: int) -> tuple[Matrix, Tensor]:
        return rounded(new(n_in, n_out)), new(n_out)

    norm = new(n_channels), new(n_channels)
    layer = DecodeLayer(
        *norm, *product_of(n_channels, 3 * n_channels), 0.125, *product_of(n_channels, n_channels),
        *norm, *product_of(n_channels, 4 * n_channels), *product_of(4 * n_channels, n_channels),
    )  # fmt: skip
    wte = new(_VOCABULARY, n_channels)
    head = rounded(wte.t()) if kind else wte
    # The products of a first layer find no sums of parts to add to the stream, those of the others do.
    return DecodeWeights(wte, new(_CONTEXT, n_channels), (layer, layer), *norm, head, 1e-5, n_heads, "gelu_new")


def _decode_state(n_channels: int, n_heads: int, n_rows: int, n_caches: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Cache, tokens, positions, slots, starts and logits."""
    cache = torch.zeros(2, 2, n_caches, n_heads, _CONTEXT, n_channels // n_heads, dtype=dtype)
    return cache, *torch.zeros(4, n_rows, dtype=torch.int64), torch.zeros(n_rows, _VOCABULARY)


def _decode(_: str) -> Iterator[Call]:
    # The narrowest and the widest size; those between use the same tiles. One row, the most that are fused in any size,
    # the most in narrow ones, and the most for which norms and products are kernels of their own; then new tokens of
    # one sequence, for prompt lookup.
    forms = (1, False), (4, False), (8, False), (64, False), (4, True), (9, True)
    # With rounded weights, the tiles of many rows grow with their number; the dtype of the rows changes little else.
    # With int4, 4 rows are fused at most.
    rounded_forms = {
        (torch.bfloat16, "small", "int8"): ((1, False), (8, False), (16, False), (64, False)),
        (torch.bfloat16, "small", "int4"): ((1, False), (4, False), (16, False), (64, False)),
        (torch.bfloat16, "xl", "int8"): forms[:2],
        (torch.bfloat16, "xl", "int4"): forms[:2],
        (torch.float32, "small", "int8"): ((1, False), (8, False)),
        (torch.float32, "small", "int4"): forms[:3],
    }
    for dtype, size, rounding in product((torch.bfloat16, torch.float32), ("small", "xl"), ("", "int8", "int4")):
        weights = cache(partial(_decode_weights, *_SIZES[size], dtype, rounding))  # made by the first call that runs
        float_forms = forms if dtype == torch.bfloat16 else forms[:2]
        for n_rows, one_sequence in rounded_forms.get((dtype, size, rounding), ()) if rounding else float_forms:

            def run(
                n_rows: int = n_rows, one_sequence: bool = one_sequence, made: Callable[[], DecodeWeights] = weights
            ) -> None:
                weights = made()
                step = DecodeStep(weights, n_rows, _CONTEXT, one_sequence=one_sequence)
                n_caches = 1 if one_sequence else n_rows
                state = _decode_state(weights.wte.shape[1], weights.n_heads, n_rows, n_caches, weights.wte.dtype)
                if one_sequence:  # Each token has its own position and slot.
                    for counters in state[2:4]:
                        counters += torch.arange(n_rows)
                step.decode(weights, *state)  # type: ignore[arg-type]

            kind = " ".join(filter(None, (_NAMES[dtype], rounding, size)))
            yield Call("decode", f"{kind} B={n_rows}{' one sequence' * one_sequence}", run)


def _persistent_decode(architecture: str) -> Iterator[Call]:
    for dtype, (size, (n_channels, n_heads)) in product((torch.bfloat16, torch.float16), _SIZES.items()):
        if persistent_decode_tiles.persistent_ring(n_channels, dtype, architecture) is None:
            continue

        def run(n_channels: int = n_channels, n_heads: int = n_heads, dtype: torch.dtype = dtype) -> None:
            decoder = PersistentDecoder(_decode_weights(n_channels, n_heads, dtype))
            decoder.decode(*_decode_state(n_channels, n_heads, 1, 1, dtype))  # type: ignore[arg-type]

        yield Call("persistent_decode", f"{_NAMES[dtype]} {size}", run)


def _sample(_: str) -> Iterator[Call]:
    filters = {
        "greedy": {"seed": None}, "draw": {}, "min-p": {"min_p": 0.1}, "top-k": {"top_k": 50}, "top-p": {"top_p": 0.9},
        "top-k, top-p": {"top_k": 50, "top_p": 0.9},
    }  # fmt: skip
    # Decode steps write float32 logits; those of a prompt are bfloat16.
    for dtype, has_penalty, label in (
        *product((torch.float32,), (False, True), filters),
        (torch.bfloat16, True, "draw"),
        (torch.bfloat16, True, "top-k, top-p"),
    ):
        options = filters[label]

        def run(dtype: torch.dtype = dtype, has_penalty: bool = has_penalty, options: Any = options) -> None:
            tokens, positions, slots = torch.zeros(3, _BATCH, dtype=torch.int64)
            finished = torch.zeros(_BATCH, dtype=torch.bool)
            seen = torch.zeros(_BATCH, _VOCABULARY, dtype=torch.bool) if has_penalty else None
            sequences = torch.zeros(_BATCH, _CONTEXT, dtype=torch.int64)
            sampling.sample(
                torch.zeros(_BATCH, _VOCABULARY, dtype=dtype),
                Rows(tokens, positions, slots, finished, sequences, seen),
                SamplingOptions(**{"seed": 0} | options, repetition_penalty=1.2 if has_penalty else 1.0),
                torch.tensor([50256]),
                pad_id=0,
            )

        yield Call("sample", f"{_NAMES[dtype]} {label}{', penalty' * has_penalty}", run)
