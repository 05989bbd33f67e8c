"""Translate basic blocks of PTX to Python functions over all lanes at once.

A register is an array with one element per lane. Each block becomes one function `block(R, X, M)`: R are the registers,
X the machine (memory, barriers, matrix units), M the active lanes, None for all. Registers that live only in one block
are Python locals, and their lanes outside M are undefined; the others are merged under M at the end of the block.
Everything that accesses memory receives M. `writer.py` writes the text, and `write_*.py` what each opcode does.

PTX registers have a width but no type. Each is stored as the NumPy type that most of its uses need, so that few views
are needed.
"""

# pyright: reportOptionalSubscript=false, reportOptionalCall=false, reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# An operand of a kind that an instruction does not take raises.

from collections import Counter
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from . import numeric
from .control_flow import accumulators_used_early, immediate_postdominators
from .instructions import Entry
from .write_arithmetic import Arithmetic
from .write_bits import Bits
from .write_memory import Memory
from .write_warps import Warps


class _Translator(Bits, Arithmetic, Memory, Warps):
    """The writer that knows every opcode."""


@dataclass
class Program:
    """What a machine runs. blocks: (function, end) by number; histogram: instructions by opcode in each block."""

    entry: Entry
    functions: list
    ends: list
    histograms: list
    kinds: list  # of each register, by its index
    constants: list
    sites: list  # of memory accesses and matrix products: the instruction behind a number
    source: str
    grain: int  # bytes of the smallest access of shared memory
    global_grain: int  # and of global memory
    joins: list  # of each block, where lanes that part at its end meet again: a block, or None at the very end
    too_early: list  # (instruction, register): accumulators of wgmma that are used before they were waited for

    @cached_property
    def asynchronous(self) -> bool:
        """Whether it has tensor copies or products of four warps, whose groups belong to a program."""
        return self._has("wgmma", "cp.async.bulk")

    @cached_property
    def has_warp_groups(self) -> bool:
        return self._has("wgmma")

    def _has(self, *words: str) -> bool:
        return any(opcode.startswith(words) for histogram in self.histograms for opcode in histogram)


def translate(entry: Entry) -> Program:
    writer = _Translator(entry)
    for writer.voting in (True, False):
        writer.start()
        for block in entry.blocks:
            writer.block(block)
        if writer.voting:
            writer.settle()
    source = "\n".join(writer.lines)
    space = {name: getattr(numeric, name) for name in dir(numeric) if not name.startswith("_")}
    space.update(np=np, K=writer.scalars)
    exec(compile(source, f"<{entry.name}>", "exec"), space)
    functions = [space[f"block_{block.number}"] for block in entry.blocks]
    histograms = [Counter(i.opcode for i in block.instructions) for block in entry.blocks]
    for histogram, block in zip(histograms, entry.blocks, strict=True):
        if block.last is not None:
            histogram[block.last.opcode] += 1
    kinds = [writer.kinds[name] for name in writer.index]
    return Program(
        entry,
        functions,
        [b.end for b in entry.blocks],
        histograms,
        kinds,
        writer.constants,
        writer.sites,
        source,
        writer.grain,
        writer.global_grain,
        immediate_postdominators(entry.blocks),
        accumulators_used_early(entry.blocks),
    )
