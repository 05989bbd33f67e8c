"""Plants faults in the machine code of kernels that ship, one at a time, and says which of them are noticed.

    TRITON_CACHE_DIR=/tmp/ptx PYTHONPATH=tests:kernels python -m ptx.mutants [--seed 0] [--of-a-kernel 16] [--json FILE]

Every launch of `CASES` is executed once; then its program is changed in one place and executed again on the same
inputs. A fault is noticed by a check, by a kernel that stops or does not end, or by a result that differs by more than
two ulps of its largest value. Where no bit differs and no check reports anything, the fault has no effect, and
`reason` says why.
"""

import argparse
import json
import random
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from fastgpt_kernels.audit import shipped
from fastgpt_kernels.common.decode_weights import DecodeWeights
from fastgpt_kernels.operations.decode_step.op import DecodeStep
from fastgpt_kernels.operations.persistent_decode.op import PersistentDecoder

from . import launch, machine, translate
from .faults import Fault, barrier_faults, faults, probes
from .instructions import Entry
from .memory import Report

# Executed as the calls of `shipped`, with a target.
CASES = [
    ("sm_90", "layer_norm bf16 C=768"),
    ("sm_90", "causal_attention bf16 D=64 mask dropout"),
    ("sm_80", "causal_attention bf16 D=64"),
    ("sm_90", "linear_cross_entropy bf16 mean"),
    ("sm_90", "gelu_mlp bf16 gelu residual dropout"),
    ("sm_80", "gelu_mlp bf16 gelu_new"),
    ("sm_90", "decode small"),
    ("sm_90", "persistent decode small"),
    ("sm_90", "sample fp32 greedy"),
    ("sm_90", "sample bf16 top-k, top-p, penalty"),
]
_OPTIONS = machine.Options(max_steps=40_000)


@dataclass
class Recorded:
    """A launch with the contents of its tensors before and after."""

    case: str
    kernel: str
    compiled: Any
    grid: tuple
    arguments: tuple
    entry: Entry
    tensors: list[torch.Tensor]
    before: list[torch.Tensor]
    after: list[torch.Tensor]
    report: Report

    def run(self, program: translate.Program, options: machine.Options = _OPTIONS) -> Report:
        for tensor, content in zip(self.tensors, self.before, strict=True):
            tensor.copy_(content)
        report = Report()
        launch.execute(program, self.compiled, self.grid, self.arguments, report, options)
        return report

    def difference(self) -> str:
        """How the results differ: "none", "within two ulps" or "more"."""
        found = "none"
        for now, then in zip(self.tensors, self.after, strict=True):
            if torch.equal(_bits(now), _bits(then)):
                continue
            if not now.is_floating_point():
                return "more"
            dtype, now, then = now.dtype, now.double(), then.double()
            finite = then.isfinite()
            if (
                not torch.equal(now[~finite].nan_to_num(), then[~finite].nan_to_num())
                or not now[finite].isfinite().all()
            ):
                return "more"
            if (now[finite] - then[finite]).abs().max() > 2 * torch.finfo(dtype).eps * then[finite].abs().max():
                return "more"
            found = "within two ulps"
        return found


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).contiguous().view(torch.uint8)


def _tensors(arguments: tuple) -> Iterator[torch.Tensor]:
    for argument in arguments:
        if isinstance(argument, tuple | list):
            yield from _tensors(tuple(argument))
        elif isinstance(base := getattr(argument, "base", argument), torch.Tensor):
            yield base


def recorded(architecture: str, name: str, run: Callable[[], object]) -> list[Recorded]:
    """The launches of a call, one of each kernel."""
    found: dict[str, Recorded] = {}
    execute = launch.execute

    def note(
        program: translate.Program, compiled: Any, grid: tuple, arguments: tuple, report: Report, *rest: Any
    ) -> None:
        tensors = [t for t in _tensors(arguments) if t.numel()]
        tensors = [t.detach() for t in tensors]
        before = [t.clone() for t in tensors]
        execute(program, compiled, grid, arguments, report, *rest)
        after = [t.clone() for t in tensors]
        kernel = compiled.metadata.name
        found[kernel] = Recorded(
            f"{architecture} {name}", kernel, compiled, grid, arguments, program.entry, tensors, before, after, report
        )

    with (
        mock.patch.object(launch, "execute", note),
        mock.patch.object(torch, "ones_like", torch.randn_like),  # the gradients from which backward begins
        launch.executing(architecture, n_multiprocessors=3),
    ):
        run()
    return list(found.values())


def planted(case: Recorded, fault: Fault) -> dict[str, Any]:
    """What became of a fault."""
    row = {"case": case.case, "kernel": case.kernel, "fault": fault.what, "instruction": fault.text, "noticed": ""}
    try:
        program = translate.translate(fault.applied(case.entry))
        report = case.run(program)
    except Exception as error:  # A fault may raise anything.
        return row | {"noticed": f"stops: {type(error).__name__}"}
    more = sorted({kind for kind, _ in report.problems} - case.report.kinds())
    if more:
        return row | {"noticed": more[0]}
    difference = case.difference()
    if difference == "more":
        return row | {"noticed": "result"}
    if difference == "within two ulps":
        return row | {"missed": "the result differs within two ulps"}
    return row | {"reason": _reason(case, fault)}


def _reason(case: Recorded, fault: Fault) -> str:
    """Why a fault has no effect, as far as executing can show."""
    if fault.orders:
        return fault.orders
    probed = probes(case.entry, fault)
    if probed is None:
        return "no stored bit depends on it"
    entry, why = probed
    try:
        report = case.run(translate.translate(entry))
    except Exception:
        return "its value differs, but no stored bit depends on it"
    return why if "trap" not in report.kinds() else "its value differs, but no stored bit depends on it"


def chosen(case: Recorded, n: int, seed: int) -> list[Fault]:
    """n faults at instructions that the case executes, of as many kinds as possible."""
    source = random.Random(f"{seed} {case.case} {case.kernel}")
    kinds: dict[str, list[Fault]] = {}
    for fault in (*barrier_faults(case.entry), *faults(case.entry)):
        if case.report.blocks[fault.block]:
            kinds.setdefault(fault.what, []).append(fault)
    for group in kinds.values():
        source.shuffle(group)
    picked: list[Fault] = []
    while len(picked) < n and any(kinds.values()):
        picked += [group.pop() for group in kinds.values() if group]
    return picked[:n]


def _random(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    """As `shipped._random`, with a mean that is not zero, so that no sum is."""
    return (torch.randn(shape) + 0.5).to(dtype).requires_grad_(dtype.is_floating_point)


_N_CHANNELS, _N_HEADS = 128, 2


def _small_weights() -> DecodeWeights:
    """The weights of a narrow model; no sum of them is zero."""
    weights = shipped._decode_weights(_N_CHANNELS, _N_HEADS, torch.bfloat16)
    for tensor in (weights.wte, weights.wpe, *weights.layers[0], weights.ln_f_weight, weights.ln_f_bias):
        if isinstance(tensor, torch.Tensor):
            tensor.normal_(0.1, 0.3)
    return weights


def _small_state(n_rows: int) -> tuple[torch.Tensor, ...]:
    """After 40 tokens."""
    state = shipped._decode_state(_N_CHANNELS, _N_HEADS, n_rows, n_rows, torch.bfloat16)
    state[0].normal_(0.1, 0.3)
    for places in state[2:4]:
        places[:] = 40
    return state


def _small_decode() -> None:
    weights = _small_weights()
    DecodeStep(weights, 2, shipped._CONTEXT).decode(weights, *_small_state(2))  # type: ignore[arg-type]


def _small_persistent_decode() -> None:
    PersistentDecoder(_small_weights()).decode(*_small_state(1))  # type: ignore[arg-type]


_NARROW = {"decode small": _small_decode, "persistent decode small": _small_persistent_decode}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m ptx.mutants", description="Faults planted in machine code.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--of-a-kernel", type=int, default=16, help="faults planted in each kernel (16)")
    parser.add_argument("--only", default="", help="text of a case or of a kernel")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    shipped._VOCABULARY, shipped._random = 1041, _random
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    for architecture, name in CASES:
        torch.manual_seed(0)
        calls = {f"{call.operation} {call.label}": call.run for call in shipped.calls(architecture)}
        for case in recorded(architecture, name, (calls | _NARROW)[name]):
            if options.only in f"{case.case} {case.kernel}":
                found = [planted(case, fault) for fault in chosen(case, options.of_a_kernel, options.seed)]
                print(f"{case.case} {case.kernel}: {summary(found)}", file=sys.stderr, flush=True)
                rows += found
        if options.json:
            options.json.write_text(json.dumps(rows, indent=1) + "\n")
    print(json.dumps({"summary": summary(rows), "rows": rows}))
    return 0


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    noticed = [row for row in rows if row["noticed"]]
    reasons = Counter(row["reason"] for row in rows if "reason" in row)
    missed = [row for row in rows if "missed" in row]
    return {"planted": len(rows), "noticed": len(noticed), "missed": len(missed), "without effect": dict(reasons)}


if __name__ == "__main__":
    sys.exit(main())
