"""ctranslate2 and onnxruntime with int8 weights, of the head too, each rounded in the engine's own way."""

import copy

from torch import Tensor, nn
from transformers import GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

from .cpu_engines import CTranslate2, OnnxRuntime


class CTranslate2Int8(CTranslate2):
    """int8 weights, of the embeddings too; products round their rows to int8, each with its own scale."""

    compute_type = "int8"


class _OnnxProducts(OnnxRuntime):
    """Every product with a weight is exported as a node MatMul, which the quantisers of onnxruntime know."""

    def _as_exported(self, base: GPT2LMHeadModel) -> GPT2LMHeadModel:
        model = copy.deepcopy(base)
        for name, module in base.named_modules():
            if isinstance(module, Conv1D):
                model.set_submodule(name, _Product(module.weight, module.bias))
        model.lm_head = _Product(base.lm_head.weight.t(), None)  # type: ignore[assignment]
        return model


class OnnxRuntimeInt8(_OnnxProducts):
    """Dynamic quantisation: int8 weights with a scale for each column; rows are rounded to bytes with one scale."""

    def _rounded(self, file: str, to: str) -> str:
        from onnxruntime.quantization import QuantType, quantize_dynamic  # type: ignore[import-not-found]

        quantize_dynamic(
            file, to, per_channel=True, weight_type=QuantType.QInt8, use_external_data_format=True,
            op_types_to_quantize=["MatMul"],
        )  # fmt: skip
        return to


class OnnxRuntime8Bit(_OnnxProducts):
    """MatMulNBits: weights of 8 bits with a scale for 32 rows of each column; float32 rows, rounded as it sees fit."""

    def _rounded(self, file: str, to: str) -> str:
        import onnx  # type: ignore[import-not-found]
        from onnxruntime.quantization.matmul_nbits_quantizer import (  # type: ignore[import-not-found]
            MatMulNBitsQuantizer,
        )

        quantizer = MatMulNBitsQuantizer(onnx.load(file), bits=8, block_size=32, is_symmetric=True, accuracy_level=4)
        quantizer.process()
        quantizer.model.save_model_to_file(to, use_external_data_format=True)
        return to


class _Product(nn.Module):
    """x @ weight + bias. weight: (in, out)."""

    def __init__(self, weight: Tensor, bias: Tensor | None):
        super().__init__()
        self.weight = nn.Parameter(weight.detach().clone().contiguous())
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        product = x @ self.weight
        return product if self.bias is None else product + self.bias
