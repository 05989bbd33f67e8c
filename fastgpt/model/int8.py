"""Products with int8 weights: the module that holds them, `quantize`, and how a checkpoint of them is marked."""

import copy
from collections.abc import Iterator
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from fastgpt_kernels.common.int8 import Int8Matrix
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

import fastgpt.ops as ops

from ..checkpoint.fit import INT8, has_int8_activations, has_int8_head, has_int8_products
from . import digits
from .plain import is_plain, watch

Model = TypeVar("Model", bound=PreTrainedModel)

# For 768 x 3072, digits of 16 float32 rows take a quarter of the time of a float copy and its product, of 64 half, of
# 128 three quarters. From there on they gain little, and their products take much memory in the head.
MAX_ROWS_IN_DIGITS = 128

# --- the module -----------------------------------------------------------------------------------------------------


class Int8Linear(nn.Linear):
    """x @ weight + bias, where the weight is an `Int8Matrix`. Gradients flow to x and to the bias.

    weight: (out, in) int8. scale: (out,) float32, in every dtype of the model. bias: (out,), or None for a head.
    rounds_input: x may be rounded to int8, each row with a scale of its own, where that is faster: on a CPU with exact
    instructions for it, without gradients.
    """

    def __init__(self, matrix: Int8Matrix, bias: nn.Parameter | None, *, rounds_input: bool = False):
        nn.Module.__init__(self)
        self.in_features, self.out_features = matrix.shape
        self.weight = nn.Parameter(matrix.values, requires_grad=False)
        self.scale = nn.Parameter(matrix.scale, requires_grad=False)
        self.register_parameter("bias", bias)
        self.rounds_input = rounds_input

    @property
    def matrix(self) -> Int8Matrix:
        return Int8Matrix(self.weight, self.scale)

    def forward(self, input: Tensor) -> Tensor:
        if self._takes_digits(input):
            rows = input.reshape(-1, self.in_features).contiguous()
            precision = torch.int8 if self.rounds_input else input.dtype
            product = digits.Digits(self.matrix, len(rows), precision, digits.Stored)(rows, self.bias)
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


watch(Int8Linear)


def replace_products(model: nn.Module, *, head: bool, activations: bool) -> None:
    """Give every product of a GPT-2's blocks int8 weights, and its head of tokens if that is asked for, in place.

    Those that have them keep their weights. activations: whether all of them may round their inputs. Raises ValueError,
    and changes nothing, if another is not a plain Conv1D (the head a plain Linear) or holds NaN or Inf.
    """
    replacements = {}
    for name, module in _float_products(model, head):
        kind = nn.Linear if name == HEAD else Conv1D
        if not is_plain(module, kind):
            raise ValueError(f"{name} was changed: quantize a model before anything is added to its products")
        matrix = module.weight.t() if kind is nn.Linear else module.weight  # (in, out)
        try:
            replacements[name] = Int8Linear(Int8Matrix.nearest(matrix), module.bias).train(module.training)
        except ValueError as error:
            raise ValueError(f"{name}.weight: {error}") from error
    for name, module in replacements.items():
        model.set_submodule(name, module, strict=True)
    for module in model.modules():
        if isinstance(module, Int8Linear):
            module.rounds_input = activations


HEAD = "lm_head"


def _float_products(model: nn.Module, head: bool) -> Iterator[tuple[str, Any]]:
    """By their names: those of the blocks, and the head of tokens where it is asked for."""
    for name, module in model.named_modules():
        if isinstance(module, Conv1D) or (head and name == HEAD and not isinstance(module, Int8Linear)):
            yield name, module


def head_weight(head: Any, dtype: torch.dtype) -> Tensor:
    """The weight (V, C) of a head of tokens; of an int8 one a copy in a floating-point dtype."""
    return head.matrix.to_float(dtype).t() if isinstance(head, Int8Linear) else head.weight


# --- checkpoints ----------------------------------------------------------------------------------------------------


@register_quantization_config(INT8)
class Int8Config(QuantizationConfigMixin):
    """The mark of such a model in config.json: with it transformers' from_pretrained, too, loads int8 weights.

    Where fastgpt was not imported, transformers warns of an unknown method and then refuses the checkpoint, because the
    weights are stored transposed.
    """

    def __init__(self, quant_method: str = INT8, head: bool = False, activations: bool = False):
        """As of `quantize`: head, whether the head of tokens has int8 weights too, if the model has one."""
        self.quant_method = quant_method  # type: ignore[assignment] - the names of transformers' own methods
        self.head, self.activations = head, activations


@register_quantizer(INT8)
class Int8Quantizer(HfQuantizer):
    """What transformers calls around the loading of weights; it only loads what `quantize` made."""

    requires_calibration = True
    is_trainable = True  # type: ignore[assignment] - adapters on top are

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs) -> None:
        config: Any = self.quantization_config
        replace_products(model, head=config.head and hasattr(model, HEAD), activations=config.activations)

    def is_serializable(self) -> bool:
        return True


def quantize(model: Model, *, head: bool = False, activations: bool = False) -> Model:
    """Round the weights of all products of a GPT-2's blocks to int8, in place; each output channel has a scale.

    Decoding then reads half the bytes of bfloat16, or a quarter of float32's. Everything else works as before, on
    weights that are rounded once: forward, adapters on top, `save_pretrained`, `from_pretrained`. The token table keeps
    its dtype, because a step reads one row of it for each token.

    model: a GPT-2 of fastgpt or transformers, in any dtype; it is best rounded from the dtype of its checkpoint.
    head: round the head of tokens too, with a scale for each token: a copy of its own, where it was the token table. On
    weights like trained ones the largest error of the logits was 14.0 of 171 with and without it (bfloat16 alone: 6.9).
    activations: let a CPU round the rows that these weights multiply to int8 as well, each with a scale of its own,
    where it has exact instructions for that and no gradient is asked for. Prompts and steps are then faster, and err
    more; kernels on a GPU read the rows as they are.
    Returns the model. Raises TypeError on another model, and ValueError, having changed nothing, when a product was
    changed (adapters, hooks) or holds NaN or Inf, and when there is no head of tokens to round.
    """
    if not isinstance(model, PreTrainedModel) or model.config.model_type != "gpt2":
        raise TypeError(f"fastgpt.quantize takes a GPT-2, not {type(model).__name__}")
    if not hasattr(model, "all_tied_weights_keys"):
        raise TypeError(f"fastgpt.quantize: the constructor of {type(model).__name__} must end with self.post_init()")
    if head and not hasattr(model, HEAD):
        raise ValueError(f"{type(model).__name__} has no head of tokens: quantize it without head=True")
    if has_int8_products(model.config):
        head, activations = head or has_int8_head(model.config), activations or has_int8_activations(model.config)
        if (head, activations) == (has_int8_head(model.config), has_int8_activations(model.config)):
            return model
    elif getattr(model, "hf_quantizer", None) is not None:
        raise ValueError(f"the model is quantised already, by {model.config.quantization_config.quant_method}")
    replace_products(model, head=head, activations=activations)
    # The mark must not show in other models that were built from the same configuration.
    shared, own = model.config, copy.deepcopy(model.config)
    for module in model.modules():
        if vars(module).get("config") is shared:
            module.config = own  # type: ignore[assignment]
    if head:
        own.tie_word_embeddings = False
        model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)
    # As transformers leaves a model that was loaded with such weights.
    model.hf_quantizer = Int8Quantizer(Int8Config(head=head, activations=activations))  # type: ignore[assignment]
    model.hf_quantizer.preprocess_model(model)  # type: ignore[operator]
    model.hf_quantizer.postprocess_model(model)  # type: ignore[operator]
    return model
