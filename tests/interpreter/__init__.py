"""Triton kernels in tests: on the GPU where there is one, else in the CPU interpreter with repairs and checks.

Importing this package makes the interpreter compute bfloat16 and tf32 as a GPU does and refuse every access outside
the tensors of a launch. Tests ask for the rest, which has no effect on a GPU:

    with check_overflow():   index arithmetic that leaves int32 raises, and tl.device_assert fires
    with dry_run():          only the first and last programs run and touch no memory: huge shapes cost nothing
    with shuffled_grid(s):   programs run in a random order: the outputs may not change

The hooks use private interfaces: `releases` lists where these differ, and warns about an untried release.
"""

import pytest
import triton
from triton import knobs

from . import releases

INTERPRETING = bool(knobs.runtime.interpret)
DEVICE = "cpu" if INTERPRETING else "cuda"
only_interpreted = pytest.mark.skipif(not INTERPRETING, reason="a GPU is here: kernels run on it")

releases.check(triton.__version__)
with releases.skipping_what_is_unknown(triton.__version__):
    from . import arithmetic, memory, speed
    from .grid import dry_run, shuffled_grid
    from .memory import OutOfBoundsError, check_overflow

    if INTERPRETING:
        releases.mend(triton.__version__)
        arithmetic.repair()
        memory.watch()
        speed.repeat_less()

__all__ = [
    "DEVICE",
    "INTERPRETING",
    "OutOfBoundsError",
    "check_overflow",
    "dry_run",
    "only_interpreted",
    "shuffled_grid",
]
