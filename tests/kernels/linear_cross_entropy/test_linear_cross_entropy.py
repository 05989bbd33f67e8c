"""linear_cross_entropy, as reference and as kernel, against its formula and what others get wrong."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from accuracy import DTYPES, LAYOUTS, assert_same_bits, forward, gradients, max_error, random
from fastgpt_kernels import reference
from fuzz import cases
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from .formula import (
    CHUNK_ROWS,
    REDUCTIONS,
    TERMS,
    assert_loss_parity,
    in_chunks,
    loss_formula,
    make_inputs,
    make_upstream,
    of,
    results,
)

every_reduction = pytest.mark.parametrize("reduction", REDUCTIONS)

# --- parity ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@every_reduction
@pytest.mark.parametrize("sizes", [(7, 64, 2), (1, 16, 128), (5, 5, 64)])
def test_as_accurate_as_eager(operations: Any, sizes: tuple[int, int, int], reduction: str, dtype: torch.dtype) -> None:
    inputs, labels = make_inputs(*sizes, dtype=dtype)
    assert_loss_parity(operations, inputs, labels, reduction=reduction)


@pytest.mark.parametrize("dtype", DTYPES)
@every_reduction
@pytest.mark.parametrize("sizes", [(33, 16, 101), (129, 31, 257), (5, 8, 50257)])
def test_the_tile_and_the_chunk_that_ship(
    operations: Any, sizes: tuple[int, int, int], reduction: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With GPT-2's vocabulary too."""
    monkeypatch.undo()
    inputs, labels = make_inputs(*sizes, dtype=dtype)
    assert_loss_parity(operations, inputs, labels, reduction=reduction)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])  # of which the latter's chunks add up in float32
@every_reduction
@pytest.mark.parametrize("n_chunk_rows", [1, 6, 12, 13, 14])
def test_chunks_end_anywhere(
    operations: Any, n_chunk_rows: int, reduction: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_chunks(monkeypatch, n_chunk_rows, 19)
    inputs, labels = make_inputs(13, 8, 19, dtype=dtype)
    assert_loss_parity(operations, inputs, labels, reduction=reduction)


@pytest.mark.parametrize("dtype", DTYPES)
@every_reduction
@pytest.mark.parametrize("terms", TERMS)
def test_label_smoothing_and_z_loss(operations: Any, terms: str, reduction: str, dtype: torch.dtype) -> None:
    inputs, labels = make_inputs(9, 16, 67, dtype=dtype)
    options: dict[str, Any] = TERMS[terms]
    assert_loss_parity(operations, inputs, labels, reduction=reduction, **options)


@cases(70)
@given(
    data=st.data(),
    reduction=st.sampled_from(REDUCTIONS),
    label_smoothing=st.sampled_from([0.0, 0.0, 0.3]),
    z_loss=st.sampled_from([0.0, 0.0, 0.01]),
    ignored=st.sampled_from([0.0, 0.5]),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(LAYOUTS),
)
def test_random_arguments(
    operations: Any, data: st.DataObject, reduction: str, label_smoothing: float, z_loss: float, ignored: float,
    dtype: torch.dtype, layout: str,
) -> None:  # fmt: skip
    # The interpreter takes milliseconds for each tile of a row.
    largest = (40, 40, 300) if operations is reference else (16, 40, 200)
    n_rows, n_channels, n_vocabulary = data.draw(st.tuples(*(st.integers(1, n) for n in largest)))
    if label_smoothing or dtype.itemsize < 4:
        # Of a single token all gradients are 0, and nothing measures the rounding error that 1 - 0.3 - 0.7 leaves, or,
        # in half precision on a GPU, that of a product which is added without being rounded.
        n_vocabulary += 1
    n_chunk_rows = data.draw(st.integers(1, n_rows + 4))
    inputs, labels = make_inputs(n_rows, n_channels, n_vocabulary, dtype=dtype, layout=layout, ignored=ignored)
    with pytest.MonkeyPatch.context() as patch:
        in_chunks(patch, n_chunk_rows, n_vocabulary)
        terms: dict[str, Any] = {"label_smoothing": label_smoothing, "z_loss": z_loss}
        assert_loss_parity(operations, inputs, labels, reduction=reduction, **terms, slack=4)


@every_reduction
@pytest.mark.parametrize("terms", [{}, TERMS["both"]], ids=["", "more terms"])
def test_gradients_are_those_of_finite_differences(operations: Any, terms: dict[str, float], reduction: str) -> None:
    inputs, labels = make_inputs(5, 3, 7, dtype=torch.float64)
    inputs = [x.requires_grad_() for x in inputs]
    assert torch.autograd.gradcheck(of(operations, labels, reduction=reduction, **terms), inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [30.0, 1e4])
@every_reduction
def test_huge_logits_stay_finite(operations: Any, reduction: str, scale: float, dtype: torch.dtype) -> None:
    (hidden, weight), labels = make_inputs(9, 16, 50, dtype=dtype)
    assert_loss_parity(operations, (hidden * scale, weight), labels, reduction=reduction)


@every_reduction
def test_vocabulary_of_one(operations: Any, reduction: str) -> None:
    for result in results(operations, *make_inputs(6, 4, 1), reduction=reduction):
        assert torch.equal(result, torch.zeros_like(result))


# --- what is computed -----------------------------------------------------------------------------------------------


@every_reduction
@pytest.mark.parametrize("wanted", [0, 1])
def test_gradient_of_one_input_alone(operations: Any, wanted: int, reduction: str) -> None:
    inputs, labels = make_inputs(13, 8, 19)
    loss = of(operations, labels, reduction=reduction)
    both = gradients(loss, inputs, [torch.ones_like(loss(*inputs))])
    inputs[wanted].requires_grad_()
    loss(*inputs).sum().backward()
    assert inputs[1 - wanted].grad is None
    torch.testing.assert_close(inputs[wanted].grad, both[wanted])


@pytest.mark.parametrize("dtype", DTYPES)
@every_reduction
@pytest.mark.parametrize("wants_gradient", [False, True])
def test_loss_is_in_float32_at_least(operations: Any, wants_gradient: bool, reduction: str, dtype: torch.dtype) -> None:
    inputs, labels = make_inputs(5, 8, 19, dtype=dtype)
    with torch.set_grad_enabled(wants_gradient):
        loss = of(operations, labels, reduction=reduction)(*[x.requires_grad_() for x in inputs])
    assert loss.requires_grad == wants_gradient
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert loss.shape == ((5,) if reduction == "none" else ())


class LargestTensor(TorchDispatchMode):
    """Remembers the number of elements of the largest tensor that any operation gives back."""

    n_elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        outputs = func(*args, **(kwargs or {}))
        for output in outputs if isinstance(outputs, tuple | list) else [outputs]:
            if isinstance(output, Tensor):
                self.n_elements = max(self.n_elements, output.numel())
        return outputs


@every_reduction
def test_logits_never_exist_at_once(operations: Any, reduction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    n_rows, n_vocabulary = 64, 101
    in_chunks(monkeypatch, CHUNK_ROWS, n_vocabulary)
    inputs, labels = make_inputs(n_rows, 4, n_vocabulary)
    inputs = [x.requires_grad_() for x in inputs]
    n_elements = []
    functions: list[Callable[..., Tensor]] = [loss_formula, operations.linear_cross_entropy]
    for function in functions:
        with LargestTensor() as largest:
            function(*inputs, labels, reduction=reduction).sum().backward()
        n_elements.append(largest.n_elements)
    # The kernel's rows are padded to 128, and the interpreter copies a chunk of them as bytes.
    most = CHUNK_ROWS * (n_vocabulary if operations is reference else 128 * 4)
    assert n_elements[0] == n_rows * n_vocabulary
    assert CHUNK_ROWS * n_vocabulary <= n_elements[1] <= most


# --- layouts and dtypes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@every_reduction
def test_any_layout_of_inputs_and_gradients(operations: Any, reduction: str, layout: str) -> None:
    inputs, labels = make_inputs(6, 8, 19, layout=layout)
    upstream = make_upstream(6, layout) if reduction == "none" else None
    assert_loss_parity(operations, inputs, labels, upstream, reduction=reduction)
    wide = torch.full((6, 2), 2**40)
    wide[:, 0] = labels
    same, expected = (results(operations, inputs, x, reduction=reduction) for x in (wide[:, 0], labels))
    assert_same_bits(same, expected)


@every_reduction
@pytest.mark.parametrize(
    "dtypes", [(torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.bfloat16,) * 2]
)
def test_bug_autocast_mixes_dtypes(operations: Any, dtypes: tuple[torch.dtype, torch.dtype], reduction: str) -> None:
    tensors, labels = make_inputs(13, 16, 19)
    inputs = tuple(x.to(dtype) for x, dtype in zip(tensors, dtypes, strict=True))
    with torch.autocast(labels.device.type, torch.bfloat16):
        loss, *grads = results(operations, inputs, labels, reduction=reduction)
    formula, exact = partial(loss_formula, labels=labels, reduction=reduction), [x.double() for x in inputs]
    (truth,) = forward(formula, exact)
    assert loss.dtype == torch.float32
    assert max_error(loss, truth) <= 0.02 * truth.abs().max()
    true_grads = gradients(formula, exact, [random(*truth.shape, seed=5)])
    for grad, true, x in zip(grads, true_grads, inputs, strict=True):
        assert grad.dtype == x.dtype
        assert max_error(grad, true) <= 0.05 * true.abs().max()


def test_autocast_leaves_float64_alone(operations: Any) -> None:
    inputs, labels = make_inputs(3, 8, 19, dtype=torch.float64)
    with torch.autocast(labels.device.type, torch.bfloat16):
        assert_loss_parity(operations, inputs, labels)


# --- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("hidden", "weight", "labels"),
    [((4, 8), (9, 7), (4,)), ((4, 8), (9, 8), (5,)), ((4, 8), (9, 8), (4, 1)), ((2, 2, 8), (9, 8), (4,))],
)
def test_wrong_shapes_are_named(
    operations: Any, hidden: tuple[int, ...], weight: tuple[int, ...], labels: tuple[int, ...]
) -> None:
    shapes = f"not {hidden}, {weight}, {labels}".replace("(", r"\(").replace(")", r"\)")
    with pytest.raises(ValueError, match=rf"must be \(N, C\).*{shapes}"):
        operations.linear_cross_entropy(torch.zeros(hidden), torch.zeros(weight), torch.zeros(labels).long())


@pytest.mark.parametrize("n_rows", [0, 3])
def test_bug_an_empty_vocabulary_has_a_loss(operations: Any, n_rows: int) -> None:
    labels = torch.full((n_rows,), -100)
    with pytest.raises(ValueError, match=r"the vocabulary is empty: weight is \(0, 8\)"):
        operations.linear_cross_entropy(torch.zeros(n_rows, 8), torch.zeros(0, 8), labels)


@pytest.mark.parametrize("dtype", [torch.float32, torch.int32, torch.bool])
def test_wrong_labels_dtype_is_named(operations: Any, dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match=f"labels must be int64, not {dtype}"):
        operations.linear_cross_entropy(torch.zeros(2, 3), torch.zeros(4, 3), torch.zeros(2, dtype=dtype))


def test_wrong_reduction_is_named(operations: Any) -> None:
    inputs, labels = make_inputs(3, 4, 5)
    with pytest.raises(ValueError, match="unknown reduction 'batchmean': choose one of mean, sum, none"):
        operations.linear_cross_entropy(*inputs, labels, reduction="batchmean")


@pytest.mark.parametrize("value", [-0.1, 1.1, float("nan"), float("inf")])
def test_wrong_terms_are_named(operations: Any, value: float) -> None:
    inputs, labels = make_inputs(3, 4, 5)
    with pytest.raises(ValueError, match=rf"label_smoothing must be in \[0, 1\], not {value}"):
        operations.linear_cross_entropy(*inputs, labels, label_smoothing=value)
    if value != 1.1:
        with pytest.raises(ValueError, match=f"z_loss must be finite and 0 or more, not {value}"):
            operations.linear_cross_entropy(*inputs, labels, z_loss=value)


# --- bugs this field has had ----------------------------------------------------------------------------------------


@every_reduction
def test_bug_padded_columns_add_exp_0(operations: Any, reduction: str) -> None:
    """It shows most where every true logit is far below zero."""
    (hidden, weight), labels = make_inputs(9, 8, 67)
    hidden[:, 0], weight[:, 0] = 10.0, -10.0
    assert_loss_parity(operations, (hidden, weight), labels, reduction=reduction)


@pytest.mark.parametrize("upstream", ["random", "strided", "ones", "zeros"])
def test_bug_gradient_scaled_by_the_first_tokens(operations: Any, upstream: str) -> None:
    inputs, labels = make_inputs(13, 8, 19, ignored=0.0)
    grads = {
        "random": make_upstream(13),
        "strided": make_upstream(13, "strided"),
        "ones": torch.ones(()).expand(13),
        "zeros": torch.zeros(13),
    }
    assert_loss_parity(operations, inputs, labels, grads[upstream], reduction="none")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("scale", [0.0, -3.0, -1 / 3, 1 / 3, 2.0**16, 2.0**17, 2.0**-20])
def test_bug_upstream_scalar_rounded_to_half_precision(
    operations: Any, scale: float, reduction: str, dtype: torch.dtype
) -> None:
    """Loss scaling multiplies by 65536, infinite in float16; 1/3 in bfloat16 would shift every gradient alike."""
    inputs, labels = make_inputs(3, 64, 19, dtype=dtype, ignored=0.0)
    inputs = [x / 100 for x in inputs]  # so that a gradient times 65536 is finite
    dhidden, _ = gradients(of(operations, labels, reduction="sum"), inputs, [torch.ones(())])
    upstream = torch.tensor(scale, dtype=torch.promote_types(dtype, torch.float32))
    scaled_dhidden, scaled_dweight = gradients(of(operations, labels, reduction=reduction), inputs, [upstream])
    factor = upstream / 3 if reduction == "mean" else upstream
    assert torch.equal(scaled_dhidden, (dhidden.double() * factor.double()).to(dtype))
    exact = [x.double() for x in inputs]
    true_grads = gradients(partial(loss_formula, labels=labels, reduction=reduction), exact, [upstream])
    for grad, true in zip((scaled_dhidden, scaled_dweight), true_grads, strict=True):
        # bfloat16 rounds the logits and their gradient; the least float16 is 6e-8.
        assert max_error(grad, true) <= 4 * torch.finfo(dtype).eps * true.abs().max() + 6e-8


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@every_reduction
def test_bug_weight_gradient_summed_in_half_precision(
    operations: Any, reduction: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over 256 chunks, or 30 in the interpreter; the hidden states are positive, so that the sum grows."""
    n_rows, n_chunk_rows = (512, 2) if operations is reference else (120, 4)
    in_chunks(monkeypatch, n_chunk_rows, 3)
    (hidden, weight), labels = make_inputs(n_rows, 8, 3, dtype=dtype)
    assert_loss_parity(operations, (hidden.abs(), weight), labels.clamp(max=0), reduction=reduction)


# --- the reference alone --------------------------------------------------------------------------------------------


@every_reduction
def test_bug_results_of_the_reference_differ_between_runs(reduction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    in_chunks(monkeypatch, 16, 101)
    inputs, labels = make_inputs(65, 32, 101)
    first = results(reference, inputs, labels, reduction=reduction)
    for _ in range(3):
        assert_same_bits(results(reference, inputs, labels, reduction=reduction), first)
