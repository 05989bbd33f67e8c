"""Products with int8 or int4 weights: the modules that hold them, `quantize`, and the mark of their checkpoints."""

import copy
from collections.abc import Iterator
from typing import Any, ClassVar, TypeVar

import torch
import torch.nn.functional as F
from fastgpt_kernels.common.decode_weights import RoundedMatrix
from fastgpt_kernels.common.int4 import Int4Matrix
from fastgpt_kernels.common.int8 import Int8Matrix
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.utils.quantization_config import QuantizationConfigMixin

import fastgpt.ops as ops

from ..checkpoint.fit import DEFAULT_GROUP_SIZE, INT4, INT8, Rounding, group_problem, rounding_marked, rounding_of
from . import digits
from .plain import is_plain, watch

Model = TypeVar("Model", bound=PreTrainedModel)

# For 768 x 3072, digits of 16 float32 rows take a quarter of the time of a float copy and its product, of 64 half, of
# 128 three quarters. From there on they gain little, and their products take much memory in the head.
MAX_ROWS_IN_DIGITS = 128

# --- the modules ----------------------------------------------------------------------------------------------------


class RoundedLinear(nn.Linear):
    """x @ weight + bias, where the weight is a `RoundedMatrix`. Gradients flow to x and to the bias.

    The parts of the matrix are parameters without gradients, of which `weight` holds the values. bias: (out,), or None
    for a head.
    rounds_input: x may be rounded to int8, each row with a scale of its own, where that is faster: on a CPU with exact
    instructions for it, without gradients.
    """

    matrix_type: ClassVar[type[RoundedMatrix]]
    # In the order of the matrix, each with its dtype, whatever that of the model is.
    parts: ClassVar[dict[str, torch.dtype]]

    def __init__(self, matrix: RoundedMatrix, bias: nn.Parameter | None, *, rounds_input: bool = False):
        nn.Module.__init__(self)
        self.in_features, self.out_features = matrix.shape
        for name, part in zip(self.parts, matrix, strict=True):
            self.register_parameter(name, nn.Parameter(part, requires_grad=False))
        self.register_parameter("bias", bias)
        self.rounds_input = rounds_input

    @property
    def matrix(self) -> RoundedMatrix:
        parts: Any = (self._parameters[name] for name in self.parts)
        return self.matrix_type(*parts)

    def forward(self, input: Tensor) -> Tensor:
        if self._takes_digits(input):
            rows = input.reshape(-1, self.in_features).contiguous()
            precision = torch.int8 if self.rounds_input else input.dtype
            product = digits.Digits(self.matrix.to_int8(), len(rows), precision, digits.Stored)(rows, self.bias)
            return product.unflatten(0, input.shape[:-1])
        return F.linear(input, self.matrix.to_float(input.dtype).t(), self.bias)

    def _takes_digits(self, input: Tensor) -> bool:
        """Whether converting the weight to floats would take longer than the product: of few rows, or rounded ones."""
        return (
            not torch.compiler.is_compiling()
            and not torch.is_grad_enabled()
            and type(input) is Tensor
            and input.is_cpu
            and input.is_floating_point()
            and (self.rounds_input or input.dtype in digits.N_DIGITS)
            and (self.rounds_input or input.numel() <= MAX_ROWS_IN_DIGITS * self.in_features)
            and input.numel() > 0
            and not ops.is_transformed()
            and not torch.is_autocast_enabled("cpu")
            and digits.is_exact(digits.Stored)
        )

    def _apply(self, fn, recurse=True):
        """`to()`, `half()` and others call this: it moves the scale, which keeps its dtype."""
        exact = self.scale.data
        super()._apply(fn, recurse)
        if self.scale.dtype != torch.float32:
            self.scale = nn.Parameter(exact.to(self.scale.device), requires_grad=False)
        return self


class Int8Linear(RoundedLinear):
    """weight: (out, in) int8. scale: (out,) float32."""

    matrix_type = Int8Matrix
    parts: ClassVar = {"weight": torch.int8, "scale": torch.float32}


class Int4Linear(RoundedLinear):
    """weight: (out, in / 2) uint8, two values in a byte. steps: (out, in / group) int8. scale: (out,) float32."""

    matrix_type = Int4Matrix
    parts: ClassVar = {"weight": torch.uint8, "steps": torch.int8, "scale": torch.float32}


for _kind in (RoundedLinear, Int8Linear, Int4Linear):
    watch(_kind)


def replace_products(model: nn.Module, rounding: Rounding) -> None:
    """Round every product of a GPT-2's blocks, and its head of tokens if that is asked for, in place.

    Those that are rounded already keep their weights. Raises ValueError, and changes nothing, if another is not a plain
    Conv1D (the head a plain Linear), holds NaN or Inf, or has a number of inputs that the groups do not divide.
    """
    replacements = {}
    for name, module in _float_products(model, rounding.head):
        kind = nn.Linear if name == HEAD else Conv1D
        if not is_plain(module, kind):
            raise ValueError(f"{name} was changed: quantize a model before anything is added to its products")
        matrix = module.weight.t() if kind is nn.Linear else module.weight  # (in, out)
        try:
            replacements[name] = _rounded(matrix, module.bias, rounding).train(module.training)
        except ValueError as error:
            raise ValueError(f"{name}.weight: {error}") from error
    for name, module in replacements.items():
        model.set_submodule(name, module, strict=True)
    for module in model.modules():
        if isinstance(module, RoundedLinear):
            module.rounds_input = rounding.activations


def _rounded(matrix: Tensor, bias: nn.Parameter | None, rounding: Rounding) -> RoundedLinear:
    if rounding.bits == 8:
        return Int8Linear(Int8Matrix.nearest(matrix), bias)
    if problem := group_problem(len(matrix), rounding.group_size):
        raise ValueError(problem)
    return Int4Linear(Int4Matrix.nearest(matrix, rounding.group_size), bias)


HEAD = "lm_head"


def _float_products(model: nn.Module, head: bool) -> Iterator[tuple[str, Any]]:
    """By their names: those of the blocks, and the head of tokens where it is asked for."""
    for name, module in model.named_modules():
        if isinstance(module, Conv1D) or (head and name == HEAD and not isinstance(module, RoundedLinear)):
            yield name, module


def head_weight(head: Any, dtype: torch.dtype) -> Tensor:
    """The weight (V, C) of a head of tokens; of a rounded one a copy in a floating-point dtype."""
    return head.matrix.to_float(dtype).t() if isinstance(head, RoundedLinear) else head.weight


# --- checkpoints ----------------------------------------------------------------------------------------------------


class Int8Config(QuantizationConfigMixin):
    """The mark of such a model in config.json: with it transformers' from_pretrained, too, loads int8 weights.

    Where fastgpt was not imported, transformers warns of an unknown method and then refuses the checkpoint, because the
    weights are stored transposed.
    """

    def __init__(self, quant_method: str = INT8, head: bool = False, activations: bool = False):
        """head: whether a head of tokens, if there is one, has int8 weights too. activations: as for `quantize`."""
        self.quant_method = quant_method  # type: ignore[assignment] - the names of transformers' own methods
        self.head, self.activations = head, activations


class Int4Config(QuantizationConfigMixin):
    """The same for int4 weights."""

    def __init__(self, quant_method: str = INT4, group_size: int = DEFAULT_GROUP_SIZE, head: bool = False):
        """group_size, head: as for `quantize`."""
        self.quant_method = quant_method  # type: ignore[assignment]
        self.group_size, self.head = group_size, head


class RoundedQuantizer(HfQuantizer):
    """What transformers calls around the loading of weights; it only loads what `quantize` made."""

    requires_calibration = True
    is_trainable = True  # type: ignore[assignment] - adapters on top are

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs) -> None:
        rounding = rounding_marked(self.quantization_config)
        assert rounding is not None  # transformers found this class by the mark
        replace_products(model, rounding._replace(head=rounding.head and hasattr(model, HEAD)))

    def is_serializable(self) -> bool:
        return True


# transformers' functions for this refuse a known name, such as one of an earlier import of fastgpt in this process.
AUTO_QUANTIZATION_CONFIG_MAPPING.update({INT8: Int8Config, INT4: Int4Config})
AUTO_QUANTIZER_MAPPING.update({INT8: RoundedQuantizer, INT4: RoundedQuantizer})


def quantize(
    model: Model,
    *,
    bits: int = 8,
    group_size: int = DEFAULT_GROUP_SIZE,
    head: bool = False,
    activations: bool = False,
) -> Model:
    """Round the weights of all products of a GPT-2's blocks to int8 or int4, in place.

    Decoding then reads half the bytes of bfloat16 with int8, or about a quarter with int4. Everything else works as
    before, on weights that are rounded once: forward, adapters on top, `save_pretrained`, `from_pretrained`. The token
    table keeps its dtype, because a step reads one row of it for each token.

    model: a GPT-2 of fastgpt or transformers, in any dtype; it is best rounded from the dtype of its checkpoint.
    bits: 8, where each output channel has a scale, or 4, where each group of its weights has a step, too.
    group_size: with 4 bits, how many neighbouring weights of an output channel share a step: 32, 64 or 128, of which
    smaller ones err less and take more bytes. It must divide the inputs of every product.
    head: round the head of tokens too, with a scale for each token: a copy of its own, where it was the token table. On
    weights like trained ones the largest error of the logits was 14.0 of 171 with and without it in int8 (bfloat16
    alone: 6.9).
    activations: with 8 bits, let a CPU round the rows that these weights multiply to int8 as well, each with a scale of
    its own, where it has exact instructions for that and no gradient is asked for. Prompts are then faster, a step of a
    single row is not, and both err more; kernels on a GPU read the rows as they are.
    Returns the model. Raises TypeError on another model, and ValueError, having changed nothing, on other values of
    these, when a product was changed (adapters, hooks) or holds NaN or Inf, when there is no head of tokens to round,
    and on a model that is rounded already in another way.
    """
    if not isinstance(model, PreTrainedModel) or model.config.model_type != "gpt2":
        raise TypeError(f"fastgpt.quantize takes a GPT-2, not {type(model).__name__}")
    if not hasattr(model, "all_tied_weights_keys"):
        raise TypeError(f"fastgpt.quantize: the constructor of {type(model).__name__} must end with self.post_init()")
    if head and not hasattr(model, HEAD):
        raise ValueError(f"{type(model).__name__} has no head of tokens: quantize it without head=True")
    rounding = _asked_for(bits, group_size, head, activations)
    before = rounding_of(model.config)
    if before is not None:
        if (before.bits, before.group_size) != (rounding.bits, rounding.group_size):
            groups = f" in groups of {before.group_size}" if before.bits == 4 else ""
            raise ValueError(f"the model is quantised already, to {before.bits} bits{groups}")
        rounding = rounding._replace(head=head or before.head, activations=activations or before.activations)
        if rounding == before:
            return model
    elif getattr(model, "hf_quantizer", None) is not None:
        raise ValueError(f"the model is quantised already, by {model.config.quantization_config.quant_method}")
    replace_products(model, rounding)
    # The mark must not show in other models that were built from the same configuration.
    shared, own = model.config, copy.deepcopy(model.config)
    for module in model.modules():
        if vars(module).get("config") is shared:
            module.config = own  # type: ignore[assignment]
    if rounding.head:
        own.tie_word_embeddings = False
        model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)
    # As transformers leaves a model that was loaded with such weights.
    model.hf_quantizer = RoundedQuantizer(_mark(rounding))  # type: ignore[assignment]
    model.hf_quantizer.preprocess_model(model)  # type: ignore[operator]
    model.hf_quantizer.postprocess_model(model)  # type: ignore[operator]
    return model


def _asked_for(bits: int, group_size: int, head: bool, activations: bool) -> Rounding:
    if bits == 8:
        return Rounding(head=head, activations=activations)
    if bits != 4:
        raise ValueError(f"fastgpt.quantize rounds to 8 bits or 4, not {bits}")
    if activations:
        raise ValueError("activations=True needs bits=8: rows are rounded to int8, beside weights in int8")
    return Rounding(bits, group_size, head)


def _mark(rounding: Rounding) -> QuantizationConfigMixin:
    kind: Any = Int8Config if rounding.bits == 8 else Int4Config
    others = {"activations": rounding.activations} if rounding.bits == 8 else {"group_size": rounding.group_size}
    return kind(head=rounding.head, **others)
