"""What ptxas makes of PTX: registers, and the instructions of the machine code that a launch executes, by unit.

The executor counts how often each basic block of PTX runs. With a number on each line of PTX, ptxas and nvdisasm tell
which line an instruction of machine code was made of. A block of machine code then runs as often as the PTX of most of
its instructions, and at most once where it is in no loop: what ptxas moved out of a loop counts where it now is. What
ptxas copied, as when it unrolls a loop, runs in turns, which the number of loads, stores and products shows, of which
it makes one of each.
"""

import re
import statistics
import subprocess
import tempfile
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from triton.backends import nvidia

from . import parse
from .instructions import Block

# The units of a multiprocessor, by the first word of a machine instruction. NVIDIA's engineers in its forum (topics
# 302018 on GH100 and 108729) and the Nsight Compute manual, "Pipelines": of the two FMA pipes only the heavy one
# multiplies integers; the ALU has other integers, logic, comparisons, selections, moves and packed conversions. Other
# words are only issued: uniform instructions, memory, products of matrices, control.
_UNITS = {
    "FMA": "FADD FMUL FFMA FADD32I FMUL32I FFMA32I HADD2 HMUL2 HFMA2 FSWZADD",
    "FMA heavy": "IMAD IMUL IDP IDP4A",
    "special": "MUFU F2F F2I I2F F2FI I2I FRND POPC FLO BREV",
    "exchange": "SHFL VOTE MATCH REDUX",
    "float64": "DADD DMUL DFMA DSETP",
    "ALU": "LOP3 LOP PLOP3 SHF SHL SHR LEA IADD IADD3 VIADD VIADDMNMX IABS IMNMX VIMNMX ISETP ISCADD SEL FSEL FSET"
    " FSETP FMNMX FCHK HSET2 HSETP2 HMNMX2 MOV PRMT SGXT BMSK F2FP I2FP P2R R2P CSEL",
}
_UNIT_OF = {word: unit for unit, words in _UNITS.items() for word in words.split()}
# PTX of which ptxas makes one instruction, and that instruction.
_ONE_OF_EACH = {
    "wgmma.mma_async": "HGMMA", "mma": "HMMA", "ld.global": "LDG", "st.global": "STG", "ex2": "MUFU", "shfl": "SHFL",
    "cp.async": "LDGSTS", "bar": "BAR", "atom": "ATOMG",
}  # fmt: skip
_STATEMENT = re.compile(r"\s*(?:\{\s*)?(?:@!?%\w+\s+)?[a-z][\w.:]*(?:\s|;)")
_LINE = re.compile(r'//## File ".*?", line (\d+)')
_INSTRUCTION = re.compile(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?(\w+)(.*)")
_LABEL = re.compile(r"\s*(\.L\S*|\$\S*):")
_ENDS_BLOCK = {"BRA", "EXIT", "RET", "CALL", "BRX", "JMP", "BSYNC"}


@dataclass
class MachineBlock:
    """instructions: first words and lines of PTX. label: how jumps call it. target: where it jumps at its end."""

    label: str = ""
    instructions: list[tuple[str, int]] = field(default_factory=list)
    target: str = ""
    in_loop: bool = False


@dataclass(frozen=True)
class MachineCode:
    """registers: of a thread."""

    registers: int
    blocks: list[MachineBlock]


def numbered(text: str) -> str:
    """PTX whose statements say on which line they stand, in place of where they are in the Python source."""
    text = re.sub(r"\.section\s+\.\w+\s*\{.*?\}", lambda found: "\n" * found[0].count("\n"), text, flags=re.S)
    lines, has_file = [], False
    for number, line in enumerate(text.splitlines(), 1):
        if re.match(r"\s*\.(loc|file)\b", line):
            continue
        if not has_file and re.match(r"\s*\.(visible|extern|func|global|weak)\b", line):
            lines.append('.file 1 "ptx"')
            has_file = True
        if _STATEMENT.match(line):
            lines.append(f".loc 1 {number} 1")
        lines.append(line)
    return "\n".join(lines) + "\n"


def compiled(text: str, architecture: str) -> MachineCode:
    """The machine code of numbered PTX. architecture: sm_90, for example."""
    tools = Path(nvidia.__path__[0], "bin")
    target = architecture + "a" * (architecture == "sm_90")  # wgmma is of sm_90a
    with tempfile.TemporaryDirectory() as folder:
        source, code = Path(folder, "kernel.ptx"), Path(folder, "kernel.cubin")
        source.write_text(text)
        command = [tools / "ptxas", "-v", "-lineinfo", f"--gpu-name={target}", source, "-o", code]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
        command = [tools / "nvdisasm", "-g", "-c", code]
        listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"Used (\d+) registers", said)
    assert found is not None, said
    blocks = _basic_blocks(listing)
    places = {block.label: i for i, block in enumerate(blocks) if block.label}
    for last, block in enumerate(blocks):
        for inside in blocks[places.get(block.target, last + 1) : last + 1]:  # none, where it jumps forward
            inside.in_loop = True
    return MachineCode(int(found[1]), blocks)


def _basic_blocks(listing: str) -> list[MachineBlock]:
    """Without padding, and without the paths of rare operands behind the kernel, such as denormal divisors."""
    blocks, number = [MachineBlock()], 0
    for line in listing.splitlines():
        if (label := _LABEL.match(line)) is not None:
            if "__internal_" in label[1]:
                break
            blocks.append(MachineBlock(label[1]))
        elif (place := _LINE.search(line)) is not None:
            number = int(place[1])
        elif (found := _INSTRUCTION.match(line)) is not None and found[1] != "NOP":
            blocks[-1].instructions.append((found[1], number))
            if found[1] in _ENDS_BLOCK:
                jump = re.search(r"\.L\w+", found[2])
                blocks[-1].target = jump[0] if jump and found[1] == "BRA" else ""
                blocks.append(MachineBlock())
    return blocks


def executed(text: str, times: Mapping[int, int], architecture: str) -> tuple[int, Counter]:
    """Registers of a thread, and how many instructions of machine code a launch executes: all, and by unit.

    times: how often each basic block of the PTX was executed, by warps.
    """
    text = numbered(text)
    code = compiled(text, architecture)
    block_of = {}  # of PTX, by line; a block that none of its lines is in is never asked for
    blocks = parse.parse(text).blocks
    for block in blocks:
        for instruction in (*block.instructions, *([] if block.last is None else [block.last])):
            block_of.setdefault(int(instruction.place.split(":")[1]), block.number)
    copies = _copies(blocks, code)
    counts: dict[str, float] = defaultdict(float)
    for block in code.blocks:
        made_of = [block_of[line] for _, line in block.instructions if line in block_of]
        if not made_of:
            continue
        n_times = statistics.median_low(times.get(number, 0) / copies[number] for number in made_of)
        if not block.in_loop:
            n_times = min(n_times, times.get(0, 0))
        for word, _ in block.instructions:
            counts["machine instructions"] += n_times
            if word in _UNIT_OF:
                counts[f"{_UNIT_OF[word]} machine instructions"] += n_times
    return code.registers, Counter({name: round(n) for name, n in counts.items()})


def _copies(blocks: list[Block], code: MachineCode) -> dict[int, float]:
    """How many copies of each block of PTX the machine code runs in turns: those in its loops."""
    due, found = Counter(), Counter()
    made = Counter(one for block in code.blocks if block.in_loop for one in block.instructions)
    for block in blocks:
        for instruction in block.instructions:
            word = next((w for start, w in _ONE_OF_EACH.items() if instruction.opcode.startswith(start)), "")
            n_made = made[word, int(instruction.place.split(":")[1])]
            due[block.number] += n_made > 0
            found[block.number] += n_made
    return {block.number: max(1.0, found[block.number] / (due[block.number] or 1)) for block in blocks}
