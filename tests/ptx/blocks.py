"""Basic blocks: instructions between a label or a jump and the next one, and what follows a block."""

from .instructions import Block, PtxError


def basic_blocks(statements: list) -> list[Block]:
    """Cut statements, ("label", name) or ("code", instruction), at labels that are jumped to, at jumps and barriers."""
    blocks, labels = [Block(0)], {}

    def fresh() -> None:
        if blocks[-1].instructions or blocks[-1].end != ("next",):
            blocks.append(Block(len(blocks)))

    targets = {rest[0].operands[0].name for kind, *rest in statements if kind == "code" and rest[0].parts[0] == "bra"}
    for kind, *rest in statements:
        if kind == "label":
            if rest[0] not in targets:  # Those of debug information split no block.
                continue
            fresh()
            labels[rest[0]] = blocks[-1].number
            continue
        instruction = rest[0]
        base = instruction.parts[0]
        if base == "bra":
            if instruction.guard is None:
                blocks[-1].end = ("branch", instruction.operands[0].name, None, False)
            else:
                blocks[-1].end = ("branch", instruction.operands[0].name, instruction.guard, instruction.guard_negated)
            blocks[-1].last = instruction
            fresh()
        elif base in ("ret", "exit"):
            blocks[-1].end = ("exit", instruction.guard, instruction.guard_negated)
            blocks[-1].last = instruction
            fresh()
        elif base in ("bar", "barrier") and "sync" in instruction.parts and "warp" not in instruction.parts:
            if instruction.guard is not None:
                raise PtxError(f"a barrier under a predicate: {instruction}")
            identity = instruction.operands[0].bits
            n_threads = instruction.operands[1].bits if len(instruction.operands) > 1 else 0
            blocks[-1].end = ("barrier", identity, n_threads)
            blocks[-1].last = instruction
            fresh()
        else:
            blocks[-1].instructions.append(instruction)
    if blocks[-1].end == ("next",):
        blocks[-1].end = ("exit", None, False)
    for block in blocks:
        if block.end[0] == "branch":
            block.end = ("branch", labels[block.end[1]], *block.end[2:])
    return blocks
