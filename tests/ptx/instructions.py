"""What parsing makes of PTX: registers and other operands, instructions, basic blocks, and an entry of these."""

from dataclasses import dataclass, field
from typing import Any

# Bytes of a register by its declared type; a predicate has none.
WIDTHS = {"pred": 0, "b8": 1, "b16": 2, "b32": 4, "b64": 8, "f16": 2, "f32": 4, "f64": 8,
           "u8": 1, "u16": 2, "u32": 4, "u64": 8, "s8": 1, "s16": 2, "s32": 4, "s64": 8}  # fmt: skip


@dataclass(frozen=True)
class Register:
    """width: bytes, 0 for a predicate. name: unique within the entry, inlined functions included."""

    name: str
    width: int


@dataclass(frozen=True)
class Special:
    """%tid.x and the like."""

    name: str


@dataclass(frozen=True)
class Immediate:
    """bits: of a float constant in its own width, or an integer. float_width: 4, 8 or 0 for an integer."""

    bits: int
    float_width: int = 0


@dataclass(frozen=True)
class Symbol:
    """The name of a parameter, of shared memory, of a function or of a label."""

    name: str


@dataclass(frozen=True)
class Address:
    """base: a register, a symbol, or an immediate."""

    base: object
    offset: int = 0
    extra: tuple = ()  # Coordinates of a tensor copy: [descriptor, {x, y}].


@dataclass(frozen=True)
class Vector:
    items: tuple


@dataclass(frozen=True)
class Pair:
    """%r1|%p1: a result and its predicate."""

    first: object
    second: object


@dataclass
class Instruction:
    opcode: str
    operands: list
    guard: Register | None = None
    guard_negated: bool = False
    text: str = ""
    place: str = ""  # file:line:column of the Python source

    @property
    def parts(self) -> list[str]:
        return self.opcode.replace("::", ":").split(".")

    def __str__(self) -> str:
        return f"{self.text}  [{self.place}]"


@dataclass
class Block:
    """Instructions that are entered only at the first and left only after the last."""

    number: int
    instructions: list = field(default_factory=list)
    # What comes after: ("next",), ("branch", block, predicate or None, negated), ("barrier", id, n_threads), ("exit",)
    end: tuple = ("next",)
    last: Any = None  # the instruction that makes the end, where there is one


@dataclass
class Entry:
    """name, parameters (name -> (type, bytes, offset)), threads, and blocks in the order of the text."""

    name: str
    parameters: dict
    blocks: list
    n_threads: int
    target: str
    registers: dict
    symbols: dict  # module-scope variables: name -> (space, bytes, initial bytes)


class PtxError(Exception):
    """Text that the parser or the translation does not know."""
