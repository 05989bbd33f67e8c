"""Labels of linear_cross_entropy, as reference and as kernel: out of range, ignored, or all of them ignored."""

from functools import partial
from typing import Any

import pytest
import torch
from accuracy import assert_same_bits, gradients

from .formula import (
    REDUCTIONS,
    TERMS,
    assert_loss_parity,
    loss_formula,
    make_inputs,
    results,
    without_a_look_at_labels,
)

every_reduction = pytest.mark.parametrize("reduction", REDUCTIONS)


@every_reduction
@pytest.mark.parametrize("label", [19, 20, 2**31, 2**62, -1, -99, -101])
def test_bug_label_out_of_range_crashes_later(operations: Any, label: int, reduction: str) -> None:
    """Labels on a GPU are not looked at."""
    with torch.device("cpu"):
        inputs, labels = make_inputs(5, 8, 19)
    labels[2] = label
    with pytest.raises(ValueError, match=rf"label {label} is outside the vocabulary: it must be in \[0, 19\)"):
        operations.linear_cross_entropy(*inputs, labels, reduction=reduction)


@every_reduction
@pytest.mark.parametrize("label", [19, 63, 64, 2**31, 2**32 + 3, 2**62, -1, -99, -(2**62)])
def test_bug_label_out_of_range_gives_a_plausible_loss(
    operations: Any, label: int, reduction: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs, labels = make_inputs(5, 8, 19, ignored=0.0)
    labels[2] = label
    loss = without_a_look_at_labels(monkeypatch, operations)(*inputs, labels, reduction=reduction)
    expected = torch.arange(5) == 2 if reduction == "none" else torch.tensor(True)
    assert torch.equal(loss.isnan(), expected)


@every_reduction
@pytest.mark.parametrize("terms", [{}, TERMS["both"]], ids=["", "more terms"])
@pytest.mark.parametrize("label", [19, 63, 64, 2**31, 2**32 + 3, 2**62, -1, -99, -(2**62)])
def test_bug_label_out_of_range_gives_plausible_gradients(
    operations: Any, label: int, terms: dict[str, float], reduction: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its row of dhidden is NaN and so is dweight; the other rows do not notice."""
    inputs, labels = make_inputs(5, 8, 19, ignored=0.0)
    unchecked = without_a_look_at_labels(monkeypatch, operations)
    loss = partial(unchecked, labels=labels, reduction=reduction, **terms)
    upstream = [torch.ones_like(loss(*inputs))]
    expected, _ = gradients(loss, inputs, upstream)
    labels[2] = label
    dhidden, dweight = gradients(loss, inputs, upstream)
    assert dhidden[2].isnan().all()
    assert dweight.isnan().all()
    others = [0, 1, 3, 4]
    assert torch.equal(dhidden[others], expected[others])


@every_reduction
@pytest.mark.parametrize("terms", [{}, TERMS["both"]], ids=["", "more terms"])
def test_bug_ignored_rows_are_read(operations: Any, terms: dict[str, float], reduction: str) -> None:
    """NaN in a row that does not count reaches nothing but the weight, through 0 * NaN."""
    (hidden, weight), labels = make_inputs(9, 8, 19)
    ignored = labels == -100
    loss, dhidden, _ = results(operations, (hidden, weight), labels, reduction=reduction, **terms)
    assert torch.equal((dhidden == 0).all(1), ignored)
    hidden[ignored] = float("nan")
    *same, dweight = results(operations, (hidden, weight), labels, reduction=reduction, **terms)
    assert_same_bits(same, [loss, dhidden])
    assert dweight.isnan().all()


@every_reduction
@pytest.mark.parametrize("ignore_index", [-100, -1, 0, 5, 1000, 2**62])
def test_bug_sentinel_label_hits_a_column(operations: Any, ignore_index: int, reduction: str) -> None:
    """Whether the ignored label is a word, lies in the padding or far away."""
    inputs, labels = make_inputs(12, 8, 19)
    labels[labels == -100], labels[3] = ignore_index, 5
    assert_loss_parity(operations, inputs, labels, reduction=reduction, ignore_index=ignore_index)
    _, dhidden, _ = results(operations, inputs, labels, reduction=reduction, ignore_index=ignore_index)
    assert torch.equal((dhidden == 0).all(1), labels == ignore_index)


@every_reduction
def test_bug_every_label_ignored(operations: Any, reduction: str) -> None:
    """As torch has it: a mean of nothing is NaN, and its gradient is zero."""
    inputs, labels = make_inputs(9, 8, 19)
    labels = torch.full_like(labels, -100)
    loss, *grads = results(operations, inputs, labels, reduction=reduction)
    formula = partial(loss_formula, labels=labels, reduction=reduction)
    torch.testing.assert_close(loss, formula(*inputs), rtol=0, atol=0, equal_nan=True)
    assert loss.isnan().any() == (reduction == "mean")
    assert_same_bits(grads, list(gradients(formula, inputs, [torch.ones_like(loss)])))
    assert_same_bits(grads, [torch.zeros_like(grad) for grad in grads])


@every_reduction
def test_bug_no_rows(operations: Any, reduction: str) -> None:
    inputs, labels = make_inputs(0, 8, 19)
    loss, dhidden, dweight = results(operations, inputs, labels, reduction=reduction)
    torch.testing.assert_close(loss, loss_formula(*inputs, labels, reduction=reduction), equal_nan=True)
    assert dhidden.shape == (0, 8)
    assert torch.equal(dweight, torch.zeros_like(inputs[1]))
