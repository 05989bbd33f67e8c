"""Saved-tensor hooks may hand back what an operation saved in another layout, or rounded: its gradients must not mind.

Offloading and compression of activations work that way. Every operation has a record here, so that none escapes.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import cache, partial
from typing import Any

import fastgpt_kernels
import pytest
import torch
from accuracy import max_error, random, relayout
from interpreter import DEVICE
from torch import Tensor
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
MASK = torch.tensor([[False] * 2 + [True] * 17, [True] * 19], device=DEVICE)
SEED = torch.tensor(3, device=DEVICE)
LABELS = torch.tensor([0, 4, -100, 130, 7], device=DEVICE)

# Of every operation the shapes of its floating inputs, and the options of each form in which it saves something else.
RECORDS: dict[str, tuple[list[tuple[int, ...]], list[dict[str, Any]]]] = {
    "layer_norm": ([(3, 5, 24), (24,), (24,)], [{}]),
    "add_layer_norm": ([(3, 5, 24), (3, 5, 24), (24,), (24,)], [{}]),
    "causal_attention": (
        [(2, 3, 17, 16), (2, 3, 19, 16), (2, 3, 19, 16)],
        [{}, {"key_padding_mask": MASK, "dropout_p": 0.25, "seed": SEED}],
    ),
    "gelu_mlp": ([(3, 5, 16), (16, 40), (40,), (40, 16), (16,)], [{}, {"dropout_p": 0.25, "seed": SEED}]),
    "linear_cross_entropy": (
        [(5, 16), (131, 16)],
        [{"labels": LABELS, "reduction": reduction} for reduction in ("sum", "mean", "none")],
    ),
}
FORMS = [(name, form) for name in fastgpt_kernels.OPERATIONS for form in range(len(RECORDS[name][1]))]


def repacked(layout: str) -> AbstractContextManager:
    return saved_tensors_hooks(partial(relayout, layout=layout), lambda x: x)


def compressed() -> AbstractContextManager:
    """To float16 and back; what is not floating is left as it is."""

    def pack(x: Tensor) -> tuple[torch.dtype, Tensor]:
        return x.dtype, x.half() if x.is_floating_point() else x

    return saved_tensors_hooks(pack, lambda packed: packed[1].to(packed[0]))


HOOKS: dict[str, Callable[[], AbstractContextManager]] = {
    "contiguous": partial(repacked, "contiguous"),
    "transposed": partial(repacked, "transposed"),
    "strided": partial(repacked, "strided"),
    "on the CPU": save_on_cpu,
    "float16": compressed,
}


def results(operation: str, form: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """The gradients of inputs that float16 holds, so that compression rounds only what the operation has computed."""
    shapes, forms = RECORDS[operation]
    inputs = [random(*shape, seed=seed).half().to(dtype).requires_grad_() for seed, shape in enumerate(shapes)]
    outputs = getattr(fastgpt_kernels, operation)(*inputs, **forms[form])
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    return torch.autograd.grad(outputs, inputs, [random(*output.shape, seed=99).to(output) for output in outputs])


plain_results = cache(results)


@pytest.fixture(autouse=True)
def _on_the_device() -> Iterator[None]:
    with torch.device(DEVICE):
        yield


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize(("operation", "form"), FORMS)
def test_gradients_do_not_depend_on_how_tensors_are_saved(
    operation: str, form: int, hook: str, dtype: torch.dtype
) -> None:
    # A product may add up in another order where a weight lies otherwise. Compression moves each saved value by half a
    # step of float16 at most, and a few of them meet in a term of a gradient.
    steps = 2 * torch.finfo(dtype).eps + 2 * torch.finfo(torch.float16).eps * (hook == "float16")
    with HOOKS[hook]():
        packed_results = results(operation, form, dtype)
    for packed, plain in zip(packed_results, plain_results(operation, form, dtype), strict=True):
        assert plain.any()
        assert max_error(packed, plain) <= steps * plain.abs().max().item()
