"""The logits of a training step under torch.compile: a result of the compiled graph whose values are computed later.

AOTAutograd takes a tensor subclass apart into the tensors that it holds, here the two factors of the product. So a
compiled step returns logits without computing them, and operations inside of the graph compute them with their
gradients. Shapes: B batch, T tokens, C channels, V vocabulary.
"""

import contextlib
from typing import Any

import torch
import torch.nn.functional as F
from fastgpt_kernels.common.precision import autocast
from torch import Tensor
from torch._subclasses import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.utils._pytree import tree_map_only

from .outputs import CURE, WITHOUT_VALUES

NO_PATH = f"the gradient of this loss does not pass through output.logits: {CURE}"


class CompiledLogits(Tensor):
    """hidden_states @ weight^T (B, T, V), in the first of `dtypes`, then rounded to each of the others in turn.

    Whatever reads the values outside of the graph gets a plain tensor, whose backward raises RuntimeError: the graph
    returns no gradient for its factors. `requires_grad` is False, so that AOTAutograd does not ask for one.
    """

    _hidden_states: Tensor
    _weight: Tensor
    _dtypes: tuple[torch.dtype, ...]

    @staticmethod
    def __new__(cls, hidden_states: Tensor, weight: Tensor, dtypes: tuple[torch.dtype, ...]) -> "CompiledLogits":
        shape = (*hidden_states.shape[:-1], weight.shape[0])
        logits = Tensor._make_wrapper_subclass(cls, shape, dtype=dtypes[-1], device=hidden_states.device)  # type: ignore[attr-defined]
        torch._C._set_throw_on_mutable_data_ptr(logits)  # as for the logits of an eager step
        return logits

    def __init__(self, hidden_states: Tensor, weight: Tensor, dtypes: tuple[torch.dtype, ...]):
        self._hidden_states, self._weight, self._dtypes = hidden_states, weight, dtypes
        self._value: Tensor | None = None

    def __tensor_flatten__(self) -> tuple[list[str], tuple[torch.dtype, ...]]:
        return ["_hidden_states", "_weight"], self._dtypes

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], dtypes: tuple[torch.dtype, ...], *_: Any) -> "CompiledLogits":
        return CompiledLogits(inner["_hidden_states"], inner["_weight"], dtypes)

    @property
    def data(self) -> Tensor:  # type: ignore[override] - and no setter, as for the logits of an eager step
        return _values(self).data

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is Tensor.detach and not _is_traced(args[0]):
            with torch.no_grad():
                return _values(args[0]).detach()
        if _needs_no_values(func, args):
            with contextlib.suppress(_ValuesNeeded), torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        return func(*tree_map_only(CompiledLogits, _values, args), **tree_map_only(CompiledLogits, _values, kwargs))

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        logits, options = args[0], kwargs or {}
        if not isinstance(logits, CompiledLogits) or logits._value is not None:
            raise _ValuesNeeded
        if func in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            return CompiledLogits(logits._hidden_states.detach(), logits._weight.detach(), logits._dtypes)
        if func is torch.ops.aten.clone.default:
            return CompiledLogits(logits._hidden_states, logits._weight, logits._dtypes)
        if func is torch.ops.aten._to_copy.default and options.get("device") in (None, logits.device):
            dtype = options.get("dtype") or logits.dtype
            return CompiledLogits(logits._hidden_states, logits._weight, (*logits._dtypes, dtype))
        raise _ValuesNeeded

    def __repr__(self, **options: Any) -> str:  # type: ignore[override]
        if _is_traced(self):  # AOTAutograd logs it.
            return f"{type(self).__name__}(shape={tuple(self.shape)}, dtype={self.dtype})"
        return _values(self).__repr__(**options)


class _ValuesNeeded(Exception):
    """An operation below autograd asks for values."""


def _needs_no_values(func: Any, args: tuple) -> bool:
    """Whether an operation can be tried without values; it raises _ValuesNeeded where it turns out to need them."""
    if torch.compiler.is_dynamo_compiling():  # Dynamo cannot catch the exception.
        return func.__name__ in ("to", "float", "half", "bfloat16", "double")
    # Outside of the graph, others would read memory that does not exist.
    return func in WITHOUT_VALUES or any(isinstance(x, CompiledLogits) and _is_traced(x) for x in args)


def _is_traced(logits: CompiledLogits) -> bool:
    return isinstance(logits._hidden_states, FakeTensor | FunctionalTensor)


def _values(logits: CompiledLogits) -> Tensor:
    if _is_traced(logits):
        return _product(logits)
    if logits._value is None:
        with torch.inference_mode(False), torch.no_grad(), autocast(logits.device, None):
            logits._value = _product(logits)
    return _WithoutGradient.apply(logits._value.detach().requires_grad_()) if torch.is_grad_enabled() else logits._value


def _product(logits: CompiledLogits) -> Tensor:
    values = F.linear(logits._hidden_states, logits._weight)
    for dtype in logits._dtypes[1:]:
        values = values.to(dtype)
    return values


class _WithoutGradient(torch.autograd.Function):
    """Gives values a graph that ends in an error, so that no part of a gradient is lost silently."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        raise RuntimeError(NO_PATH)


@torch._dynamo.allow_in_graph
def compiled_logits(hidden_states: Tensor, weight: Tensor, dtype: torch.dtype) -> CompiledLogits:
    """The result of transformers' head in `dtype`, but computed when it is read.

    hidden_states: (B, T, C). weight: (V, C). Both are copied if the graph returns the logits, because they may change.
    """
    return CompiledLogits(hidden_states.to(dtype, copy=True), weight.to(dtype, copy=True), (dtype,))
