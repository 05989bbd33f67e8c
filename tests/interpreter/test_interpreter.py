"""The interpreter's checks catch what they are there for."""

import re
import warnings

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime import interpreter as triton_interpreter
from triton.runtime.errors import InterpreterError

import interpreter
from interpreter import DEVICE, check_overflow, dry_run, only_interpreted, releases, shuffled_grid

pytestmark = only_interpreted


@triton.jit
def _copy_kernel(x_ptr, y_ptr, n, x_first, y_first, BLOCK: tl.constexpr):
    """y[y_first:][:n] = x[x_first:][:n]"""
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    in_row = offsets < n
    x = tl.load(x_ptr + x_first + offsets, mask=in_row, other=0.0)
    tl.store(y_ptr + y_first + offsets, x, mask=in_row)


@triton.jit
def _arithmetic_kernel(x_ptr, y_ptr, out_ptr, BLOCK: tl.constexpr, OPERATION: tl.constexpr):
    cols = tl.arange(0, BLOCK)
    x, y = tl.load(x_ptr + cols), tl.load(y_ptr + cols)
    if OPERATION == "add":
        out = x + y
    elif OPERATION == "multiply":
        out = x * y
    elif OPERATION == "divide":
        out = (x / y).to(tl.bfloat16)
    elif OPERATION == "negate":
        out = -x
    elif OPERATION == "select":
        out = tl.where(x > y, x, y)
    elif OPERATION == "maximum":
        out = tl.zeros_like(x) + tl.max(x, axis=0)
    elif OPERATION == "sum":
        out = tl.zeros_like(x) + tl.sum(x.to(tl.float32), axis=0).to(tl.bfloat16)
    elif OPERATION == "exponential":
        out = tl.exp(x.to(tl.float32)).to(tl.bfloat16)
    else:
        out = x.to(tl.float32).to(tl.bfloat16)
    tl.store(out_ptr + cols, out)


@triton.jit
def _earlier_maximum(value, place, other, other_place):
    is_ours = (value > other) | ((value == other) & (place < other_place))
    return tl.where(is_ours, value, other), tl.where(is_ours, place, other_place)


@triton.jit
def _reduce_kernel(x_ptr, value_ptr, place_ptr, ROWS: tl.constexpr, COLS: tl.constexpr, AXIS: tl.constexpr):
    """The maximum along an axis, and where it first is along it."""
    rows, cols = tl.arange(0, ROWS)[:, None], tl.arange(0, COLS)[None, :]
    x = tl.load(x_ptr + rows * COLS + cols)
    place = (rows if AXIS == 0 else cols) + tl.zeros_like(x).to(tl.int32)
    value, place = tl.reduce((x, place), AXIS, _earlier_maximum)
    out = tl.arange(0, COLS if AXIS == 0 else ROWS)
    tl.store(value_ptr + out, value)
    tl.store(place_ptr + out, place)


@triton.jit
def _dot_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr, PRECISION: tl.constexpr):
    rows, cols = tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK)[None, :]
    x = tl.load(x_ptr + rows * BLOCK + cols)
    out = tl.dot(x, x, input_precision=PRECISION)
    tl.store(out_ptr + rows * BLOCK + cols, out)


@triton.jit
def _offset_kernel(x_ptr, stride, WIDE: tl.constexpr):
    row = tl.program_id(0)
    if WIDE:
        row = row.to(tl.int64)
    tl.store(x_ptr + row * stride, 1.0)


@triton.jit
def _running_sum_kernel(x_ptr, total_ptr):
    """A race: every program reads what another wrote."""
    tl.store(total_ptr, tl.load(total_ptr) * 0.5 + tl.load(x_ptr + tl.program_id(0)))


@triton.jit
def _one_more(x):
    return x + 1.0


@triton.jit
def _count_kernel(x_ptr, n):
    for _ in range(n):
        tl.store(x_ptr, _one_more(tl.load(x_ptr)))


@triton.jit
def _assert_kernel(x_ptr, n):
    tl.device_assert(n > 0, "n must be positive")
    tl.store(x_ptr, 1.0)


@triton.jit
def _count_programs_kernel(count_ptr):
    tl.atomic_add(count_ptr + tl.arange(0, 2), 1)


def copy(x: Tensor, y: Tensor, n: int, x_first: int = 0, y_first: int = 0) -> None:
    _copy_kernel[(triton.cdiv(n, 8),)](x, y, n, x_first, y_first, BLOCK=8)  # pyright: ignore


# --- bounds ---------------------------------------------------------------------------------------------------------


def test_bounds_allow_what_is_inside() -> None:
    x, y = torch.arange(13.0), torch.zeros(13)
    copy(x, y, 13)
    assert torch.equal(x, y)
    strided = torch.zeros(13, 2)[:, 1]
    copy(x, strided, 1)
    copy(x, y, 0)


@pytest.mark.parametrize(
    ("n", "x_first", "y_first", "access"),
    [(14, 0, 0, "load"), (13, 1, 0, "load"), (13, -1, 0, "load"), (13, 0, 1, "store"), (1, 0, -1, "store")],
)
def test_bounds_refuse_one_element_outside(n: int, x_first: int, y_first: int, access: str) -> None:
    with pytest.raises(InterpreterError, match=f"OutOfBounds.*{access}"):
        copy(torch.zeros(13), torch.zeros(13), n, x_first, y_first)


def test_bounds_refuse_an_access_that_runs_from_one_tensor_into_the_next() -> None:
    memory = torch.zeros(16)
    with pytest.raises(InterpreterError, match="OutOfBounds"):
        copy(memory[:4], memory[4:], 8)


def test_bounds_watch_atomics() -> None:
    _count_programs_kernel[(1,)](torch.zeros(2, dtype=torch.int32))  # pyright: ignore
    with pytest.raises(InterpreterError, match=r"OutOfBounds.*atomic"):
        _count_programs_kernel[(1,)](torch.zeros(1, dtype=torch.int32))  # pyright: ignore


# --- overflow -------------------------------------------------------------------------------------------------------


def test_overflow_of_an_offset_raises() -> None:
    x = torch.zeros(1)
    for stride in (0, 2**30):
        with dry_run():
            _offset_kernel[(2,)](x, stride, WIDE=False)  # pyright: ignore
    with dry_run():
        _offset_kernel[(2**20,)](x, 2**13, WIDE=True)  # pyright: ignore
    with dry_run(), pytest.raises(InterpreterError, match="overflow"):
        _offset_kernel[(2**20,)](x, 2**13, WIDE=False)  # pyright: ignore


def test_device_asserts_fire() -> None:
    x = torch.zeros(1)
    with check_overflow():
        _assert_kernel[(1,)](x, 1)  # pyright: ignore
        with pytest.raises(InterpreterError, match="n must be positive"):
            _assert_kernel[(1,)](x, 0)  # pyright: ignore
    _assert_kernel[(1,)](x, 0)  # pyright: ignore


def test_dry_run_touches_no_memory_and_few_programs() -> None:
    x, y, count = torch.arange(13.0), torch.zeros(13), torch.zeros(2, dtype=torch.int32)
    with dry_run():
        copy(x, y, 2**30)
        _count_programs_kernel[(2**30, 3, 1)](count)  # pyright: ignore
    assert torch.equal(y, torch.zeros(13))
    assert count.tolist() == [4, 4]
    copy(x, y, 13)
    assert torch.equal(x, y)


# --- order ----------------------------------------------------------------------------------------------------------


def test_shuffled_grid_shows_a_race_and_leaves_others_alone() -> None:
    x, totals, copies = torch.arange(1.0, 9.0), set(), set()
    for seed in range(4):
        total, y = torch.zeros(1), torch.zeros(64)
        with shuffled_grid(seed):
            _running_sum_kernel[(8,)](x, total)  # pyright: ignore
            copy(torch.arange(64.0), y, 64)
        totals.add(total.item())
        copies.add(tuple(y.tolist()))
    assert len(totals) == 4
    assert copies == {tuple(range(64))}


# --- bfloat16 and tf32 ----------------------------------------------------------------------------------------------

TORCH_TWINS = {
    "add": lambda x, y: x + y,
    "multiply": lambda x, y: x * y,
    "divide": lambda x, y: x / y,
    "negate": lambda x, y: -x,
    "select": torch.maximum,
    "maximum": lambda x, y: x.max().expand_as(x),
    "sum": lambda x, y: x.double().sum().bfloat16().expand_as(x),
    "exponential": lambda x, y: x.float().exp().bfloat16(),
    "convert": lambda x, y: x,
}


@pytest.mark.parametrize("operation", TORCH_TWINS)
def test_bfloat16_arithmetic_is_that_of_torch(operation: str) -> None:
    x, y = torch.randn(2, 256, generator=torch.Generator().manual_seed(0)).bfloat16()
    out = torch.empty_like(x)
    _arithmetic_kernel[(1,)](x, y, out, BLOCK=256, OPERATION=operation)  # pyright: ignore
    assert torch.equal(out, TORCH_TWINS[operation](x, y))


def test_bfloat16_rounds_to_nearest_even() -> None:
    values = torch.tensor(
        [1.0, 1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20, 3.4e38, -float("inf"), float("nan"), 1e-40]
    )
    out = torch.empty(8, dtype=torch.bfloat16)
    copy(values, out, 8)
    torch.testing.assert_close(out, values.bfloat16(), rtol=0, atol=0, equal_nan=True)
    assert out[1:3].tolist() == [1.0, 1.015625]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dot_computes_on_values(dtype: torch.dtype) -> None:
    x = torch.randn(32, 32, generator=torch.Generator().manual_seed(0)).to(dtype)
    out = torch.empty(32, 32)
    _dot_kernel[(1,)](x, out, BLOCK=32, PRECISION="ieee")  # pyright: ignore
    torch.testing.assert_close(out.double(), x.double() @ x.double(), rtol=0, atol=1e-5)


def test_dot_refuses_an_inner_axis_that_no_gpu_takes() -> None:
    with pytest.raises(InterpreterError, match="K >= 16"):
        _dot_kernel[(1,)](torch.ones(8, 8), torch.empty(8, 8), BLOCK=8, PRECISION="ieee")  # pyright: ignore


def test_dot_in_tf32_errs_as_a_gpu_does() -> None:
    x, out = torch.randn(32, 32, generator=torch.Generator().manual_seed(0)), torch.empty(32, 32)
    _dot_kernel[(1,)](x, out, BLOCK=32, PRECISION="tf32")  # pyright: ignore
    error = (out.double() - x.double() @ x.double()).abs().max()
    assert 1e-4 < error < 2e-2


# --- canary ---------------------------------------------------------------------------------------------------------


@triton.jit
def _count_to_kernel(count_ptr, n):
    for i in range(n):
        tl.store(count_ptr, i + 1)


def test_a_loop_runs_as_often_as_an_argument_says() -> None:
    count = torch.zeros(1, dtype=torch.int32)
    _count_to_kernel[(1,)](count, 5)  # pyright: ignore
    assert count.item() == 5


def test_a_release_that_was_tried_is_not_warned_of() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for version in (*releases.TRIED, f"{releases.TRIED[-1]}+git0123abc"):
            releases.check(version)


@pytest.mark.parametrize("version", ["99.0.0", "3.7.0", "3.10.0+git0123abc"])
def test_another_release_is_warned_of(version: str) -> None:
    with pytest.warns(UserWarning, match=f"not {re.escape(version)}: run tests/interpreter/test_interpreter.py first"):
        releases.check(version)


def test_what_a_new_release_lacks_is_skipped_and_what_a_known_one_lacks_is_an_error() -> None:
    skipped = pytest.raises(pytest.skip.Exception, match=r"triton 99\.0\.0 is not known .*no such name")
    with skipped, releases.skipping_what_is_unknown("99.0.0"):
        raise AttributeError("no such name")
    with pytest.raises(AttributeError, match="no such name"), releases.skipping_what_is_unknown(releases.TRIED[-1]):
        raise AttributeError("no such name")


def test_the_language_is_replaced_once_in_a_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    replaced: list[str] = []
    replace = triton_interpreter._patch_builtin
    monkeypatch.setattr(
        triton_interpreter, "_patch_builtin", lambda part, *rest: replaced.append(part.__name__) or replace(part, *rest)
    )
    x, n_parts = torch.zeros(1), []
    for n_calls in (0, 1, 20, 20):
        _count_kernel[(3,)](x, n_calls)
        n_parts.append(len(replaced))
        replaced.clear()
    assert x.item() == 3 * 41
    assert n_parts == [n_parts[0]] * 4
    assert n_parts[0] > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("axis", [0, 1])
def test_a_reduction_by_a_function_of_the_kernel(axis: int, dtype: torch.dtype) -> None:
    x = torch.randint(-3, 4, (8, 16), generator=torch.Generator().manual_seed(0)).to(dtype)  # with equal values
    n_results = x.shape[1 - axis]
    values, places = torch.empty(n_results, dtype=dtype), torch.empty(n_results, dtype=torch.int32)
    _reduce_kernel[(1,)](x, values, places, ROWS=8, COLS=16, AXIS=axis)  # pyright: ignore
    assert torch.equal(values, x.amax(axis))
    assert places.tolist() == [row.tolist().index(row.max().item()) for row in x.movedim(axis, 1)]


def test_device_is_where_kernels_run() -> None:
    assert interpreter.DEVICE == DEVICE == "cpu"
