"""Compares direct launches with triton's own as a GPU's driver sees them; run by test_direct_launches.py.

Triton's launcher in C is real, and the driver below it a stub. Every function that launches is replaced by one that
launches its arguments through triton, then as it is, and compares all that the driver was told: the machine code, the
grid, the stream, attributes and the bytes of every parameter.
"""

import ctypes
import itertools
import random
import re
import sys
from collections.abc import Callable
from importlib import import_module
from typing import Any
from unittest import mock

import fastgpt_kernels
import torch
from fastgpt_kernels.common import launch as launching_module
from fastgpt_kernels.common.launch import Launch, launching
from fastgpt_kernels.operations.layer_norm.kernels import _layer_norm_bwd_reduce_kernel
from torch import Tensor
from triton import knobs
from triton.runtime import driver

from benchmarks.cpu.stub_driver import stub_gpu

LAUNCHERS = {
    "layer_norm": ("_launch_forward", "_launch_backward"),
    "attention": ("_launch_forward", "_launch_backward"),
    "gelu_mlp": ("_launch_forward", "_launch_backward_product", "_launch_backward_pre"),
    "linear_cross_entropy": ("_launch_losses",),
}
# Bytes of a parameter by the last digits of its type in PTX.
BYTES = {"8": 1, "16": 2, "32": 4, "64": 8}


class Comparison:
    """calls: of functions that launch. direct: how many of them launched directly, and were compared."""

    def __init__(self, driver_library: ctypes.CDLL):
        self.library = driver_library
        self.calls = self.direct = 0

    def heard(self) -> bytes:
        buffer = (ctypes.c_ubyte * (1 << 16))()
        return bytes(buffer[: self.library.hear(buffer)])

    def launch_through_triton(self, launches: list[Launch]) -> bytes:
        for compiled in map(launching_module._launch, launches):
            sizes = parameter_sizes(compiled.asm["ptx"])
            self.library.listen(ctypes.c_long(compiled.function), len(sizes), (ctypes.c_int * len(sizes))(*sizes))
        self.heard()
        for launch in launches:
            launching_module._launch(launch)
        return self.heard()

    def replace(self, call: Callable[..., None]) -> Callable[..., None]:
        def compare(*arguments: Any) -> None:
            launches = list(call.__wrapped__(*arguments))  # type: ignore[attr-defined]
            expected, n_loaded = self.launch_through_triton(launches), self.library.functions_loaded()
            with mock.patch.object(launching_module, "_launch_directly", wraps=launching_module._launch_directly) as it:
                call(*arguments)
            heard = self.heard()
            assert it.call_count in (0, len(launches))
            if it.call_count:  # Otherwise these were triton's launches, perhaps of a copy at another address.
                assert heard == expected, f"{call.__name__}: other arguments than triton's"
            assert self.library.functions_loaded() == n_loaded
            self.calls += 1
            self.direct += it.call_count > 0

        return compare


def parameter_sizes(ptx: str) -> list[int]:
    declared = re.findall(r"\.param\s+(?:\.align \d+ \.b8 \w+\[(\d+)\]|\.[busf](\d+))", ptx[: ptx.index(")\n")])
    return [int(array) if array else BYTES[scalar] for array, scalar in declared]


# --- calls ----------------------------------------------------------------------------------------------------------


def tensor(*shape: int, dtype: torch.dtype) -> Tensor:
    """With a dense last axis, at the start of its memory or not, and with or without gaps between rows."""
    shift, gap = random.choice([(0, 0), (0, 0), (8, 0), (1, 0), (0, 8), (0, 3), (4, 16)])
    memory = torch.empty((*shape[:-1], shape[-1] + gap + shift), dtype=dtype)
    return memory[..., shift : shift + shape[-1]].detach().requires_grad_()


def run(operation: str, inputs: tuple[Any, ...], **options: Any) -> None:
    outputs = getattr(fastgpt_kernels, operation)(*inputs, **options)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    # A gradient of another memory layout than its output, as after a transposition.
    torch.autograd.backward(outputs, [torch.ones_like(x) if random.random() < 0.7 else x.new_ones(()).expand_as(x)
                                      for x in outputs])  # fmt: skip


def random_calls(seed: int) -> list[Tensor]:
    """Calls of every operation. The same seed gives arguments of the same kinds in other memory, which is returned."""
    random.seed(seed)
    B, T = random.choice([(1, 1), (2, 16), (3, 5), (1, 33)])
    n_heads, D = random.choice([(2, 16), (1, 5)])
    C = n_heads * D
    memory = []

    def new(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        memory.append(tensor(*shape, dtype=dtype))
        return memory[-1]

    x, weight, bias = new(B, T, C), new(C), new(C)
    residual = random.choice([x, new(B, T, C), new(B, T, C, dtype=torch.float32)])
    run("layer_norm", (x, weight, bias))
    run("add_layer_norm", (x, residual, weight, bias))

    packed = [heads.transpose(1, 2) for heads in new(B, T, 3 * C).unflatten(-1, (3, n_heads, D)).unbind(2)]
    apart = [new(B, n_heads, T, D) for _ in range(3)]
    dropout = random.choice([{}, {"dropout_p": 0.1, "seed": 7}])
    mask = random.choice([None, torch.ones(B, T, dtype=torch.bool)])
    run("causal_attention", random.choice([packed, apart, [apart[0]] * 3]), key_padding_mask=mask, **dropout)  # type: ignore[arg-type]

    proj_weight = random.choice([new(4 * C, C), new(C, 4 * C).t()])
    run(
        "gelu_mlp",
        (x, new(C, 4 * C), new(4 * C), proj_weight, bias),
        residual=random.choice([None, residual]),
        **dropout,
    )
    labels = torch.zeros(B * T, dtype=torch.int64)
    reduction = random.choice(["sum", "none"])
    run("linear_cross_entropy", (new(B * T, C), new(37, C), labels), reduction=reduction)
    return memory


def check_kinds(comparison: Comparison) -> None:
    """Tensors that differ in one respect, and one tensor in two places before two tensors of the same kind."""
    weight, bias, residual = torch.randn(16), torch.randn(16), torch.randn(2, 16)
    like_x = [
        lambda: torch.randn(2, 16),
        lambda: torch.randn(33)[1:].view(2, 16),  # another alignment
        lambda: torch.randn(2, 24)[:, :16],  # other strides
        lambda: torch.randn(2, 16, dtype=torch.float64),
        lambda: torch.randn(1, 16),
    ]
    n_direct = comparison.direct
    for make in like_x * 2:
        fastgpt_kernels.layer_norm(make(), weight, bias)
    assert comparison.direct == n_direct + len(like_x)

    x, n_direct = torch.randn(2, 16), comparison.direct
    for other in (x, x, residual, residual):
        fastgpt_kernels.add_layer_norm(x, other, weight, bias)
    assert comparison.direct == n_direct + 1


@launching
def with_options(partials: Tensor, dweight: Tensor, dbias: Tensor, is_cooperative: bool, is_overlapped: bool):
    """A launch with the options of the kernels for decoding."""
    yield Launch(
        _layer_norm_bwd_reduce_kernel, 1, partials[0], partials[1], dweight, dbias,
        n_partials=partials.shape[1], n_cols=partials.shape[2], BLOCK_PARTIALS=16, BLOCK_COLS=16,
        ACCUMULATOR=launching_module.tl.float32, launch_cooperative_grid=is_cooperative, launch_pdl=is_overlapped,
    )  # fmt: skip


def check_what_triton_is_asked_for(call: Callable[[], None]) -> None:
    """Hooks and the other knobs that count at a launch lead through triton, and only while they are set."""

    def n_direct() -> int:
        with mock.patch.object(launching_module, "_launch_directly") as direct:
            call()
        return direct.call_count

    call()
    assert n_direct() == 1
    for name in ("launch_enter_hook", "launch_exit_hook"):
        hook, called = getattr(knobs.runtime, name), []
        hook.add(called.append)
        assert (n_direct(), len(called)) == (0, 1), name
        hook.remove(called.append)
        assert n_direct() == 1
        with knobs.runtime.scope():
            setattr(knobs.runtime, name, called.append)
            assert (n_direct(), len(called)) == (0, 2), name
    with knobs.runtime.scope():
        knobs.runtime.debug = True
        assert n_direct() == 0
    launching_module.forget_plans()
    assert n_direct() == 0
    assert n_direct() == 1


def main(n_seeds: int) -> None:
    with stub_gpu() as library:
        comparison = Comparison(library)
        for folder, names in LAUNCHERS.items():
            module = import_module(f"fastgpt_kernels.operations.{folder}.op")
            for name in names:
                setattr(module, name, comparison.replace(getattr(module, name)))
        kept = []
        for seed in range(n_seeds):
            for stream in (0, 1 + seed):
                driver.active.stream = stream  # type: ignore[attr-defined]
                kept += random_calls(seed)
        # The second time, only calls that have to copy a tensor ask triton.
        assert comparison.direct >= 0.35 * comparison.calls, (comparison.direct, comparison.calls)
        with torch.no_grad():
            check_kinds(comparison)
        compare = comparison.replace(with_options)
        for options in itertools.product((False, True), repeat=2):
            for _ in range(2):
                compare(torch.empty(2, 3, 16), torch.empty(16), torch.empty(16), *options)
        partials, rows = torch.empty(2, 3, 16), torch.empty(2, 16)
        check_what_triton_is_asked_for(lambda: with_options(partials, rows[0].clone(), rows[1].clone(), False, False))
    print(comparison.calls, comparison.direct)


if __name__ == "__main__":
    main(int(sys.argv[1]))
