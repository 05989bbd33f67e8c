"""What must hold for every operation of the package, on the record of each: a new operation cannot escape it."""

from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import fastgpt_kernels
import pytest
import torch
from accuracy import assert_same_bits, forward, max_error, random, relayout
from interpreter import INTERPRETING, check_overflow, dry_run, only_interpreted, shuffled_grid
from records import FORMS, RECORDS, bind, call, make
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

pytestmark = pytest.mark.usefixtures("on_the_device")

every_form = pytest.mark.parametrize(("operation", "form"), FORMS)


@pytest.fixture(autouse=True)
def _several_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    for record in RECORDS.values():
        record.several_programs(monkeypatch)


def results(function: Any, inputs: list[Tensor], upstream: list[Tensor] | None = None) -> list[Tensor]:
    """Outputs, and gradients of the inputs; zeros for an input on which no output depends."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    outputs = forward(function, leaves)
    upstream = upstream or [random(*output.shape, seed=99).to(output) for output in outputs]
    grads = torch.autograd.grad(outputs, leaves, upstream, materialize_grads=True)
    return [output.detach() for output in outputs] + list(grads)


# --- shapes and layouts ---------------------------------------------------------------------------------------------


def assert_nothing_comes_of_nothing(function: Any, inputs: list[Tensor], expected: tuple[Tensor, ...]) -> None:
    """The shapes and dtypes of `expected`, and gradients of zero."""
    made = results(function, inputs)
    outputs, grads = made[: len(expected)], made[len(expected) :]
    assert [(y.shape, y.dtype) for y in outputs] == [(y.shape, y.dtype) for y in expected]
    assert_same_bits(grads, [torch.zeros_like(x) for x in inputs])


@every_form
def test_no_rows(operations: Any, operation: str, form: str) -> None:
    function, inputs = call(operations, operation, form, 0)
    expected, _ = call(fastgpt_kernels.reference, operation, form, 0)
    assert_nothing_comes_of_nothing(function, inputs, forward(expected, inputs))


@pytest.mark.parametrize("operation", RECORDS)
def test_no_elements(operations: Any, operation: str) -> None:
    for shapes in RECORDS[operation].empty:
        functions = (bind(module, operation, list(shapes), {}) for module in (operations, fastgpt_kernels.reference))
        function, expected = functions
        inputs = make(shapes)
        assert_nothing_comes_of_nothing(function, inputs, forward(expected, inputs))


@every_form
@pytest.mark.parametrize("n_kept", [0, 1])
def test_gradients_without_strides(operations: Any, operation: str, form: str, n_kept: int) -> None:
    """The gradient of a sum is one element, expanded; of a sum over all but the last axis one row."""
    function, inputs = call(operations, operation, form, 7)
    shapes = [output.shape for output in forward(function, inputs)]
    elements = [random(*shape[len(shape) - n_kept :], seed=5).float() for shape in shapes]
    expanded = [element.expand(shape) for element, shape in zip(elements, shapes, strict=True)]
    dense = [relayout(grad, "contiguous") for grad in expanded]
    # Not the same bits: a stride of 0 is one that 16 divides, for which triton compiles another form.
    for ours, expected in zip(results(function, inputs, expanded), results(function, inputs, dense), strict=True):
        assert expected.any()
        assert max_error(ours, expected) <= 4 * torch.finfo(torch.float32).eps * expected.abs().max().item()


def test_the_imaginary_part_of_a_conjugate_is_a_negated_view() -> None:
    x = random(3, 5)
    assert torch.complex(x, x).conj().imag.is_neg()
    assert torch._neg_view(x).is_neg()


@every_form
def test_bug_negated_views_are_read_without_their_sign(operations: Any, operation: str, form: str) -> None:
    function, inputs = call(operations, operation, form, 7)
    upstream = [random(*output.shape, seed=5).to(output) for output in forward(function, inputs)]
    negated = [[torch._neg_view(-x) for x in tensors] for tensors in (inputs, upstream)]
    for _ in range(2):  # The launch is remembered.
        for ours, expected in zip(results(function, *negated), results(function, inputs, upstream), strict=True):
            assert max_error(ours, expected) <= 4 * torch.finfo(torch.float32).eps * expected.abs().max().item()


# --- torch ----------------------------------------------------------------------------------------------------------

CHECKS = "schema", "autograd_registration", "faketensor", "aot_dispatch_static", "aot_dispatch_dynamic"


class Registered(TorchDispatchMode):
    """Remembers the calls of operations that are registered in the namespace of fastgpt_kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "fastgpt_kernels":
            self.calls.append((func, args))
        return func(*args, **(kwargs or {}))


def registered_calls(operation: str, form: str, wanted: slice = slice(None)) -> list[tuple[Any, tuple[Any, ...]]]:
    """What torch.compile sees of a forward and backward in which some inputs want a gradient."""
    function, inputs = call(fastgpt_kernels, operation, form, 5)
    leaves = [x.requires_grad_() for x in inputs[wanted]]
    with pytest.MonkeyPatch.context() as patch, Registered() as registered:
        patch.setattr(torch.compiler, "is_compiling", lambda: True)
        outputs = forward(function, inputs)
        torch.autograd.grad(outputs, leaves, [torch.ones_like(output) for output in outputs])
    return registered.calls


@every_form
@pytest.mark.parametrize("wanted", [slice(None), slice(1, 2)], ids=["all", "one"])
def test_registered_operations_pass_opcheck(operation: str, form: str, wanted: slice) -> None:
    calls = registered_calls(operation, form, wanted)
    assert calls
    for registered, args in calls:
        has_derivative = "backward" not in registered.name()
        args = [
            x.detach().requires_grad_(has_derivative and x.is_floating_point()) if isinstance(x, Tensor) else x
            for x in args
        ]
        outcome = torch.library.opcheck(registered, tuple(args), test_utils=[f"test_{check}" for check in CHECKS])
        assert outcome == {f"test_{check}": "SUCCESS" for check in CHECKS}


def test_every_registered_operation_is_checked() -> None:
    checked = {registered.name() for operation, form in FORMS for registered, _ in registered_calls(operation, form)}
    everything = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("fastgpt_kernels::")}
    assert checked == everything


@every_form
def test_compiles_without_a_graph_break(operation: str, form: str) -> None:
    shapes_and_options = RECORDS[operation].forms[form]
    names = list(shapes_and_options(5)[0])

    def around(*inputs: Tensor, **options: Any) -> tuple[Tensor, ...]:
        function = bind(fastgpt_kernels, operation, names, options)
        return tuple(output.sin() for output in forward(function, [2 * x for x in inputs]))

    torch.compiler.reset()
    compiled = torch.compile(around, fullgraph=True, backend="aot_eager", dynamic=True)
    for n in (5, 9):
        shapes, options = shapes_and_options(n)
        inputs = make(shapes)
        ours, eager = (results(partial(function, **options), inputs) for function in (compiled, around))
        assert_same_bits(ours, eager)


# --- memory and order -----------------------------------------------------------------------------------------------


@every_form
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_results_do_not_depend_on_the_order_of_programs(operation: str, form: str, dtype: torch.dtype) -> None:
    function, inputs = call(fastgpt_kernels, operation, form, 20, dtype)
    first = results(function, inputs)
    for seed in range(3):
        with shuffled_grid(seed) as launched:
            assert_same_bits(results(function, inputs), first)
        assert not INTERPRETING or max(launched) > 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@every_form
def test_an_element_that_no_kernel_writes_shows(
    operation: str, form: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """New memory holds NaN in these tests: results have none, unless nothing is launched."""
    function, inputs = call(fastgpt_kernels, operation, form, 20, dtype)
    assert all(result.isfinite().all() for result in results(function, inputs))
    op = getattr(fastgpt_kernels.operations, fastgpt_kernels.KERNEL_MODULES[operation]).op
    for name in [name for name in vars(op) if name.startswith("_") and name.endswith("_kernel")]:
        monkeypatch.setattr(op, name, DoesNothing())
    assert all(result.isnan().any() for result in results(function, inputs)[: len(forward(function, inputs))])


class DoesNothing:
    """In place of a kernel."""

    def __getitem__(self, grid: Any) -> Any:
        return lambda *args, **options: None


@only_interpreted
@every_form
def test_no_arithmetic_overflows_in_use(operation: str, form: str) -> None:
    function, inputs = call(fastgpt_kernels, operation, form, 7)
    with check_overflow():
        results(function, [relayout(x, "padded") for x in inputs])


@only_interpreted
@pytest.mark.parametrize(
    ("operation", "sizes"), [(operation, sizes) for operation, record in RECORDS.items() for sizes in record.huge]
)
def test_offsets_of_huge_tensors_do_not_overflow(operation: str, sizes: str) -> None:
    with dry_run():
        RECORDS[operation].huge[sizes]()


@pytest.mark.parametrize("folder", sorted(set(fastgpt_kernels.KERNEL_MODULES.values())))
def test_every_kernel_is_launched_on_huge_tensors(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    package = import_module(f"fastgpt_kernels.operations.{folder}")
    names, launched = set(), set()
    for path in Path(package.__path__[0]).glob("*kernels.py"):
        kernels = import_module(f"{package.__name__}.{path.stem}")
        for name in [name for name in vars(kernels) if name.endswith("_kernel")]:
            monkeypatch.setattr(kernels, name, Noted(name, launched))
            names.add(name)
    for operation, record in RECORDS.items():
        if fastgpt_kernels.KERNEL_MODULES[operation] == folder:
            for launch in record.huge.values():
                launch()
    assert launched == names


class Noted(DoesNothing):
    """In place of a kernel, to know that it is launched."""

    def __init__(self, name: str, launched: set[str]) -> None:
        self.name, self.launched = name, launched

    def __getitem__(self, grid: Any) -> Any:
        self.launched.add(self.name)
        return super().__getitem__(grid)
