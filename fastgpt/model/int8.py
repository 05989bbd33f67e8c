"""Products with int8 weights: the module that holds them, `quantize`, and how a checkpoint of them is marked."""

import copy
from typing import TypeVar

import torch
import torch.nn.functional as F
from fastgpt_kernels.common.int8 import Int8Matrix
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..checkpoint.fit import INT8, has_int8_products
from .plain import is_plain, watch

Model = TypeVar("Model", bound=PreTrainedModel)

# --- the module -----------------------------------------------------------------------------------------------------


class Int8Linear(nn.Linear):
    """x @ weight + bias, where the weight is an `Int8Matrix`. Gradients flow to x and to the bias.

    weight: (out, in) int8. scale: (out,) float32, in every dtype of the model. bias: (out,), whose dtype is that of the
    product.
    """

    def __init__(self, matrix: Int8Matrix, bias: nn.Parameter):
        nn.Module.__init__(self)
        self.in_features, self.out_features = matrix.shape
        self.weight = nn.Parameter(matrix.values, requires_grad=False)
        self.scale = nn.Parameter(matrix.scale, requires_grad=False)
        self.bias = bias

    @property
    def matrix(self) -> Int8Matrix:
        return Int8Matrix(self.weight, self.scale)

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.matrix.to_float(self.bias.dtype).t(), self.bias)

    def _apply(self, fn, recurse=True):
        """`to()`, `half()` and others call this: it moves the scale, which keeps its dtype."""
        exact = self.scale.data
        super()._apply(fn, recurse)
        if self.scale.dtype != torch.float32:
            self.scale = nn.Parameter(exact.to(self.scale.device), requires_grad=False)
        return self


watch(Int8Linear)


def replace_products(model: nn.Module) -> None:
    """Give every product of a GPT-2's blocks int8 weights, in place.

    Raises ValueError, and changes nothing, if one is not a plain Conv1D or holds NaN or Inf.
    """
    products = {name: module for name, module in model.named_modules() if isinstance(module, Conv1D)}
    for name, module in products.items():
        if not is_plain(module, Conv1D):
            raise ValueError(f"{name} was changed: quantize a model before anything is added to its products")
    replacements = {}
    for name, module in products.items():
        try:
            replacements[name] = Int8Linear(Int8Matrix.nearest(module.weight), module.bias).train(module.training)
        except ValueError as error:
            raise ValueError(f"{name}.weight: {error}") from error
    for name, module in replacements.items():
        model.set_submodule(name, module, strict=True)


# --- checkpoints ----------------------------------------------------------------------------------------------------


@register_quantization_config(INT8)
class Int8Config(QuantizationConfigMixin):
    """The mark of such a model in config.json: with it transformers' from_pretrained, too, loads int8 weights.

    Where fastgpt was not imported, transformers warns of an unknown method and then refuses the checkpoint, because the
    weights are stored transposed.
    """

    def __init__(self, quant_method: str = INT8):
        self.quant_method = quant_method  # type: ignore[assignment] - the names of transformers' own methods


@register_quantizer(INT8)
class Int8Quantizer(HfQuantizer):
    """What transformers calls around the loading of weights; it only loads what `quantize` made."""

    requires_calibration = True
    is_trainable = True  # type: ignore[assignment] - adapters on top are

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs) -> None:
        replace_products(model)

    def is_serializable(self) -> bool:
        return True


def quantize(model: Model) -> Model:
    """Round the weights of all products of a GPT-2's blocks to int8, in place; each output channel has a scale.

    Decoding then reads half the bytes of bfloat16, or a quarter of float32's. Everything else works as before, on
    weights that are rounded once: forward, adapters on top, `save_pretrained`, `from_pretrained`. The token table keeps
    its dtype, and so does the head, which usually is that table: on weights like trained ones the largest error of the
    logits was 14.0 of 171 without it, and 17.6 with it (bfloat16 alone: 6.9).

    model: a GPT-2 of fastgpt or transformers, in any dtype; it is best rounded from the dtype of its checkpoint.
    Returns the model. Raises TypeError on another model, and ValueError, having changed nothing, when a product was
    changed (adapters, hooks) or holds NaN or Inf.
    """
    if not isinstance(model, PreTrainedModel) or model.config.model_type != "gpt2":
        raise TypeError(f"fastgpt.quantize takes a GPT-2, not {type(model).__name__}")
    if has_int8_products(model.config):
        return model
    if getattr(model, "hf_quantizer", None) is not None:
        raise ValueError(f"the model is quantised already, by {model.config.quantization_config.quant_method}")
    replace_products(model)
    # The mark must not show in other models that were built from the same configuration.
    shared, own = model.config, copy.deepcopy(model.config)
    for module in model.modules():
        if vars(module).get("config") is shared:
            module.config = own  # type: ignore[assignment]
    # As transformers leaves a model that was loaded with such weights.
    model.hf_quantizer = Int8Quantizer(Int8Config())  # type: ignore[assignment]
    model.hf_quantizer.preprocess_model(model)  # type: ignore[operator]
    model.hf_quantizer.postprocess_model(model)  # type: ignore[operator]
    return model
