"""The logits of a training step: a tensor whose values are computed when an operation first needs them.

The loss needs no logits. A reader gets the logits that transformers would have computed in forward, even if the weights
have changed since: a copy of the head's weight, (V, C), lives until the logits are read or dropped. No cheaper check
shows that a weight has changed, because `.data`, fused optimisers and shared memory do not count versions.
Shapes: B batch, T tokens, C channels, V vocabulary.
"""

import contextlib
import copy
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from fastgpt_kernels.common.precision import autocast, autocast_dtype
from torch import Tensor
from torch._dynamo import compiled_autograd
from torch.utils._pytree import tree_map_only

CURE = "pass logits_to_keep=0 to the model, which computes the loss from the logits as transformers does"


class _Product:
    """hidden_states @ weight^T, computed once in the first of `dtypes`, then rounded to each of the others in turn."""

    def __init__(self, hidden_states: Tensor, weight: Tensor, dtype: torch.dtype):
        self.shape, self.device, self.dtypes = (*hidden_states.shape[:-1], weight.shape[0]), weight.device, (dtype,)
        self.factors: tuple[Tensor, Tensor] | None = hidden_states.detach(), weight.detach().to(dtype, copy=True)
        self.version = hidden_states._version
        self.value: Tensor | None = None

    def rounded_to(self, dtype: torch.dtype) -> "_Product":
        """Another product, whose value has its own memory."""
        rounded = copy.copy(self)
        rounded.dtypes = (*self.dtypes, dtype)
        return rounded

    def read(self) -> Tensor:
        """The value, always in the same memory."""
        if self.value is None:
            self.value, self.factors = self.compute(), None
        return self.value

    def compute(self) -> Tensor:
        assert self.factors is not None
        hidden_states, weight = self.factors
        if hidden_states._version != self.version:
            raise RuntimeError(
                f"the hidden states were changed before output.logits was read: read it first, or {CURE}"
            )
        with torch.inference_mode(False), torch.no_grad(), autocast(self.device, None):
            logits = F.linear(hidden_states.to(self.dtypes[0]), weight)
            for dtype in self.dtypes[1:]:
                logits = logits.to(dtype)
        return logits


class _Waiting:
    """Who waits for the gradient of the logits: hooks, retain_grad, or a call of autograd that names them."""

    def __init__(self) -> None:
        self.hooks: dict[int, Callable] = {}
        self.is_retained = self.is_named = False
        self.logits: Tensor | None = None  # without their graph, while somebody waits

    def __bool__(self) -> bool:
        return self.is_retained or self.is_named or not all(map(_only_sees_backward, self.hooks.values()))


def _only_sees_backward(hook: Callable) -> bool:
    """Whether a hook is one that FSDP or Fabric sets on every output, which ignores the gradient."""
    function = getattr(hook, "func", hook)  # of a functools.partial
    return (getattr(function, "__module__", None) or "").startswith(_WATCHING)


_WATCHING = ("torch.distributed.", "lightning.fabric.", "lightning_fabric.")


class TrainingLogits(Tensor):
    """Logits (B, T, V) that are computed, with their graph, when an operation first needs their values.

    To autograd this is an ordinary tensor with its own graph; operations below autograd get a plain tensor with the
    values. Shape, dtype, device, hooks, `detach()` and conversions to another dtype compute nothing.
    """

    _product: _Product
    _waiting: _Waiting | None

    @staticmethod
    def __new__(cls, product: _Product) -> "TrainingLogits":
        dtype = product.dtypes[-1]
        logits = Tensor._make_wrapper_subclass(cls, product.shape, dtype=dtype, device=product.device)  # type: ignore[attr-defined]
        logits._product, logits._waiting = product, None
        # Code in C++ that asks for the memory without a call of torch gets torch's error in place of address 0.
        torch._C._set_throw_on_mutable_data_ptr(logits)
        return logits

    @property
    def data(self) -> Tensor:  # type: ignore[override] - and no setter, which would leave the product behind
        return _plain(self).data

    @classmethod
    @torch.compiler.disable(reason="logits of a training step are computed when they are read")
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func not in WITHOUT_VALUES:
            return func(*tree_map_only(TrainingLogits, _plain, args), **tree_map_only(TrainingLogits, _plain, kwargs))
        if func in (torch.autograd.grad, torch.autograd.backward):
            with torch._C.DisableTorchFunctionSubclass(), _named(*args, **kwargs):
                return func(*args, **kwargs)
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **kwargs)
        waiting = args[0]._waiting if isinstance(args[0], TrainingLogits) else None
        if waiting is not None and func in (Tensor.register_hook, Tensor.retain_grad):
            # The dict of hooks forgets those that are removed.
            waiting.hooks = args[0]._backward_hooks or {}
            waiting.is_retained |= func is Tensor.retain_grad
            waiting.logits = args[0].detach() if waiting else None
        return result

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        later = _LATER[func](*args, **kwargs) if func in _LATER else None
        if later is not None:
            return later
        args, kwargs = tree_map_only(TrainingLogits, lambda logits: logits._product.read(), (args, kwargs))
        return func(*args, **kwargs)


def with_logits(
    loss: Tensor, hidden_states: Tensor, weight: Tensor, loss_of_logits: Callable[[Tensor], Tensor]
) -> tuple[Tensor, TrainingLogits]:
    """A fused loss, and the result of transformers' head, F.linear(hidden_states, weight), computed when it is read.

    hidden_states: (B, T, C). weight: (V, C). loss_of_logits: what transformers computes the loss with; it runs only if
    somebody waits for the gradient of the loss with respect to the logits.
    """
    logits = _Head.apply(hidden_states, weight, _Product(hidden_states, weight, head_dtype(hidden_states)))
    if logits.grad_fn is not None and loss.grad_fn is not None:
        logits._waiting = _Waiting()
        loss = _ThroughLogits.apply(loss, logits, logits._waiting, loss_of_logits)
    return loss, logits


def head_dtype(hidden_states: Tensor) -> torch.dtype:
    """The dtype of transformers' logits: the one of autocast where it is on."""
    return autocast_dtype(hidden_states) or hidden_states.dtype


class _Head(torch.autograd.Function):
    """The product for autograd; its values may be computed later."""

    @staticmethod
    def forward(ctx: Any, hidden_states: Tensor, weight: Tensor, product: _Product) -> Tensor:
        ctx.save_for_backward(hidden_states, weight)
        ctx.set_materialize_grads(False)
        return TrainingLogits(product)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        (dlogits,) = grads
        hidden_states, weight = ctx.saved_tensors
        if dlogits is None:
            if compiled_autograd.in_compiled_autograd_region:  # which adds up gradients without asking for None
                return *(x.new_zeros(()).expand_as(x) for x in (hidden_states, weight)), None
            return None, None, None
        dtype = dlogits.dtype
        dhidden = dweight = None
        with autocast(dlogits.device, None):
            if ctx.needs_input_grad[0]:
                dhidden = (dlogits @ weight.to(dtype)).to(hidden_states.dtype)
            if ctx.needs_input_grad[1]:
                rows = hidden_states.flatten(0, -2).to(dtype)
                dweight = (dlogits.flatten(0, -2).t() @ rows).to(weight.dtype)
        return dhidden, dweight, None


class _ThroughLogits(torch.autograd.Function):
    """The fused loss, whose gradient takes the way through the logits where somebody waits for it there."""

    @staticmethod
    def forward(
        ctx: Any, loss: Tensor, logits: Tensor, waiting: _Waiting, loss_of_logits: Callable[[Tensor], Tensor]
    ) -> Tensor:
        ctx.waiting, ctx.loss_of_logits = waiting, loss_of_logits
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (dloss,) = grads
        if not ctx.waiting:
            return dloss, None, None, None
        if torch.is_grad_enabled():
            raise RuntimeError(f"no second derivative passes through output.logits: {CURE}")
        logits = ctx.waiting.logits
        if logits._version > 0:
            raise RuntimeError(f"output.logits was changed in place before the backward of its loss: {CURE}")
        with torch.enable_grad(), autocast(logits.device, None):
            logits = _plain(logits).detach().requires_grad_()
            loss = ctx.loss_of_logits(logits)
        return None, *torch.autograd.grad(loss, logits, dloss), None, None


def _plain(logits: TrainingLogits) -> Tensor:
    """The values as a plain tensor that shares the graph and the memory of the logits."""
    with torch._C.DisableTorchFunctionSubclass(), torch.enable_grad():
        return torch.ops.aten.alias.default(logits)


@contextlib.contextmanager
def _named(outputs: Any, inputs: Iterable[Any] | None = None, **_: Any) -> Iterator[None]:
    """During a call of autograd, its inputs wait for their gradient."""
    named = [(x, x._waiting) for x in inputs or () if isinstance(x, TrainingLogits) and x._waiting is not None]
    try:
        for logits, waiting in named:
            waiting.is_named, waiting.logits = True, logits.detach()
        yield
    finally:
        for _logits, waiting in named:
            waiting.is_named = False
            waiting.logits = waiting.logits if waiting else None


# --- operations without values --------------------------------------------------------------------------------------


def _same_memory(logits: Tensor, size: Iterable[int] | None = None) -> TrainingLogits | None:
    if not isinstance(logits, TrainingLogits) or (size is not None and tuple(size) != logits._product.shape):
        return None
    return TrainingLogits(logits._product)


def _converted(logits: Tensor, *, dtype: torch.dtype | None = None, **options: Any) -> TrainingLogits | None:
    if not isinstance(logits, TrainingLogits) or logits._product.value is not None:
        return None
    if options.get("device") not in (None, logits._product.device):
        return None
    return TrainingLogits(logits._product.rounded_to(dtype or logits._product.dtypes[-1]))


def _cloned(logits: Tensor, *, memory_format: torch.memory_format | None = None) -> TrainingLogits | None:
    later = _converted(logits)
    if later is None and isinstance(logits, TrainingLogits) and memory_format is not None:
        # torch.jit.trace copies its arguments so, for a second trace, which must show the same calls as the first.
        later = TrainingLogits(copy.copy(logits._product))
        later._product.value = logits._product.read().clone(memory_format=memory_format)
    return later


# Below autograd: these return logits that are still not computed, or None if the values are needed now.
_LATER: dict[Any, Callable[..., TrainingLogits | None]] = {
    torch.ops.aten.detach.default: _same_memory,
    torch.ops.aten.view.default: _same_memory,  # to the same shape: how autograd returns an input
    torch.ops.aten.clone.default: _cloned,
    torch.ops.aten._to_copy.default: _converted,
}

_PROPERTIES = (
    "shape dtype device layout ndim itemsize nbytes is_cpu is_cuda is_meta is_sparse is_nested requires_grad "
    "is_leaf grad_fn grad retains_grad output_nr name _version _base _backward_hooks _post_accumulate_grad_hooks"
)
_METHODS = (
    "size dim ndimension numel nelement stride storage_offset element_size get_device is_contiguous is_floating_point "
    "is_complex is_signed is_inference is_pinned is_same_size __len__ __hash__ register_hook retain_grad "
    "requires_grad_ detach_ detach clone to float double half bfloat16"
)
WITHOUT_VALUES = {
    *(getattr(Tensor, name).__get__ for name in _PROPERTIES.split()),
    *(getattr(Tensor, name) for name in _METHODS.split()),
    Tensor.grad.__set__,  # type: ignore[attr-defined]
    Tensor.requires_grad.__set__,  # type: ignore[attr-defined]
    Tensor._backward_hooks.__set__,  # type: ignore[attr-defined]
    torch.is_floating_point,
    torch.is_complex,
    torch.numel,
    torch.autograd.grad,
    torch.autograd.backward,
}
