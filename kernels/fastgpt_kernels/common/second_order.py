"""Second derivatives: where backward is asked for a graph, gradients come from the formula in torch's operations.

Kernels give gradients as numbers, which a second derivative would take for constants. Under create_graph=True, and only
then, autograd runs backward with gradients enabled: that is when the formula is computed again from what was saved.
"""

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import torch
from torch import Tensor

Gradients = tuple[Tensor | None, ...]
Backward = Callable[..., Gradients]


def twice_differentiable(with_graph: Backward) -> Callable[[Backward], Backward]:
    """For the backward of an autograd.Function: `with_graph`, called alike, takes its place under create_graph=True."""

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
    with torch.autocast(grad.device.type, enabled=False):
        # Aliases, because one input may depend on another, and each gradient is that of its own place in the formula.
        aliases = [None if x is None else x.view_as(x) for x in inputs]
        wanted = [alias for alias in aliases if alias is not None and alias.requires_grad]
        output = formula(*aliases)
        found = iter(torch.autograd.grad(output, wanted, grad.to(output.dtype), create_graph=True) if wanted else ())
    return [next(found) if alias is not None and alias.requires_grad else None for alias in aliases]
