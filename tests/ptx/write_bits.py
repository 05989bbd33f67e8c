"""Moves, comparisons, and integers bit by bit."""

# pyright: reportOptionalSubscript=false, reportOptionalCall=false, reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# An operand of a kind that an instruction does not take raises.

from .instructions import Immediate, Pair, Register, Vector
from .writer import Writer, unsigned

_COMPARISONS = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">=",
                "lo": "<", "ls": "<=", "hi": ">", "hs": ">="}  # fmt: skip


class Bits(Writer):
    """Opcodes from mov to brev."""

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
        if kind in ("f16x2", "bf16x2"):
            self.compare_pairs(comparison, kind == "bf16x2", operands, x, y)
            return
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
        expression = self.comparison(comparison, x, y, kind[0] == "f")
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

    def comparison(self, comparison, x, y, is_float):
        """The expression that compares two temporaries."""
        if comparison == "num":
            return f"({x} == {x}) & ({y} == {y})"
        if comparison == "nan":
            return f"({x} != {x}) | ({y} != {y})"
        unordered = is_float and comparison.endswith("u")
        name = comparison[:-1] if unordered else comparison
        if name not in _COMPARISONS:
            self.fail()
        expression = f"{x} {_COMPARISONS[name]} {y}"
        if unordered:
            return f"({expression}) | ({x} != {x}) | ({y} != {y})"
        if is_float and name == "ne":
            return f"({expression}) & ({x} == {x}) & ({y} == {y})"
        return expression

    def compare_pairs(self, comparison, is_bf16, operands, x, y):
        """setp of f16x2 and bf16x2: a predicate for the low halves of two words, and one for the high halves."""
        pair, a, b = operands
        if not isinstance(pair, Pair):
            self.fail()
        for temporary, operand in ((x, a), (y, b)):
            self.emit(f"{temporary} = both_halves({self.get(operand, 'u4', vote=False, array=True)}, {is_bf16})")
        for half, target in enumerate((pair.first, pair.second)):
            self.put(target, self.comparison(comparison, f"{x}[{half}]", f"{y}[{half}]", True), "p")

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
