"""Run Triton kernels on CPU tensors: launches compile for a GPU that is absent, and this package runs the PTX.

    with executing("sm_80") as session:
        layer_norm(x, weight, bias)      # on tensors in the CPU's memory
    print(session.summary())

The project's launchers choose tiles for `architecture` with `n_multiprocessors`. Machine code is made only where asked
for; otherwise set TRITON_CACHE_DIR to a separate folder, because what is cached there has none.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch
from fastgpt_kernels import audit
from fastgpt_kernels.common import chip
from triton.backends.nvidia import compiler as nvidia_compiler
from triton.compiler import compiler as triton_compiler
from triton.runtime import driver

from . import machine, parse, translate
from .instructions import PtxError
from .memory import GlobalMemory, Report
from .team import PARAMETER_BASE

_FORMATS = {"i1": "i1", "i8": "i1", "i16": "i2", "i32": "i4", "i64": "i8", "u1": "u1", "u8": "u1", "u16": "u2",
            "u32": "u4", "u64": "u8", "fp32": "f4", "f32": "f4", "fp64": "f8"}  # fmt: skip

# Options of `executing`: in lock-step and without checks for races, and to count with.
UNCHECKED: dict[str, Any] = {"warps": False, "races": False, "global_races": False}
COUNTING = UNCHECKED | {"traffic": True}


@dataclass
class Launch:
    """A launch that was run."""

    kernel: str
    grid: tuple
    seconds: float
    report: Report
    constants: dict
    n_warps: int
    shared: int
    element_size: int  # of the largest tensor passed
    text: str = ""  # the PTX


@dataclass
class Session:
    """What happened in an `executing` block.

    edit: called with the name of a kernel and its PTX before it is run; returns the PTX to run. checked: PTX that need
    not be checked for races again; what is run is added.
    """

    options: machine.Options
    edit: Callable[[str, str], str] | None = None
    checked: set[str] | None = None
    launches: list[Launch] = field(default_factory=list)
    extra: list = field(default_factory=list)  # tensors that kernels reach by addresses in memory

    def problems(self) -> dict:
        """(kernel, kind, instruction) -> [times, example]"""
        merged: dict = {}
        for launch in self.launches:
            for (kind, instruction), (times, example) in launch.report.problems.items():
                known = merged.setdefault((launch.kernel, kind, instruction), [0, example])
                known[0] += times
        return merged

    def summary(self) -> str:
        lines = []
        for launch in self.launches:
            n_instructions = sum(launch.report.opcodes.values())
            lines.append(f"{launch.kernel} grid={launch.grid} warps={launch.n_warps} {launch.seconds:.2f} s, "
                         f"{n_instructions} instructions of a warp")  # fmt: skip
        for (kernel, kind, instruction), (times, example) in self.problems().items():
            lines.append(f"PROBLEM {kernel}: {kind} ({times} times; {example}): {instruction}")
        return "\n".join(lines)


@contextmanager
def executing(
    architecture: str, n_multiprocessors: int = 2, edit: Callable | None = None, checked: set[str] | None = None,
    machine_code: bool = False, **options: Any,
) -> Iterator[Session]:  # fmt: skip
    """Run the launches of the block here.

    edit, checked: as `Session` has them. machine_code: whether triton makes it too, as what reads its cache after this
    may need it. options: those of `machine.Options`.
    """

    session = Session(machine.Options(**options), edit, checked)

    def init_handles(compiled: Any) -> None:
        compiled.module = compiled.function = None
        compiled._run = lambda *args: _run(_current[-1], compiled, *args)

    saved = (driver._active, triton_compiler.CompiledKernel._init_handles, nvidia_compiler.CUDABackend.make_cubin)
    driver.set_active(audit._AbsentGpu(architecture))  # type: ignore[arg-type]
    triton_compiler.CompiledKernel._init_handles = init_handles  # type: ignore[method-assign]
    if not machine_code:
        nvidia_compiler.CUDABackend.make_cubin = lambda self, src, metadata, opt, capability: b"none"
    _current.append(session)
    try:
        # Direct launches pass addresses, and the memory around them is checked here: tensors are needed.
        with (
            chip.assume(chip.Chip(architecture, n_multiprocessors)),
            mock.patch("fastgpt_kernels.common.launch._triton_only_launches", return_value=False),
        ):
            yield session
    finally:
        _current.pop()
        driver._active, triton_compiler.CompiledKernel._init_handles, nvidia_compiler.CUDABackend.make_cubin = saved


_current: list[Session] = []
_translated: dict = {}  # PTX -> Program: the same in every session


def _run(
    session: Session,
    compiled: Any,
    grid_x: int,
    grid_y: int,
    grid_z: int,
    stream: int,
    function: Any,
    packed: Any,
    launch_metadata: Any,
    enter: Any,
    exit_: Any,
    *arguments: Any,
) -> None:
    metadata, grid = compiled.metadata, (grid_x, grid_y, grid_z)
    text = compiled.asm["ptx"]
    if session.edit is not None:
        text = session.edit(metadata.name, text)
    if text not in _translated:
        _translated[text] = translate.translate(parse.parse(text))
    constants = {k: v for k, v in zip(compiled.src.fn.arg_names, arguments, strict=False)
                 if isinstance(v, (int, float, str, bool))}  # fmt: skip
    launch = Launch(metadata.name, grid, 0.0, Report(), constants, metadata.num_warps,
                    metadata.shared, _element_size(arguments), text)  # fmt: skip
    session.launches.append(launch)
    options = session.options
    if session.checked is not None:
        options = replace(options, **UNCHECKED) if text in session.checked else options
        session.checked.add(text)
    started = time.perf_counter()
    try:
        execute(_translated[text], compiled, grid, arguments, launch.report, options, session.extra)
    finally:
        launch.seconds = time.perf_counter() - started


def execute(
    program: translate.Program, compiled: Any, grid: tuple, arguments: tuple, report: Report,
    options: machine.Options, extra: Sequence[torch.Tensor] = (),
) -> None:  # fmt: skip
    """Run a program with the arguments of a launch. compiled: what triton made, for the kinds of the arguments."""
    spans: list = []
    scratch: list = []
    metadata = compiled.metadata
    parameters, descriptors = _parameters(program, compiled, arguments, metadata, grid, spans, scratch)
    spans += [_span(f"extra{i}", tensor) for i, tensor in enumerate(extra)]
    storages = [(s[0], s[3], s[4]) for s in spans]
    memory = GlobalMemory([s[:3] for s in spans], storages, report, program.global_grain)
    machine.run_grid(program, grid, parameters, metadata.shared, memory, report, options,
                     metadata.launch_cooperative_grid, descriptors)  # fmt: skip


def _element_size(arguments: tuple) -> int:
    tensors = [getattr(argument, "base", argument) for argument in arguments]  # a descriptor has a tensor as its base
    largest = max((t for t in tensors if isinstance(t, torch.Tensor)), key=lambda t: t.nbytes, default=None)
    return 0 if largest is None else largest.element_size()


def _span(name: str, tensor: torch.Tensor) -> tuple:
    """The name, the first byte of the tensor, the byte after its last, and both of its storage."""
    size = tensor.element_size()
    first = tensor.data_ptr()
    extent = (
        0 if tensor.numel() == 0 else 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    )
    storage = tensor.untyped_storage()
    return name, first, first + extent * size, storage.data_ptr(), storage.data_ptr() + storage.nbytes()


def _parameters(program: Any, compiled: Any, arguments: tuple, metadata: Any, grid: tuple, spans: list,
                scratch: list) -> tuple[dict, dict]:  # fmt: skip
    """The bytes of each PTX parameter by name, and the tensor descriptors by parameter."""
    names = list(program.entry.parameters)
    signature = compiled.src.signature
    flat: list[tuple[str, str, Any]] = []
    descriptors: dict = {}
    tensor_metadata = list(getattr(metadata, "tensordesc_meta", None) or [])

    def add(name: str, kind: Any, value: Any) -> None:
        if isinstance(kind, tuple):
            for i, (one, each) in enumerate(zip(kind, value, strict=True)):
                add(f"{name}[{i}]", one, each)
        elif kind == "constexpr":
            return
        elif isinstance(kind, str) and kind.startswith("tensordesc"):
            about = tensor_metadata.pop(0) if tensor_metadata else None
            spans.append(_span(name, value.base))
            if about is None:
                flat.append((name, "pointer", value.base))
            else:
                flat.append((name, "descriptor", (value, about)))
            if about is None:  # No hardware for it: taken apart.
                flat.extend((name, "i64", s) for s in (*value.shape, *value.strides))
                flat.append((name, "i1", value.padding == "nan"))
                flat.append((name, "i1", value.round_f32_to_tf32))
            flat.extend((name, "i32", s) for s in value.shape)
            flat.extend((name, "i64", s) for s in value.strides)
        elif kind[0] == "*":
            flat.append((name, "pointer", value))
            if isinstance(value, torch.Tensor):
                spans.append(_span(name, value))
        else:
            flat.append((name, kind, value))

    for (name, kind), value in zip(signature.items(), arguments, strict=True):
        add(name, kind, value)
    n_programs = grid[0] * grid[1] * grid[2]
    for size in (metadata.global_scratch_size, metadata.profile_scratch_size):
        if size:
            scratch.append(torch.full((size * n_programs + 256,), 0xFF, dtype=torch.uint8))
            spans.append(_span("scratch", scratch[-1]))
            flat.append(("scratch", "pointer", scratch[-1]))
        else:
            flat.append(("scratch", "pointer", None))
    if len(flat) != len(names):
        raise PtxError(f"{len(flat)} arguments for {len(names)} parameters: {[f[:2] for f in flat]}")
    parameters = {}
    for parameter, (_, kind, value) in zip(names, flat, strict=True):
        declared = program.entry.parameters[parameter]
        if kind == "pointer":
            address = 0 if value is None else value.data_ptr() if hasattr(value, "data_ptr") else int(value)
            parameters[parameter] = np.array([address], "u8").tobytes()
        elif kind == "descriptor":
            descriptors[PARAMETER_BASE + declared[2]] = describe(*value)
            parameters[parameter] = bytes(declared[1])
        elif kind in ("fp16", "bf16"):
            parameters[parameter] = np.array([value], "f4").tobytes()
        else:
            parameters[parameter] = np.array([value]).astype(_FORMATS[kind]).tobytes().ljust(declared[1], b"\0")
        if len(parameters[parameter]) != declared[1]:
            raise PtxError(f"{parameter} takes {declared[1]} bytes, given {len(parameters[parameter])}")
    return parameters, descriptors


def describe(value: Any, about: dict) -> SimpleNamespace:
    """A tensor descriptor as triton's host side makes it. Axes from the outermost to the innermost."""
    base = value.base
    return SimpleNamespace(
        address=base.data_ptr(), element=about["elem_size"], shape=tuple(value.shape), strides=tuple(value.strides),
        box=tuple(about["block_size"]), swizzle=about["swizzle"], nan=value.padding == "nan",
    )  # fmt: skip
