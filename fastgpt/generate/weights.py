"""Views of a model's weights, in the order in which decoding uses them, and whether they are still where they were.

L layers, H heads, C channels, F hidden width, V vocabulary, P positions.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from fastgpt_kernels.common.activations import ACTIVATIONS
from fastgpt_kernels.common.decode_weights import DecodeLayer, DecodeWeights
from torch import Tensor
from transformers import GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

from ..model.blocks import GPT2Block
from ..model.plain import fused_activation


class Norm(NamedTuple):
    """weight, bias: (C,)."""

    weight: Tensor
    bias: Tensor
    eps: float

    def __call__(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


class Product(NamedTuple):
    """weight: (in, out), as Conv1D stores it. bias: (out,)."""

    weight: Tensor
    bias: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x, self.weight)


class RowProduct(Product):
    """A product made for one row. weight: (out, in), a copy."""

    def __call__(self, x: Tensor) -> Tensor:
        if x.shape[0] > 1:
            return F.linear(x, self.weight, self.bias)
        return torch.addmv(self.bias, self.weight, x[0])[None]


class Layer(NamedTuple):
    """The weights of one block, in the order in which they are used."""

    ln_1: Norm
    qkv: Product
    scale: float
    attn_proj: Product
    ln_2: Norm
    fc: Product
    activation: Callable[[Tensor], Tensor]
    mlp_proj: Product


class Weights(NamedTuple):
    """A view of a model: its own tensors, so that a change in them is seen. wte (V, C), wpe (P, C), head (V, C)."""

    wte: Tensor
    wpe: Tensor
    layers: list[Layer]
    ln_f: Norm
    head: Tensor
    n_heads: int


def view_weights(model: GPT2LMHeadModel, *, copy_for_one_row: bool = False) -> Weights:
    """The weights of a model whose modules `routing` found plain.

    copy_for_one_row: hold the products of the blocks as `RowProduct`; the copies are as large as the blocks' weights.
    """
    body, product = model.transformer, _copied_product if copy_for_one_row else _product
    layers = [_view_layer(block, product) for block in body.h]  # type: ignore[arg-type]
    return Weights(
        body.wte.weight, body.wpe.weight, layers, _norm(body.ln_f), model.lm_head.weight, model.config.n_head
    )


def _view_layer(block: GPT2Block, product: Callable[[Conv1D], Product]) -> Layer:
    attn, mlp = block.attn, block.mlp
    return Layer(
        ln_1=_norm(block.ln_1),
        qkv=product(attn.c_attn),
        scale=attn.scaling,
        attn_proj=product(attn.c_proj),
        ln_2=_norm(block.ln_2),
        fc=product(mlp.c_fc),
        activation=ACTIVATIONS[str(fused_activation(mlp.act))],
        mlp_proj=product(mlp.c_proj),
    )


def _product(module: Conv1D) -> Product:
    return Product(module.weight, module.bias)


def _copied_product(module: Conv1D) -> Product:
    return RowProduct(module.weight.t().contiguous(), module.bias)


def _norm(module: torch.nn.LayerNorm) -> Norm:
    return Norm(module.weight, module.bias, module.eps)


def watched(generation: Iterable[Tensor], model: GPT2LMHeadModel) -> Iterator[Tensor]:
    """The tokens of a generation, between which its caller may do anything but move or replace the model's weights.

    Raises RuntimeError when it did: steps read the weights where they lay, and the cache lies beside them.
    """
    # Looked at in their tables, because `parameters()` takes the host longer than a step takes a GPU.
    children = [module._modules for module in model.modules()]
    parameters = [module._parameters for module in model.modules()]

    def places() -> list[int | None]:
        modules = [id(module) for table in children for module in table.values()]
        return modules + [None if x is None else x.data_ptr() for table in parameters for x in table.values()]

    before = places()
    for tokens in generation:
        yield tokens
        if places() != before:
            raise RuntimeError(
                "the model's weights were moved or replaced between two tokens of one call: start a new one"
            )


def kernel_weights(model: GPT2LMHeadModel) -> DecodeWeights:
    """The weights of a model whose modules `routing` found plain, as the kernels of decoding take them."""
    body = model.transformer
    blocks: list[GPT2Block] = list(body.h)  # type: ignore[arg-type]
    return DecodeWeights(
        wte=body.wte.weight,
        wpe=body.wpe.weight,
        layers=tuple(map(_kernel_layer, blocks)),
        ln_f_weight=body.ln_f.weight,
        ln_f_bias=body.ln_f.bias,
        head=model.lm_head.weight,
        eps=body.ln_f.eps,
        n_heads=model.config.n_head,
        activation=str(fused_activation(blocks[0].mlp.act)),
    )


def _kernel_layer(block: GPT2Block) -> DecodeLayer:
    attn, mlp = block.attn, block.mlp
    return DecodeLayer(
        ln_1_weight=block.ln_1.weight,
        ln_1_bias=block.ln_1.bias,
        qkv_weight=attn.c_attn.weight,
        qkv_bias=attn.c_attn.bias,
        scale=attn.scaling,
        proj_weight=attn.c_proj.weight,
        proj_bias=attn.c_proj.bias,
        ln_2_weight=block.ln_2.weight,
        ln_2_bias=block.ln_2.bias,
        fc_weight=mlp.c_fc.weight,
        fc_bias=mlp.c_fc.bias,
        mlp_proj_weight=mlp.c_proj.weight,
        mlp_proj_bias=mlp.c_proj.bias,
    )
