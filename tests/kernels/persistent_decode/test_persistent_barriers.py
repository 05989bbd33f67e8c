"""The grid barriers of the decode step as one kernel, and what its programs share."""

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
import triton
import triton.language as tl
from accuracy import max_error
from fastgpt_kernels.operations.persistent_decode import kernels
from interpreter import check_overflow, only_interpreted
from interpreter.cooperative import cooperative_grid
from models import token_ids
from paths import ROOT
from torch import Tensor
from triton.runtime.errors import InterpreterError

from .decoders import decode, make_decoder, make_model, read_prompt, small_config, tuned

# --- barriers -------------------------------------------------------------------------------------------------------


def without_waiting(nth: int, n_programs: int) -> Callable[..., None]:
    """A grid barrier at which nobody waits if it is the nth of the second layer."""
    barrier = kernels._grid_barrier

    def arrive(counter_ptr: Any, target: Any) -> None:
        if int(target.handle.data.item()) // n_programs == 5 + nth + 1:
            tl.atomic_add(counter_ptr, 1, sem="release", scope="gpu")
        else:
            barrier(counter_ptr, target)

    return arrive


@only_interpreted
@pytest.mark.parametrize("nth", range(5))
@torch.inference_mode()
def test_a_barrier_at_which_nobody_waits_is_noticed(nth: int) -> None:
    with tuned(6):
        model = make_model(small_config(), torch.float32)
        prompt, decoder = read_prompt(model, token_ids(1, 30, 131), 32), make_decoder(model)
        right = decode(decoder, prompt.cache.clone(), 9, 30, 30)
        decoder = make_decoder(model)
        with mock.patch.object(kernels, "_grid_barrier", without_waiting(nth, 6)):
            wrong = decode(decoder, prompt.cache.clone(), 9, 30, 30)
    assert wrong.isnan().any() or max_error(wrong, right) > 1e-3 * right.abs().max().item()


@triton.jit
def _meeting_kernel(x_ptr, y_ptr, counter_ptr, n_expected, fails_at):
    """y[i] = x[i + 1], which the next program has written before they met."""
    program, n_programs = tl.program_id(0), tl.num_programs(0)
    tl.device_assert(program != fails_at, "as it should")
    tl.store(x_ptr + program, program)
    kernels._grid_barrier(counter_ptr, n_expected)
    tl.store(y_ptr + program, tl.load(x_ptr + (program + 1) % n_programs))


def meet(n_programs: int, n_expected: int, fails_at: int = -1, seed: int = 0) -> Tensor:
    x, y = torch.full((2, n_programs), -1)
    with cooperative_grid(seed), check_overflow():
        _meeting_kernel[(n_programs,)](x, y, torch.zeros(1, dtype=torch.int64), n_expected, fails_at)
    return y


@only_interpreted
@pytest.mark.parametrize("n_programs", [1, 2, 132])
def test_programs_meet(n_programs: int) -> None:
    for seed in range(3):
        assert meet(n_programs, n_programs, seed=seed).tolist() == [(i + 1) % n_programs for i in range(n_programs)]


@only_interpreted
def test_programs_that_do_not_meet_read_too_early() -> None:
    assert -1 in meet(7, 1).tolist()


@only_interpreted
def test_waiting_forever_is_an_error() -> None:
    n_threads = threading.active_count()
    with pytest.raises(InterpreterError, match="7 of 7 programs wait forever"):
        meet(7, 8)
    assert threading.active_count() == n_threads


@only_interpreted
def test_a_failing_program_ends_the_others() -> None:
    n_threads = threading.active_count()
    with pytest.raises(InterpreterError, match="as it should"):
        meet(7, 7, fails_at=3)
    assert threading.active_count() == n_threads
    assert -1 not in meet(7, 7).tolist()


# --- what programs share --------------------------------------------------------------------------------------------

# Prints the code of one configuration for sm_90.
COMPILE = """
from fastgpt_kernels import audit
launch, *_ = audit.launches("sm_90", "persistent_decode bf16 small")
print(audit.compile_launch(launch, "sm_90").asm["ptx"])
"""


@torch.inference_mode()
def test_the_same_bits_in_any_order_of_programs() -> None:
    with tuned(6):
        model = make_model(small_config(), torch.bfloat16)
        prompt, decoder = read_prompt(model, token_ids(1, 30, 131), 32), make_decoder(model)
        first, *others = (decode(decoder, prompt.cache.clone(), 9, 30, 30, seed=seed) for seed in range(3))
    assert all(torch.equal(other, first) for other in others)


def test_what_is_not_inlined_uses_no_shared_memory() -> None:
    """In triton 3.6 it would overwrite the ring of its caller, which no interpreter shows."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(ROOT / "kernels")
    finished = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    _, kernel, function = finished.stdout.split("\n.func ")  # the first follows a declaration of the second
    assert "cp.async" in kernel
    function = function.partition("\n}")[0]
    assert "release" in function
    assert "shared" not in function
    assert "global_smem" not in function
