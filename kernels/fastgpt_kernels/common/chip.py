"""The GPU for which launch configurations are chosen.

Configurations are fixed tables keyed by shape and GPU. Nothing is tuned at run time, so the first call is as fast as
the next and graph capture never meets a measurement.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import NamedTuple

import torch


class Chip(NamedTuple):
    """What the tables need to know of a device. architecture: sm_90, gfx942, or cpu, which is the interpreter."""

    architecture: str
    n_multiprocessors: int


# Variants of a chip, configured as it is: with the same tensor cores, triton has the same faults.
_VARIANT_OF = {"sm_87": "sm_86", "sm_103": "sm_100", "sm_110": "sm_100", "sm_121": "sm_120"}

_assumed: Chip | None = None


@contextmanager
def assume(chip: Chip) -> Iterator[None]:
    """Choose configurations for a chip that need not be present, wherever tensors lie. The audit uses this."""
    global _assumed
    previous, _assumed = _assumed, chip
    try:
        yield
    finally:
        _assumed = previous


def assumed() -> Chip | None:
    """The chip that `assume` gave."""
    return _assumed


@cache
def _chip_of(device: torch.device) -> Chip:
    if device.type != "cuda":
        return Chip(device.type, 1)
    properties = torch.cuda.get_device_properties(device)
    name = properties.gcnArchName.split(":")[0] if torch.version.hip else f"sm_{properties.major}{properties.minor}"
    return Chip(_VARIANT_OF.get(name, name), properties.multi_processor_count)


def chip(device: torch.device) -> Chip:
    """The chip for which launches on a device are configured."""
    return _assumed or _chip_of(device)


def architecture(device: torch.device) -> str:
    """The architecture that kernels are configured for: sm_90, gfx942, or cpu, which is the interpreter."""
    return chip(device).architecture


# Few in the interpreter, so that each program has several tiles.
_PROGRAMS_OF_CPU = 3


def resident_programs(device: torch.device, n_resident: int) -> int:
    """How many programs of a kernel a device holds, with n_resident on each multiprocessor."""
    name, n_multiprocessors = chip(device)
    return _PROGRAMS_OF_CPU if name == "cpu" else n_resident * n_multiprocessors


def overlaps_launches(device: torch.device) -> bool:
    """Whether a kernel may start while the previous one runs: programmatic dependent launch, from Hopper on."""
    name = architecture(device)
    return name.startswith("sm_") and int(name[3:]) >= 90
