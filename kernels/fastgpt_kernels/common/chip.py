"""The GPU that launches are chosen for.

Configurations are fixed tables keyed by shape and GPU: nothing is searched at run time, so the first call is as fast as
the next and graph capture meets no measurement.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import NamedTuple

import torch


class Chip(NamedTuple):
    """What the tables ask of a device. architecture: sm_90, gfx942, or cpu, which is the interpreter."""

    architecture: str
    n_multiprocessors: int


_assumed: Chip | None = None


@contextmanager
def assume(chip: Chip) -> Iterator[None]:
    """Choose as for a chip that need not be there, whatever holds the tensors: what the audit compiles."""
    global _assumed
    previous, _assumed = _assumed, chip
    try:
        yield
    finally:
        _assumed = previous


@cache
def _chip_of(device: torch.device) -> Chip:
    if device.type != "cuda":
        return Chip(device.type, 1)
    properties = torch.cuda.get_device_properties(device)
    name = properties.gcnArchName.split(":")[0] if torch.version.hip else f"sm_{properties.major}{properties.minor}"
    return Chip(name, properties.multi_processor_count)


def chip(device: torch.device) -> Chip:
    """What launches on a device are chosen for."""
    return _assumed or _chip_of(device)


def architecture(device: torch.device) -> str:
    """What the kernels for a device are compiled for: sm_90, gfx942, or cpu, which is the interpreter."""
    return chip(device).architecture


# In the interpreter few, so that each has several tiles to walk.
_PROGRAMS_OF_CPU = 3


def resident_programs(device: torch.device, n_resident: int) -> int:
    """How many programs of a kernel a device holds at n_resident a multiprocessor."""
    name, n_multiprocessors = chip(device)
    return _PROGRAMS_OF_CPU if name == "cpu" else n_resident * n_multiprocessors


def overlaps_launches(device: torch.device) -> bool:
    """Whether a kernel may start while the one before it runs: programmatic dependent launch, from Hopper on."""
    name = architecture(device)
    return name.startswith("sm_") and int(name[3:]) >= 90
