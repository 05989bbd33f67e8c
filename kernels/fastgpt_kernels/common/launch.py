"""Launching kernels: through triton, and directly where the same launch was made before.

Triton looks at every argument of every launch to find the machine code that fits. What it finds depends on dtypes,
sizes, strides, alignments and numbers alone. A function decorated with `launching` is therefore asked once for each
kind of arguments what to launch; later calls put new addresses into the same launches. These names of triton 3.6 to 3.9
are used for it: `driver.active`, and `CompiledKernel`, which a launch returns, with its `run`, `function` and
`packed_metadata`.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import wraps
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor
from triton import knobs
from triton.compiler import CompiledKernel
from triton.runtime import driver
from triton.tools.tensor_descriptor import TensorDescriptor

from . import chip

# Passed to every launch, because triton 3.10 changes the default: a * b + c rounds once.
FP_FUSION = {"enable_fp_fusion": True}


def cdiv(n: int, size: int) -> int:
    """How many tiles of a given size cover n."""
    return -(-n // size)


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which values of a dtype are summed: float64 for itself, else float32."""
    return torch.promote_types(dtype, torch.float32)


def triton_accumulator(dtype: torch.dtype) -> tl.dtype:
    """`accumulator` in triton's types."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def on_device(x: Tensor) -> AbstractContextManager:
    """A context in which the GPU that holds x is the current one; nearly free where it is already."""
    is_current = not x.is_cuda or x.device.index == torch.cuda.current_device()
    return nullcontext() if is_current else torch.cuda.device(x.device)


def launch(kernel: Any, n_programs: int, x: Tensor, *pointers: Tensor | None, **arguments: Any) -> None:
    """Run n_programs programs of a kernel on the GPU of x, its first argument.

    Always through triton: for steps that CUDA graphs replay, whose host time hardly counts. The launchers of operations
    that a model calls one by one are decorated with `launching`.
    """
    with on_device(x):
        kernel[(n_programs,)](x, *pointers, **arguments, **FP_FUSION)


# --- direct launches ------------------------------------------------------------------------------------------------


class Launch:
    """A launch to be made: a kernel, how many programs, its pointers in order, and its other arguments by name."""

    def __init__(self, kernel: Any, n_programs: int, *pointers: Tensor | TensorDescriptor | None, **arguments: Any):
        self.kernel, self.n_programs, self.pointers, self.arguments = kernel, n_programs, pointers, arguments


class _DirectLaunch(NamedTuple):
    """A launch whose arguments are known up to addresses.

    compiled: what triton made, which owns the machine code. run: its launcher. arguments: of the kernel, in its order.
    pointers: for each address its position among them, which tensor of the call it lies in, and the offset there in
    bytes. descriptors: the same and the other fields of a TensorDescriptor.
    """

    compiled: Any
    run: Any
    n_programs: int
    arguments: list[Any]
    pointers: list[tuple[int, int, int]]
    descriptors: list[tuple[int, int, int, dict[str, Any]]]


class _Address(int):
    """The base of a TensorDescriptor, as far as a launch needs it."""

    def data_ptr(self) -> int:
        return self


_MOST_PLANS = 4096
_plans: dict[tuple, list[_DirectLaunch]] = {}


def forget_plans() -> None:
    """Ask again what to launch. Needed where a launch configuration is replaced in a running process."""
    _plans.clear()


def launching(describe: Callable[..., Iterator[Launch]]) -> Callable[..., None]:
    """Decorate a generator of launches, so that a call makes them, on the GPU of its first argument.

    Its arguments are positional: tensors, None, and whatever can be hashed. From a tensor's address it may read only
    the remainder by 16. It does nothing but describe launches, because it is not called again for arguments of a known
    kind; if it copies a tensor in order to launch, it is.
    """

    @wraps(describe)
    def call(*arguments: Any) -> None:
        x = arguments[0]
        kind = (
            describe, x.device, chip.assumed(),
            *[
                (a.dtype, a.shape, a.stride(), a.data_ptr() % 16, a.is_neg()) if isinstance(a, Tensor) else a
                for a in arguments
            ],
        )  # fmt: skip
        with on_device(x):
            if not _triton_only_launches():
                for one in describe(*map(_as_stored, arguments)):
                    _launch(one)
            elif (plan := _plans.get(kind)) is None:
                made = [(one, _launch(one)) for one in describe(*map(_as_stored, arguments))]
                _remember(kind, [_direct(one, compiled, arguments) for one, compiled in made])
            else:
                active: Any = driver.active
                stream = active.get_current_stream(active.get_current_device())
                for one in plan:
                    _launch_directly(one, arguments, stream)

    return call


def _as_stored(argument: Any) -> Any:
    """A tensor whose memory holds its values: torch gives the imaginary part of a conjugate without its sign there."""
    return argument.resolve_neg() if isinstance(argument, Tensor) and argument.is_neg() else argument


def _launch(launch: Launch) -> Any:
    return launch.kernel[(launch.n_programs,)](*launch.pointers, **launch.arguments, **FP_FUSION)


def _remember(kind: tuple, plan: list[_DirectLaunch | None]) -> None:
    known = [one for one in plan if one is not None]
    if known and len(known) == len(plan):
        if len(_plans) >= _MOST_PLANS:
            _plans.clear()
        _plans[kind] = known


def _triton_only_launches() -> bool:
    """Whether triton would do no more than launch: no hook is called, and no other code is asked for than usual."""
    runtime = knobs.runtime
    is_hooked = _calls(runtime.launch_enter_hook) or _calls(runtime.launch_exit_hook)
    return not (is_hooked or runtime.debug or knobs.compilation.instrumentation_mode)


def _calls(hook: Any) -> bool:
    """Whether a hook does anything: triton's default is a chain of calls without any."""
    return hook is not None and bool(getattr(hook, "calls", True))


def _launch_directly(launch: _DirectLaunch, tensors: tuple[Any, ...], stream: int) -> None:
    compiled, run, n_programs, arguments, pointers, descriptors = launch
    arguments = arguments.copy()
    for position, index, offset in pointers:
        arguments[position] = tensors[index].data_ptr() + offset
    for position, index, offset, fields in descriptors:
        arguments[position] = descriptor = object.__new__(TensorDescriptor)  # Checked when it was first made.
        descriptor.__dict__.update(fields, base=_Address(tensors[index].data_ptr() + offset))
    run(n_programs, 1, 1, stream, compiled.function, compiled.packed_metadata, None, None, None, *arguments)


def _direct(launch: Launch, compiled: Any, tensors: tuple[Any, ...]) -> _DirectLaunch | None:
    """A launch that was made, with addresses to be filled in. None where it cannot be made so again.

    The interpreter and a hook that skips a launch return no kernel. On AMD's GPUs machine code also depends on the size
    of the memory in which a tensor lies.
    """
    if not isinstance(compiled, CompiledKernel) or compiled.metadata.target.backend != "cuda":
        return None
    names = launch.kernel.arg_names
    named = dict(zip(names, launch.pointers, strict=False)) | launch.arguments
    arguments, pointers, descriptors = [named[name] for name in names], [], []
    for position, argument in enumerate(arguments):
        if not isinstance(argument, Tensor | TensorDescriptor):
            continue
        tensor = argument if isinstance(argument, Tensor) else argument.base
        index = _origin(tensor, tensors)
        if index is None:
            return None
        where = position, index, tensor.data_ptr() - tensors[index].data_ptr()
        if isinstance(argument, Tensor):
            pointers.append(where)
        else:
            descriptors.append((*where, {name: value for name, value in vars(argument).items() if name != "base"}))
        arguments[position] = None
    return _DirectLaunch(compiled, compiled.run, launch.n_programs, arguments, pointers, descriptors)


def _origin(tensor: Tensor, tensors: tuple[Any, ...]) -> int | None:
    """Which of the tensors of a call a tensor is, or is a view of. None where it is a copy, and in doubt."""
    origins = [i for i, other in enumerate(tensors) if other is tensor]
    if not origins:
        storage = tensor.untyped_storage().data_ptr()
        origins = [
            i for i, x in enumerate(tensors) if isinstance(x, Tensor) and x.untyped_storage().data_ptr() == storage
        ]
    return origins[0] if len(origins) == 1 else None


# --- choosing how to call -------------------------------------------------------------------------------------------


def is_watched() -> bool:
    """Whether torch.compile traces the call, or a dispatch mode watches it, such as FakeTensorMode.

    Both see an operation as one, and run it on tensors without values, only where it is registered with torch.
    """
    return torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0


def eager_or_registered(forward: Callable, function: type[torch.autograd.Function], registered: Any) -> Callable:
    """The cheapest way to call an operation now; all three reach the same launchers.

    registered: where the call is watched, because dispatch through torch.library costs more host time than a launch.
    function: where gradients are enabled. forward: without them, because even an autograd.Function costs as much as a
    launch.
    """
    if is_watched():
        return registered
    return function.apply if torch.is_grad_enabled() else forward


def as_rows(x: Tensor) -> Tensor:
    """x (..., C), not empty, as (N, C) rows with a dense last axis: a view where the strides allow it, else a copy."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()
