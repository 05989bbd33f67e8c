"""Products of float32 in kernels follow torch's setting for tf32."""

import warnings
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import fastgpt_kernels
import pytest
import torch
from accuracy import forward, gradients, random
from fastgpt_kernels import reference
from fastgpt_kernels.common import chip
from fastgpt_kernels.common.precision import float32_products, product_precision
from fastgpt_kernels.operations.attention.tiles import attention_tile
from interpreter import DEVICE, only_interpreted
from records import FORMS, RECORDS, call
from torch import Tensor
from triton.runtime import interpreter

backends: Any = torch.backends
matmul = torch.backends.cuda.matmul
# Those whose kernels multiply; the others leave their products to torch.
MULTIPLYING = [(operation, form) for operation, form in FORMS if operation in ("causal_attention", "gelu_mlp")]
# Largest relative errors of rounding to the nearest. A result may err eight times as much, as a whole: through a chain
# of up to three products.
TF32, FP32 = 2**-11, 2**-24


@pytest.fixture(autouse=True)
def _torchs_defaults() -> Iterator[None]:
    def restore() -> None:
        torch.set_float32_matmul_precision("highest")
        backends.fp32_precision = matmul.fp32_precision = "none"

    restore()
    with torch.device(DEVICE):
        yield
    restore()


# --- the setting ----------------------------------------------------------------------------------------------------


def high() -> None:
    torch.set_float32_matmul_precision("high")


def setting(name: str, value: Any, owner: Any = matmul) -> Callable[[], None]:
    return lambda: setattr(owner, name, value)


def after_high(change: Callable[[], None]) -> Callable[[], None]:
    return lambda: (high(), change())[1]


# In these torch's own getters of the other kind raise.
MIXED = {
    "fp32_precision tf32": (setting("fp32_precision", "tf32"), "tf32"),
    "of all backends tf32": (setting("fp32_precision", "tf32", backends), "tf32"),
    "high, then ieee": (after_high(setting("fp32_precision", "ieee")), "ieee"),
}
WAYS = {
    "nothing": (lambda: None, "ieee"),
    "highest": (lambda: torch.set_float32_matmul_precision("highest"), "ieee"),
    "high": (high, "tf32"),
    "medium": (lambda: torch.set_float32_matmul_precision("medium"), "tf32"),
    "allow_tf32": (setting("allow_tf32", True), "tf32"),
    "no allow_tf32": (after_high(setting("allow_tf32", False)), "ieee"),
    "fp32_precision ieee": (setting("fp32_precision", "ieee"), "ieee"),
    **MIXED,
}


@pytest.mark.parametrize("way", WAYS)
def test_the_setting_is_read_however_it_was_made(way: str) -> None:
    make, expected = WAYS[way]
    make()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert product_precision(torch.zeros(1)) == expected
    if way in MIXED:
        with pytest.raises(RuntimeError, match="mix of the legacy and new APIs"):
            matmul.allow_tf32  # noqa: B018


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_are_not_rounded(dtype: torch.dtype) -> None:
    high()
    assert product_precision(torch.zeros(1, dtype=dtype)) == "ieee"


@pytest.mark.parametrize(("architecture", "expected"), [("sm_80", "tf32"), ("sm_120", "tf32"), ("gfx942", "ieee")])
def test_amd_gpus_are_not_asked_for_it(architecture: str, expected: str) -> None:
    high()
    with chip.assume(chip.Chip(architecture, 1)):
        assert product_precision(torch.zeros(1)) == expected


@pytest.mark.parametrize(
    ("capability", "expected"),
    [((8, 7), "sm_86"), ((9, 0), "sm_90"), ((10, 3), "sm_100"), ((11, 0), "sm_100"), ((12, 1), "sm_120")],
)  # fmt: skip
def test_bug_float32_is_rounded_on_variants_of_a_chip(
    capability: tuple[int, int], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Triton 3.6 and 3.7 round float32 attention to tf32 on sm_103 and sm_110 too, in tiles of 64 queries."""
    major, minor = capability
    properties = SimpleNamespace(major=major, minor=minor, multi_processor_count=7)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.version, "hip", None)
    found = chip._chip_of.__wrapped__(torch.device("cuda", 0))
    assert found == chip.Chip(expected, 7)
    assert attention_tile("fwd", 64, 4, found.architecture, False, "ieee").block_q == (32 if major in (10, 11) else 64)


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("outside", [True, False])
def test_the_setting_is_put_back(outside: bool, inside: bool) -> None:
    x = torch.zeros(1)
    with float32_products(tf32=outside):
        with float32_products(tf32=inside):
            assert product_precision(x) == ("tf32" if inside else "ieee")
        assert product_precision(x) == ("tf32" if outside else "ieee")
    assert product_precision(x) == "ieee"


# --- the results ----------------------------------------------------------------------------------------------------


def results(operations: Any, operation: str, form: str, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Outputs and gradients for values that float32 represents."""
    function, inputs = call(operations, operation, form, 20)
    inputs = [x.to(dtype) for x in inputs]
    outputs = forward(function, inputs)
    upstream = [random(*output.shape, seed=99).float() for output in outputs]
    return [*outputs, *gradients(function, inputs, upstream)]


def distances(values: list[Tensor], truth: list[Tensor]) -> list[float]:
    return [((x.double() - true).norm() / true.norm()).item() for x, true in zip(values, truth, strict=True)]


@pytest.mark.parametrize(("operation", "form"), MULTIPLYING)
def test_errors_are_those_of_the_precision_asked_for(operation: str, form: str) -> None:
    truth = results(reference, operation, form, torch.float64)
    default = results(fastgpt_kernels, operation, form)
    high()
    rounded = distances(results(fastgpt_kernels, operation, form), truth)
    assert 8 * FP32 < max(rounded) <= 8 * TF32
    torch.set_float32_matmul_precision("highest")
    exact = results(fastgpt_kernels, operation, form)
    assert max(distances(exact, truth)) <= 8 * FP32
    assert all(map(torch.equal, exact, default))


@only_interpreted
@pytest.mark.parametrize("precision", ["ieee", "tf32"])
@pytest.mark.parametrize(("operation", "form"), MULTIPLYING)
def test_every_product_follows_the_setting(
    operation: str, form: str, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    RECORDS[operation].several_programs(monkeypatch)
    matmul.fp32_precision = precision
    used, dot = set(), interpreter.InterpreterBuilder.create_dot

    def noted(builder: Any, a: Any, b: Any, accumulator: Any, precision: Any, *more: Any) -> Any:
        used.add(precision.name)
        return dot(builder, a, b, accumulator, precision, *more)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", noted)
    results(fastgpt_kernels, operation, form)
    assert used == {precision.upper()}


@pytest.mark.parametrize(("operation", "form"), MULTIPLYING)
def test_compiled_calls_follow_it_at_run_time(operation: str, form: str) -> None:
    function, inputs = call(fastgpt_kernels, operation, form, 9)
    torch.compiler.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    exact = forward(compiled, inputs)
    high()
    rounded = forward(compiled, inputs)
    assert all(map(torch.equal, rounded, forward(function, inputs)))
    assert not any(map(torch.equal, rounded, exact))
