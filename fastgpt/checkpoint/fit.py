"""Checks of a GPT-2's configuration, of the names and shapes of its stored tensors, and of their values.

Shapes: C channels, F hidden width, V vocabulary, P positions.
"""

import math
import re
from collections.abc import Collection, Iterator
from itertools import islice
from types import NoneType
from typing import Any, NamedTuple

import torch
from fastgpt_kernels.common.int4 import GROUP_SIZES
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN

from ..messages import shown
from .headers import FLOATS, Checkpoint, CheckpointError, CheckpointShapeError, StoredTensor

PREFIX = "transformer."
# Causal masks that old releases of transformers saved with the weights.
OLD_BUFFER = r"(^|\.)(attn|crossattention)\.(masked_)?bias$"
_CROSS_ATTENTION = re.compile(r"h\.\d+\.(crossattention|ln_cross_attn)\.")

# More than any task has. transformers makes a name for each label when it reads a configuration.
MAX_LABELS = 100_000
DTYPES = ("float32", "float16", "bfloat16", "float64")

# --- configuration --------------------------------------------------------------------------------------------------


def field_problems(fields: dict[str, Any]) -> Iterator[str]:
    """Fields of a config.json with which transformers would take all memory or fail later."""
    n_labels = fields.get("num_labels")
    if n_labels is not None and not (type(n_labels) is int and 0 <= n_labels <= MAX_LABELS):
        yield f"num_labels must be a whole number up to {MAX_LABELS}, not {shown(n_labels)}"
    for name in ("id2label", "label2id"):
        if isinstance(fields.get(name), dict) and len(fields[name]) > MAX_LABELS:
            yield f"{name} has {len(fields[name])} entries, more than {MAX_LABELS}"
    if fields.get("transformers_weights") == "" or not isinstance(fields.get("transformers_weights"), str | NoneType):
        yield f"transformers_weights must name a file, not {shown(fields['transformers_weights'])}"
    for name in ("dtype", "torch_dtype"):
        dtype = fields.get(name)
        if dtype is not None and (not isinstance(dtype, str) or dtype.removeprefix("torch.") not in DTYPES):
            yield f"{name} must be one of {', '.join(DTYPES)}, not {shown(dtype)}"


def config_problems(config: PreTrainedConfig) -> Iterator[str]:
    """Why no GPT-2 can be built from this configuration."""
    sizes = {name: getattr(config, name) for name in ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head")}
    if config.n_inner is not None:
        sizes["n_inner"] = config.n_inner
    bad_sizes = {name: size for name, size in sizes.items() if type(size) is not int or not 0 < size < 2**31}
    for name, size in bad_sizes.items():
        yield f"{name} must be a whole number from 1 to 2**31 - 1, not {shown(size)}"
    if not bad_sizes.keys() & {"n_embd", "n_head"} and config.n_embd % config.n_head:
        yield f"n_embd {config.n_embd} is not divisible by n_head {config.n_head}"
    if not (_is_number(config.layer_norm_epsilon) and 0 < config.layer_norm_epsilon < math.inf):
        yield f"layer_norm_epsilon must be a finite number above 0, not {shown(config.layer_norm_epsilon)}"
    for name in ("embd_pdrop", "attn_pdrop", "resid_pdrop"):
        if not (_is_number(getattr(config, name)) and 0 <= getattr(config, name) <= 1):
            yield f"{name} must be a probability, not {shown(getattr(config, name))}"
    rounding = rounding_of(config)
    if rounding is not None and rounding.head and config.tie_word_embeddings:
        yield f"tie_word_embeddings must be false, because the head has int{rounding.bits} weights of its own"
    if rounding is not None and rounding.bits == 4 and not bad_sizes:
        for n_inputs in {config.n_embd, config.n_inner or 4 * config.n_embd}:
            if problem := group_problem(n_inputs, rounding.group_size):
                yield f"quantization_config: {problem}"
    if not isinstance(config.activation_function, str) or config.activation_function not in ACT2FN:
        yield f"unknown activation_function {shown(config.activation_function)}: GPT-2's own is 'gelu_new'"


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def check_config(config: PreTrainedConfig) -> None:
    """Raise ValueError when no GPT-2 can be built from this configuration."""
    for problem in config_problems(config):
        raise ValueError(problem)


# The names under which a configuration says how `fastgpt.quantize` rounded a model.
INT8, INT4 = "fastgpt_int8", "fastgpt_int4"
# Weights of int4 that share a step of one byte: a compromise between the bytes and the demo's perplexity.
DEFAULT_GROUP_SIZE = 64


class Rounding(NamedTuple):
    """How the products of a model's blocks are rounded.

    bits: of a weight, 8 or 4. group_size: weights that share a step, with 4 bits; 0 with 8. head: whether the head of
    tokens is rounded too. activations: whether the inputs of the products may be rounded, with 8 bits.
    """

    bits: int = 8
    group_size: int = 0
    head: bool = False
    activations: bool = False


def rounding_of(config: PreTrainedConfig) -> Rounding | None:
    """What a configuration says; None where it describes a model in floats, or one that something else quantised."""
    return rounding_marked(getattr(config, "quantization_config", None))


def rounding_marked(mark: Any) -> Rounding | None:
    """The same of the part of a configuration, as an object or as the fields of a file, that marks such a model."""
    fields = mark if isinstance(mark, dict) else getattr(mark, "__dict__", {})
    head = bool(fields.get("head"))
    if fields.get("quant_method") == INT8:
        return Rounding(head=head, activations=bool(fields.get("activations")))
    if fields.get("quant_method") == INT4:
        return Rounding(4, fields.get("group_size", 0), head)
    return None


def has_rounded_head(config: PreTrainedConfig) -> bool:
    """Whether the head of tokens has int8 or int4 weights."""
    rounding = rounding_of(config)
    return rounding is not None and rounding.head


def group_problem(n_inputs: int, group_size: Any) -> str | None:
    """Why the weights of products with n_inputs cannot share steps in such groups; None if they can."""
    if not isinstance(group_size, int) or group_size not in GROUP_SIZES:
        return f"group_size must be one of {', '.join(map(str, GROUP_SIZES))}, not {shown(group_size)}"
    return f"groups of {group_size} do not divide {n_inputs} inputs" if n_inputs % group_size else None


# --- names and shapes -----------------------------------------------------------------------------------------------

Named = Iterator[tuple[str, tuple[int, ...]]]


def body_shapes(config: PreTrainedConfig) -> Named:
    """Names and shapes of all tensors of a GPT2Model, without the prefix they have in models with a head."""
    C, V, P = config.n_embd, config.vocab_size, config.n_positions
    F = 4 * C if config.n_inner is None else config.n_inner

    rounding = rounding_of(config)

    def linear(name: str, n_in: int, n_out: int) -> Named:
        if rounding is None:
            yield f"{name}.weight", (n_in, n_out)  # as Conv1D stores it
        else:
            for part, shape in rounded_shapes(n_in, n_out, rounding).items():
                yield f"{name}.{part}", shape
        yield f"{name}.bias", (n_out,)

    def norm(name: str) -> Named:
        yield f"{name}.weight", (C,)
        yield f"{name}.bias", (C,)

    yield "wte.weight", (V, C)
    yield "wpe.weight", (P, C)
    for layer in range(config.n_layer):
        block = f"h.{layer}"
        yield from norm(f"{block}.ln_1")
        yield from linear(f"{block}.attn.c_attn", C, 3 * C)
        yield from linear(f"{block}.attn.c_proj", C, C)
        yield from norm(f"{block}.ln_2")
        if config.add_cross_attention:
            yield from linear(f"{block}.crossattention.c_attn", C, 2 * C)
            yield from linear(f"{block}.crossattention.c_proj", C, C)
            yield from linear(f"{block}.crossattention.q_attn", C, C)
            yield from norm(f"{block}.ln_cross_attn")
        yield from linear(f"{block}.mlp.c_fc", C, F)
        yield from linear(f"{block}.mlp.c_proj", F, C)
    yield from norm("ln_f")


def rounded_shapes(n_in: int, n_out: int, rounding: Rounding) -> dict[str, tuple[int, ...]]:
    """The shapes of the tensors of a rounded product, without its bias."""
    if rounding.bits == 8:
        return {"weight": (n_out, n_in), "scale": (n_out,)}
    return {"weight": (n_out, n_in // 2), "steps": (n_out, n_in // rounding.group_size), "scale": (n_out,)}


def head_shapes(architecture: str, config: PreTrainedConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors that a GPT-2 class has besides its body; none for an unknown class."""
    C, V, n_labels = config.n_embd, config.vocab_size, config.num_labels or 0
    n_choices = 1 if config.summary_proj_to_labels else C
    summary = {"weight": (n_choices, C), "bias": (n_choices,)} if config.summary_use_proj else {}
    rounding = rounding_of(config)
    parts = {"weight": (V, C)} if rounding is None or not rounding.head else rounded_shapes(C, V, rounding)
    lm_head = {f"lm_head.{part}": shape for part, shape in parts.items()}
    heads: dict[str, dict[str, tuple[int, ...]]] = {
        "GPT2LMHeadModel": lm_head,
        "GPT2DoubleHeadsModel": {
            **lm_head,
            **{f"multiple_choice_head.summary.{name}": shape for name, shape in summary.items()},
        },
        "GPT2ForSequenceClassification": {"score.weight": (n_labels, C)},
        "GPT2ForTokenClassification": {"classifier.weight": (n_labels, C), "classifier.bias": (n_labels,)},
        "GPT2ForQuestionAnswering": {"qa_outputs.weight": (2, C), "qa_outputs.bias": (2,)},
    }
    return heads.get(architecture, {})


def by_model_name(checkpoint: Checkpoint) -> dict[str, StoredTensor]:
    """The stored tensors by their names in a model without the prefix of the body."""
    return {name.removeprefix(PREFIX): tensor for name, tensor in checkpoint.tensors.items()}


def missing_from_body(stored: Collection[str], config: PreTrainedConfig) -> Iterator[str]:
    """The names of the body that are not among `stored`; all of cross-attention may be missing.

    A language model that becomes a decoder of images or speech gets new cross-attention.
    """
    has_cross_attention = any(_CROSS_ATTENTION.match(name) for name in stored)
    # A configuration can claim any number of layers. A hundred names more than are stored show enough missing ones.
    for name, _ in islice(body_shapes(config), len(stored) + 100):
        if name not in stored and (has_cross_attention or not _CROSS_ATTENTION.match(name)):
            yield name


def missing(stored: Collection[str], config: PreTrainedConfig, architecture: str) -> Iterator[str]:
    """The names that are not among `stored` of the body, and of a rounded head, of which no new one is made."""
    yield from missing_from_body(stored, config)
    if has_rounded_head(config):
        for name in head_shapes(architecture, config):
            if name.startswith("lm_head.") and name not in stored:
                yield name


def is_table_of_head(stored: Collection[str], config: PreTrainedConfig, architecture: str) -> bool:
    """Whether the token table is tied to a head that alone is stored, as `safetensors.torch.save_model` does.

    architecture: "" for a class of a user, which may have such a head.
    """
    has_head = not architecture or "lm_head.weight" in head_shapes(architecture, config)
    return config.tie_word_embeddings and has_head and "lm_head.weight" in stored and "wte.weight" not in stored


def name_problems(checkpoint: Checkpoint, config: PreTrainedConfig, architecture: str) -> Iterator[CheckpointError]:
    """Tensors that are missing from the body or a rounded head, or stored twice."""
    stored = set(by_model_name(checkpoint))
    if is_table_of_head(stored, config, architecture):
        stored.add("wte.weight")
    for name in checkpoint.tensors:
        if name.startswith(PREFIX) and name.removeprefix(PREFIX) in checkpoint.tensors:
            yield CheckpointError(f"{checkpoint.source}: stores {shown(name)} a second time, without {PREFIX!r}")
    for name in missing(stored, config, architecture):
        yield CheckpointError(f"{checkpoint.source}: has no tensor {name!r}, which the configuration asks for")


def shape_problems(
    checkpoint: Checkpoint, config: PreTrainedConfig, architecture: str, *, ignore_mismatched_sizes: bool = False
) -> Iterator[CheckpointError]:
    """Tensors of a model of this configuration that are stored with another shape or kind of numbers."""
    stored = by_model_name(checkpoint)
    body = islice(body_shapes(config), len(stored) + 100)
    shapes = dict(body) | head_shapes(architecture, config)
    for name, shape in shapes.items():
        tensor = stored.get(name)
        if tensor is None:
            continue
        if tensor.shape != shape and not ignore_mismatched_sizes:
            yield CheckpointShapeError(
                f"{tensor.file}: tensor {name!r} has shape {tensor.shape}, but the configuration asks for {shape}"
            )
        dtypes, kind = _expected_dtypes(name, shapes)
        if tensor.dtype not in dtypes:
            yield CheckpointError(f"{tensor.file}: tensor {name!r} holds {tensor.dtype}, not {kind}")


def _expected_dtypes(name: str, shapes: Collection[str]) -> tuple[tuple[str, ...], str]:
    """In which a tensor may be stored, and what to call them. shapes: the names of all tensors."""
    product, _, part = name.rpartition(".")
    is_rounded, is_int4 = f"{product}.scale" in shapes, f"{product}.steps" in shapes
    if is_rounded and part == "weight" and is_int4:
        return ("U8",), "pairs of int4"
    if is_rounded and part in ("weight", "steps"):
        return ("I8",), "int8"
    return FLOATS, "floating-point numbers"


# --- values ---------------------------------------------------------------------------------------------------------


def not_finite(tensor: Tensor) -> str | None:
    """'NaN' or 'Inf' when the tensor holds one, else None; one pass without a copy of the tensor."""
    if hasattr(tensor, "to_local"):  # a DTensor: each process checks its own part
        tensor = tensor.to_local()  # type: ignore[operator]
    if not tensor.is_floating_point() or tensor.is_meta or tensor.numel() == 0:
        return None
    if tensor.element_size() == 1:  # float8 has no aminmax, and its range fits in bfloat16
        tensor = tensor.to(torch.bfloat16)
    lowest, highest = (bound.item() for bound in torch.aminmax(tensor.detach()))
    if math.isnan(lowest) or math.isnan(highest):
        return "NaN"
    return None if math.isfinite(lowest) and math.isfinite(highest) else "Inf"
