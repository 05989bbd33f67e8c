"""Second derivatives of the five operations and of the training loss, against the formula in float64."""

from functools import partial
from typing import Any

import fastgpt_kernels as fk
import pytest
import torch
from accuracy import Function, forward, random
from fastgpt_kernels import reference
from interpreter import DEVICE
from linear_cross_entropy.formula import loss_formula
from models import pair, tiny_config, token_ids
from records import FORMS, RECORDS, call
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import fastgpt

pytestmark = pytest.mark.usefixtures("on_the_device")

PATHS = {"kernel": fk, "torch": reference}
SCALE = 0.4  # of inputs


def penalty_gradients(operation: Function, inputs: list[Tensor]) -> list[Tensor]:
    """The gradients of a penalty on the first gradients plus the value: of every input, in a nonlinear mixture."""
    output = torch.stack([output.sin().sum() for output in forward(operation, inputs)]).sum()
    first = torch.autograd.grad(output, inputs, create_graph=True)
    penalty = torch.stack([g.sin().square().sum() for g in first]).sum()
    return list(torch.autograd.grad(penalty + output, inputs))


def truth_of(operation: str, form: str) -> tuple[Function, list[Tensor]]:
    """The formula in torch's operations alone, and inputs in float64."""
    function, inputs = call(reference, operation, form, 5, torch.float64, SCALE)
    if operation == "linear_cross_entropy":
        _, options = RECORDS[operation].forms[form](5)
        function = partial(loss_formula, **options)
    return function, [x.requires_grad_() for x in inputs]


@pytest.mark.parametrize(("operation", "form"), FORMS)
@pytest.mark.parametrize("path", PATHS)
def test_gradient_penalty(operation: str, form: str, path: str) -> None:
    function, inputs = call(PATHS[path], operation, form, 5, torch.float32, SCALE)
    with sdpa_kernel(SDPBackend.MATH):
        truth = penalty_gradients(*truth_of(operation, form))
    with sdpa_kernel(SDPBackend.MATH if path == "torch" else SDPBackend.FLASH_ATTENTION):
        found = penalty_gradients(function, [x.requires_grad_() for x in inputs])
    for ours, expected in zip(found, truth, strict=True):
        assert (ours - expected).abs().max() <= 2e-5 * expected.abs().max().clamp(min=1.0)


@pytest.mark.parametrize(("operation", "form"), [names for names in FORMS if names[0] != "causal_attention"])
@pytest.mark.parametrize("path", PATHS)
def test_finite_differences(operation: str, form: str, path: str) -> None:
    function, inputs = call(PATHS[path], operation, form, 5, torch.float64, SCALE)
    assert torch.autograd.gradgradcheck(function, [x.requires_grad_() for x in inputs], fast_mode=True)


def test_one_input_depends_on_another() -> None:
    q, again = ((SCALE * random(2, 2, 5, 16)).to(dtype).requires_grad_() for dtype in (torch.float32, torch.float64))
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
