"""What the lanes of a warp do together: shuffles, votes, and products of matrices that lie across their registers."""

# pyright: reportOptionalSubscript=false, reportOptionalCall=false, reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# An operand of a kind that an instruction does not take raises.

from .instructions import Immediate, Pair, Vector
from .writer import Writer


class Warps(Writer):
    """Opcodes from shfl to wgmma."""

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
