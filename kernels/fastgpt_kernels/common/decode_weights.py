"""The weights of a GPT-2 as the decode steps read them."""

from typing import NamedTuple

from torch import Tensor

from .int4 import Int4Matrix
from .int8 import Int8Matrix

RoundedMatrix = Int8Matrix | Int4Matrix
Matrix = Tensor | RoundedMatrix


class DecodeLayer(NamedTuple):
    """The weights of one block. Matrices are (in, out), as Conv1D stores them; vectors are (out,).

    scale: what the scores of attention are multiplied by.
    """

    ln_1_weight: Tensor
    ln_1_bias: Tensor
    qkv_weight: Matrix  # (C, 3C)
    qkv_bias: Tensor
    scale: float
    proj_weight: Matrix  # (C, C)
    proj_bias: Tensor
    ln_2_weight: Tensor
    ln_2_bias: Tensor
    fc_weight: Matrix  # (C, F)
    fc_bias: Tensor
    mlp_proj_weight: Matrix  # (F, C)
    mlp_proj_bias: Tensor


class DecodeWeights(NamedTuple):
    """The weights of a model: wte (V, C), wpe (P, C), ln_f (C,), head (V, C), which may be wte itself.

    A rounded head is a matrix (C, V), whose values lie as (V, C) in memory too.
    activation: of the MLP, a name in `activations.ACTIVATIONS`.
    """

    wte: Tensor
    wpe: Tensor
    layers: tuple[DecodeLayer, ...]
    ln_f_weight: Tensor
    ln_f_bias: Tensor
    head: Matrix
    eps: float
    n_heads: int
    activation: str
