"""Writes one Python function for each basic block: registers as arrays, their types, and the operands of instructions.

A register is an array with one element per lane, `r5` in the text. `get` writes the expression that reads an operand,
`put` the statement that assigns a result under the instruction's guard, `emit` any other line. What an opcode does is
in the subclasses: their method `op_add` writes the lines of `add`.

The writer goes through the blocks twice. The lines of the first pass (`voting`) are thrown away: it counts with which
NumPy type each register is used, and finds the registers that live in one block only. The second pass writes the text.
"""

# pyright: reportOptionalSubscript=false, reportOptionalCall=false, reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# An operand of a kind that an instruction does not take raises.

from collections import Counter
from typing import NoReturn

import numpy as np

from . import numeric
from .instructions import Address, Block, Entry, Immediate, Instruction, PtxError, Register, Special, Symbol, Vector

TYPES = {"b8": "u1", "b16": "u2", "b32": "u4", "b64": "u8", "u8": "u1", "u16": "u2", "u32": "u4", "u64": "u8",
          "s8": "s1", "s16": "s2", "s32": "s4", "s64": "s8", "f16": "f2", "f32": "f4", "f64": "f8", "pred": "p",
          "bf16": "bf16", "f16x2": "f16x2", "bf16x2": "bf16x2", "f32x2": "f32x2"}  # fmt: skip


def unsigned(width: int) -> str:
    return f"u{width}" if width else "p"


class Writer:
    """The text of the functions of an entry's blocks."""

    def __init__(self, entry: Entry):
        self.entry = entry
        self.index = {name: i for i, name in enumerate(entry.registers)}
        self.votes = {name: Counter() for name in self.index}
        self.kinds = {name: unsigned(r.width) for name, r in entry.registers.items()}
        self.uses: dict[str, set] = {name: set() for name in self.index}
        self.exposed: set[str] = set()  # read in a block before it is written there
        self.voting = True
        self.constants: list = []  # (kind, bits) of arrays that hold one value in all lanes
        self.scalars: list = []
        self.scalar_index: dict = {}
        self.grain, self.global_grain = 16, 16  # bytes of the smallest access of shared and of global memory

    def start(self) -> None:
        self.lines: list[str] = []
        self.sites: list[Instruction] = []
        self.n_temporaries = 0

    def settle(self) -> None:
        for name, votes in self.votes.items():
            if votes and self.entry.registers[name].width:
                self.kinds[name] = votes.most_common(1)[0][0]
        self.locals = {n for n, blocks in self.uses.items() if len(blocks) <= 1 and n not in self.exposed}

    # --- blocks -----------------------------------------------------------------------------------------------------

    def block(self, block: Block) -> None:
        self.number, self.known, self.dirty = block.number, set(), {}
        self.lines.append(f"def block_{block.number}(R, X, M):")
        n_lines = len(self.lines)
        for self.instruction in block.instructions:
            self.one(self.instruction)
        end, result = block.end, None
        if end[0] == "branch" and end[2] is not None:
            result = self.get(end[2], "p")
            result = f"~{result}" if end[3] else result
        if end[0] == "exit" and end[1] is not None:
            result = self.get(end[1], "p")
            result = f"~{result}" if end[2] else result
        if not self.voting:
            kept = [n for n in self.dirty if n not in self.locals]
            if kept:
                self.lines.append("    if M is None:")
                self.lines += [f"        R[{self.index[n]}] = {self.local(n)}" for n in kept]
                self.lines.append("    else:")
                self.lines += [
                    f"        R[{i}] = np.where(M, {self.local(n)}, R[{i}])" for n in kept for i in [self.index[n]]
                ]
        if result is not None:
            self.lines.append(f"    return {result}")
        elif len(self.lines) == n_lines:
            self.lines.append("    pass")

    def local(self, name: str) -> str:
        return f"r{self.index[name]}"

    def emit(self, line: str) -> None:
        self.lines.append("    " + line)

    def temporary(self) -> str:
        self.n_temporaries += 1
        return f"t{self.n_temporaries}"

    def site(self) -> int:
        self.sites.append(self.instruction)
        return len(self.sites) - 1

    def narrow(self, space: str, n_bytes: int) -> None:
        """Note an access of n_bytes."""
        if space == "shared":
            self.grain = min(self.grain, n_bytes)
        else:
            self.global_grain = min(self.global_grain, n_bytes)

    def fail(self, why: str = "not known") -> NoReturn:
        raise PtxError(f"instruction {why}: {self.instruction}")

    # --- operands ---------------------------------------------------------------------------------------------------

    def kind(self, operand: object) -> str:
        """How a register is kept; unsigned of 4 bytes for what is none."""
        if isinstance(operand, Register):
            return self.kinds[operand.name]
        return "u8" if isinstance(operand, Symbol) else "u4"

    def scalar(self, kind: str, bits: int) -> str:
        key = kind, bits
        if key not in self.scalar_index:
            width = int(kind[1])
            value = np.array([bits & (1 << 8 * width) - 1], f"u{width}").view(getattr(numeric, kind))[0]
            self.scalar_index[key] = len(self.scalars)
            self.scalars.append(value)
        return f"K[{self.scalar_index[key]}]"

    def get(self, operand: object, kind: str, vote: bool = True, array: bool = False) -> str:
        """An expression of a kind. array: never a scalar."""
        if isinstance(operand, Register):
            name = operand.name
            if self.voting:
                self.uses[name].add(self.number)
                if name not in self.known:
                    self.exposed.add(name)
                if vote and kind != "p" and int(kind[1]) == operand.width:
                    self.votes[name][kind] += 1
            elif name not in self.known:
                self.emit(f"{self.local(name)} = R[{self.index[name]}]")
            self.known.add(name)
            return self.converted(self.local(name), self.kinds[name], kind)
        if isinstance(operand, Vector) and operand.items and operand.items[0] == "not":
            return f"(~{self.get(operand.items[1], kind)})"
        if isinstance(operand, Immediate):
            if kind == "p":
                return "X.true" if operand.bits else "X.false"
            bits, width = operand.bits, int(kind[1])
            if operand.float_width and operand.float_width != width:
                if kind == "f4" and operand.float_width == 8:
                    bits = int(np.array([bits], "u8").view("f8").astype("f4").view("u4")[0])
                else:
                    self.fail("has a constant of another width")
            if not operand.float_width and kind[0] == "f" and kind != "f2":
                bits = bits  # A bit pattern: `mov.b32 %r, 0` into a register kept as float.
            if array:
                return f"X.constant({kind!r}, {bits & (1 << 8 * width) - 1})"
            return self.scalar(kind, bits)
        if isinstance(operand, Special):
            return self.converted(f"X.special({operand.name!r})", "u4", kind)
        if isinstance(operand, Symbol):
            width = int(kind[1])
            return f"X.address_of({operand.name!r}, {kind!r}, {width})"
        self.fail(f"has an operand {operand}")

    @staticmethod
    def converted(expression: str, kept: str, kind: str) -> str:
        """The same bits as another kind; of another width, cut off or extended by zeros, by its sign where signed."""
        if kept == kind:
            return expression
        if kept == "p" or kind == "p":
            raise PtxError(f"a predicate where {kind} stands: {expression}")
        if kept[1] == kind[1]:
            return f"{expression}.view({kind})"
        raw = expression if kept[0] == "u" else f"{expression}.view(u{kept[1]})"
        cut = f"{raw}.astype(u{kind[1]})"
        return cut if kind[0] == "u" else f"{cut}.view({kind})"

    def put(self, operand: object, expression: str, kind: str, vote: bool = True) -> None:
        """Assign, under the instruction's guard."""
        if isinstance(operand, Symbol) and operand.name == "_":
            return
        if isinstance(operand, Special) and operand.name == "%_":
            return
        if not isinstance(operand, Register):
            self.fail(f"writes to {operand}")
        name, guard = operand.name, self.instruction.guard
        if self.voting and vote and kind != "p" and int(kind[1]) == operand.width:
            self.votes[name][kind] += 1
        kept = self.kinds[name]
        if kept != "p" and kind != "p" and kept[1] != kind[1]:  # A register wider than its value: by sign or zeros.
            expression = f"{expression}.astype({kind[0]}{kept[1]})"
            kind = f"{kind[0]}{kept[1]}"
        if kept != kind:
            expression = self.converted(f"({expression})", kind, kept)
        if guard is not None:
            old = self.get(operand, kept, vote=False)
            chosen = self.get(guard, "p")
            new = f"{old}, {expression}" if self.instruction.guard_negated else f"{expression}, {old}"
            expression = f"np.where({chosen}, {new})"
        if self.voting:
            self.uses[name].add(self.number)
        self.known.add(name)
        self.dirty[name] = True
        self.emit(f"{self.local(name)} = {expression}")

    def mask(self) -> str:
        """The lanes in which the instruction acts."""
        guard = self.instruction.guard
        if guard is None:
            return "M"
        chosen = self.get(guard, "p")
        return f"X.both(M, {'~' if self.instruction.guard_negated else ''}{chosen})"

    def address(self, operand: Address, wide: bool) -> str:
        """An address in bytes, of 8 bytes where global."""
        kind = "u8" if wide else "u4"
        if isinstance(operand.base, Register) and operand.base.width != int(kind[1]):
            base = self.converted(self.get(operand.base, unsigned(operand.base.width), vote=False),
                                  unsigned(operand.base.width), kind)  # fmt: skip
        else:
            base = self.get(operand.base, kind, vote=False, array=True)
        return f"({base} + {self.scalar(kind, operand.offset)})" if operand.offset else base

    # --- instructions -----------------------------------------------------------------------------------------------

    def one(self, instruction: Instruction) -> None:
        parts = instruction.parts
        method = getattr(self, f"op_{parts[0]}", None)
        if method is None:
            self.fail()
        method(parts, instruction.operands)

    def type_of(self, parts: list[str]) -> str:
        if parts[-1] not in TYPES:
            self.fail()
        return TYPES[parts[-1]]

    def flushed(self, parts: list[str], *expressions: str) -> list[str]:
        return [f"flush({e})" for e in expressions] if "ftz" in parts else list(expressions)

    def checked(self, parts: list[str], *allowed: str) -> None:
        """No modifier that is not understood."""
        for part in parts[1:-1]:
            if part not in allowed:
                self.fail(f"has a modifier .{part}, not known")
