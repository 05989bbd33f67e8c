"""Sums, products, functions and conversions of numbers, rounded as the opcode says."""

# pyright: reportOptionalSubscript=false, reportOptionalCall=false, reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# An operand of a kind that an instruction does not take raises.

from functools import reduce

from .instructions import Register
from .writer import TYPES, Writer, unsigned


class Arithmetic(Writer):
    """Opcodes from add to cvt."""

    def arithmetic(self, symbol, parts, operands):
        target, a, b = operands
        kind = self.type_of(parts)
        if kind in ("bf16x2", "f16x2", "bf16", "f16", "f2"):
            self.half(f"lambda x, y: x {symbol} y", kind, operands)
            return
        if kind == "f32x2":
            self.pairs(f"lambda x, y: x {symbol} y", parts, operands)
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

    def pairs(self, operation: str, parts: list, operands: list) -> None:
        """An operation on two float32 in 64 bits."""
        self.checked(parts, "rn")
        values = [self.get(operand, "u8", array=True) for operand in operands[1:]]
        self.put(operands[0], f"packed_f4({operation}, {', '.join(values)})", "u8")

    def op_add(self, parts, operands):
        if parts[-1] == "s16x2":
            self.checked(parts, "s16x2")
            x, y = (self.get(operand, "u4", array=True) for operand in operands[1:])
            self.put(operands[0], f"sum_of_halves({x}, {y})", "u4")
            return
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
        if kind == "f32x2":
            self.pairs("fma4", parts, operands)
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
        target, a, *others = operands  # two of them from sm_100 on
        kind = self.type_of(parts)
        is_half = kind in ("bf16x2", "f16x2", "bf16", "f2")
        if kind[0] != "f" and not is_half:
            name = f"np.{which}imum"
        else:  # NaN gives way to a number, unless asked for.
            name = f"np.{which}imum" if "NaN" in parts else f"np.f{which[:3]}"
        if is_half:
            self.half(name, "f16" if kind == "f2" else kind, operands)
            return
        first, *more = self.flushed(parts, self.get(a, kind, array=True), *(self.get(o, kind) for o in others))
        self.put(target, reduce(lambda x, y: f"{name}({x}, {y})", more, first), kind)

    def op_max(self, parts, operands):
        self.extreme("max", parts, operands)

    def op_min(self, parts, operands):
        self.extreme("min", parts, operands)

    def op_cvt(self, parts, operands):
        target, *sources = operands
        to, of = TYPES.get(parts[-2]), TYPES.get(parts[-1])
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
