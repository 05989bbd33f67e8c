"""Views of a model's weights, in the order in which decoding uses them, and whether they are still where they were."""

from collections.abc import Callable, Iterable, Iterator

from fastgpt_kernels.common.decode_weights import DecodeLayer, DecodeWeights
from torch import Tensor
from transformers import GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

from ..model.blocks import GPT2Block
from ..model.plain import fused_activation


def view_weights(model: GPT2LMHeadModel, *, copy_for_one_row: bool = False) -> DecodeWeights:
    """A view of a model whose modules `routing` found plain: its own tensors, so that decoding sees changes in them.

    copy_for_one_row: store the matrices of the blocks by columns, in copies as large as these matrices. With them the
    torch path multiplies one row of bfloat16 faster; the kernels need the model's own.
    """
    body, matrix = model.transformer, _stored_by_columns if copy_for_one_row else _own_weight
    blocks: list[GPT2Block] = list(body.h)  # type: ignore[arg-type]
    return DecodeWeights(
        wte=body.wte.weight,
        wpe=body.wpe.weight,
        layers=tuple(_view_layer(block, matrix) for block in blocks),
        ln_f_weight=body.ln_f.weight,
        ln_f_bias=body.ln_f.bias,
        head=model.lm_head.weight,
        eps=body.ln_f.eps,
        n_heads=model.config.n_head,
        activation=str(fused_activation(blocks[0].mlp.act)),
    )


def _view_layer(block: GPT2Block, matrix: Callable[[Conv1D], Tensor]) -> DecodeLayer:
    attn, mlp = block.attn, block.mlp
    return DecodeLayer(
        ln_1_weight=block.ln_1.weight,
        ln_1_bias=block.ln_1.bias,
        qkv_weight=matrix(attn.c_attn),
        qkv_bias=attn.c_attn.bias,
        scale=attn.scaling,
        proj_weight=matrix(attn.c_proj),
        proj_bias=attn.c_proj.bias,
        ln_2_weight=block.ln_2.weight,
        ln_2_bias=block.ln_2.bias,
        fc_weight=matrix(mlp.c_fc),
        fc_bias=mlp.c_fc.bias,
        mlp_proj_weight=matrix(mlp.c_proj),
        mlp_proj_bias=mlp.c_proj.bias,
    )


def _own_weight(module: Conv1D) -> Tensor:
    return module.weight


def _stored_by_columns(module: Conv1D) -> Tensor:
    """(in, out), in other memory: the elements of one column follow each other."""
    return module.weight.t().contiguous().t()


def watched(generation: Iterable[Tensor], model: GPT2LMHeadModel) -> Iterator[Tensor]:
    """The tokens of a generation, during which the caller may do anything but move or replace the model's weights.

    Raises RuntimeError when it did, because steps read the weights where they lay, and the cache is on their device.
    """
    # Read from the modules' own tables, because `parameters()` takes the host longer than a step takes a GPU.
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
