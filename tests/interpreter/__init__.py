"""Triton kernels in tests: on the GPU where there is one, else in the CPU interpreter, mended and watched.

Importing this package makes the interpreter compute bfloat16 and tf32 as a GPU does and refuse every access outside
the tensors of a launch. The rest is asked for by a test, and changes nothing on a GPU:

    with check_overflow():   index arithmetic that leaves int32 raises, and tl.device_assert fires
    with dry_run():          only the first and last programs run and touch no memory: huge shapes cost nothing
    with shuffled_grid(s):   programs run in a random order: the outputs may not change

The hooks reach into private interfaces, hence the fixed list of triton's releases.
"""

import triton
from triton import knobs

from . import arithmetic, memory
from .grid import dry_run, shuffled_grid
from .memory import OutOfBoundsError, check_overflow

TRIED_VERSIONS = ("3.9.0",)

INTERPRETING = bool(knobs.runtime.interpret)
DEVICE = "cpu" if INTERPRETING else "cuda"


def check_version(version: str) -> None:
    """Raise RuntimeError for a release of triton whose interpreter these hooks have not met."""
    if version not in TRIED_VERSIONS:
        raise RuntimeError(
            f"tests/interpreter was tried with triton {', '.join(TRIED_VERSIONS)}, not {version}: compare "
            "triton/runtime/interpreter.py with what it replaces, run tests/test_interpreter.py, then add the version"
        )


if INTERPRETING:
    check_version(triton.__version__)
    arithmetic.repair()
    memory.watch()

__all__ = [
    "DEVICE",
    "INTERPRETING",
    "TRIED_VERSIONS",
    "OutOfBoundsError",
    "check_overflow",
    "check_version",
    "dry_run",
    "shuffled_grid",
]
