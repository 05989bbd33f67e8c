"""Second derivatives: under create_graph=True, gradients come from the formula in torch's operations.

Gradients from kernels carry no graph, so a second derivative would treat them as constants. Only under
create_graph=True does autograd run backward with gradients enabled. The formula is then recomputed from saved tensors.
"""

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from .precision import autocast

Gradients = tuple[Tensor | None, ...]
Backward = Callable[..., Gradients]


def twice_differentiable(with_graph: Backward) -> Callable[[Backward], Backward]:
    """Decorate the backward of an autograd.Function: under create_graph=True `with_graph` runs in its place."""

    def decorate(backward: Backward) -> Backward:
        @wraps(backward)
        def choose(ctx: Any, *grads: Tensor | None) -> Gradients:
            return with_graph(ctx, *grads) if torch.is_grad_enabled() else backward(ctx, *grads)

        return choose

    return decorate


def formula_gradients(
    formula: Callable[..., Tensor], inputs: Sequence[Tensor | None], grad: Tensor
) -> list[Tensor | None]:
    """The gradients of formula(*inputs) with their graph, for every input that requires one."""
    with autocast(grad.device, None):
        # Aliases, because one input may depend on another, but each gradient is of its own argument of the formula.
        aliases = [None if x is None else x.view_as(x) for x in inputs]
        wanted = [alias for alias in aliases if alias is not None and alias.requires_grad]
        output = formula(*aliases)
        found = iter(torch.autograd.grad(output, wanted, grad.to(output.dtype), create_graph=True) if wanted else ())
    return [next(found) if alias is not None and alias.requires_grad else None for alias in aliases]
