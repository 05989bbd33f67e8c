"""Searches for launch configurations that beat those in the `tiles.py` of the operations, on the GPU at hand.

    PYTHONPATH=.:kernels python -m benchmarks tune --minutes 20 --out tuned.json > tuned.txt

Every candidate is checked, and then timed in turn with the shipped configuration. The best is timed again, and kept
only if it gains more than 2% and more than the spread, because the best of many tries is partly luck.
Standard output holds what was kept, to paste. `--dry-run` takes every step on tiny shapes, on a CPU.
"""

import gc
import itertools
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from importlib import import_module
from pathlib import Path
from statistics import median
from types import ModuleType
from typing import Annotated, Any

import torch
import typer
from fastgpt_kernels.common import chip
from fastgpt_kernels.common.launch import forget_plans
from fastgpt_kernels.operations.attention import tiles as attention_tiles
from fastgpt_kernels.operations.decode_step import tiles as decode_tiles
from fastgpt_kernels.operations.gelu_mlp import tiles as gelu_mlp_tiles
from fastgpt_kernels.operations.layer_norm import tiles as layer_norm_tiles
from fastgpt_kernels.operations.linear_cross_entropy import tiles as linear_cross_entropy_tiles
from fastgpt_kernels.operations.persistent_decode import tiles as persistent_tiles
from fastgpt_kernels.operations.sampling import tiles as sampling_tiles
from rich.console import Console

from fastgpt.accounting import PRESETS, Shape
from fastgpt.bench import machine, operations
from fastgpt.bench.operations import TINY
from fastgpt.messages import first_line
from fastgpt.ops import backend

from . import steps
from .run import ROOT, checked_sizes

MIN_GAIN = 1.02
_log = Console(stderr=True, highlight=False)

# --- what can be tuned ----------------------------------------------------------------------------------------------


_TILES = {
    "add_layer_norm": layer_norm_tiles,
    "causal_attention": attention_tiles,
    "gelu_mlp": gelu_mlp_tiles,
    "linear_cross_entropy": linear_cross_entropy_tiles,
    "decode step": decode_tiles,
    "persistent decode": persistent_tiles,
    "choice": sampling_tiles,
}
# Rows of the decode steps that are tuned: those of the kernels with a norm inside, and those of the product kernel.
FEW, MANY = 1, 64


def _always(*arguments: Any) -> bool:
    return True


@dataclass(frozen=True)
class Tunable:
    """Something in the `tiles.py` of an operation that launches read: a function that returns a tile, or a number.

    operation, direction: of the case that is timed. name: of the function or the number. grid: the values to try of
    each field of the tile, or of the number itself under "". selects: whether a call of the function, by its
    arguments, is for the tile that is tuned.
    """

    operation: str
    direction: str
    name: str
    grid: Mapping[str, Sequence[int]]
    selects: Callable[..., bool] = _always

    @property
    def tiles(self) -> ModuleType:
        return _TILES[self.operation.partition(",")[0]]

    def candidates(self, shipped: Any) -> list[Any]:
        """All others of the grid, the shipped one's neighbours first."""
        if not isinstance(shipped, tuple):
            return [value for value in self.grid[""] if value != shipped]
        tiles = [shipped._replace(**dict(zip(self.grid, values, strict=True))) for values in _product(self.grid)]  # type: ignore[attr-defined]
        others = [tile for tile in tiles if tile != shipped]
        return sorted(others, key=lambda tile: sum(a != b for a, b in zip(tile, shipped, strict=True)))


def _product(grid: Mapping[str, Sequence[int]]) -> Iterator[tuple[int, ...]]:
    return itertools.product(*grid.values())


def _kernel(name: str) -> Callable[..., bool]:
    return lambda kernel, *_: kernel == name


_ROWS = {"block_rows": (1, 2, 4, 8), "num_warps": (1, 2, 4, 8, 16)}
_SCORES = {"block_q": (32, 64, 128), "block_k": (32, 64, 128), "num_warps": (4, 8), "num_stages": (2, 3, 4)}
_RESIDENT_PRODUCT = {
    "block_rows": (64, 128, 256),
    "block_cols": (64, 128, 256),
    "block_inner": (32, 64, 128),
    "num_warps": (4, 8),
    "num_stages": (2, 3, 4, 5),
    "n_resident": (1, 2),
}
# The MLP added to a residual stream, in each of its dtypes: in all rows, and in so few that tiles are narrow.
_STREAMS = tuple(f"gelu_mlp, {dtype} stream{rows}" for rows in ("", ", few rows") for dtype in ("bfloat16", "float32"))
_ATTENTIONS = ("causal_attention", f"causal_attention, dropout {operations.DROPOUT_P}")
_BOTH, _STEP = "forward+backward", "replay"
_FEW, _MANY = (f"decode step, B={n}" for n in (FEW, MANY))
_SAMPLED, _TOP_K, _TOP_P = (f"choice, {kind}, B={FEW}" for kind in ("sampled", "top-k", "top-p"))
# Of the tensor cores' tile; without them some of these are refused.
_FEW_ROWS = {"block_out": (8, 16, 32, 64), "num_stages": (2, 3, 4)}
_MANY_ROWS = {"block_cols": (64, 128, 256), "block_out": (32, 64), "num_warps": (4, 8), "num_stages": (2, 3, 4)}

TUNABLES = (
    Tunable("add_layer_norm", "forward", "layer_norm_tile", _ROWS, _kernel("fwd")),
    Tunable("add_layer_norm", _BOTH, "layer_norm_tile", _ROWS, _kernel("bwd")),
    Tunable("add_layer_norm", _BOTH, "_BWD_WARPS_PER_MULTIPROCESSOR", {"": (4, 8, 16, 32)}),
    Tunable("add_layer_norm", _BOTH, "LAYER_NORM_REDUCE_COLS", {"": (8, 16, 32, 64)}),
    Tunable("add_layer_norm", _BOTH, "LAYER_NORM_REDUCE_WARPS", {"": (2, 4, 8, 16)}),
    *(Tunable(operation, "forward", "attention_tile", _SCORES, _kernel("fwd")) for operation in _ATTENTIONS),
    *(Tunable(operation, _BOTH, "attention_tile", _SCORES, _kernel("dq")) for operation in _ATTENTIONS),
    *(Tunable(operation, _BOTH, "attention_tile", _SCORES, _kernel("dkdv")) for operation in _ATTENTIONS),
    *(
        Tunable("gelu_mlp", direction, "product_tile", _RESIDENT_PRODUCT, _kernel(kernel))
        for kernel, direction in (("hidden", "forward"), ("out", "forward"), ("pre", _BOTH))
    ),
    *(Tunable(operation, "forward", "product_tile", _RESIDENT_PRODUCT, _kernel("out")) for operation in _STREAMS),
    Tunable("gelu_mlp", _BOTH, "_WIDE_TILES_PER_MULTIPROCESSOR", {"": (1, 2, 4, 2**20)}),
    Tunable("gelu_mlp", _BOTH, "GELU_MLP_BWD_PRODUCT", {**_ROWS, "block_rows": (16, 32, 64), "block_cols": (64, 128)}),
    Tunable("linear_cross_entropy", _BOTH, "LINEAR_CROSS_ENTROPY_LANES", {"": (256, 512, 1024, 2048)}),
    Tunable("linear_cross_entropy", _BOTH, "LINEAR_CROSS_ENTROPY_WARPS", {"": (4, 8, 16, 32)}),
    Tunable("linear_cross_entropy", _BOTH, "LINEAR_CROSS_ENTROPY_BYTES", {"": (2**27, 2**28, 2**29, 2**30)}),
    *(
        Tunable(_FEW, _STEP, "decode_tile", _FEW_ROWS, _kernel(kernel))
        for kernel in ("norm_product", "project", "head")
    ),
    Tunable(_FEW, _STEP, "_DECODE_PROGRAMS", {"": (64, 128, 192, 256)}),
    Tunable(_FEW, _STEP, "_DECODE_PART_COLS", {"": (512, 1024, 2048)}),
    Tunable(_FEW, _STEP, "_DECODE_HEAD_PROGRAMS_PER_MULTIPROCESSOR", {"": (1, 2, 3, 4)}),
    Tunable(_MANY, _STEP, "decode_product_tile", _MANY_ROWS),
    *(
        Tunable(rows, _STEP, name, {"": values})
        for rows in (_FEW, _MANY)
        for name, values in (
            ("DECODE_BLOCK_KEYS", (16, 32, 64)),
            ("DECODE_ATTENTION_WARPS", (1, 2, 4, 8)),
            ("DECODE_ATTENTION_STAGES", (1, 2, 3, 4)),
        )
    ),
    Tunable("persistent decode", _STEP, "persistent_ring", {"groups": (2, 4, 8), "num_stages": (3, 4, 5, 6, 8)}),
    Tunable("persistent decode", _STEP, "PERSISTENT_KEYS_PER_SPLIT", {"": (32, 64, 128)}),
    Tunable("persistent decode", _STEP, "PERSISTENT_MAX_SPLITS", {"": (4, 8, 16)}),
    Tunable(_SAMPLED, _STEP, "SAMPLING_GROUPS", {"": (16, 32, 64, 128)}),
    Tunable(_SAMPLED, _STEP, "SAMPLING_GROUPS_WARPS", {"": (2, 4, 8)}),
    Tunable(_SAMPLED, _STEP, "sampling_choice_block", {"": (512, 1024, 2048, 4096)}),
    Tunable(_SAMPLED, _STEP, "SAMPLING_CHOICE_WARPS", {"": (4, 8, 16)}),
    *(Tunable(filtered, _STEP, "SAMPLING_WAYS", {"": (2, 4, 8)}) for filtered in (_TOP_K, _TOP_P)),
)


@contextmanager
def _replaced(tunable: Tunable, value: Any) -> Iterator[None]:
    shipped = getattr(tunable.tiles, tunable.name)
    setattr(tunable.tiles, tunable.name, value)
    forget_plans()
    try:
        yield
    finally:
        setattr(tunable.tiles, tunable.name, shipped)
        forget_plans()


@contextmanager
def patched(tunable: Tunable, value: Any) -> Iterator[None]:
    """Launches read `value` in place of what is shipped while the block runs."""
    shipped = getattr(tunable.tiles, tunable.name)

    def choose(*arguments: Any) -> Any:
        return value if tunable.selects(*arguments) else shipped(*arguments)

    with _replaced(tunable, choose if callable(shipped) else value):
        yield


def shipped_values(tunable: Tunable, run: Callable[[], Any]) -> dict[str, Any]:
    """The values of a tunable that `run` reads, by the call that returned them: mostly one."""
    shipped = getattr(tunable.tiles, tunable.name)
    if not callable(shipped):
        return {tunable.name: shipped}
    read: dict[str, Any] = {}

    def note(*arguments: Any) -> Any:
        value = shipped(*arguments)
        if tunable.selects(*arguments):
            read[f"{tunable.name}({', '.join(map(repr, arguments))})"] = value
        return value

    with _replaced(tunable, note):
        run()
    return read


def stream_cases(shape: Shape, n_rows: int, device: torch.device, dtype: torch.dtype) -> Iterator[operations.Case]:
    """Those of `_STREAMS`. few rows: the most, of halves of n_rows, whose second product takes narrow tiles."""
    n_few, n_multiprocessors = n_rows, chip.chip(device).n_multiprocessors
    while gelu_mlp_tiles.is_large_product(n_few, shape.n_embd, n_multiprocessors):
        n_few //= 2
    for n, suffix in ((n_rows, ""), (n_few, ", few rows")):
        for stream_dtype in (torch.bfloat16, torch.float32):
            case = operations.mlp_and_stream_case(shape, n, device, dtype, stream_dtype)
            yield replace(case, operation=case.operation + suffix)


# --- search ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Effort:
    """row_s: timed seconds of one row. n_rounds: of the confirmation. n_candidates: to try at most, None for all."""

    row_s: float
    n_rounds: int
    n_candidates: int | None


FULL, DRY = Effort(0.1, 5, None), Effort(0.0, 1, 1)


@dataclass
class Finding:
    """The result for one tunable at one size. gain: of the confirmed best, None where nothing was confirmed."""

    size: str
    operation: str
    direction: str
    call: str
    shipped: Any
    best: Any = None
    gain: float | None = None
    n_tried: int = 0
    n_candidates: int = 0
    refused: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Timing:
    median_s: float
    low_s: float
    high_s: float


def is_gain(shipped: Sequence[Timing], candidate: Sequence[Timing]) -> bool:
    """Whether the gain of the medians is above `MIN_GAIN` and above every round's distance between its quartiles."""
    ours, theirs = (median(timing.median_s for timing in rounds) for rounds in (candidate, shipped))
    spread = max(timing.high_s - timing.low_s for timing in (*shipped, *candidate))
    return theirs / ours > MIN_GAIN and theirs - ours > spread


def search(case: operations.Case, tunable: Tunable, size: str, effort: Effort, stop_at: float) -> list[Finding]:
    """Try the candidates of a tunable until time.monotonic() is stop_at."""
    found = []
    for call, shipped in shipped_values(tunable, lambda: operations.check(case)).items():
        candidates = tunable.candidates(shipped)[: effort.n_candidates]
        finding = Finding(size, case.operation, tunable.direction, call, shipped, n_candidates=len(candidates))
        found.append(finding)
        best_ratio = 1.0
        for candidate in candidates:
            if time.monotonic() > stop_at:
                break
            finding.n_tried += 1
            if reason := _refusal(case, tunable, candidate):
                finding.refused[repr(candidate)] = reason
                continue
            theirs, ours = _in_turn(case, tunable, shipped, candidate, effort.row_s, n_rounds=1)
            if (ratio := theirs[0].median_s / ours[0].median_s) > best_ratio:
                best_ratio, finding.best = ratio, candidate
        if finding.best is not None:
            theirs, ours = _in_turn(case, tunable, shipped, finding.best, effort.row_s, effort.n_rounds)
            if is_gain(theirs, ours):
                finding.gain = median(t.median_s for t in theirs) / median(t.median_s for t in ours)
    return found


def _refusal(case: operations.Case, tunable: Tunable, candidate: Any) -> str | None:
    with patched(tunable, candidate):
        try:
            return operations.check(case)
        except Exception as error:  # Too large for the GPU, or for the compiler: a reason to leave it, whatever it is.
            return first_line(error)


def _in_turn(
    case: operations.Case, tunable: Tunable, shipped: Any, candidate: Any, row_s: float, n_rounds: int
) -> tuple[list[Timing], list[Timing]]:
    timings: tuple[list[Timing], list[Timing]] = ([], [])
    for _ in range(n_rounds):
        for value, rounds in zip((shipped, candidate), timings, strict=True):
            with patched(tunable, value):
                rounds.append(_time(case, tunable.direction, row_s))
    return timings


def _time(case: operations.Case, direction: str, row_s: float) -> Timing:
    ours = replace(case, contenders={"fastgpt": case.contenders["fastgpt"]}, directions=(direction,))
    (row,) = operations.measure(ours, {"bandwidth": 1.0, "matrix_rate": 1.0}, row_s)
    if "skipped" in row:
        raise RuntimeError(row["skipped"])
    return Timing(row["median_s"], *row["quartiles_s"])


# --- the command ----------------------------------------------------------------------------------------------------


def main(
    out: Annotated[Path, typer.Option(help="JSON with all that was tried")],
    minutes: Annotated[float, typer.Option(help="shared by all tunables")] = 20.0,
    sizes: Annotated[str, typer.Option(help="presets, comma-separated")] = "gpt2,gpt2-xl",
    batch: Annotated[int, typer.Option(help="sequences of 1024 tokens")] = 16,
    only: Annotated[str, typer.Option(help="operations whose name begins so")] = "",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="every step on tiny shapes, on a CPU")] = False,
) -> None:
    """Search for faster launch configurations on the GPU at hand."""
    names = checked_sizes(sizes, dry_run)
    if dry_run and "TRITON_INTERPRET" not in os.environ:  # which triton reads when it is imported, as it is by now
        again = [sys.executable, "-m", "benchmarks", "tune", *sys.argv[2:]]
        os.execve(sys.executable, again, os.environ | {"TRITON_INTERPRET": "1"})
    if dry_run:
        sys.path.append(str(ROOT / "tests"))
        import_module("interpreter")  # of the tests: it mends triton's own where that computes otherwise than a GPU
    shapes = TINY if dry_run else {name: PRESETS[name] for name in names}
    device = torch.device("cpu" if dry_run else "cuda")
    gc.freeze()  # What was imported is not looked through again, which takes 0.2 s for every candidate.
    findings = []
    with backend("triton"):
        for finding in tune(shapes, device, batch, 60 * minutes, only, dry_run):
            findings.append(finding)
            _log.print(_summary(finding), soft_wrap=True)
            environment = {"machine": machine.describe(device), "versions": machine.versions(), "dry_run": dry_run}
            out.write_text(json.dumps(environment | {"findings": [asdict(one) for one in findings]}, indent=1))
    print(to_paste(findings, machine.describe(device)["gpu"] or "the interpreter"))


def tune(
    shapes: Mapping[str, Shape], device: torch.device, batch: int, seconds: float, only: str, dry_run: bool
) -> Iterator[Finding]:
    """The findings of every tunable at every size, each of which gets its share of the time that is left."""
    n_batch, n_tokens, dtype = (2, 17, torch.float32) if dry_run else (batch, 1024, torch.bfloat16)
    stop_at = time.monotonic() + seconds
    wanted = [tunable for tunable in TUNABLES if tunable.operation.startswith(only)]
    n_left = len(wanted) * len(shapes)
    for size, shape in shapes.items():
        of_generation = steps.cases(shape, (FEW, MANY), n_tokens, device, dtype)
        of_streams = stream_cases(shape, n_batch * n_tokens, device, dtype)
        of_operations = operations.cases(shape, n_batch, n_tokens, device, dtype)
        for case in itertools.chain(of_operations, of_streams, of_generation):
            for tunable in wanted:
                if tunable.operation != case.operation:
                    continue
                now = time.monotonic()
                share_s = max(0.0, stop_at - now) / max(1, n_left)
                n_left -= 1
                yield from search(case, tunable, size, DRY if dry_run else FULL, now + share_s)


def _summary(finding: Finding) -> str:
    tried = f"{finding.n_tried} of {finding.n_candidates} tried, {len(finding.refused)} refused"
    result = "nothing better" if finding.gain is None else f"{finding.best}, {finding.gain:.2f}x"
    return f"{finding.size} {finding.operation} {finding.direction}, {finding.call}: {tried}; {result}"


def to_paste(findings: Sequence[Finding], place: str) -> str:
    """What was kept, as Python with its origin."""
    lines = []
    for finding in findings:
        if finding.gain is not None:
            lines.append(
                f"# {finding.call}: {finding.gain:.2f}x the speed of {finding.shipped}, "
                f"{finding.operation} {finding.direction} of {finding.size} on {place}.\n{finding.best}"
            )
    return "\n".join(lines) or "# nothing beat the shipped configuration"
