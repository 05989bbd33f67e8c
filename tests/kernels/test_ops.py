"""Which backend an operation runs on, how it is chosen, and what is reported about the choice."""

import importlib.util
import os
import pkgutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace

import fastgpt_kernels
import pytest
import torch
from fastgpt_kernels import KernelUnavailableError, operations, reference

import fastgpt
from fastgpt import measured, ops

LABELS = torch.tensor([0, 4, -100])


def call(operation: str) -> object:
    """The operation, through `ops`, on small CPU tensors."""
    return getattr(ops, operation)(*ARGUMENTS[operation][0], **ARGUMENTS[operation][1])


def zeros(*shapes: tuple[int, ...]) -> list[torch.Tensor]:
    return [torch.zeros(shape) for shape in shapes]


ARGUMENTS: dict[str, tuple[list[torch.Tensor], dict]] = {
    "layer_norm": (zeros((2, 4), (4,), (4,)), {"eps": 1e-3, "dtype": torch.float64}),
    "add_layer_norm": (zeros((2, 4), (2, 4), (4,), (4,)), {"eps": 1e-3, "dtype": torch.float64}),
    "causal_attention": (zeros((1, 1, 3, 4), (1, 1, 3, 4), (1, 1, 3, 4)), {"scale": 0.5, "dropout_p": 0.1, "seed": 1}),
    "gelu_mlp": (zeros((2, 4), (4, 8), (8,), (8, 4), (4,)), {"activation": "relu"}),
    "linear_cross_entropy": ([*zeros((3, 4), (5, 4)), LABELS], {"reduction": "sum"}),
}


@pytest.fixture
def no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "_warned", set())
    for operation in list(fastgpt_kernels.KERNEL_MODULES):
        monkeypatch.delitem(fastgpt_kernels.KERNEL_MODULES, operation)


@pytest.fixture
def fake_kernels(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A kernel for every operation, which gives back its own name and arguments, on a GPU that was not measured."""
    pytest.importorskip("triton")
    monkeypatch.setattr(measured, "machine", lambda device: {"gpu": "none", "torch": "2", "triton": "3"})
    monkeypatch.setattr(measured, "_known", {})
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(fastgpt_kernels, "architecture", lambda device: "sm_90")
    monkeypatch.setattr(fastgpt_kernels, "_fault", lambda device: None)
    monkeypatch.setattr(ops, "_warned", set())
    module = ModuleType("fake")
    setattr(module, "supports", lambda x: x.dtype != torch.float64)  # noqa: B010
    for operation in fastgpt_kernels.OPERATIONS:
        setattr(module, operation, lambda *args, _name=operation, **kwargs: (_name, args, kwargs))
        monkeypatch.setitem(fastgpt_kernels.KERNEL_MODULES, operation, "fake")
    monkeypatch.setattr(operations, "fake", SimpleNamespace(op=module), raising=False)


# --- the choice -----------------------------------------------------------------------------------------------------


def test_the_default_is_auto() -> None:
    assert ops.selected_backend() == os.environ.get("FASTGPT_BACKEND", "auto")


def test_every_operation_is_offered() -> None:
    assert set(ARGUMENTS) == set(fastgpt_kernels.OPERATIONS)


@pytest.mark.parametrize("name", ["torch", "auto", "triton"])
def test_backend_holds_inside_its_block(name: str) -> None:
    before = ops.selected_backend()
    with fastgpt.backend(name):
        assert ops.selected_backend() == name
    assert ops.selected_backend() == before


def test_backends_nest() -> None:
    before = ops.selected_backend()
    with fastgpt.backend("torch"):
        with fastgpt.backend("triton"), fastgpt.backend("auto"):
            assert ops.selected_backend() == "auto"
        assert ops.selected_backend() == "torch"
    assert ops.selected_backend() == before


def test_backend_is_restored_after_an_exception() -> None:
    before = ops.selected_backend()
    with pytest.raises(KeyError), fastgpt.backend("torch"), fastgpt.backend("triton"):
        raise KeyError
    assert ops.selected_backend() == before


@pytest.mark.parametrize("name", ["cuda", "", "Torch", "auto "])
def test_unknown_backend_is_named_and_changes_nothing(name: str) -> None:
    before = ops.selected_backend()
    with (
        pytest.raises(ValueError, match=f"unknown backend '{name}': choose one of auto, torch, triton"),
        fastgpt.backend(name),
    ):
        raise AssertionError("the block must not run")
    assert ops.selected_backend() == before


def read_ops_again() -> ModuleType:
    """A second copy of `ops`, which reads the environment as a fresh process does."""
    spec = importlib.util.spec_from_file_location("fastgpt.ops_again", ops.__file__)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("value", [None, "torch", "triton", "auto"])
def test_environment_variable(value: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    if value is None:
        monkeypatch.delenv("FASTGPT_BACKEND", raising=False)
    else:
        monkeypatch.setenv("FASTGPT_BACKEND", value)
    assert read_ops_again().selected_backend() == (value or "auto")


@pytest.mark.parametrize("value", ["TRITON", "cuda", ""])
def test_wrong_environment_variable(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It stops every operation, but not the import: `fastgpt doctor` explains it."""
    monkeypatch.setenv("FASTGPT_BACKEND", value)
    again = read_ops_again()
    assert again.backend_setting() == value
    x = torch.ones(2, 4)
    for use in (again.selected_backend, lambda: again.layer_norm(x, x[0], x[0])):
        with pytest.raises(ValueError, match=f"FASTGPT_BACKEND: unknown backend '{value}': choose one of auto, torch,"):
            use()
    with again.backend("torch"):
        again.layer_norm(x, x[0], x[0])


# --- what runs ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("operation", ARGUMENTS)
@pytest.mark.parametrize("name", ["torch", "auto"])
def test_the_reference_runs_on_a_cpu(
    name: str, operation: str, fake_kernels: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reference, operation, lambda *args, **kwargs: "the reference")
    with fastgpt.backend(name):
        assert call(operation) == "the reference"


@pytest.mark.parametrize("operation", ARGUMENTS)
def test_a_kernel_asked_for_by_name_runs_with_every_argument(operation: str, fake_kernels: None) -> None:
    """And the reference gives the same with the same arguments, so that the signatures agree."""
    args, kwargs = ARGUMENTS[operation]
    with fastgpt.backend("triton"):
        name, passed, options = call(operation)  # type: ignore[misc]
    assert name == operation
    values = [*passed, *options.values()]
    assert [id(x) for x in values if isinstance(x, torch.Tensor)] == [id(x) for x in args]
    assert [x for x in values if not isinstance(x, torch.Tensor)] == list(kwargs.values())
    function: Callable = getattr(reference, operation)
    torch.testing.assert_close(function(*passed, **options), function(*args, **kwargs))


@pytest.mark.parametrize("operation", ARGUMENTS)
def test_a_kernel_asked_for_by_name_that_is_missing_raises(operation: str, no_kernels: None) -> None:
    with fastgpt.backend("triton"):
        with pytest.raises(KernelUnavailableError, match=f"^{operation}: .*[Tt]riton"):
            call(operation)
        with pytest.raises(KernelUnavailableError, match=f"^{operation}: .*[Tt]riton"):
            ops.explain(operation, "cuda")


class Subclass(torch.Tensor):
    """A tensor of which a kernel would see nothing but the memory."""


@pytest.mark.parametrize("operation", ARGUMENTS)
def test_on_a_gpu_auto_leaves_to_the_reference_what_the_kernel_does_not_support(
    operation: str, fake_kernels: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ops, "explain", lambda operation, device, dtype: ("triton", "kernel available"))
    x = torch.zeros(2, 4)
    with fastgpt.backend("auto"):
        for supported in (x, torch.nn.Parameter(x)):
            assert ops.implementation(operation, supported) is fastgpt_kernels.kernel(operation)
        for other in (x.double(), x.as_subclass(Subclass)):
            assert ops.implementation(operation, other) is getattr(reference, operation)
    with fastgpt.backend("triton"):
        assert ops.implementation(operation, x.double()) is fastgpt_kernels.kernel(operation)


def test_bug_auto_asked_only_one_part_of_a_sum_whether_the_kernel_takes_it(
    fake_kernels: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ops, "explain", lambda operation, device, dtype: ("triton", "kernel available"))
    x, weight = zeros((2, 4), (4,))
    wide = x.double()
    with fastgpt.backend("auto"):
        for parts in ((x, wide), (wide, x), (None, wide)):
            normalised, _ = ops.add_layer_norm(*parts, weight.double(), weight.double())
            assert isinstance(normalised, torch.Tensor)  # A kernel, here, gives back its own name.
        assert isinstance(ops.add_layer_norm(x, x.as_subclass(Subclass), weight, weight)[0], torch.Tensor)
        assert ops.add_layer_norm(x, x, weight, weight)[0] == "add_layer_norm"


@pytest.mark.parametrize("operation", ARGUMENTS)
def test_bug_auto_took_float32_products_to_kernels_that_are_slower_than_torch(
    operation: str, fake_kernels: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fastgpt_kernels, "check_device", lambda device: None)
    monkeypatch.setattr(torch.Tensor, "device", property(lambda x: torch.device("cuda")), raising=False)
    x, kernel = torch.zeros(2, 4), fastgpt_kernels.kernel(operation)
    multiplies = operation in ("causal_attention", "gelu_mlp")
    in_float32 = getattr(reference, operation) if multiplies else kernel
    with fastgpt.backend("auto"):
        assert ops.implementation(operation, x) is in_float32
        assert ops.implementation(operation, x.bfloat16()) is kernel
        with monkeypatch.context() as autocast:
            autocast.setattr(torch, "is_autocast_enabled", lambda device_type: True)
            autocast.setattr(torch, "get_autocast_dtype", lambda device_type: torch.bfloat16)
            assert ops.implementation(operation, x) is kernel
        # The reference of attention would hold all weights in memory.
        with_dropout = kernel if operation == "causal_attention" else in_float32
        assert ops.implementation(operation, x, has_dropout=True) is with_dropout
        assert ops.explain("gelu_mlp", "cuda", torch.float32) == (
            "torch",
            "torch's products in float32 are expected to be faster",
        )
    with fastgpt.backend("triton"):
        assert ops.implementation(operation, x) is kernel


def test_an_old_gpu_runs_the_reference(fake_kernels: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fastgpt_kernels, "architecture", lambda device: "sm_75")
    with fastgpt.backend("auto"), pytest.warns(UserWarning, match="runs in torch .* need sm_80"):
        name, reason = ops.explain("layer_norm", "cuda")
    assert (name, "need sm_80 or newer, and cuda is sm_75" in reason) == ("torch", True)
    with fastgpt.backend("triton"), pytest.raises(KernelUnavailableError, match="need sm_80"):
        ops.explain("layer_norm", "cuda")


def test_a_cpu_runs_kernels_in_the_interpreter_only(fake_kernels: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("triton.knobs.runtime.interpret", False)
    with (
        fastgpt.backend("triton"),
        pytest.raises(KernelUnavailableError, match="run on a GPU, not on cpu; on a CPU with TRITON_INTERPRET=1"),
    ):
        call("layer_norm")


# --- what is reported -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("operation", ARGUMENTS)
def test_explain(operation: str, fake_kernels: None) -> None:
    with fastgpt.backend("torch"):
        assert ops.explain(operation, "cuda") == ("torch", "asked for by name")
    with fastgpt.backend("triton"):
        assert ops.explain(operation, "cpu") == ("triton", "asked for by name")
    with fastgpt.backend("auto"):
        assert ops.explain(operation, "cuda:0") == ("triton", "kernel available")
        assert ops.explain(operation, torch.device("cpu")) == ("torch", "no kernel runs on cpu")
        assert ops.explain(operation, "mps") == ("torch", "no kernel runs on mps")


def test_explain_says_why_there_is_no_kernel(no_kernels: None) -> None:
    with fastgpt.backend("auto"), pytest.warns(UserWarning, match="runs in torch"):
        name, reason = ops.explain("layer_norm", "cuda")
    assert name == "torch"
    assert reason.startswith("layer_norm: ")
    assert "triton" in reason.lower()


def test_unknown_operation_is_named() -> None:
    with pytest.raises(ValueError, match="unknown operation 'softmax': choose one of layer_norm, add_layer_norm"):
        fastgpt_kernels.kernel("softmax")
    with pytest.raises(AttributeError, match="no attribute 'softmax'"):
        fastgpt_kernels.softmax  # noqa: B018


def test_the_packages_attributes_are_the_kernels(fake_kernels: None) -> None:
    for operation in fastgpt_kernels.OPERATIONS:
        assert getattr(fastgpt_kernels, operation)(1, b=2) == (operation, (1,), {"b": 2})
        assert fastgpt_kernels.kernel(operation) is getattr(fastgpt_kernels, operation)


def test_no_module_has_the_name_of_an_operation() -> None:
    """Importing such a module would bind it over the operation of that name."""
    modules = {module.name for module in pkgutil.iter_modules(fastgpt_kernels.__path__)}
    assert "reference" in modules
    assert not modules & set(fastgpt_kernels.OPERATIONS)
