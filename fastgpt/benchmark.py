"""Tokens/s of fastgpt beside transformers with the same weights: gated by parity, interleaved, as medians.

Contenders take turns, run by run and in rotating order, within one process: what disturbs the machine disturbs them
alike, so ratios hold where absolute figures wander.
"""

import ctypes
import gc
import os
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
from torch import Tensor
from transformers import GPT2LMHeadModel

from . import accounting, ops, parity, workloads
from .doctor import versions
from .generation import DTYPES, default_device
from .parity import ParityError
from .plotting import plot, render
from .workloads import BASELINES, OURS, WORKLOADS, Work, seconds, synchronize

__all__ = ["BenchmarkOptions", "ParityError", "plot", "progress_bar", "render", "run_benchmark"]

SCHEMA = 1
MIN_RUNS = 5

# Called with what is being done, how many of the steps are done, and how many there are.
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class BenchmarkOptions:
    """What to run. Raises ValueError, naming the value, on what cannot be run.

    workloads, baselines: names from `WORKLOADS` and `BASELINES`, as a sequence or separated by commas.
    prompt_tokens: T of prefill, decode and train. new_tokens: what decode makes, the first one included.
    device, dtype: the GPU where there is one, and float32 on a CPU, bfloat16 elsewhere, when None.
    runs: timed runs of each contender. seed: of random weights and of the tokens.
    """

    model: str = "gpt2"
    random_weights: bool = False
    workloads: Sequence[str] = ("prefill", "decode")
    batch: int = 1
    prompt_tokens: int = 512
    new_tokens: int = 32
    device: str | None = None
    dtype: str | None = None
    baselines: Sequence[str] = ("hf-eager", "hf-sdpa")
    runs: int = 7
    seed: int = 0

    def __post_init__(self) -> None:
        def settle(name: str, value: Any) -> None:
            object.__setattr__(self, name, value)

        settle("workloads", _names("workload", self.workloads, WORKLOADS))
        settle("baselines", _names("baseline", self.baselines, BASELINES))
        settle("device", default_device() if self.device is None else self.device)
        settle("dtype", self.dtype or ("float32" if str(self.device).startswith("cpu") else "bfloat16"))
        if not self.workloads:
            raise ValueError(f"no workload given: choose from {', '.join(WORKLOADS)}")
        lowest = {"batch": 1, "prompt_tokens": 2, "new_tokens": 2, "runs": MIN_RUNS}
        for name, least in lowest.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be {least} or more, not {getattr(self, name)}")
        if self.dtype not in DTYPES:
            raise ValueError(f"unknown dtype {self.dtype!r}: choose one of {', '.join(DTYPES)}")
        if self.dtype == "float16" and "train" in self.workloads:
            raise ValueError("train in float16 needs loss scaling, which is not timed here: use bfloat16 or float32")
        _check_device(str(self.device))


def _names(kind: str, names: Sequence[str], known: tuple[str, ...]) -> tuple[str, ...]:
    names = [name.strip() for name in names.split(",")] if isinstance(names, str) else names
    names = tuple(dict.fromkeys(name for name in names if name))
    for name in names:
        if name not in known:
            raise ValueError(f"unknown {kind} {name!r}: choose from {', '.join(known)}")
    return names


def _check_device(device: str) -> None:
    try:
        kind = torch.device(device).type
    except RuntimeError as error:
        raise ValueError(f"unknown device {device!r}: say cpu or cuda") from error
    if kind not in ("cpu", "cuda"):
        raise ValueError(f"the benchmark times cpu and cuda, not {kind}")
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError("no CUDA device here: leave the device out or say cpu")


# --- one benchmark --------------------------------------------------------------------------------------------------


def run_benchmark(options: BenchmarkOptions, progress: Progress | None = None) -> dict[str, Any]:
    """Check parity, measure the machine's ceilings, then time every workload.

    Returns a result ready for JSON. Raises ParityError, before anything is timed, when fastgpt's results differ from
    transformers'; ValueError when the model cannot run these options.
    """
    device, dtype = torch.device(str(options.device)), DTYPES[str(options.dtype)]
    steps = _Steps(progress, 3 + len(options.workloads) * (2 + options.runs))
    load_before = _load_average()
    with steps(f"loading {options.model}"):
        base, weights = workloads.load_base(
            options.model, random_weights=options.random_weights, seed=options.seed
        )
        shape = accounting.shape_of(base)
        _check_room(options, shape.n_positions)
        ids = _tokens(options, shape.vocab_size).to(device)
    with steps("checking parity with transformers"):
        gate = _gate(options, base, ids, device, dtype)
    with steps("measuring bandwidth and matrix rate"):
        rates = measure_rates(device, dtype)

    results, ratios, skipped = [], [], {}
    for workload in options.workloads:
        timed = _time_workload(workload, options, base, ids, device, dtype, steps)
        skipped |= timed.pop("skipped")
        ceiling = _ceiling(workload, options, shape, rates, dtype.itemsize)
        results += [_summary(workload, name, timed[name], ceiling) for name in timed]
        ours = timed[OURS]["samples_s"]
        ratios += [
            {"workload": workload, "baseline": name} | compare(ours, timed[name]["samples_s"])
            for name in timed
            if name != OURS
        ]
    return {
        "schema": SCHEMA,
        "timestamp": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": _machine(device) | {"load_average_before": load_before, "load_average_after": _load_average()},
        "versions": versions(),
        "options": asdict(options),
        "model": {"name": options.model, "weights": weights, "dropout": _dropout(base), **asdict(shape)},
        "path": "torch" if ops.explain("causal_attention", device)[0] == "torch" else "kernels",
        "gate": gate,
        "rates": rates,
        "results": results,
        "ratios": ratios,
        "skipped": skipped,
    }


def _check_room(options: BenchmarkOptions, n_positions: int) -> None:
    n_tokens = options.prompt_tokens + (options.new_tokens if "decode" in options.workloads else 0)
    if n_tokens > n_positions:
        raise ValueError(f"{n_tokens} tokens do not fit in the context of {options.model}, which is {n_positions}")


def _tokens(options: BenchmarkOptions, vocab_size: int) -> Tensor:
    generator = torch.Generator().manual_seed(options.seed)
    return torch.randint(vocab_size, (options.batch, options.prompt_tokens), generator=generator)


def _dropout(model: GPT2LMHeadModel) -> dict[str, float]:
    config = model.config
    return {"embedding": config.embd_pdrop, "attention": config.attn_pdrop, "residual": config.resid_pdrop}


def _gate(
    options: BenchmarkOptions, base: GPT2LMHeadModel, ids: Tensor, device: torch.device, dtype: torch.dtype
) -> dict[str, Any]:
    gate: dict[str, Any] = {"passed": True}
    if set(options.workloads) & {"prefill", "decode"}:
        gate["inference"] = parity.check_inference(base, ids, options.new_tokens, str(device), dtype)
    if "train" in options.workloads:
        gate["training"] = parity.check_training(base, ids, str(device), dtype)
    return gate


# --- timing ---------------------------------------------------------------------------------------------------------


def _time_workload(
    workload: str,
    options: BenchmarkOptions,
    base: GPT2LMHeadModel,
    ids: Tensor,
    device: torch.device,
    dtype: torch.dtype,
    steps: "_Steps",
) -> dict[str, Any]:
    works, timed, skipped = {}, {}, {}
    with steps(f"{workload}: warming up"):
        for name in (OURS, *options.baselines):
            work = make_work(workload, name, base, ids, options.new_tokens, dtype)
            try:
                first_run_s = seconds(work.run, device)
                work.seconds()
            except Exception as error:
                # A compiler may be missing, or refuse the graph, in too many ways to name; the others go on.
                if name != "hf-compile":
                    raise
                skipped[name] = f"{workload}: {type(error).__name__}: {str(error).strip().splitlines()[0]}"
                continue
            works[name] = work
            timed[name] = {"first_run_s": first_run_s, "samples_s": [], "n_tokens": work.n_tokens}
    gc.collect()
    for turn in range(options.runs):
        with steps(f"{workload}: run {turn + 1} of {options.runs}"):
            for name in rotated(list(works), turn):
                timed[name]["samples_s"].append(works[name].seconds())
    with steps(f"{workload}: peak memory"):
        for name, work in works.items():
            timed[name] |= peak_memory(work, device)
    return timed | {"skipped": skipped}


def make_work(
    workload: str, name: str, base: GPT2LMHeadModel, ids: Tensor, n_new_tokens: int, dtype: torch.dtype
) -> Work:
    """One contender's work, on a copy of `base` of its own, where ids (B, T) are.

    Training keeps its weights in float32 whatever the dtype.
    """
    weights_dtype = torch.float32 if workload == "train" else dtype
    model = workloads.contender(name, base, str(ids.device), weights_dtype)
    if workload == "train":
        return workloads.train(name, model, ids, dtype)
    if workload == "decode":
        return workloads.decode(name, model, ids, n_new_tokens)
    return workloads.prefill(name, model, ids)


def rotated(names: list[str], turn: int) -> list[str]:
    """The order of one round: each contender goes first as often as the others."""
    start = turn % len(names)
    return names[start:] + names[:start]


# --- memory ---------------------------------------------------------------------------------------------------------


def peak_memory(work: Work, device: torch.device) -> dict[str, Any]:
    """Bytes that the contender holds, and on top of them the most that one run needs.

    On CUDA the growth of torch's allocations; on Linux the growth of the resident set, which counts whole pages and
    whatever the allocator keeps; elsewhere None. Returns {"peak_memory_bytes", "memory_measure"}.
    """
    gc.collect()
    if device.type == "cuda":
        synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work.run()
        synchronize(device)
        growth, measure = torch.cuda.max_memory_allocated(device) - before, "torch allocations"
    elif (before := _reset_peak_resident_bytes()) is not None:
        work.run()
        growth, measure = max(0, _resident_bytes("VmHWM") - before), "resident set growth"
    else:
        return {"peak_memory_bytes": None, "memory_measure": "n/a"}
    return {"peak_memory_bytes": work.held_bytes() + growth, "memory_measure": measure}


def _reset_peak_resident_bytes() -> int | None:
    """Give freed memory back and start a new peak; the resident bytes now, or None where that cannot be done."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    except (OSError, AttributeError):
        return None
    return _resident_bytes("VmRSS")


def _resident_bytes(field: str) -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.partition(f"{field}:")[2].split()[0]) * 1024


# --- ceilings -------------------------------------------------------------------------------------------------------


def measure_rates(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """What this machine reaches now: {"bandwidth" in bytes/s, "matrix_rate" in FLOP/s}.

    bandwidth: the faster of a large copy (read and written) and a large sum (read). matrix_rate: a large product in
    dtype, or in float32 where the machine multiplies that faster.
    """
    n_bytes, size = (2**32, 8192) if device.type == "cuda" else (2**28, 2048)
    x = torch.ones(n_bytes // 4, device=device)
    y = torch.empty_like(x)
    copied, summed = _best_seconds(lambda: y.copy_(x), device), _best_seconds(x.sum, device)
    del x, y
    products = []
    for product_dtype in {dtype, torch.float32}:
        a = torch.randn(size, size, device=device).to(product_dtype)
        products.append(_best_seconds(lambda a=a: a @ a, device))
    return {"bandwidth": max(2 * n_bytes / copied, n_bytes / summed), "matrix_rate": 2 * size**3 / min(products)}


def _best_seconds(call: Callable[[], Any], device: torch.device, n: int = 5) -> float:
    call()
    return min(seconds(call, device) for _ in range(n))


def _ceiling(
    workload: str, options: BenchmarkOptions, shape: accounting.Shape, rates: Mapping[str, float], element_bytes: int
) -> float:
    """Tokens/s of the whole batch that the measured rates allow."""
    if workload == "decode":
        context = options.prompt_tokens + options.new_tokens // 2
        return accounting.decode_ceiling(
            shape, rates["bandwidth"], options.batch, context, element_bytes=element_bytes
        )
    per_sequence = {"prefill": accounting.prefill_ceiling, "train": accounting.training_ceiling}[workload]
    return per_sequence(shape, rates["matrix_rate"], options.prompt_tokens)


# --- figures --------------------------------------------------------------------------------------------------------


def _summary(workload: str, name: str, timed: Mapping[str, Any], ceiling: float) -> dict[str, Any]:
    spread = spread_of([timed["n_tokens"] / sample for sample in timed["samples_s"]])
    return {
        "workload": workload,
        "contender": name,
        "tokens_per_s": spread,
        "ceiling_tokens_per_s": ceiling,
        "percent_of_ceiling": 100 * spread["median"] / ceiling,
        **timed,
    }


def spread_of(values: Sequence[float]) -> dict[str, float]:
    """Median, quartiles and extremes."""
    low, _, high = quantiles(values, n=4, method="inclusive")
    return {"min": min(values), "quartile_1": low, "median": median(values), "quartile_3": high, "max": max(values)}


def compare(ours_s: Sequence[float], theirs_s: Sequence[float]) -> dict[str, Any]:
    """How many times faster ours is: the ratio of the medians, and the spread of the ratio round by round."""
    paired = [theirs / ours for ours, theirs in zip(ours_s, theirs_s, strict=True)]
    return {"ratio": median(theirs_s) / median(ours_s), "paired": spread_of(paired)}


def _machine(device: torch.device) -> dict[str, Any]:
    is_cuda = device.type == "cuda"
    return {
        "platform": platform.platform(),
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "gpu": torch.cuda.get_device_name(device) if is_cuda else None,
        "gpu_memory_bytes": torch.cuda.get_device_properties(device).total_memory if is_cuda else None,
        "cuda": torch.version.cuda,
    }


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    names = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")] if info.is_file() else []  # fmt: skip
    return names[0] if names else platform.processor() or platform.machine()


def _load_average() -> float | None:
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


# --- progress -------------------------------------------------------------------------------------------------------


class _Steps:
    """Counts the steps of a benchmark and says what each is."""

    def __init__(self, progress: Progress | None, n_steps: int):
        self.progress, self.n_steps, self.n_done = progress, n_steps, 0

    @contextmanager
    def __call__(self, what: str) -> Iterator[None]:
        if self.progress is not None:
            self.progress(what, self.n_done, self.n_steps)
        yield
        self.n_done += 1
        if self.progress is not None:
            self.progress(what, self.n_done, self.n_steps)


@contextmanager
def progress_bar(console: Any) -> Iterator[Progress]:
    """A progress bar on a rich console while the block runs, as `run_benchmark` takes it."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("starting")
        yield lambda what, n_done, n_steps: bar.update(task, description=what, completed=n_done, total=n_steps)
