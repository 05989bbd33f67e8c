"""Tokens/s of fastgpt compared with transformers on the same weights: medians of interleaved runs after a parity gate.

Contenders take turns within one process, run by run and in rotating order. What disturbs the machine then disturbs all
of them alike, so ratios stay stable where absolute figures do not.
"""

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from statistics import median, quantiles
from typing import Any

import torch
from torch import Tensor
from transformers import GPT2LMHeadModel

import fastgpt.bench.machine as machine
import fastgpt.bench.parity as parity
import fastgpt.bench.workloads as workloads

from .. import accounting, ops
from ..load import DTYPES, device_and_dtype
from ..messages import first_line
from ..progress import Progress
from .workloads import BASELINES, OURS, WORKLOADS

SCHEMA = 2
MIN_RUNS = 5

# Makes the work of a further contender from (workload, base, ids, n_new_tokens, dtype), as `make_work` takes them. If
# it raises, the contender is skipped, and the result gives the exception as the reason.
MakeWork = Callable[[str, GPT2LMHeadModel, Tensor, int, torch.dtype], workloads.Work]

# --- options --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BenchmarkOptions:
    """What to run. Raises ValueError, with the value, on options that cannot run.

    model: demo, a preset's name (with random weights), a directory, or a Hub id. random_weights: take only the
    configuration of a directory or id. workloads, baselines: names from `WORKLOADS` and `BASELINES`, as a sequence or
    separated by commas. prompt_tokens: T of prefill, decode and train. new_tokens: tokens that decode makes,
    including the first. device, dtype: None takes the GPU where there is one, and float32 on a CPU, bfloat16 elsewhere.
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
        device, dtype = device_and_dtype(self.device, self.dtype)
        settled = {
            "workloads": _names("workload", self.workloads, WORKLOADS),
            "baselines": _names("baseline", self.baselines, BASELINES),
            "device": str(device),
            "dtype": str(dtype).removeprefix("torch."),
        }
        for name, value in settled.items():
            object.__setattr__(self, name, value)

        if not self.workloads:
            raise ValueError(f"no workload given: choose from {', '.join(WORKLOADS)}")
        for name, least in {"batch": 1, "prompt_tokens": 2, "new_tokens": 2, "runs": MIN_RUNS}.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be {least} or more, not {getattr(self, name)}")
        if self.dtype == "float16" and "train" in self.workloads:
            raise ValueError("train in float16 needs loss scaling, which is not timed here: use bfloat16 or float32")


def _names(kind: str, names: Sequence[str], known: tuple[str, ...]) -> tuple[str, ...]:
    names = names.split(",") if isinstance(names, str) else names
    names = tuple(dict.fromkeys(name.strip() for name in names if name.strip()))
    for name in names:
        if name not in known:
            raise ValueError(f"unknown {kind} {name!r}: choose from {', '.join(known)}")
    return names


# --- one benchmark --------------------------------------------------------------------------------------------------


def run_benchmark(
    options: BenchmarkOptions,
    progress: Progress | None = None,
    peers: Mapping[str, MakeWork] | None = None,
    loaded: tuple[GPT2LMHeadModel, str] | None = None,
    rates: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """Check parity, measure the rates of the machine, then time every workload.

    peers: further contenders by name, which check their own parity. loaded, rates: earlier results of
    `workloads.load_base` and `machine.measure_rates`, for a series of benchmarks of one model.
    Returns a result ready for JSON. Raises ParityError, before anything is timed, when fastgpt's results differ from
    transformers'; ValueError when the model cannot run these options.
    """
    device, dtype = torch.device(str(options.device)), DTYPES[str(options.dtype)]
    step = _Steps(progress, 3 + len(options.workloads) * (2 + options.runs))
    load_before = machine.load_average()

    with step(f"loading {options.model}"):
        base, weights = loaded or workloads.load_base(
            options.model, random_weights=options.random_weights, seed=options.seed
        )
        shape = accounting.shape_of(base)
        ids = make_tokens(options, shape).to(device)
    with step("checking parity with transformers"):
        gate = _check_parity(options, base, ids, dtype)
    with step("measuring bandwidth and matrix rate"):
        rates = rates or machine.measure_rates(device, dtype)

    results, ratios, skipped = [], [], []
    for workload in options.workloads:
        timed, failed = _time_workload(workload, options, base, ids, dtype, step, peers or {})
        ceiling = _ceiling(workload, options, shape, rates, dtype.itemsize)
        ours_s = timed[OURS]["samples_s"]
        for name, timing in timed.items():
            results.append({"workload": workload, "contender": name} | _speed(timing, ceiling) | timing)
            if name != OURS:
                ratios.append({"workload": workload, "baseline": name} | compare(ours_s, timing["samples_s"]))
        skipped += [{"workload": workload, "baseline": name, "reason": reason} for name, reason in failed.items()]

    dropout = {part: getattr(base.config, f"{part}_pdrop") for part in ("embd", "attn", "resid")}
    return {
        "schema": SCHEMA,
        "timestamp": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine.describe(device) | {"load_average": [load_before, machine.load_average()]},
        "versions": machine.versions(),
        "options": asdict(options),
        "model": {"name": options.model, "weights": weights, "dropout": dropout, **asdict(shape)},
        "path": "kernels" if ops.runs_kernels(device) else "torch",
        "gate": gate,
        "rates": dict(rates),
        "results": results,
        "ratios": ratios,
        "skipped": skipped,
    }


def run_series(series: Sequence[BenchmarkOptions], progress: Progress | None = None) -> list[dict[str, Any]]:
    """`run_benchmark` of one model with each of several options, which differ in dtype and batch. Raises as it does."""
    model, random_weights, seed = series[0].model, series[0].random_weights, series[0].seed
    with _Steps(progress, 1)(f"loading {model}"):
        loaded = workloads.load_base(model, random_weights=random_weights, seed=seed)
    results, rates = [], {}
    for options in series:
        results.append(run_benchmark(options, progress, loaded=loaded, rates=rates.get(options.dtype)))
        rates[options.dtype] = results[-1]["rates"]
    return results


def bring_together(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The results of a series in one, ready for JSON: a single one unchanged, several under their dtype and batch."""
    first = results[0]
    if len(results) == 1:
        return dict(first)
    whole: dict[str, Any] = {"schema": SCHEMA, "environment": {name: first[name] for name in ("machine", "versions")}}
    for result in results:
        options = result["options"]
        whole.setdefault(options["dtype"], {})[f"batch {options['batch']}"] = result
    return whole


def make_tokens(options: BenchmarkOptions, shape: accounting.Shape) -> Tensor:
    """(B, T) random tokens. Raises ValueError when they and the tokens that decode adds exceed the context."""
    n_tokens = options.prompt_tokens + (options.new_tokens if "decode" in options.workloads else 0)
    if n_tokens > shape.n_positions:
        raise ValueError(
            f"{n_tokens} tokens do not fit in the context of {options.model}, which is {shape.n_positions}"
        )
    generator = torch.Generator("cpu").manual_seed(options.seed)
    size = options.batch, options.prompt_tokens
    return torch.randint(shape.vocab_size, size, generator=generator, device="cpu")


def _check_parity(
    options: BenchmarkOptions, base: GPT2LMHeadModel, ids: Tensor, dtype: torch.dtype
) -> dict[str, dict[str, Any]]:
    gate = {}
    if "prefill" in options.workloads or "decode" in options.workloads:
        n_new_tokens = options.new_tokens if "decode" in options.workloads else 1  # the prompt may fill the context
        gate["inference"] = parity.check_inference(base, ids, n_new_tokens, dtype)
    if "train" in options.workloads:
        gate["training"] = parity.check_training(base, ids, dtype)
    return gate


def _time_workload(
    workload: str,
    options: BenchmarkOptions,
    base: GPT2LMHeadModel,
    ids: Tensor,
    dtype: torch.dtype,
    step: "_Steps",
    peers: Mapping[str, MakeWork],
) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """Timings by contender, and by the name of each skipped contender the reason."""
    works, timed, failed = {}, {}, {}
    with step(f"{workload}: warming up"):
        for name in (OURS, *options.baselines, *peers):
            try:
                if name in peers:
                    work = peers[name](workload, base, ids, options.new_tokens, dtype)
                else:
                    work = workloads.make_work(workload, name, base, ids, options.new_tokens, dtype)
                first_run_s = machine.seconds(work.run, ids.device)
                work.seconds()
            except Exception as error:
                # A compiler or another engine may be missing or refuse the model, with any exception.
                if name != "hf-compile" and name not in peers:
                    raise
                failed[name] = first_line(error)
                continue
            works[name] = work
            timed[name] = {"n_tokens": work.n_tokens, "first_run_s": first_run_s, "samples_s": [], **work.accuracy}
    gc.collect()
    for turn in range(options.runs):
        with step(f"{workload}: run {turn + 1} of {options.runs}"):
            for name in rotated(list(works), turn):
                timed[name]["samples_s"].append(works[name].seconds())
    with step(f"{workload}: peak memory"):
        for name, work in works.items():
            peak_growth = work.peak_growth or partial(machine.peak_growth, work.run, ids.device)
            growth, measure = peak_growth()
            peak = None if growth is None else work.held_bytes() + growth
            timed[name] |= {"peak_memory_bytes": peak, "memory_measure": measure}
    return timed, failed


def rotated(names: list[str], turn: int) -> list[str]:
    """The order of one round: each contender goes first as often as the others.

    Every other round goes backwards, because a contender is slower after another process than after its own, and would
    otherwise always follow the same one.
    """
    names = names[::-1] if turn % 2 else names
    start = turn // 2 % len(names)
    return names[start:] + names[:start]


# --- figures --------------------------------------------------------------------------------------------------------


def _ceiling(
    workload: str, options: BenchmarkOptions, shape: accounting.Shape, rates: Mapping[str, float], element_bytes: int
) -> float:
    """Tokens/s of the whole batch that the measured rates allow."""
    if workload == "decode":
        context = options.prompt_tokens + options.new_tokens // 2
        return accounting.decode_ceiling(shape, rates["bandwidth"], options.batch, context, element_bytes=element_bytes)
    per_sequence = {"prefill": accounting.prefill_ceiling, "train": accounting.training_ceiling}[workload]
    return per_sequence(shape, rates["matrix_rate"], options.prompt_tokens)


def _speed(timing: Mapping[str, Any], ceiling: float) -> dict[str, Any]:
    speed = spread([timing["n_tokens"] / sample for sample in timing["samples_s"]])
    percent = 100 * speed["median"] / ceiling
    return {"tokens_per_s": speed, "ceiling_tokens_per_s": ceiling, "percent_of_ceiling": percent}


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, quartiles and extremes."""
    quartile_1, _, quartile_3 = quantiles(values, n=4, method="inclusive")
    extremes = {"min": min(values), "max": max(values)}
    return {"median": median(values), "quartile_1": quartile_1, "quartile_3": quartile_3, **extremes}


def compare(ours_s: Sequence[float], theirs_s: Sequence[float]) -> dict[str, Any]:
    """How many times as fast ours is, in each round: what disturbs the machine disturbs both contenders of a round."""
    return {"paired": spread([theirs / ours for ours, theirs in zip(ours_s, theirs_s, strict=True)])}


# --- progress -------------------------------------------------------------------------------------------------------


class _Steps:
    """Reports each step of a benchmark and counts the finished ones."""

    def __init__(self, progress: Progress | None, n_steps: int):
        self.progress, self.n_steps, self.n_done = progress, n_steps, 0

    @contextmanager
    def __call__(self, what: str) -> Iterator[None]:
        self._say(what)
        yield
        self.n_done += 1
        self._say(what)

    def _say(self, what: str) -> None:
        if self.progress is not None:
            self.progress(what, self.n_done, self.n_steps)
