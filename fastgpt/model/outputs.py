"""The logits of a training step: a tensor whose values are computed when an operation first needs them.

The loss needs no logits. A reader gets the logits that transformers would have computed in forward, even if the weights
have changed since: a copy of the head's weight, (V, C), lives until the logits are read or dropped. No cheaper check
shows that a weight has changed, because `.data`, fused optimisers and shared memory do not count versions.
Shapes: B batch, T tokens, C channels, V vocabulary.
"""

import copy
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from fastgpt_kernels.common.precision import autocast, autocast_dtype
from torch import Tensor
from torch.utils._pytree import tree_map_only

_CURE = "pass logits_to_keep=0 to the model, which computes the loss from the logits as transformers does"
NO_PATH = f"the gradient of this loss does not pass through output.logits: {_CURE}"


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
                f"the hidden states were changed before output.logits was read: read it first, or {_CURE}"
            )
        with torch.inference_mode(False), torch.no_grad(), autocast(self.device, None):
            logits = F.linear(hidden_states.to(self.dtypes[0]), weight)
            for dtype in self.dtypes[1:]:
                logits = logits.to(dtype)
        return logits


class _GradientWanted:
    """Hooks and retain_grad on logits, through which a fused loss has no gradient."""

    def __init__(self) -> None:
        self.retained = False
        self.hooks: dict[int, Callable] = {}

    def refuse(self, *_: Any) -> None:
        # FSDP's hooks only detect the start of backward, and it has another one on the loss for that.
        if self.retained or not all(map(_is_of_torch, self.hooks.values())):
            raise RuntimeError(NO_PATH)


def _is_of_torch(hook: Callable) -> bool:
    function = getattr(hook, "func", hook)  # of a functools.partial
    return (getattr(function, "__module__", None) or "").startswith("torch.")


class TrainingLogits(Tensor):
    """Logits (B, T, V) that are computed, with their graph, when an operation first needs their values.

    To autograd this is an ordinary tensor with its own graph; operations below autograd get a plain tensor with the
    values. Shape, dtype, device, hooks, `detach()` and conversions to another dtype compute nothing.
    """

    _product: _Product
    _wanted: _GradientWanted | None

    @staticmethod
    def __new__(cls, product: _Product) -> "TrainingLogits":
        dtype = product.dtypes[-1]
        logits = Tensor._make_wrapper_subclass(cls, product.shape, dtype=dtype, device=product.device)  # type: ignore[attr-defined]
        logits._product, logits._wanted = product, None
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
            _refuse_gradients(*args, **kwargs)
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **kwargs)
            wanted = args[0]._wanted if isinstance(args[0], TrainingLogits) else None
            if wanted is not None and func is Tensor.register_hook:
                wanted.hooks = args[0]._backward_hooks  # type: ignore[assignment] - a dict, which forgets a hook that is removed
            elif wanted is not None and func is Tensor.retain_grad:
                wanted.retained = True
        return result

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        later = _LATER[func](*args, **kwargs) if func in _LATER else None
        if later is not None:
            return later
        args, kwargs = tree_map_only(TrainingLogits, lambda logits: logits._product.read(), (args, kwargs))
        return func(*args, **kwargs)


def training_logits(hidden_states: Tensor, weight: Tensor, loss: Tensor) -> TrainingLogits:
    """The result of transformers' head, F.linear(hidden_states, weight), but computed when it is read.

    hidden_states: (B, T, C). weight: (V, C). loss: the fused loss, whose graph does not contain these logits: its
    backward raises RuntimeError if somebody waits for their gradient.
    """
    logits = _Head.apply(hidden_states, weight, _Product(hidden_states, weight, head_dtype(hidden_states)))
    if logits.grad_fn is not None and loss.grad_fn is not None:
        logits._wanted = _GradientWanted()
        node: Any = loss.grad_fn
        node.metadata[_GradientWanted] = logits._wanted
        node.register_prehook(logits._wanted.refuse)
    return logits


def head_dtype(hidden_states: Tensor) -> torch.dtype:
    """The dtype of transformers' logits: the one of autocast where it is on."""
    return autocast_dtype(hidden_states) or hidden_states.dtype


class _Head(torch.autograd.Function):
    """The product for autograd; its values may be computed later."""

    @staticmethod
    def forward(ctx: Any, hidden_states: Tensor, weight: Tensor, product: _Product) -> Tensor:
        ctx.save_for_backward(hidden_states, weight)
        return TrainingLogits(product)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (dlogits,) = grads
        hidden_states, weight = ctx.saved_tensors
        dtype = dlogits.dtype
        dhidden = dweight = None
        with autocast(dlogits.device, None):
            if ctx.needs_input_grad[0]:
                dhidden = (dlogits @ weight.to(dtype)).to(hidden_states.dtype)
            if ctx.needs_input_grad[1]:
                rows = hidden_states.flatten(0, -2).to(dtype)
                dweight = (dlogits.flatten(0, -2).t() @ rows).to(weight.dtype)
        return dhidden, dweight, None


def _plain(logits: TrainingLogits) -> Tensor:
    """The values as a plain tensor that shares the graph and the memory of the logits."""
    with torch._C.DisableTorchFunctionSubclass(), torch.enable_grad():
        return torch.ops.aten.alias.default(logits)


def _refuse_gradients(outputs: Iterable[Any], inputs: Iterable[Any] | None = None, **_: Any) -> None:
    """Raise if the inputs contain logits and the outputs their loss, because no graph connects the two."""
    wanted = [x._wanted for x in inputs or () if isinstance(x, TrainingLogits) and x._wanted is not None]
    waiting: list[Any] = [x.grad_fn if isinstance(x, Tensor) else x.node for x in outputs] if wanted else []
    seen: set[Any] = {None}
    while waiting:
        node = waiting.pop()
        if node in seen:
            continue
        seen.add(node)
        if node.metadata.get(_GradientWanted) in wanted:
            raise RuntimeError(NO_PATH)
        waiting += [following for following, _ in node.next_functions]


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


# Below autograd: these return logits that are still not computed, or None if the values are needed now.
_LATER: dict[Any, Callable[..., TrainingLogits | None]] = {
    torch.ops.aten.detach.default: _same_memory,
    torch.ops.aten.view.default: _same_memory,  # to the same shape: how autograd returns an input
    torch.ops.aten.clone.default: _converted,
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
