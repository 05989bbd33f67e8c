"""Translate basic blocks of PTX to Python functions over all lanes at once.

A register is an array with one element per lane. Each block becomes one function `block(R, X, M)`: R are the registers,
X the machine (memory, barriers, matrix units), M the active lanes, None for all. Registers that live only in one block
are Python locals, and their lanes outside M are undefined; the others are merged under M at the end of the block.
Everything that accesses memory receives M.

PTX registers have a width but no type. Each is stored as the NumPy type that most of its uses need, so that few views
are needed.
"""

# pyright: reportOptionalSubscript=false, reportOptionalCall=false, reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# An operand of a kind that an instruction does not take raises.

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NoReturn

import numpy as np

from . import numeric
from .parse import Address, Block, Entry, Immediate, Instruction, Pair, PtxError, Register, Special, Symbol, Vector

_TYPES = {"b8": "u1", "b16": "u2", "b32": "u4", "b64": "u8", "u8": "u1", "u16": "u2", "u32": "u4", "u64": "u8",
          "s8": "s1", "s16": "s2", "s32": "s4", "s64": "s8", "f16": "f2", "f32": "f4", "f64": "f8", "pred": "p",
          "bf16": "bf16", "f16x2": "f16x2", "bf16x2": "bf16x2"}  # fmt: skip
_COMPARISONS = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">=",
                "lo": "<", "ls": "<=", "hi": ">", "hs": ">="}  # fmt: skip


def unsigned(width: int) -> str:
    return f"u{width}" if width else "p"


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
    joins: list  # of each block, where lanes that part at its end meet again: a block, or None at the very end
    too_early: list  # (instruction, register): accumulators of wgmma that are used before they were waited for


def translate(entry: Entry) -> Program:
    writer = _Writer(entry)
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
    histograms = [Counter(_counted(i.opcode) for i in block.instructions) for block in entry.blocks]
    for histogram, block in zip(histograms, entry.blocks, strict=True):
        if block.last is not None:
            histogram[_counted(block.last.opcode)] += 1
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
        immediate_postdominators(entry.blocks),
        accumulators_used_early(entry.blocks),
    )


def immediate_postdominators(blocks: list[Block]) -> list[int | None]:
    """Of each block the nearest that every way from it to the end passes; None where that is the end itself."""
    n = len(blocks)
    following = []
    for block in blocks:
        kind = block.end[0]
        if kind == "branch":
            following.append([block.end[1]] if block.end[2] is None else [block.end[1], block.number + 1])
        elif kind == "exit":
            following.append([n] if block.end[1] is None else [n, block.number + 1])
        else:
            following.append([block.number + 1])
    everything = (1 << n + 1) - 1
    after = [everything] * n + [1 << n]  # as bits: the blocks that every way from here passes, itself among them
    changed = True
    while changed:
        changed = False
        for number in range(n - 1, -1, -1):
            common = everything
            for other in following[number]:
                common &= after[other]
            common |= 1 << number
            if common != after[number]:
                after[number], changed = common, True
    result: list[int | None] = []
    for number in range(n):
        candidates = after[number] & ~(1 << number)
        # The nearest is the one that itself is followed by all the others.
        found = next((c for c in range(n) if candidates >> c & 1 and after[c] == candidates), None)
        result.append(found)
    return result


def _registers(operand: object) -> Iterator[str]:
    if isinstance(operand, Register):
        yield operand.name
    elif isinstance(operand, Vector):
        for item in operand.items:
            yield from _registers(item)
    elif isinstance(operand, Pair):
        yield from _registers(operand.first)
        yield from _registers(operand.second)
    elif isinstance(operand, Address):
        yield from _registers(operand.base)
        for item in operand.extra:
            yield from _registers(item)


def accumulators_used_early(blocks: list[Block]) -> list[tuple[Instruction, str]]:
    """Registers that a wgmma in flight may still write, where another instruction touches them.

    Along all ways through the blocks: what was issued since the last commit_group, and the groups not waited for, the
    latest last.
    """
    if not any(i.opcode.startswith("wgmma") for block in blocks for i in block.instructions):
        return []
    none: frozenset = frozenset()
    before: dict[int, tuple] = {0: (none, ())}
    early: dict[tuple[int, str], tuple[Instruction, str]] = {}
    todo = [0]
    while todo:
        number = todo.pop()
        loose, groups = before[number]
        for instruction in blocks[number].instructions:
            flying = loose.union(*groups)
            if instruction.opcode.startswith("wgmma.mma_async"):
                accumulators = frozenset(_registers(instruction.operands[0]))
                used = {r for o in instruction.operands[1:] for r in _registers(o)}
                loose = loose | accumulators
            elif instruction.opcode.startswith("wgmma.commit_group"):
                used, groups, loose = set(), (*groups, loose)[-8:], none
            elif instruction.opcode.startswith("wgmma.wait_group"):
                left = instruction.operands[0].bits
                used, groups = set(), groups[-left:] if left else ()
            else:
                used = {r for o in instruction.operands for r in _registers(o)}
            for register in used & flying:
                early[id(instruction), register] = instruction, register
        end = blocks[number].end
        following = [end[1]] if end[0] == "branch" else []
        if (
            end[0] in ("next", "barrier")
            or (end[0] == "branch" and end[2] is not None)
            or (end[0] == "exit" and end[1] is not None)
        ):
            following.append(number + 1)
        for other in following:
            known = before.get(other)
            if known is None:
                merged = loose, groups
            else:
                n = max(len(groups), len(known[1]))
                padded = [(none,) * (n - len(g)) + tuple(g) for g in (groups, known[1])]
                merged = loose | known[0], tuple(a | b for a, b in zip(*padded, strict=True))
            if merged != known:
                before[other] = merged
                todo.append(other)
    return list(early.values())


def _counted(opcode: str) -> str:
    """As instructions are counted: the first word, with the space for memory."""
    parts = opcode.replace("::", ":").split(".")
    for space in ("global", "shared", "param"):
        if parts[0] in ("ld", "st", "atom", "red") and any(p.startswith(space) for p in parts):
            return f"{parts[0]}.{space}"
    if parts[0] == "cp":
        return ".".join(parts[:3])
    if parts[0] in ("wgmma", "mbarrier"):
        return ".".join(parts[:2])
    return parts[0]


class _Writer:
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
        self.grain = 16

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
        if parts[-1] not in _TYPES:
            self.fail()
        return _TYPES[parts[-1]]

    def flushed(self, parts: list[str], *expressions: str) -> list[str]:
        return [f"flush({e})" for e in expressions] if "ftz" in parts else list(expressions)

    def checked(self, parts: list[str], *allowed: str) -> None:
        """No modifier that is not understood."""
        for part in parts[1:-1]:
            if part not in allowed:
                self.fail(f"has a modifier .{part}, not known")

    # moves

    def op_mov(self, parts, operands):
        target, source = operands
        if isinstance(target, Vector):  # unpack
            width = int(self.type_of(parts)[1]) // len(target.items)
            total = width * len(target.items)
            value = self.temporary()
            self.emit(f"{value} = {self.get(source, unsigned(total), vote=False)}")
            for i, item in enumerate(target.items):
                shifted = f"({value} >> u{total}({8 * width * i}))" if i else value
                self.put(item, f"{shifted}.astype(u{width})", unsigned(width), vote=False)
            return
        if isinstance(source, Vector) and source.items[0] != "not":  # pack
            width = target.width // len(source.items)
            words = [self.get(i, unsigned(width), vote=False, array=True) for i in source.items]
            terms = [f"({w}.astype(u{target.width}) << u{target.width}({8 * width * i}))" if i else
                     f"{w}.astype(u{target.width})" for i, w in enumerate(words)]  # fmt: skip
            self.put(target, " | ".join(terms), unsigned(target.width), vote=False)
            return
        kind = self.kind(target)
        self.put(target, self.get(source, kind, vote=False, array=True), kind, vote=False)

    def op_cvta(self, parts, operands):
        self.op_mov(["mov", parts[-1]], operands)

    def op_createpolicy(self, parts, operands):
        self.put(operands[0], "X.constant('u8', 0)", "u8", vote=False)

    def op_selp(self, parts, operands):
        target, a, b, chosen = operands
        kind = self.kind(target) if parts[1][0] == "b" else self.type_of(parts)
        vote = parts[1][0] != "b"
        self.put(target, f"np.where({self.get(chosen, 'p')}, {self.get(a, kind, vote)}, {self.get(b, kind, vote)})",
                 kind, vote)  # fmt: skip

    # comparisons and logic

    def op_setp(self, parts, operands):
        comparison, kind = parts[1], self.type_of(parts)
        combined = next((p for p in parts[2:-1] if p in ("and", "or", "xor")), None)
        a, b = operands[1:3]
        x, y = self.temporary(), self.temporary()
        if kind == "bf16":
            self.emit(
                f"{x}, {y} = bf16_to_f4({self.get(a, 'u2', array=True)}), bf16_to_f4({self.get(b, 'u2', array=True)})"
            )
            kind = "f4"
        else:
            self.emit(f"{x} = {self.get(a, kind, array=True)}")
            self.emit(f"{y} = {self.get(b, kind)}")
        if "ftz" in parts:
            self.emit(f"{x}, {y} = flush({x}), flush({y})")
        is_float = kind[0] == "f"
        unordered = is_float and comparison.endswith("u") and comparison != "u"
        name = comparison[:-1] if unordered else comparison
        if comparison == "num":
            expression = f"({x} == {x}) & ({y} == {y})"
        elif comparison == "nan":
            expression = f"({x} != {x}) | ({y} != {y})"
        elif name in _COMPARISONS:
            expression = f"{x} {_COMPARISONS[name]} {y}"
            if unordered:
                expression = f"({expression}) | ({x} != {x}) | ({y} != {y})"
            elif is_float and name == "ne":
                expression = f"({expression}) & ({x} == {x}) & ({y} == {y})"
        else:
            self.fail()
        symbol = {"and": "&", "or": "|", "xor": "^"}.get(combined)
        if isinstance(operands[0], Pair):
            value = self.temporary()
            self.emit(f"{value} = {expression}")
            first, second = value, f"~{value}"
            if symbol:
                third = self.get(operands[3], "p")
                first, second = f"{first} {symbol} {third}", f"({second}) {symbol} {third}"
            self.put(operands[0].first, first, "p")
            self.put(operands[0].second, second, "p")
            return
        if symbol:
            expression = f"({expression}) {symbol} {self.get(operands[3], 'p')}"
        self.put(operands[0], expression, "p")

    def logic(self, symbol, parts, operands):
        target, a, b = operands
        kind = self.type_of(parts)
        x = self.get(a, kind, vote=False, array=not isinstance(b, Register))
        self.put(target, f"{x} {symbol} {self.get(b, kind, vote=False)}", kind, vote=False)

    def op_and(self, parts, operands):
        self.logic("&", parts, operands)

    def op_or(self, parts, operands):
        self.logic("|", parts, operands)

    def op_xor(self, parts, operands):
        self.logic("^", parts, operands)

    def op_not(self, parts, operands):
        kind = self.type_of(parts)
        self.put(operands[0], f"~{self.get(operands[1], kind, vote=False, array=True)}", kind, vote=False)

    def op_lop3(self, parts, operands):
        target, *sources, table = operands
        a, b, c = (self.get(s, "u4", array=True) for s in sources)
        self.put(target, f"logic3({a}, {b}, {c}, {table.bits})", "u4")

    def op_shl(self, parts, operands):
        target, value, amount = operands
        width = int(self.type_of(parts)[1])
        kind = unsigned(width)
        x = self.get(value, kind, array=True)
        if isinstance(amount, Immediate):
            expression = f"{x} << {self.scalar(kind, amount.bits)}" if amount.bits < 8 * width else f"{x} * {kind}(0)"
        else:
            expression = f"shift_left({x}, {self.get(amount, 'u4')})"
        self.put(target, expression, kind)

    def op_shr(self, parts, operands):
        target, value, amount = operands
        kind = self.type_of(parts)
        x = self.get(value, kind, array=True)
        if isinstance(amount, Immediate) and amount.bits < 8 * int(kind[1]):
            expression = f"{x} >> {self.scalar(kind, amount.bits)}"
        else:
            expression = f"shift_right({x}, {self.get(amount, 'u4', array=True)})"
        self.put(target, expression, kind)

    def op_shf(self, parts, operands):
        target, low, high, amount = operands
        a, b = self.get(low, "u4", array=True), self.get(high, "u4", array=True)
        self.put(target, f"funnel_shift({a}, {b}, {self.get(amount, 'u4')}, {parts[1] == 'l'}, {parts[2] == 'wrap'})",
                 "u4")  # fmt: skip

    def op_bfe(self, parts, operands):
        target, value, position, length = operands
        kind = self.type_of(parts)
        a = self.get(value, unsigned(int(kind[1])), array=True)
        if isinstance(position, Immediate) and isinstance(length, Immediate):
            p, n, bits = position.bits, length.bits, 8 * int(kind[1])
            if n > 0 and p + n <= bits:
                width = kind[1]
                up = f"({a} << u{width}({bits - p - n}))" if p + n < bits else a
                up = f"{up}.view({kind})" if kind[0] == "s" else up
                self.put(target, f"{up} >> {kind}({bits - n})", kind)
                return
        expression = f"bit_field({a}, {self.get(position, 'u4')}, {self.get(length, 'u4')}, {kind[0] == 's'})"
        self.put(target, expression, unsigned(int(kind[1])))

    def op_bfi(self, parts, operands):
        target, a, b, position, length = operands
        kind = self.type_of(parts)
        a, b = self.get(a, kind, array=True), self.get(b, kind, array=True)
        self.put(target, f"bit_insert({a}, {b}, {self.get(position, 'u4')}, {self.get(length, 'u4')})", kind)

    def op_prmt(self, parts, operands):
        target, a, b, selector = operands
        if len(parts) != 2:
            self.fail()
        a, b = self.get(a, "u4", array=True), self.get(b, "u4", array=True)
        self.put(target, f"permute_bytes({a}, {b}, {self.get(selector, 'u4')})", "u4")

    def op_popc(self, parts, operands):
        self.put(operands[0], f"count_ones({self.get(operands[1], self.type_of(parts), array=True)})", "u4")

    def op_clz(self, parts, operands):
        self.put(operands[0], f"leading_zeros({self.get(operands[1], self.type_of(parts), array=True)})", "u4")

    def op_brev(self, parts, operands):
        kind = self.type_of(parts)
        self.put(operands[0], f"reverse_bits({self.get(operands[1], kind, array=True)})", kind)

    # arithmetic

    def arithmetic(self, symbol, parts, operands):
        target, a, b = operands
        kind = self.type_of(parts)
        if kind in ("bf16x2", "f16x2", "bf16", "f16", "f2"):
            self.half(f"lambda x, y: x {symbol} y", kind, operands)
            return
        self.checked(parts, "rn", "ftz", "lo", "s32", "sat")
        if "sat" in parts:
            self.fail()
        x = self.get(a, kind, array=not isinstance(b, Register))
        x, y = self.flushed(parts, x, self.get(b, kind))
        expression = f"{x} {symbol} {y}"
        self.put(target, *self.flushed(parts, expression), kind)

    def half(self, operation: str, kind: str, operands: list) -> None:
        target, *sources = operands
        is_bf16 = kind.startswith("bf")
        function, width = ("packed2", 4) if kind.endswith("x2") else ("half1", 2)
        values = [self.get(s, unsigned(width), array=True) for s in sources]
        self.put(target, f"{function}({operation}, {is_bf16}, {', '.join(values)})", unsigned(width))

    def op_add(self, parts, operands):
        self.arithmetic("+", parts, operands)

    def op_sub(self, parts, operands):
        self.arithmetic("-", parts, operands)

    def op_mul(self, parts, operands):
        target, a, b = operands
        kind = self.type_of(parts)
        if parts[1] == "wide":
            double = f"{kind[0]}{2 * int(kind[1])}"
            x, y = self.get(a, kind, array=True), self.get(b, kind)
            self.put(target, f"{x}.astype({double}) * {double}({y})" if not isinstance(b, Register) else
                     f"{x}.astype({double}) * {y}", double)  # fmt: skip
        elif parts[1] == "hi":
            x, y = self.get(a, kind, array=True), self.get(b, kind)
            if kind[1] == "8":
                y = self.get(b, kind, array=True)
                self.put(target, f"mul_hi8({x}, {y}, {kind[0] == 's'})", kind)
            else:
                double = f"{kind[0]}{2 * int(kind[1])}"
                self.put(
                    target,
                    f"({x}.astype({double}) * {double}({y}) >> {double}({8 * int(kind[1])})).astype({kind})"
                    if not isinstance(b, Register)
                    else f"({x}.astype({double}) * {y} >> {double}({8 * int(kind[1])})).astype({kind})",
                    kind,
                )
        else:
            self.arithmetic("*", parts, operands)

    def op_mad(self, parts, operands):
        target, a, b, c = operands
        kind = self.type_of(parts)
        if parts[1] == "wide":
            double = f"{kind[0]}{2 * int(kind[1])}"
            x, y = self.get(a, kind, array=True), self.get(b, kind)
            y = y if isinstance(b, Register) else f"{double}({y})"
            self.put(target, f"{x}.astype({double}) * {y} + {self.get(c, double)}", double)
        elif parts[1] == "lo":
            x = self.get(a, kind, array=True)
            self.put(target, f"{x} * {self.get(b, kind)} + {self.get(c, kind)}", kind)
        else:
            self.fail()

    def op_fma(self, parts, operands):
        target, *sources = operands
        kind = self.type_of(parts)
        if kind in ("bf16x2", "f16x2", "bf16", "f2"):
            self.half("multiply_add", "f16" if kind == "f2" else kind, operands)
            return
        self.checked(parts, "rn", "ftz")
        values = [self.get(s, kind, array=i == 0) for i, s in enumerate(sources)]
        expression = f"fma{kind[1]}({', '.join(self.flushed(parts, *values))})"
        self.put(target, *self.flushed(parts, expression), kind)

    def op_div(self, parts, operands):
        target, a, b = operands
        kind = self.type_of(parts)
        x = self.get(a, kind, array=True)
        if kind[0] == "f":
            self.checked(parts, "rn", "full", "approx", "ftz")
            x, y = self.flushed(parts, x, self.get(b, kind))
            self.put(target, *self.flushed(parts, f"{x} / {y}"), kind)
        else:
            self.put(target, f"div_trunc({x}, {self.get(b, kind)})", kind)

    def op_rem(self, parts, operands):
        target, a, b = operands
        kind = self.type_of(parts)
        self.put(target, f"rem_trunc({self.get(a, kind, array=True)}, {self.get(b, kind)})", kind)

    def unary(self, expression: str, parts: list, operands: list) -> None:
        kind = self.type_of(parts)
        x = self.get(operands[1], kind, array=True)
        (x,) = self.flushed(parts, x)
        self.put(operands[0], *self.flushed(parts, expression.format(x)), kind)

    def op_neg(self, parts, operands):
        kind = self.type_of(parts)
        if kind in ("bf16x2", "f16x2"):
            self.put(operands[0], f"{self.get(operands[1], 'u4')} ^ u4(0x80008000)", "u4")
            return
        if kind in ("bf16", "f2"):
            self.put(operands[0], f"{self.get(operands[1], 'u2')} ^ u2(0x8000)", "u2")
            return
        self.unary("-{}", parts, operands)

    def op_abs(self, parts, operands):
        kind = self.type_of(parts)
        if kind in ("bf16x2", "f16x2"):
            self.put(operands[0], f"{self.get(operands[1], 'u4')} & u4(0x7FFF7FFF)", "u4")
            return
        if kind in ("bf16", "f2"):
            self.put(operands[0], f"{self.get(operands[1], 'u2')} & u2(0x7FFF)", "u2")
            return
        self.unary("np.abs({})", parts, operands)

    def op_ex2(self, parts, operands):
        self.unary("exp2({})", parts, operands)

    def op_lg2(self, parts, operands):
        self.unary("log2({})", parts, operands)

    def op_rsqrt(self, parts, operands):
        self.unary("rsqrt({})" if parts[-1] == "f32" else "(f8(1) / np.sqrt({}))", parts, operands)

    def op_sqrt(self, parts, operands):
        self.unary("np.sqrt({})", parts, operands)

    def op_rcp(self, parts, operands):
        self.unary(f"(f{4 if parts[-1] == 'f32' else 8}(1) / {{}})", parts, operands)

    def op_tanh(self, parts, operands):
        self.unary("tanh({})", parts, operands)

    def op_sin(self, parts, operands):
        self.unary("np.sin({})", parts, operands)

    def op_cos(self, parts, operands):
        self.unary("np.cos({})", parts, operands)

    def op_copysign(self, parts, operands):
        kind = self.type_of(parts)
        sign, size = (self.get(o, kind, array=True) for o in operands[1:])
        self.put(operands[0], f"np.copysign({size}, {sign})", kind)

    def extreme(self, which: str, parts: list, operands: list) -> None:
        target, a, b = operands
        kind = self.type_of(parts)
        is_half = kind in ("bf16x2", "f16x2", "bf16", "f2")
        if kind[0] != "f" and not is_half:
            name = f"np.{which}imum"
        else:  # NaN gives way to a number, unless asked for.
            name = f"np.{which}imum" if "NaN" in parts else f"np.f{which[:3]}"
        if is_half:
            self.half(name, "f16" if kind == "f2" else kind, operands)
            return
        x, y = self.flushed(parts, self.get(a, kind, array=True), self.get(b, kind))
        self.put(target, f"{name}({x}, {y})", kind)

    def op_max(self, parts, operands):
        self.extreme("max", parts, operands)

    def op_min(self, parts, operands):
        self.extreme("min", parts, operands)

    def op_cvt(self, parts, operands):
        target, *sources = operands
        to, of = _TYPES.get(parts[-2]), _TYPES.get(parts[-1])
        modes = parts[1:-2]
        if to is None or of is None:
            self.fail()
        if to in ("bf16x2", "f16x2"):
            if modes not in (["rn"], ["rn", "satfinite"]):
                self.fail()
            high, low = (self.get(s, "f4", array=True) for s in sources)
            one = "f4_to_bf16({})" if to == "bf16x2" else "f2_bits({})"
            self.put(target, f"pack({one.format(low)}, {one.format(high)})", "u4")
            return
        source = sources[0]
        if of == "bf16":
            value, of = f"bf16_to_f4({self.get(source, 'u2', array=True)})", "f4"
        elif of == "f2":
            value = self.get(source, "f2", array=True)
        else:
            width = source.width if isinstance(source, Register) else int(of[1])
            if width == int(of[1]):
                value = self.get(source, of, array=True)
            else:
                value = self.get(source, unsigned(width), vote=False, array=True)
                value = f"{value}.astype(u{of[1]})" + (f".view({of})" if of[0] != "u" else "")
        if "ftz" in modes and of == "f4":
            value = f"flush({value})"
        rounding = next((m for m in modes if m[0] == "r"), None)
        if set(modes) - {"rn", "rz", "rzi", "rni", "rmi", "rpi", "ftz", "sat"}:
            self.fail()
        if to == "bf16":
            if of == "f4" and rounding == "rn":
                self.put(target, f"f4_to_bf16({value})", "u2")
            elif of[0] in "us":
                self.put(target, f"f8_to_bf16({value}.astype(f8))", "u2")
            else:
                self.fail()
            return
        if to == "f2":
            if rounding not in (None, "rn"):
                self.fail()
            self.put(target, f"f2_bits({value})", "u2")
            return
        if to[0] == "f":
            if rounding in ("rzi", "rni", "rmi", "rpi"):
                function = {"rzi": "trunc", "rni": "rint", "rmi": "floor", "rpi": "ceil"}[rounding]
                value = f"np.{function}({value})"
            if rounding == "rz":
                expression = f"f4_toward_zero({value}.astype(f8))" if to == "f4" else f"{value}.astype(f8)"
            else:
                expression = f"{value}.astype({to})"
            if "sat" in modes:
                expression = f"np.clip(np.nan_to_num({expression}, nan=0.0), {to}(0), {to}(1))"
            self.put(target, expression, to)
            return
        if of[0] == "f":
            self.put(target, f"to_integer({value}, {to}, {rounding!r})", to)
        elif "sat" in modes:
            self.fail()
        else:
            self.put(target, value if to == of else f"{value}.astype({to})", to)

    # memory

    def op_ld(self, parts, operands):
        target, source = operands[:2]
        kind, size = self.type_of(parts), int(self.type_of(parts)[1])
        targets = target.items if isinstance(target, Vector) else (target,)
        if "param" in parts:
            if isinstance(source.base, Register):  # Of a called function.
                self.put(targets[0], self.get(source.base, unsigned(size), vote=False), unsigned(size), vote=False)
                return
            for i, item in enumerate(targets):
                self.put(item, f"X.parameter({source.base.name!r}, {source.offset + i * size}, {kind!r})", kind, False)
            return
        space = "shared" if any(p.startswith("shared") for p in parts) else "global"
        mask = self.mask()
        values = self.temporary()
        address = self.address(source, space == "global")
        self.emit(f"{values} = X.load_{space}({address}, {mask}, {size}, {len(targets)}, {self.site()})")
        if space == "shared":
            self.grain = min(self.grain, size * len(targets))
        for i, item in enumerate(targets):
            value = f"{values}[{i}]"
            self.put(item, f"{value}.view({kind})" if kind[0] != "u" else value, kind, vote=parts[-1][0] != "b")

    def op_st(self, parts, operands):
        target, source = operands[:2]
        size = int(self.type_of(parts)[1])
        sources = source.items if isinstance(source, Vector) else (source,)
        if "param" in parts:
            self.put(target.base, self.get(sources[0], unsigned(size), vote=False, array=True), unsigned(size), False)
            return
        space = "shared" if any(p.startswith("shared") for p in parts) else "global"
        words = []
        for item in sources:
            width = item.width if isinstance(item, Register) else size
            word = self.get(item, unsigned(width), vote=False, array=True)
            words.append(word if width == size else f"{word}.astype(u{size})")
        address, mask = self.address(target, space == "global"), self.mask()
        self.emit(f"X.store_{space}({address}, {mask}, {size}, ({', '.join(words)},), {self.site()})")
        if space == "shared":
            self.grain = min(self.grain, size * len(sources))

    def op_atom(self, parts, operands):
        target, address, *values = operands
        self.atomic(parts, target, address, values)

    def op_red(self, parts, operands):
        address, *values = operands
        self.atomic(parts, None, address, values)

    def atomic(self, parts, target, address, values):
        kind = self.type_of(parts)
        operation = next(
            p for p in parts if p in ("add", "min", "max", "and", "or", "xor", "exch", "cas", "inc", "dec")
        )
        space = "shared" if any(p.startswith("shared") for p in parts) else "global"
        width = {"bf16": 2, "f16x2": 4, "bf16x2": 4}.get(kind) or int(kind[1])
        words = [self.get(v, unsigned(width), vote=False, array=True) for v in values]
        where, mask = self.address(address, space == "global"), self.mask()
        result = self.temporary()
        self.emit(f"{result} = X.atomic({space!r}, {operation!r}, {kind!r}, {where}, {mask}, ({', '.join(words)},), "
                  f"{self.site()})")  # fmt: skip
        if space == "shared":
            self.grain = min(self.grain, width)
        if target is not None:
            self.put(target, result, unsigned(width), vote=False)

    def op_cp(self, parts, operands):
        if parts[1] != "async":
            self.fail()
        if "bulk" in parts:
            self.bulk(parts, operands)
        elif "commit_group" in parts:
            self.emit("X.copy_commit(M)")
        elif "wait_group" in parts:
            self.emit(f"X.copy_wait({operands[0].bits}, M)")
        elif "wait_all" in parts:
            self.emit("X.copy_commit(M)")
            self.emit("X.copy_wait(0, M)")
        elif "shared" in parts and "global" in parts:
            target, source, size, *rest = operands
            taken = self.get(rest[0], "u4", array=True) if rest and not isinstance(rest[0], Symbol) else "None"
            to, of = self.address(target, False), self.address(source, True)
            self.emit(f"X.copy({to}, {of}, {self.mask()}, {size.bits}, {taken}, {self.site()})")
            self.grain = min(self.grain, size.bits)
        else:
            self.fail()

    def bulk(self, parts, operands):
        """Tensor copies by descriptor."""
        if "commit_group" in parts:
            self.emit("X.bulk_commit(M)")
        elif "wait_group" in parts:
            self.emit(f"X.bulk_wait({operands[0].bits}, M, {'read' in parts})")
        elif "tensor" in parts and "mbarrier:complete_tx:bytes" in parts:
            target, source, barrier = operands[:3]
            coordinates = [self.get(c, "s4", array=True) for c in source.extra[0].items]
            self.emit(
                f"X.tensor_load({self.address(target, False)}, {self.address(source, True)}, "
                f"({', '.join(coordinates)},), {self.address(barrier, False)}, {self.mask()}, {self.site()})"
            )
        elif "tensor" in parts and "bulk_group" in parts:
            target, source = operands[:2]
            coordinates = [self.get(c, "s4", array=True) for c in target.extra[0].items]
            self.emit(f"X.tensor_store({self.address(target, True)}, ({', '.join(coordinates)},), "
                      f"{self.address(source, False)}, {self.mask()}, {self.site()})")  # fmt: skip
        else:
            self.fail()

    def op_mbarrier(self, parts, operands):
        what = parts[1]
        self.grain = min(self.grain, 8)
        if what == "init":
            self.emit(f"X.mbarrier_init({self.address(operands[0], False)}, {operands[1].bits}, {self.mask()}, "
                      f"{self.site()})")  # fmt: skip
        elif what == "inval":
            self.emit(f"X.mbarrier_inval({self.address(operands[0], False)}, {self.mask()}, {self.site()})")
        elif what == "arrive":
            address = next(o for o in operands if isinstance(o, Address))
            n_bytes = self.get(operands[-1], "u4", array=True) if "expect_tx" in parts else "None"
            self.emit(f"X.mbarrier_arrive({self.address(address, False)}, {n_bytes}, {self.mask()}, {self.site()})")
        elif what in ("try_wait", "test_wait") and "parity" in parts:
            target, address, parity = operands[:3]
            self.put(target, f"X.mbarrier_test({self.address(address, False)}, {self.get(parity, 'u4', array=True)}, "
                             f"{self.mask()}, {self.site()})", "p")  # fmt: skip
        else:
            self.fail()

    def op_prefetch(self, parts, operands):
        pass

    def op_fence(self, parts, operands):
        if "proxy" in parts:
            self.emit("X.fence_proxy(M)")

    def op_membar(self, parts, operands):
        pass

    def op_griddepcontrol(self, parts, operands):
        pass

    def op_setmaxnreg(self, parts, operands):
        pass

    def op_nanosleep(self, parts, operands):
        pass

    def op_trap(self, parts, operands):
        self.emit(f"X.trap({self.mask()}, {self.site()})")

    def op_bar(self, parts, operands):  # Of a warp; those of a program end a block.
        if parts[1] != "warp":
            self.fail()
        self.emit(f"X.converged(M, {self.site()})")

    # lanes of a warp

    def op_shfl(self, parts, operands):
        target, value, b, c, *_ = operands
        mode = parts[2]
        predicate = None
        if isinstance(target, Pair):
            target, predicate = target.first, target.second
        kind = self.kind(target)
        x = self.get(value, kind, vote=False, array=True)
        self.emit(f"X.converged(M, {self.site()})")
        if isinstance(b, Immediate) and isinstance(c, Immediate):
            lanes = f"X.shuffle({mode!r}, {b.bits}, {c.bits})"
        else:
            lanes = f"X.shuffle_by({mode!r}, {self.get(b, 'u4', array=True)}, {self.get(c, 'u4', array=True)})"
        found = self.temporary()
        self.emit(f"{found} = {lanes}")
        self.put(target, f"{x}[{found}[0]]", kind, vote=False)
        if predicate is not None:
            self.put(predicate, f"{found}[1]", "p")

    def op_redux(self, parts, operands):
        target, value = operands[:2]
        kind = self.type_of(parts)
        self.emit(f"X.converged(M, {self.site()})")
        self.put(target, f"X.reduce({parts[2]!r}, {self.get(value, kind, array=True)}, M)", kind)

    def op_vote(self, parts, operands):
        value = self.get(operands[1], "p")
        result = f"X.vote({parts[2]!r}, {value}, M)"
        self.put(operands[0], result, "u4" if parts[2] == "ballot" else "p")

    def op_activemask(self, parts, operands):
        self.put(operands[0], "X.vote('ballot', X.true, M)", "u4")

    def op_elect(self, parts, operands):
        self.put(operands[0].first, "X.constant('u4', 0)", "u4")
        self.put(operands[0].second, "X.elect(M)", "p")

    # matrices

    def op_ldmatrix(self, parts, operands):
        if parts[-1] != "b16" or "m8n8" not in parts:
            self.fail()
        target, source = operands
        number = int(next(p for p in parts if p in ("x1", "x2", "x4"))[1])
        values = self.temporary()
        self.emit(
            f"{values} = X.load_matrix({self.address(source, False)}, {number}, {'trans' in parts}, {self.mask()}, "
            f"{self.site()})"
        )
        self.grain = min(self.grain, 16)
        for i, item in enumerate(target.items):
            self.put(item, f"{values}[{i}]", "u4", vote=False)

    def op_stmatrix(self, parts, operands):
        if parts[-1] != "b16" or "m8n8" not in parts:
            self.fail()
        target, source = operands
        words = [self.get(i, "u4", vote=False, array=True) for i in source.items]
        self.emit(f"X.store_matrix({self.address(target, False)}, ({', '.join(words)},), {'trans' in parts}, "
                  f"{self.mask()}, {self.site()})")  # fmt: skip

    def op_mma(self, parts, operands):
        shape = next(p for p in parts if p[0] == "m" and p[1].isdigit())
        d_type, a_type, b_type, c_type = parts[-4:]
        if parts[1:3] != ["sync", "aligned"] or ("row" not in parts) or a_type != b_type or d_type != c_type:
            self.fail()
        target, a, b, c = operands
        result = self.temporary()
        kind = {"f32": "f4", "f64": "f8", "f16": "u4", "s32": "s4"}[d_type]
        operand_kind = "f8" if a_type == "f64" else "u4"
        lists = []
        for vector, k in ((a, operand_kind), (b, operand_kind), (c, kind)):
            lists.append("(" + ", ".join(self.get(i, k, vote=k[0] == "f", array=True) for i in vector.items) + ",)")
        self.emit(f"{result} = X.multiply({shape!r}, {a_type!r}, {d_type!r}, {', '.join(lists)}, {self.mask()}, "
                  f"{self.site()})")  # fmt: skip
        for i, item in enumerate(target.items):
            self.put(item, f"{result}[{i}]", kind)

    def op_wgmma(self, parts, operands):
        if parts[1] == "fence":
            return
        if parts[1] == "commit_group":
            self.emit("X.wgmma_commit(M)")
            return
        if parts[1] == "wait_group":
            self.emit(f"X.wgmma_wait({operands[0].bits}, M, {self.site()})")
            return
        if parts[1] != "mma_async":
            self.fail()
        shape = next(p for p in parts if p[0] == "m" and p[1:2].isdigit())
        d_type, a_type, b_type = parts[-3:]
        if d_type != "f32" or a_type != b_type:
            self.fail()
        target, a, b, scale_d, *flags = operands
        accumulators = ", ".join(self.get(i, "f4") for i in target.items)
        if isinstance(a, Vector):
            left = "(" + ", ".join(self.get(i, "u4", vote=False, array=True) for i in a.items) + ",)"
        else:
            left = self.get(a, "u8", array=True)
        keep = self.get(scale_d, "p")
        signs = [f.bits for f in flags]
        result = self.temporary()
        self.emit(f"{result} = X.warpgroup_multiply({shape!r}, {a_type!r}, ({accumulators},), {left}, "
                  f"{self.get(b, 'u8', array=True)}, {keep}, {signs}, M, {self.site()})")  # fmt: skip
        for i, item in enumerate(target.items):
            self.put(item, f"{result}[{i}]", "f4")
