"""Second derivatives of the five operations and of the training loss, against the formula in float64."""

from collections.abc import Callable
from functools import partial
from typing import Any

import fastgpt_kernels as fk
import pytest
import torch
import torch.nn.functional as F
from fastgpt_kernels import reference
from interpreter import DEVICE
from models import pair, tiny_config, token_ids
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import fastgpt

LABELS = torch.tensor([3, -100, 0, 6, 2], device=DEVICE)
MASK = torch.tensor([[True] * 5, [False] * 2 + [True] * 3], device=DEVICE)
HEADS = ((2, 2, 5, 16),) * 3
MLP = ((2, 3, 16), (16, 32), (32,), (32, 16), (16,))
NORM = ((2, 3, 16), (16,), (16,))
Case = tuple[str, tuple[tuple[int, ...], ...], dict[str, Any]]
CASES: dict[str, Case] = {
    "layer_norm": ("layer_norm", NORM, {}),
    "add_layer_norm": ("add_layer_norm", ((2, 3, 16), *NORM), {}),
    "attention": ("causal_attention", HEADS, {}),
    "attention, masked": ("causal_attention", HEADS, {"key_padding_mask": MASK}),
    "attention, dropout": ("causal_attention", HEADS, {"dropout_p": 0.3, "seed": 5}),
    "mlp": ("gelu_mlp", MLP, {}),
    "mlp, dropout": ("gelu_mlp", MLP, {"activation": "silu", "dropout_p": 0.3, "seed": 5}),
    "loss, mean": ("linear_cross_entropy", ((5, 16), (7, 16)), {"labels": LABELS}),
    "loss, sum": ("linear_cross_entropy", ((5, 16), (7, 16)), {"labels": LABELS, "reduction": "sum"}),
    "loss, none": ("linear_cross_entropy", ((5, 16), (7, 16)), {"labels": LABELS, "reduction": "none"}),
}


def tensors(shapes: tuple[tuple[int, ...], ...], dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    values = [0.4 * torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    return [value.to(DEVICE, dtype).requires_grad_() for value in values]


def penalty_gradients(operation: Callable[..., Any], inputs: list[Tensor]) -> list[Tensor]:
    """Of a gradient penalty plus the value: the derivative of every input's gradient in a nonlinear mixture."""
    output = operation(*inputs)
    output = torch.stack([o.sin().sum() for o in (output if isinstance(output, tuple) else (output,))]).sum()
    first = torch.autograd.grad(output, inputs, create_graph=True)
    penalty = torch.stack([g.sin().square().sum() for g in first]).sum()
    return list(torch.autograd.grad(penalty + output, inputs))


def truth_of(name: str, options: dict[str, Any]) -> Callable[..., Any]:
    """The formula in torch's operations alone."""
    if name == "linear_cross_entropy":
        options = dict(options)
        labels = options.pop("labels")
        return lambda hidden, weight: F.cross_entropy(hidden @ weight.t(), labels, **options)
    return partial(getattr(reference, name), **options)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("path", ["kernel", "torch"])
def test_gradient_penalty(case: str, path: str) -> None:
    name, shapes, options = CASES[case]
    operation = partial(getattr(fk if path == "kernel" else reference, name), **options)
    with sdpa_kernel(SDPBackend.MATH):
        truth = penalty_gradients(truth_of(name, options), tensors(shapes, torch.float64))
    with sdpa_kernel(SDPBackend.MATH if path == "torch" else SDPBackend.FLASH_ATTENTION):
        found = penalty_gradients(operation, tensors(shapes, torch.float32))
    for ours, expected in zip(found, truth, strict=True):
        assert (ours - expected).abs().max() <= 2e-5 * expected.abs().max().clamp(min=1.0)


@pytest.mark.parametrize("case", [case for case in CASES if "attention" not in case])
@pytest.mark.parametrize("path", ["kernel", "torch"])
def test_finite_differences(case: str, path: str) -> None:
    name, shapes, options = CASES[case]
    operation = partial(getattr(fk if path == "kernel" else reference, name), **options)
    assert torch.autograd.gradgradcheck(operation, tensors(shapes, torch.float64), fast_mode=True)


def test_one_input_depends_on_another() -> None:
    (q, *_), (again, *_) = tensors(HEADS, torch.float32), tensors(HEADS, torch.float64)
    ours = penalty_gradients(lambda x: fk.causal_attention(x, x.sin(), x.cos()), [q])
    with sdpa_kernel(SDPBackend.MATH):
        truth = penalty_gradients(lambda x: reference.causal_attention(x, x.sin(), x.cos()), [again])
    assert torch.allclose(ours[0].double(), truth[0], rtol=1e-4, atol=1e-4)


def hessian_vector_product(model: Any, ids: Tensor) -> Tensor:
    parameters = list(model.parameters())
    first = torch.autograd.grad(model(ids, labels=ids).loss, parameters, create_graph=True)
    generator = torch.Generator().manual_seed(1)
    directions = [torch.randn(p.shape, generator=generator).to(p.device) for p in parameters]
    product = torch.stack([(g * d).sum() for g, d in zip(first, directions, strict=True)]).sum()
    return torch.cat([p.flatten() for p in torch.autograd.grad(product, parameters)])


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_hessian_vector_product_of_the_training_loss(backend: str) -> None:
    theirs, ours = (model.to(DEVICE).train() for model in pair(tiny_config(n_layer=1), attn_implementation="eager"))
    ids = token_ids(2, 9, 131).to(DEVICE)
    with fastgpt.backend(backend), sdpa_kernel(SDPBackend.MATH):
        found = hessian_vector_product(ours, ids)
    expected = hessian_vector_product(theirs, ids)
    assert (found - expected).norm() <= 1e-4 * expected.norm()
