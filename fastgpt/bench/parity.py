"""The gate before any timing: fastgpt gives transformers' results with the same weights, or nothing is timed.

Shapes: B batch, T tokens, V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import GPT2LMHeadModel

from ..accounting import forward_flops, shape_of
from .workloads import OURS, autocast, contender

# With more FLOPs in a forward pass on a CPU, the truth in float64 would take longer than what is timed.
_CHEAP_FLOPS = 5e11


class ParityError(RuntimeError):
    """fastgpt's results differ from transformers': the message says which and by how much."""


def check_inference(base: GPT2LMHeadModel, ids: Tensor, n_new_tokens: int, dtype: torch.dtype) -> dict[str, Any]:
    """Compare logits and greedy tokens of fastgpt with transformers' sdpa, on the inputs that will be timed.

    ids: (B, T). Where a float64 pass is cheap, it is the truth: the logits of the first sequence may err twice as much
    as transformers' own, plus one ulp of the largest logit. Elsewhere they may differ from transformers' by 64 ulps of
    the largest (8 in half precision). Greedy tokens must be equal in float32. In half precision logits tie: tokens may
    differ from the first position where transformers' logits of the two are within twice that allowance.
    Returns the figures, ready for JSON. Raises ParityError.
    """
    ours, theirs = contender(OURS, base, ids.device, dtype), contender("hf-sdpa", base, ids.device, dtype)
    report = _check_logits(ours, theirs, base, ids)
    return report | _check_greedy(ours, theirs, ids, n_new_tokens, tie=2 * report["allowed"])


def _check_logits(ours: GPT2LMHeadModel, theirs: GPT2LMHeadModel, base: GPT2LMHeadModel, ids: Tensor) -> dict[str, Any]:
    with torch.no_grad():
        our_logits, their_logits = ours(ids, use_cache=False).logits, theirs(ids, use_cache=False).logits  # (B, T, V)
    largest = their_logits.abs().max().item()
    difference = max(_max_difference(a, b) for a, b in zip(our_logits, their_logits, strict=True))
    ulp = torch.finfo(ours.dtype).eps * largest
    report = {"logit_difference": difference, "largest_logit": largest}

    truth = _truth(base, ids[:1])
    if truth is None:
        allowed = (64 if ours.dtype == torch.float32 else 8) * ulp
        checked = {"difference from transformers": (difference, allowed)}
    else:
        error, their_error = _max_difference(our_logits[0], truth[0]), _max_difference(their_logits[0], truth[0])
        allowed = 2 * their_error + ulp
        report |= {"logit_error": error, "transformers_logit_error": their_error}
        checked = {"error against float64": (error, allowed), "difference from transformers": (difference, 2 * allowed)}
    for measure, (value, limit) in checked.items():
        if not value <= limit:
            raise ParityError(
                f"parity gate: the logits' {measure} is {value:.3g}, allowed {limit:.3g}: nothing was timed"
            )
    return report | {"allowed": allowed}


def _truth(base: GPT2LMHeadModel, ids: Tensor) -> Tensor | None:
    """transformers' logits in float64, or None where they would take too long."""
    if ids.device.type == "cpu" and forward_flops(shape_of(base), ids.shape[1]) > _CHEAP_FLOPS:
        return None
    exact = contender("hf-sdpa", base, ids.device, torch.float64)
    with torch.no_grad():
        return exact(ids, use_cache=False).logits


def _check_greedy(
    ours: GPT2LMHeadModel, theirs: GPT2LMHeadModel, ids: Tensor, n_new_tokens: int, tie: float
) -> dict[str, Any]:
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": n_new_tokens}
    our_tokens, their_tokens = ours.generate(ids, **options), theirs.generate(ids, **options)  # type: ignore[operator]
    n_equal = 0
    for sequence, (our_row, their_row) in enumerate(zip(our_tokens, their_tokens, strict=True)):
        parted = (our_row != their_row).nonzero()
        n_same = int(parted[0]) if len(parted) else len(their_row)
        n_equal += n_same - ids.shape[1]
        if n_same == len(their_row):
            continue
        with torch.no_grad():
            logits = theirs(their_row[None, :n_same], use_cache=False).logits[0, -1].double()  # (V,)
        gap = abs(logits[their_row[n_same]] - logits[our_row[n_same]]).item()
        if ours.dtype == torch.float32 or not gap <= tie:
            raise ParityError(
                f"parity gate: greedy token {n_same - ids.shape[1]} of sequence {sequence} is {int(our_row[n_same])}, "
                f"transformers' {int(their_row[n_same])} (its logit is {gap:.3g} larger): nothing was timed"
            )
    return {"greedy_tokens": ids.shape[0] * n_new_tokens, "greedy_tokens_equal": n_equal}


def check_training(base: GPT2LMHeadModel, ids: Tensor, dtype: torch.dtype) -> dict[str, Any]:
    """Compare loss and gradient of fastgpt with transformers' sdpa on ids (B, T), both without dropout.

    They may differ by 1e-5 (loss) and 1e-4 (the gradient's relative distance) in float32, by 1e-2 and 5e-2 under
    bfloat16 autocast. Returns the figures, ready for JSON. Raises ParityError.
    """
    (our_loss, our_gradient), (their_loss, their_gradient) = (
        _loss_and_gradient(contender(name, base, ids.device, torch.float32), ids, dtype) for name in (OURS, "hf-sdpa")
    )
    distance = sum((a - b).double().square().sum() for a, b in zip(our_gradient, their_gradient, strict=True))
    length = sum(gradient.double().square().sum() for gradient in their_gradient)
    differences = {
        "loss": abs(our_loss - their_loss) / abs(their_loss),
        "gradient": float(distance / length) ** 0.5,
    }
    allowed = {"loss": 1e-5, "gradient": 1e-4} if dtype == torch.float32 else {"loss": 1e-2, "gradient": 5e-2}
    for what, value in differences.items():
        if not value <= allowed[what]:
            raise ParityError(
                f"parity gate: the {what} of a training step differs from transformers' by {value:.3g} of its size, "
                f"allowed {allowed[what]:.3g}: nothing was timed"
            )
    return {f"{what}_difference": value for what, value in differences.items()} | {"training_allowed": allowed}


def _loss_and_gradient(model: GPT2LMHeadModel, ids: Tensor, dtype: torch.dtype) -> tuple[float, list[Tensor]]:
    for module in model.train().modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    with autocast(ids.device, dtype):
        loss = model(ids, labels=ids).loss
    loss.backward()
    return loss.item(), [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


def _max_difference(a: Tensor, b: Tensor) -> float:
    return (a.double() - b.double()).abs().max().item()
