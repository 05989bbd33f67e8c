"""Parse the text of a PTX module into basic blocks.

This reads what triton emits, not the whole language: one entry point, device functions that are called directly (they
are inlined with registers of their own), nested scopes with local registers, and `.loc` lines, which give the place
in the Python source for errors.
"""

# pyright: reportOptionalSubscript=false, reportOptionalMemberAccess=false
# Text outside the grammar raises, either PtxError or because a match is None.

import re
from dataclasses import dataclass, field

from .blocks import basic_blocks
from .instructions import (
    WIDTHS,
    Address,
    Entry,
    Immediate,
    Instruction,
    Pair,
    PtxError,
    Register,
    Special,
    Symbol,
    Vector,
)


@dataclass
class _Function:
    name: str
    parameters: list
    statements: list
    is_entry: bool
    n_threads: int = 0
    results: list = field(default_factory=list)


_LOC = re.compile(r"^\s*\.loc\s+(\d+)\s+(\d+)\s+(\d+)(.*)$")
_HEADER = re.compile(r"\.(?:visible|extern|weak)?\s*\.?(entry|func)\b")
_LABEL = re.compile(r"\s*([$%A-Za-z_][\w$]*)\s*:(?!:)")


def parse(text: str) -> Entry:
    """The one entry of a module."""
    target = re.search(r"\.target\s+(\w+)", text).group(1)
    functions, symbols = _functions(text)
    entry = next((f for f in functions.values() if f.is_entry), None)
    if entry is None:
        raise PtxError("no entry point")
    registers: dict[str, Register] = {}
    counter = [0]
    statements = _resolve(entry, functions, registers, counter, "", {})
    blocks = basic_blocks(statements)
    parameters, offset = {}, 0
    for kind, name, size, align in entry.parameters:
        offset = -(-offset // align) * align
        parameters[name] = (kind, size, offset)
        offset += size
    return Entry(entry.name, parameters, blocks, entry.n_threads, target, registers, symbols)


# --- statements -----------------------------------------------------------------------------------------------------


def _functions(text: str) -> tuple[dict[str, _Function], dict]:
    lines, place = [], ""
    for line in text.splitlines():
        loc = _LOC.match(line)
        if loc:
            shown = re.search(r"//\s*(\S+:\d+:\d+)", line)
            place = shown.group(1) if shown else f"file{loc[1]}:{loc[2]}:{loc[3]}"
            lines.append(f"\x01{place}\x02")
            continue
        line = line.split("//")[0]
        if re.match(r"\s*\.(file|version|target|address_size)\b", line):
            continue
        lines.append(line)
    source = "\n".join(lines)
    source = re.sub(r"/\*.*?\*/", " ", source, flags=re.S)
    # Debug sections hold data only, and no instructions.
    source = re.sub(r"\.section\s+\.\w+\s*\{.*?\}", " ", source, flags=re.S)
    functions, symbols, position, place = {}, {}, 0, ""
    current, depth = None, 0
    while True:
        position, place = _skip_blank(source, position, place)
        if position >= len(source):
            break
        if current is None:
            if _HEADER.match(source, position):
                stop = min(i for i in (source.find("{", position), source.find(";", position)) if i >= 0)
                header = re.sub(r"\x01.*?\x02", " ", source[position:stop])
                position = stop + 1
                if source[stop] == "{":
                    current, depth = _header(header), 0
                continue
            stop = source.index(";", position)
            _module_variable(source[position:stop], symbols)
            position = stop + 1
            continue
        character = source[position]
        if character == "{":
            depth += 1
            current.statements.append(("open",))
            position += 1
        elif character == "}":
            position += 1
            if depth == 0:
                functions[current.name] = current
                current = None
            else:
                depth -= 1
                current.statements.append(("close",))
        elif (label := _LABEL.match(source, position)) is not None:
            current.statements.append(("label", label[1]))
            position = label.end()
        else:
            stop = source.index(";", position)
            statement = " ".join(re.sub(r"\x01.*?\x02", " ", source[position:stop]).split())
            current.statements.append(("code", statement, place))
            position = stop + 1
    return functions, symbols


def _skip_blank(source: str, position: int, place: str) -> tuple[int, str]:
    while position < len(source):
        if source[position] == "\x01":
            stop = source.index("\x02", position)
            place, position = source[position + 1 : stop], stop + 1
        elif source[position].isspace() or source[position] == ";":
            position += 1
        else:
            break
    return position, place


def _module_variable(text: str, symbols: dict) -> None:
    found = re.search(
        r"\.(shared|global|const)\b.*?\.(\w+)\s+([\w$]+)\s*(?:\[(\d*)\])?\s*(?:=\s*\{([^}]*)\})?\s*$", text
    )
    if not found:
        if text.strip():
            raise PtxError(f"cannot read the declaration: {text.strip()}")
        return
    space, kind, name, count, values = found.groups()
    n_bytes = WIDTHS.get(kind, 1) * int(count or 0)
    data = bytes(int(v, 0) for v in values.split(",")) if values and kind == "b8" else b""
    symbols[name] = (space, n_bytes, data)


def _header(text: str) -> _Function:
    kind = _HEADER.search(text)[1]
    rest = text[_HEADER.search(text).end() :]
    results = []
    if (found := re.match(r"\s*\(([^)]*)\)\s*([\w$]+)", rest)) is not None:  # (results) name (parameters)
        results, name = _parameters(found[1]), found[2]
        rest = rest[found.end() :]
    else:
        found = re.match(r"\s*([\w$]+)", rest)
        name, rest = found[1], rest[found.end() :]
    found = re.search(r"\(([^)]*)\)", rest)
    threads = re.search(r"\.(?:reqntid|maxntid)\s+(\d+)", rest)
    return _Function(name, _parameters(found[1] if found else ""), [], kind == "entry",
                     int(threads[1]) if threads else 0, results)  # fmt: skip


def _parameters(text: str) -> list[tuple[str, str, int, int]]:
    """(type, name, bytes, alignment) of each declaration."""
    parameters = []
    for part in text.split(","):
        if not part.strip():
            continue
        found = re.search(r"([\w$]+)\s*(?:\[(\d+)\])?\s*$", part)
        name, count = found[1], found[2]
        kind = next(w for w in re.findall(r"\.(\w+)", part) if w in WIDTHS)
        declared = re.search(r"\.align\s+(\d+)", part) if count else None
        size = WIDTHS[kind] * int(count or 1)
        parameters.append((kind, name, size, int(declared[1]) if declared else WIDTHS[kind]))
    return parameters


# --- operands -------------------------------------------------------------------------------------------------------


def _split(text: str) -> list[str]:
    """Split at the commas outside of brackets."""
    parts, depth, start = [], 0, 0
    for i, character in enumerate(text):
        if character in "[{(":
            depth += 1
        elif character in "]})":
            depth -= 1
        elif character == "," and depth == 0:
            parts.append(text[start:i].strip())
            start = i + 1
    last = text[start:].strip()
    return [*parts, last] if last else parts


_FLOAT = re.compile(r"0([fFdD])([0-9A-Fa-f]+)$")
_INTEGER = re.compile(r"-?(0[xX][0-9A-Fa-f]+|\d+)U?$")


def _operand(text: str, names: dict):
    text = text.strip()
    if text.startswith("{"):
        return Vector(tuple(_operand(t, names) for t in _split(text[1:-1])))
    if text.startswith("["):
        return _address(text[1:-1].strip(), names)
    if "|" in text:
        return Pair(*(_operand(t, names) for t in text.split("|")))
    if text in names:
        return names[text]
    if (found := _FLOAT.match(text)) is not None:
        return Immediate(int(found[2], 16), 4 if found[1] in "fF" else 8)
    if _INTEGER.match(text):
        return Immediate(int(text.rstrip("U"), 0))
    if re.match(r"-?\d+\.\d+$", text):
        return Symbol(text)  # Of createpolicy, which changes nothing here.
    if text.startswith("%"):
        return Special(text)
    if text.startswith("!"):
        return Vector(("not", _operand(text[1:], names)))
    return Symbol(text)


def _address(text: str, names: dict) -> Address:
    parts = _split(text)
    extra = tuple(_operand(t, names) for t in parts[1:])
    found = re.match(r"(\S+?)\s*(?:([+-])\s*(-?\w+))?$", parts[0])
    offset = int(found[3], 0) * (-1 if found[2] == "-" else 1) if found[3] else 0
    return Address(_operand(found[1], names), offset, extra)


# --- names, calls ---------------------------------------------------------------------------------------------------


def _resolve(function: _Function, functions: dict, registers: dict, counter: list, suffix: str, bound: dict) -> list:
    """The statements of a function with operands read, names made unique and calls replaced by what is called.

    bound: parameters of a called function, as the registers that hold them.
    """
    scopes: list[dict] = [dict(bound)]
    result: list = []
    labels = _label_scopes(function.statements)
    scope_numbers, n_scopes = [0], 0

    def label(name: str) -> str:
        """Find a label. If several scopes have it, the innermost is meant."""
        for number in reversed(scope_numbers):
            if name in labels[number]:
                return f"{name}{suffix}#{number}"
        raise PtxError(f"no label {name} in {function.name}")

    def visible() -> dict:
        merged: dict = {}
        for scope in scopes:
            merged.update(scope)
        return merged

    names = visible()

    def new(name: str, width: int) -> Register:
        unique = name + suffix
        if unique in registers:
            counter[0] += 1
            unique = f"{name}{suffix}'{counter[0]}"
        registers[unique] = Register(unique, width)
        return registers[unique]

    for statement in function.statements:
        if statement[0] == "open":
            scopes.append({})
            n_scopes += 1
            scope_numbers.append(n_scopes)
            continue
        if statement[0] == "close":
            scopes.pop()
            scope_numbers.pop()
            names = visible()
            continue
        if statement[0] == "label":
            result.append(("label", label(statement[1])))
            continue
        _, text, place = statement
        if text.startswith(".reg"):
            found = re.match(r"\.reg\s+\.(\w+)\s+(.*)$", text)
            width = WIDTHS[found[1]]
            for name in _split(found[2]):
                if (many := re.match(r"(.+)<(\d+)>$", name)) is not None:
                    for i in range(int(many[2])):
                        scopes[-1][f"{many[1]}{i}"] = new(f"{many[1]}{i}", width)
                else:
                    scopes[-1][name] = new(name, width)
            names = visible()
            continue
        if text.startswith(".param"):
            found = re.match(r"\.param\s+(?:\.align\s+\d+\s+)?\.(\w+)\s+([\w$]+)", text)
            scopes[-1][found[2]] = new(f"param:{found[2]}", WIDTHS[found[1]])
            names = visible()
            continue
        if text.startswith("."):
            if text.startswith((".pragma", ".loc", ".local")):
                continue
            raise PtxError(f"cannot read: {text}")
        instruction = _instruction(text, place, names)
        for operand in instruction.operands:
            _no_unknown_registers(operand, instruction)
        if instruction.opcode.startswith("call"):
            result += _inline(instruction, functions, registers, counter)
        elif instruction.opcode in ("ret", "exit") and suffix:
            result.append(("code", Instruction("bra", [Symbol(f"return{suffix}")], instruction.guard,
                                               instruction.guard_negated, text, place)))  # fmt: skip
        else:
            if instruction.opcode.split(".")[0] == "bra":
                instruction.operands = [Symbol(label(instruction.operands[0].name))]
            result.append(("code", instruction))
    return result


def _label_scopes(statements: list) -> list[set[str]]:
    """The labels of each scope, in the order in which they open; the function's own first."""
    scopes, stack = [set()], [0]
    for statement in statements:
        if statement[0] == "open":
            scopes.append(set())
            stack.append(len(scopes) - 1)
        elif statement[0] == "close":
            stack.pop()
        elif statement[0] == "label":
            scopes[stack[-1]].add(statement[1])
    return scopes


def _instruction(text: str, place: str, names: dict) -> Instruction:
    whole, guard, negated = text, None, False
    if text.startswith("@"):
        found = re.match(r"@(!?)\s*(%?[\w$]+)\s+(.*)$", text)
        negated, guard, text = bool(found[1]), names[found[2]], found[3]
    opcode, _, rest = text.partition(" ")
    return Instruction(opcode, [_operand(t, names) for t in _split(rest)], guard, negated, whole, place)


def _no_unknown_registers(operand: object, instruction: Instruction) -> None:
    if isinstance(operand, Special) and re.match(r"%(r|rs|rd|p|f|fd|h|hh)\d+$", operand.name):
        raise PtxError(f"register {operand.name} is not declared: {instruction}")


def _inline(call: Instruction, functions: dict, registers: dict, counter: list) -> list:
    """call.uni (results), name, (arguments)"""
    groups = _split(call.text.partition(" ")[2])
    places = {i: g for i, g in enumerate(groups) if not g.startswith("(")}
    position, name = next(iter(places.items()))
    arguments = _split(groups[position + 1][1:-1]) if position + 1 < len(groups) else []
    results = _split(groups[0][1:-1]) if position == 1 else []
    if name not in functions:
        raise PtxError(f"call of {name}, which is not here: {call}")
    called = functions[name]
    counter[0] += 1
    suffix = f"@{counter[0]}"
    bound = {}
    known = {r.name.split("'")[0]: r for r in registers.values()}  # The latest of a name is the one in scope.
    for (_, parameter, _, _), argument in zip(called.parameters, arguments, strict=True):
        bound[parameter] = known[f"param:{argument}"]
    for (_, parameter, _, _), argument in zip(called.results, results, strict=True):
        bound[parameter] = known[f"param:{argument}"]
    body = _resolve(called, functions, registers, counter, suffix, bound)
    return [*body, ("label", f"return{suffix}")]
