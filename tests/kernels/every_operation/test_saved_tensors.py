"""Saved-tensor hooks may hand back what an operation saved in another layout, or rounded: its gradients must not mind.

Offloading and compression of activations work that way.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import cache, partial

import fastgpt_kernels
import pytest
import torch
from accuracy import forward, max_error, random, relayout
from records import FORMS, call
from torch import Tensor
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks

pytestmark = pytest.mark.usefixtures("on_the_device")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


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


def results(operation: str, form: str, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """The gradients of inputs that float16 holds, so that compression rounds only what the operation has computed."""
    function, inputs = call(fastgpt_kernels, operation, form, 5, torch.float16)
    inputs = [x.to(dtype).requires_grad_() for x in inputs]
    outputs = forward(function, inputs)
    return torch.autograd.grad(outputs, inputs, [random(*output.shape, seed=99).to(output) for output in outputs])


plain_results = cache(results)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize(("operation", "form"), FORMS)
def test_gradients_do_not_depend_on_how_tensors_are_saved(
    operation: str, form: str, hook: str, dtype: torch.dtype
) -> None:
    # A product may add up in another order where a weight lies otherwise; on processors with AMX one order errs twice
    # as much as the other. Compression moves each saved value by half a step of float16 at most, and a few of them meet
    # in a term of a gradient.
    steps = (4 if hook == "transposed" else 2) * torch.finfo(dtype).eps
    steps += 2 * torch.finfo(torch.float16).eps * (hook == "float16")
    with HOOKS[hook]():
        packed_results = results(operation, form, dtype)
    for packed, plain in zip(packed_results, plain_results(operation, form, dtype), strict=True):
        assert plain.any()
        assert max_error(packed, plain) <= steps * plain.abs().max().item()
