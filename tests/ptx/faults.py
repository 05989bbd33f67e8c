"""Faults of machine code: what can be changed in an instruction, and how to see whether its value changes.

A fault replaces one instruction of a basic block by another, or removes it, or removes the barrier at a block's end.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from .instructions import Address, Entry, Immediate, Instruction, Register, Vector

_NO_CONFLICT = "no two warps touch one place on both sides of the barrier"
_NOTHING_IN_FLIGHT = "nothing touches what it waits for or fences before the next one"
_NO_LANES = "no two lanes touch one place on both sides of it"
_SCOPES = "no program touches what another one wrote before it"
_SEMANTICS = "release", "acquire", "acq_rel"
_COMPARES = {"lt": "le", "le": "lt", "gt": "ge", "ge": "gt", "eq": "ne", "ne": "eq"}
_OPCODES = {
    "add": "sub", "sub": "add", "max": "min", "min": "max", "and": "or", "or": "and", "shl": "shr", "shr": "shl",
    "ex2": "sqrt",
}  # fmt: skip
_WITH_CONSTANTS = "mov", "add", "xor", "and", "or", "shl", "shr", "mul", "mad", "sub"
_WAITS = "cp.async.wait_group", "cp.async.bulk.wait_group", "wgmma.wait_group"
_COMMITS = "cp.async.commit_group", "cp.async.bulk.commit_group", "wgmma.commit_group"
_ACCESSES = "ld.global", "ld.shared", "st.global", "st.shared", "ldmatrix", "stmatrix", "cp.async.ca", "cp.async.cg"


@dataclass(frozen=True)
class Fault:
    """what: the kind. place: of the instruction in its block; None for the barrier at the block's end. orders: why it
    has no effect, where it changes the order of accesses and no value."""

    what: str
    block: int
    place: int | None
    text: str
    by: Instruction | None = None
    orders: str = ""

    def applied(self, entry: Entry) -> Entry:
        block = entry.blocks[self.block]
        if self.place is None:
            changed = replace(block, end=("next",), last=None)
        else:
            by = [] if self.by is None else [self.by]
            changed = replace(block, instructions=_spliced(block.instructions, self.place, by))
        return _with_block(entry, self.block, changed)


def _spliced(instructions: list, place: int, by: list) -> list:
    return [*instructions[:place], *by, *instructions[place + 1 :]]


def _with_block(entry: Entry, number: int, block: object) -> Entry:
    return replace(entry, blocks=[*entry.blocks[:number], block, *entry.blocks[number + 1 :]])


def barrier_faults(entry: Entry) -> Iterator[Fault]:
    for block in entry.blocks:
        if block.end[0] == "barrier":
            yield Fault("barrier left out", block.number, None, str(block.last), orders=_NO_CONFLICT)


def faults(entry: Entry) -> Iterator[Fault]:
    """All faults that instructions can have."""
    for block in entry.blocks:
        for place, instruction in enumerate(block.instructions):
            for what, by, orders in _changes(instruction):
                yield Fault(what, block.number, place, str(instruction), by, orders)


def _changes(i: Instruction) -> Iterator[tuple[str, Instruction | None, str]]:
    parts, operands = i.parts, i.operands

    def at(place: int, operand: object) -> Instruction:
        return replace(i, operands=[*operands[:place], operand, *operands[place + 1 :]])

    def with_word(word: str, by: str) -> Instruction:
        return replace(i, opcode=i.opcode.replace(f".{word}", f".{by}"))

    def swapped(first: int, second: int) -> Instruction:
        return replace(at(first, operands[second]), operands=[
            operands[second] if k == first else operands[first] if k == second else o for k, o in enumerate(operands)
        ])  # fmt: skip

    if i.opcode.startswith(_WAITS):
        yield "wait for a group less", at(0, Immediate(operands[0].bits + 1)), _NOTHING_IN_FLIGHT
    elif i.opcode.startswith(_COMMITS):
        yield "commit left out", None, _NOTHING_IN_FLIGHT
    elif i.opcode.startswith("fence.proxy"):
        yield "fence left out", None, _NOTHING_IN_FLIGHT
    elif i.opcode.startswith("mbarrier.try_wait"):
        yield "mbarrier not waited for", Instruction("mov.pred", [operands[0], Immediate(1)]), _NOTHING_IN_FLIGHT
    elif i.opcode.startswith("mbarrier.arrive") and isinstance(operands[-1], Immediate):
        yield "half of the bytes expected", at(-1 % len(operands), Immediate(operands[-1].bits // 2)), ""
    elif i.opcode.startswith("cp.async.bulk.tensor"):
        for place, operand in enumerate(operands):
            if isinstance(operand, Address) and operand.extra and len(operand.extra[0].items) > 1:
                turned = Vector(operand.extra[0].items[::-1])
                yield "coordinates exchanged", at(place, replace(operand, extra=(turned, *operand.extra[1:]))), ""
    elif parts[0] == "wgmma" and parts[1] == "mma_async" and isinstance(operands[1], Register):
        yield "operands of a product exchanged", swapped(1, 2), ""
    elif parts[0] == "mma":
        first, second, *rest = operands[1].items
        yield "elements of an operand exchanged", at(1, Vector((second, first, *rest))), ""
    elif parts[0] == "shfl" and isinstance(operands[2], Immediate):
        distance = operands[2].bits
        yield "shuffle from another lane", at(2, Immediate(distance // 2 if distance > 1 else 2)), ""
    elif parts[0] == "setp" and parts[1] in _COMPARES:
        yield "comparison", replace(i, opcode=i.opcode.replace(f".{parts[1]}", f".{_COMPARES[parts[1]]}", 1)), ""
    elif parts[0] == "selp":
        yield "choices exchanged", swapped(1, 2), ""
    elif parts[0] == "cvt" and len(operands) == 3:
        yield "halves of a pair exchanged", swapped(1, 2), ""
    if i.opcode.startswith(_ACCESSES) and "param" not in parts:
        for place, operand in enumerate(operands):
            if isinstance(operand, Address):
                yield "address 16 bytes further", at(place, replace(operand, offset=operand.offset + 16)), ""
    if parts[:2] == ["bar", "warp"]:
        yield "synchronisation of a warp left out", None, _NO_LANES
    if parts[0] in ("atom", "red", "ld", "st", "fence"):
        yield from (("scope of a program", with_word(word, "cta"), _SCOPES) for word in ("gpu", "sys") if word in parts)
    if parts[0] in ("atom", "red", "ld", "st"):
        yield from (("no semantics", with_word(word, "relaxed"), _SCOPES) for word in _SEMANTICS if word in parts)
    if i.guard is not None:
        yield "predicate left out", replace(i, guard=None), ""
        yield "predicate negated", replace(i, guard_negated=not i.guard_negated), ""
    if parts[0] in _OPCODES and "pred" not in parts:
        yield "another operation", replace(i, opcode=_OPCODES[parts[0]] + i.opcode[len(parts[0]) :]), ""
    if parts[0] in _WITH_CONSTANTS:
        for place, operand in enumerate(operands):
            if isinstance(operand, Immediate) and not operand.float_width:
                is_descriptor = operand.bits >= 1 << 32
                more = 1 << 32 if is_descriptor else 1
                what = "matrix descriptor" if is_descriptor else "constant one more"
                yield what, at(place, Immediate(operand.bits + more)), ""


def probes(entry: Entry, fault: Fault) -> tuple[Entry, str] | None:
    """The entry with a trap where the fault would change a value or a predicate, and what it means if none is met."""
    block = entry.blocks[fault.block]
    if fault.place is None or fault.by is None:
        return None
    original = block.instructions[fault.place]
    if fault.what == "predicate left out":
        trap = Instruction("trap", [], original.guard, not original.guard_negated)
        changed = replace(block, instructions=_spliced(block.instructions, fault.place, [original, trap]))
        return _with_block(entry, fault.block, changed), "the predicate is true in every lane"
    target = original.operands[0] if original.operands else None
    if not isinstance(target, Register):
        return None
    other, differs = Register("%probe", target.width), Register("%differs", 0)
    compare = f"setp.ne.u{8 * target.width}" if target.width else "xor.pred"
    test = [
        replace(fault.by, operands=[other, *fault.by.operands[1:]]),
        original,
        Instruction(compare, [differs, target, other], fault.by.guard, fault.by.guard_negated),
        Instruction("trap", [], differs),
    ]
    registers = entry.registers | {other.name: other, differs.name: differs}
    changed = replace(block, instructions=_spliced(block.instructions, fault.place, test))
    return replace(_with_block(entry, fault.block, changed), registers=registers), "the value is the same in every lane"
