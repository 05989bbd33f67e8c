"""What launches execute, counted: the figures from which a model of time (`model.py`) starts.

A count is exact for the case that ran, and is of PTX; the machine code that ptxas makes of it has fewer instructions. A
sector is 32 bytes, the smallest piece of global memory that is moved. Shared memory has 32 banks of 4 bytes; an access
takes one pass for each word that is asked of the busiest bank.
"""

from collections import Counter
from typing import Any

from .due import FORMULAS, due

# By the first word of an instruction; the rest is arithmetic, told by its type.
_KINDS = {
    "special": "ex2 lg2 rcp rsqrt sqrt tanh sin cos div",
    "matrix": "mma wgmma.mma_async",
    "memory": "ld st atom red ldmatrix stmatrix cp prefetch",
    "exchange": "shfl vote redux elect match activemask",
    "order": "bar barrier mbarrier fence membar wgmma griddepcontrol",
    "control": "bra ret exit setmaxnreg nanosleep trap call",
    "move": "mov cvta",
    "conversion": "cvt",
}
_KIND_OF = {word: kind for kind, words in _KINDS.items() for word in words.split()}
KINDS = (*_KINDS, "float", "float64", "integer")
_WAITS = "cp.async.wait", "cp.async.bulk.wait", "wgmma.wait", "mbarrier.try_wait", "griddepcontrol.wait"


def kind_of(opcode: str) -> str:
    """One of `KINDS`. Parameters are operands of the machine code, so that loading one is a move."""
    parts = opcode.replace("::", ":").split(".")
    if opcode.startswith("ld.param"):
        return "move"
    if opcode.startswith(_WAITS) or opcode.startswith(("cp.async.commit", "cp.async.bulk.commit")):
        return "order"
    found = _KIND_OF.get(".".join(parts[:2])) or _KIND_OF.get(parts[0])
    if found is not None:
        return found
    if "f64" in parts:
        return "float64"
    return "float" if any(part.startswith(("f16", "bf16", "f32", "tf32")) for part in parts) else "integer"


def counted(launch: Any) -> Counter:
    """The counts of a launch that ran with `traffic`, summed over its programs.

    "<kind> instructions" are of warps: one for 32 lanes. "barriers" are of programs, "waits" of warps.
    """
    opcodes, seen = launch.report.opcodes, launch.report.counts
    counts = Counter({"programs": launch.grid[0] * launch.grid[1] * launch.grid[2]})
    for opcode, times in opcodes.items():
        counts[f"{kind_of(opcode)} instructions"] += times
        if opcode.startswith(("bar.sync", "barrier.sync")):
            counts["barriers"] += times / launch.n_warps
        if opcode.startswith(_WAITS):
            counts["waits"] += times
    for what in ("load", "store"):
        counts[f"{what} bytes"] = seen[f"global {what} bytes"]
        counts[f"{what} sectors"] = seen[f"global {what} sectors"]
        counts["shared passes"] += seen[f"shared {what} passes"]
        counts["fewest shared passes"] += seen[f"shared {what} least passes"]
    for name, number in seen.items():
        if name.endswith(" FLOPs"):
            counts[name] = number
    counts["atomics"] = seen["atomics"]
    return counts


def row(launch: Any) -> dict[str, Any]:
    """The counts of a launch with what is due, ready for JSON."""
    counts = counted(launch)
    result = {"kernel": launch.kernel, "warps": launch.n_warps, "shared_bytes": launch.shared, "counts": dict(counts)}
    if launch.kernel in FORMULAS:
        result["due"] = due(launch.kernel, launch.constants, counts["programs"], launch.element_size)._asdict()
    return result


def lines(rows: list[dict[str, Any]]) -> str:
    """Rows as text: for each launch what it executes, and what is due."""
    return "\n".join(_line(row) for row in rows)


def _line(row: dict[str, Any]) -> str:
    counts = Counter(row["counts"])
    shown = ", ".join(
        f"{kind} {counts[f'{kind} instructions']:,.0f}" for kind in KINDS if counts[f"{kind} instructions"]
    )
    flops = ", ".join(f"{number:.3g} {name}" for name, number in counts.items() if name.endswith(" FLOPs"))
    traffic = ", ".join(
        f"{what} {counts[f'{what} bytes']:,} bytes in {counts[f'{what} sectors']:,} sectors"
        f" ({32 * counts[f'{what} sectors'] / max(counts[f'{what} bytes'], 1):.2f})"
        for what in ("load", "store")
    )
    due = row.get("due")
    return (
        f"{row['kernel']}: {counts['programs']} programs of {row['warps']} warps\n"
        f"  instructions of warps: {shown}\n"
        f"  {flops or 'no matrix products'}; {traffic}\n"
        f"  shared memory: {counts['shared passes']:,} passes, at least {counts['fewest shared passes']:,};"
        f" {counts['barriers']:,.0f} barriers, {counts['waits']:,} waits, {counts['atomics']:,} atomics\n"
        f"  due: {'no formula' if due is None else '{flops:.3g} FLOPs, {n_bytes:,} bytes'.format(**due)}"
    )
