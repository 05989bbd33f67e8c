"""Loads, stores and atomics, asynchronous copies, and the barriers and fences that order them."""

# pyright: reportOptionalSubscript=false, reportOptionalCall=false, reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# An operand of a kind that an instruction does not take raises.

from .grid_order import reaches_programs
from .instructions import Address, Register, Symbol, Vector
from .writer import Writer, unsigned


class Memory(Writer):
    """Opcodes from ld to bar.warp.sync. The text calls the machine, `X.load_global(...)`, which does the work."""

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
        self.narrow(space, size * len(targets))
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
        self.narrow(space, size * len(sources))

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
        self.narrow(space, width)
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
            self.narrow("shared", size.bits)
            self.narrow("global", size.bits)
        else:
            self.fail()

    def bulk(self, parts, operands):
        """Tensor copies by descriptor."""
        if "commit_group" in parts:
            self.emit("X.bulk_commit(M)")
        elif "wait_group" in parts:
            self.emit(f"X.bulk_wait({operands[0].bits}, M)")
        elif "tensor" in parts and "mbarrier:complete_tx:bytes" in parts:
            target, source, barrier = operands[:3]
            coordinates = [self.get(c, "s4", array=True) for c in source.extra[0].items]
            self.emit(
                f"X.tensor_load({self.address(target, False)}, {self.address(source, True)}, "
                f"({', '.join(coordinates)},), {self.address(barrier, False)}, {self.mask()}, {self.site()})"
            )
        elif "tensor" in parts and "bulk_group" in parts:
            self.narrow("global", 1)  # Of elements, whose size the descriptor tells.
            target, source = operands[:2]
            coordinates = [self.get(c, "s4", array=True) for c in target.extra[0].items]
            self.emit(f"X.tensor_store({self.address(target, True)}, ({', '.join(coordinates)},), "
                      f"{self.address(source, False)}, {self.mask()}, {self.site()})")  # fmt: skip
        else:
            self.fail()

    def op_mbarrier(self, parts, operands):
        what = parts[1]
        self.narrow("shared", 8)
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
        else:
            self.op_membar(parts, operands)

    def op_membar(self, parts, operands):
        if reaches_programs(parts):
            self.emit("X.fence(M)")

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
        self.emit(f"X.warp_sync(M, {self.site()})")
