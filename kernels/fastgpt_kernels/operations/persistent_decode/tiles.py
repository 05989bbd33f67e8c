"""Launch configuration of the persistent decode kernel."""

from typing import NamedTuple

import torch

from ...common.chip import chip


class PersistentRing(NamedTuple):
    """How one program prefetches its weights: tiles of 4 * groups rows, num_stages - 1 of them ahead."""

    groups: int
    num_warps: int
    num_stages: int


# Tensor cores take 16 rows. Up to 1024 channels the ring uses 176 KiB of shared memory, above that 224 of 227 KiB.
# Compiled without spills (triton 3.6 and 3.9), not timed.
_PERSISTENT_RING = PersistentRing(4, 8, 6)
_PERSISTENT_STAGES_ABOVE_1024_CHANNELS = 4
_PERSISTENT_ARCHITECTURES = "sm_90", "sm_100"
# Keys per split, and the most splits per head. Every program sums all splits, so fewer are cheaper. Not timed.
PERSISTENT_KEYS_PER_SPLIT, PERSISTENT_MAX_SPLITS = 64, 16
PERSISTENT_BLOCK_KEYS = 128
# Few for the interpreter, to be quick, but enough for races between programs to show.
_PERSISTENT_PROGRAMS_OF_CPU = 5


def persistent_ring(n_channels: int, dtype: torch.dtype, architecture: str) -> PersistentRing | None:
    """The ring of the persistent decode kernel, or None where it does not run; float32 is for the interpreter only."""
    on_gpu = architecture in _PERSISTENT_ARCHITECTURES and dtype in (torch.bfloat16, torch.float16)
    in_interpreter = architecture == "cpu" and dtype in (torch.float32, torch.bfloat16, torch.float16)
    if not (on_gpu or in_interpreter):
        return None
    num_stages = _PERSISTENT_RING.num_stages if n_channels <= 1024 else _PERSISTENT_STAGES_ABOVE_1024_CHANNELS
    return _PERSISTENT_RING._replace(num_stages=num_stages)


def persistent_programs(device: torch.device) -> int:
    """How many programs of the persistent decode kernel are resident: one per multiprocessor."""
    name, n_multiprocessors = chip(device)
    return _PERSISTENT_PROGRAMS_OF_CPU if name == "cpu" else n_multiprocessors
