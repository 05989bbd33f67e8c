"""What holds along every path through the basic blocks: where diverged lanes meet again, and which accumulators are
touched too early."""

# pyright: reportOptionalSubscript=false, reportOptionalCall=false, reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# An operand of a kind that an instruction does not take raises.

from collections.abc import Iterator

from .instructions import Address, Block, Instruction, Pair, Register, Vector


def immediate_postdominators(blocks: list[Block]) -> list[int | None]:
    """For each block the nearest one that every path from it to the end passes; None where that is the end itself."""
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
