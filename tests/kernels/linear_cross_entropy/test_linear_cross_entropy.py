"""linear_cross_entropy against torch's cross-entropy on explicit logits."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from accuracy import DTYPES, LAYOUTS, assert_parity, gradients, max_error, random, relayout
from fastgpt_kernels import reference
from fastgpt_kernels.operations.linear_cross_entropy import reference as loss_reference
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

REDUCTIONS = ["mean", "sum", "none"]
ONE = [torch.ones(())]


def loss_formula(
    hidden: Tensor, weight: Tensor, labels: Tensor, ignore_index: int = -100, reduction: str = "mean"
) -> Tensor:
    """A head that rounds its logits to the dtype, and a loss in float32, or float64 for float64 inputs."""
    logits = hidden @ weight.T
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return F.cross_entropy(logits, labels, ignore_index=ignore_index, reduction=reduction)


def losses_on(labels: Tensor, **options) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """The reference and the formula, as functions of hidden and weight."""
    return partial(reference.linear_cross_entropy, labels=labels, **options), partial(
        loss_formula, labels=labels, **options
    )


def make_inputs(
    n_rows: int,
    n_channels: int,
    n_vocabulary: int,
    *,
    dtype: torch.dtype = torch.float32,
    layout: str = "contiguous",
    ignored: float = 0.25,
) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """(hidden, weight) and the labels; a share `ignored` of these is -100."""
    hidden, weight = 2 * random(n_rows, n_channels), random(n_vocabulary, n_channels, seed=1)
    generator = torch.Generator().manual_seed(n_rows)
    labels = torch.randint(n_vocabulary, (n_rows,), generator=generator)
    labels[torch.rand(n_rows, generator=generator) < ignored] = -100
    labels[: n_rows // 4 + 1 : 2] = n_vocabulary - 1
    return (relayout(hidden.to(dtype), layout), relayout(weight.to(dtype), layout)), labels


# --- parity ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("sizes", [(33, 16, 101), (5, 8, 50257), (129, 31, 257), (7, 64, 2), (1, 16, 128)])
def test_as_accurate_as_eager(sizes: tuple[int, int, int], reduction: str, dtype: torch.dtype) -> None:
    inputs, labels = make_inputs(*sizes, dtype=dtype)
    assert_parity(*losses_on(labels, reduction=reduction), inputs, slack=2)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_gradients_are_those_of_finite_differences(reduction: str) -> None:
    inputs, labels = make_inputs(5, 3, 7, dtype=torch.float64)
    loss, _ = losses_on(labels, reduction=reduction)
    assert torch.autograd.gradcheck(loss, [x.requires_grad_() for x in inputs])


@given(
    sizes=st.tuples(st.integers(1, 40), st.integers(1, 40), st.integers(1, 300)),
    n_chunk_rows=st.integers(1, 50),
    reduction=st.sampled_from(REDUCTIONS),
    ignored=st.sampled_from([0.0, 0.5]),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(LAYOUTS),
)
def test_random_arguments(
    sizes: tuple[int, int, int], n_chunk_rows: int, reduction: str, ignored: float, dtype: torch.dtype, layout: str
) -> None:
    inputs, labels = make_inputs(*sizes, dtype=dtype, layout=layout, ignored=ignored)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loss_reference, "_CHUNK_LOGITS", n_chunk_rows * sizes[2])
        assert_parity(*losses_on(labels, reduction=reduction), inputs, slack=4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("n_chunk_rows", [1, 6, 12, 13, 14])
def test_chunks_end_anywhere(
    n_chunk_rows: int, reduction: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss_reference, "_CHUNK_LOGITS", n_chunk_rows * 19 + 18)
    inputs, labels = make_inputs(13, 8, 19, dtype=dtype)
    assert_parity(*losses_on(labels, reduction=reduction), inputs, slack=2)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_vocabulary_of_one(reduction: str) -> None:
    inputs, labels = make_inputs(6, 4, 1)
    loss, _ = losses_on(labels, reduction=reduction)
    assert (loss(*inputs) == 0).all()
    for grad in gradients(loss, inputs, [torch.ones_like(loss(*inputs))]):
        assert torch.equal(grad, torch.zeros_like(grad))


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_huge_logits_stay_finite(reduction: str) -> None:
    (hidden, weight), labels = make_inputs(9, 16, 50)
    assert_parity(*losses_on(labels, reduction=reduction), [hidden * 1e4, weight], slack=2)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("wanted", [0, 1])
def test_gradient_of_one_input_alone(wanted: int, reduction: str) -> None:
    inputs, labels = make_inputs(13, 8, 19)
    loss, _ = losses_on(labels, reduction=reduction)
    both = gradients(loss, inputs, [torch.ones_like(loss(*inputs))])
    inputs[wanted].requires_grad_()
    loss(*inputs).sum().backward()
    assert inputs[1 - wanted].grad is None
    torch.testing.assert_close(inputs[wanted].grad, both[wanted])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_loss_is_in_float32_at_least(reduction: str, dtype: torch.dtype) -> None:
    inputs, labels = make_inputs(5, 8, 19, dtype=dtype)
    with torch.no_grad():
        loss = reference.linear_cross_entropy(*inputs, labels, reduction=reduction)
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert loss.shape == ((5,) if reduction == "none" else ())


# --- memory ---------------------------------------------------------------------------------------------------------


class LargestTensor(TorchDispatchMode):
    """Remembers the number of elements of the largest tensor that any operation gives back."""

    n_elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        outputs = func(*args, **(kwargs or {}))
        for output in outputs if isinstance(outputs, tuple | list) else [outputs]:
            if isinstance(output, Tensor):
                self.n_elements = max(self.n_elements, output.numel())
        return outputs


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_logits_never_exist_at_once(reduction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    n_rows, n_channels, n_vocabulary, n_chunk_rows = 64, 4, 101, 16
    monkeypatch.setattr(loss_reference, "_CHUNK_LOGITS", n_chunk_rows * n_vocabulary)
    inputs, labels = make_inputs(n_rows, n_channels, n_vocabulary)
    inputs = [x.requires_grad_() for x in inputs]
    ours, theirs = losses_on(labels, reduction=reduction)
    for loss, expected in ((ours, n_chunk_rows * n_vocabulary), (theirs, n_rows * n_vocabulary)):
        with LargestTensor() as largest:
            loss(*inputs).sum().backward()
        assert largest.n_elements == expected


# --- arguments ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ignore_index", [-100, -1, 0, 5, 1000])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_ignore_index(reduction: str, ignore_index: int) -> None:
    inputs, labels = make_inputs(12, 8, 19)
    labels[labels == -100], labels[3] = ignore_index, 5
    assert_parity(*losses_on(labels, reduction=reduction, ignore_index=ignore_index), inputs, slack=2)


@pytest.mark.parametrize(
    ("hidden", "weight", "labels"),
    [((4, 8), (9, 7), (4,)), ((4, 8), (9, 8), (5,)), ((4, 8), (9, 8), (4, 1)), ((2, 2, 8), (9, 8), (4,))],
)
def test_wrong_shapes_are_named(hidden: tuple[int, ...], weight: tuple[int, ...], labels: tuple[int, ...]) -> None:
    shapes = f"not {hidden}, {weight}, {labels}".replace("(", r"\(").replace(")", r"\)")
    with pytest.raises(ValueError, match=shapes):
        reference.linear_cross_entropy(torch.zeros(hidden), torch.zeros(weight), torch.zeros(labels).long())


@pytest.mark.parametrize("dtype", [torch.float32, torch.int32, torch.bool])
def test_wrong_labels_dtype_is_named(dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match=f"labels must be int64, not {dtype}"):
        reference.linear_cross_entropy(torch.zeros(2, 3), torch.zeros(4, 3), torch.zeros(2, dtype=dtype))


def test_wrong_reduction_is_named() -> None:
    inputs, labels = make_inputs(3, 4, 5)
    with pytest.raises(ValueError, match="unknown reduction 'batchmean': choose one of mean, sum, none"):
        reference.linear_cross_entropy(*inputs, labels, reduction="batchmean")


# --- bugs this field has had ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("label", [19, 20, 2**31, 2**62, -1, -99, -101])
def test_bug_label_out_of_range_crashes_later(label: int, reduction: str) -> None:
    inputs, labels = make_inputs(5, 8, 19)
    labels[2] = label
    with pytest.raises(ValueError, match=rf"label {label} is outside the vocabulary: it must be in \[0, 19\)"):
        reference.linear_cross_entropy(*inputs, labels, reduction=reduction)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_bug_label_out_of_range_gives_a_plausible_loss(reduction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the labels cannot be looked at, as on a GPU."""
    monkeypatch.setattr(loss_reference, "check_loss_arguments", lambda *_: None)
    inputs, labels = make_inputs(5, 8, 19, ignored=0.0)
    labels[2] = 19
    loss = reference.linear_cross_entropy(*inputs, labels, reduction=reduction)
    expected = torch.arange(5) == 2 if reduction == "none" else torch.tensor(True)
    assert torch.equal(loss.isnan(), expected)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_bug_every_label_ignored(reduction: str) -> None:
    """As torch has it: a mean of nothing is NaN, and its gradient is zero."""
    inputs, labels = make_inputs(5, 8, 19)
    ours, theirs = losses_on(torch.full_like(labels, -100), reduction=reduction)
    torch.testing.assert_close(ours(*inputs), theirs(*inputs), equal_nan=True)
    assert ours(*inputs).isnan().any() == (reduction == "mean")
    upstream = [torch.ones_like(ours(*inputs))]
    for grad, expected in zip(gradients(ours, inputs, upstream), gradients(theirs, inputs, upstream), strict=True):
        assert torch.equal(grad, torch.zeros_like(grad))
        assert torch.equal(grad, expected)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_bug_no_rows(reduction: str) -> None:
    inputs, labels = make_inputs(0, 8, 19)
    ours, theirs = losses_on(labels, reduction=reduction)
    torch.testing.assert_close(ours(*inputs), theirs(*inputs), equal_nan=True)
    dhidden, dweight = gradients(ours, inputs, [torch.ones_like(ours(*inputs))])
    assert dhidden.shape == (0, 8)
    assert torch.equal(dweight, torch.zeros_like(dweight))


def test_bug_vocabulary_tail_adds_to_the_sum() -> None:
    """Padded columns would each add exp(0) and show most where every true logit is far below zero."""
    (hidden, weight), labels = make_inputs(9, 8, 67)
    hidden[:, 0], weight[:, 0] = 10.0, -10.0
    for reduction in REDUCTIONS:
        assert_parity(*losses_on(labels, reduction=reduction), [hidden, weight], slack=2)


def test_bug_gradient_scaled_by_the_first_tokens() -> None:
    inputs, labels = make_inputs(13, 8, 19, ignored=0.0)
    upstream = random(13, seed=5).float()
    assert_parity(*losses_on(labels, reduction="none"), inputs, [upstream], slack=2)
    assert_parity(*losses_on(labels, reduction="none"), inputs, [torch.ones(()).expand(13)], slack=2)
    assert_parity(*losses_on(labels, reduction="none"), inputs, [relayout(upstream, "strided")], slack=2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("scale", [0.0, -3.0, 1 / 3, 2.0**16, 2.0**-20])
def test_bug_upstream_scalar_rounded_to_half_precision(scale: float, reduction: str, dtype: torch.dtype) -> None:
    """Loss scaling multiplies by 65536, infinite in float16; 1/3 in bfloat16 would shift every gradient alike."""
    inputs, labels = make_inputs(3, 64, 19, dtype=dtype, ignored=0.0)
    inputs = [x / 100 for x in inputs]  # so that a gradient times 65536 is finite
    dhidden, _ = gradients(partial(reference.linear_cross_entropy, labels=labels, reduction="sum"), inputs, ONE)
    upstream = torch.tensor(scale, dtype=torch.promote_types(dtype, torch.float32))
    loss, formula = losses_on(labels, reduction=reduction)
    scaled_dhidden, scaled_dweight = gradients(loss, inputs, [upstream])
    factor = upstream / 3 if reduction == "mean" else upstream
    assert torch.equal(scaled_dhidden, (dhidden.double() * factor.double()).to(dtype))
    _, true_dweight = gradients(formula, [x.double() for x in inputs], [upstream])
    assert max_error(scaled_dweight, true_dweight) <= 0.02 * true_dweight.abs().max() + 6e-8  # the least float16


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_bug_weight_gradient_summed_in_half_precision(
    reduction: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over 256 chunks; the hidden states are positive, so that the sum grows."""
    monkeypatch.setattr(loss_reference, "_CHUNK_LOGITS", 2 * 3)
    (hidden, weight), labels = make_inputs(512, 8, 3, dtype=dtype)
    assert_parity(*losses_on(labels.clamp(max=0), reduction=reduction), [hidden.abs(), weight], slack=2)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_bug_autocast_mixes_dtypes(reduction: str) -> None:
    inputs, labels = make_inputs(13, 16, 19)
    ours, theirs = losses_on(labels, reduction=reduction)
    for dtype in (torch.float32, torch.bfloat16):
        hidden, weight = inputs[0].to(dtype), inputs[1]
        truth = theirs(hidden.double(), weight.double())
        exact = gradients(theirs, [hidden.double(), weight.double()], [torch.ones_like(truth)])
        with torch.autocast("cpu", torch.bfloat16):
            loss = ours(hidden, weight)
            grads = gradients(ours, [hidden, weight], [torch.ones_like(loss)])
        assert loss.dtype == torch.float32
        assert max_error(loss, truth) <= 0.02 * truth.abs().max()
        for grad, true, x in zip(grads, exact, (hidden, weight), strict=True):
            assert grad.dtype == x.dtype
            assert max_error(grad, true) <= 0.05 * true.abs().max()


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_bug_results_differ_between_runs(reduction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_reference, "_CHUNK_LOGITS", 16 * 101)
    inputs, labels = make_inputs(65, 32, 101)
    loss, _ = losses_on(labels, reduction=reduction)
    upstream = [torch.ones_like(loss(*inputs))]
    first = loss(*inputs), *gradients(loss, inputs, upstream)
    for _ in range(3):
        again = loss(*inputs), *gradients(loss, inputs, upstream)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
