"""Norms that backward computes again: `model.config.recompute_norms = True`.

The result of a norm is saved by the products that read it, although the norm saves its own input and one cheap pass
gives the result again. Those saved tensors are replaced by what computes them: the same operation on the same inputs,
so that gradients keep every bit. Two results of C elements for each token and layer need not be kept.
"""

from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from typing import Any

import torch
from fastgpt_kernels.common.precision import autocast, autocast_dtype
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fastgpt.ops as ops


def computed_again(function: Callable, *inputs: Tensor) -> Any:
    """function(*inputs). torch.compile, whose graphs hold no recipes, is told to compute it again in backward."""
    return checkpoint(function, *inputs, use_reentrant=False) if torch.compiler.is_compiling() else function(*inputs)


def save_recipe(normalised: Tensor, x: Tensor, norm: nn.LayerNorm, output: Tensor) -> None:
    """Let the backward of the operations from `normalised` to `output` compute `normalised` again, not keep it.

    normalised: norm(x), in whatever dtype. What a saved-tensor hook has already taken, as gradient checkpointing's
    does, is left to that hook.
    """
    if torch.compiler.is_compiling():
        return
    recipe, storage = _Recipe(normalised, x, norm), normalised.untyped_storage().data_ptr()
    for saved in _saved_between(output, (normalised, x)):
        is_free = isinstance(saved.data, Tensor) and saved.unpack_hook is None
        if is_free and saved.data.untyped_storage().data_ptr() == storage:
            saved.register_hooks(_layout, recipe.follow)


def _layout(saved: Tensor) -> tuple[Any, ...]:
    return saved.shape, saved.stride(), saved.storage_offset()


class _Recipe:
    """How a norm was computed. It holds nothing but what the norm itself has saved, and parameters."""

    def __init__(self, normalised: Tensor, x: Tensor, norm: nn.LayerNorm):
        self.layer_norm = ops.implementation("layer_norm", x)
        self.arguments = x.detach(), norm.weight.detach(), norm.bias.detach(), norm.eps
        self.dtype = normalised.dtype
        self.autocast = partial(autocast, x.device, autocast_dtype(x))

    def follow(self, layout: tuple[Any, ...]) -> Tensor:
        """The tensor of this layout in the memory that the norm had written."""
        with torch.enable_grad(), self.autocast():  # On a CPU the formula depends on whether gradients are enabled.
            return self.layer_norm(*self.arguments, self.dtype).as_strided(*layout)


def _saved_between(output: Tensor, inputs: tuple[Tensor, ...]) -> Iterator[Any]:
    """The tensors that autograd has saved to go back from `output` to `inputs`: torch's SavedTensor objects."""
    seen, open_nodes = {tensor.grad_fn for tensor in inputs}, [output.grad_fn]
    while open_nodes:
        node = open_nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        open_nodes += [successor for successor, _ in node.next_functions]
        for name in _raw_names(type(node)):
            saved = getattr(node, name)
            yield from saved if isinstance(saved, tuple) else (saved,)


@lru_cache
def _raw_names(kind: type) -> list[str]:
    """The attributes that give what nodes of a kind have saved without unpacking it."""
    return [name for name in dir(kind) if name.startswith("_raw_saved")]
