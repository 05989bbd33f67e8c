"""What the steps of `benchmarks gpu` are given: how large everything is, and what is known so far."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
import typer
from transformers import GPT2LMHeadModel

from fastgpt.accounting import PRESETS, Shape
from fastgpt.bench import workloads
from fastgpt.bench.operations import TINY

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Extent:
    """How large everything is, and how often it is timed.

    shapes: of the operations, by size. models: what `workloads.load_base` is given, by size. n_batch: sequences of
    n_tokens for operations and the larger prefill. row_s: timed seconds of one operation. decode_context: the tokens
    that a sequence has when half of what it decodes is there. tiers: of decoding, each timed in addition to the one
    that `generate()` chooses. cold_starts: how many with empty caches of kernels, and how many with full ones. tests:
    files of tests, or tests, as pytest names them, by their folder.
    """

    device: torch.device
    dtype: torch.dtype
    shapes: dict[str, Shape]
    models: dict[str, str]
    n_batch: int
    n_tokens: int
    row_s: float
    n_runs: int
    decode_batches: tuple[int, ...]
    more_decode_batches: tuple[int, ...]
    decode_context: int
    n_new_tokens: int
    memory_batches: tuple[int, ...]
    contexts: tuple[int, ...]
    baselines: tuple[str, ...]
    compiled_baselines: tuple[str, ...]
    tiers: tuple[str, ...]
    cold_starts: tuple[int, int]
    tests: dict[str, tuple[str, ...]]
    n_processes: int

    @property
    def is_dry(self) -> bool:
        return self.device.type == "cpu"

    @property
    def decode_prompt(self) -> int:
        """Tokens of a prompt that, with half of what is decoded after it, make `decode_context`."""
        return self.decode_context - self.n_new_tokens // 2


def checked_sizes(sizes: str, dry_run: bool) -> list[str]:
    """The presets that an option names. Raises BadParameter on others, and where there is no GPU to measure."""
    names = sizes.split(",")
    unknown = [name for name in names if name not in PRESETS]
    if unknown:
        raise typer.BadParameter(f"unknown size {unknown[0]!r}: give some of {', '.join(PRESETS)}")
    if not dry_run and not torch.cuda.is_available():
        raise typer.BadParameter("no GPU is visible to torch; --dry-run goes through every step on a CPU")
    return names


def tests_of_kernels() -> dict[str, tuple[str, ...]]:
    """The files whose tests run kernels, by their folder.

    Where a test also runs the reference, that case's id starts with its name.
    """
    tests = ROOT / "tests"
    of_operations = (path for path in tests.glob("kernels/*/test_*.py") if path.parent.name != "audit")
    folders: dict[str, tuple[str, ...]] = {}
    for path in sorted([*of_operations, *tests.rglob("test_*_on_kernels.py")]):
        folders[path.parent.name] = (*folders.get(path.parent.name, ()), str(path.relative_to(ROOT)))
    return folders


def full(sizes: list[str], n_batch: int, n_processes: int) -> Extent:
    """The extent of a run on a GPU."""
    return Extent(
        device=torch.device("cuda"),
        dtype=torch.bfloat16,
        shapes={name: PRESETS[name] for name in sizes},
        models={name: name for name in sizes},
        n_batch=n_batch,
        n_tokens=1024,
        row_s=0.1,
        n_runs=5,
        decode_batches=(1, 64),
        more_decode_batches=(2, 4, 5, 8, 16, 32),
        decode_context=512,
        n_new_tokens=128,
        memory_batches=(1, 2, 4, 8, 16, 32),
        contexts=(64, 128, 256, 512, 768, 992),
        baselines=("hf-sdpa",),
        compiled_baselines=("hf-sdpa", "hf-compile"),
        tiers=("eager", "graph", "persistent"),
        cold_starts=(1, 3),
        tests=tests_of_kernels(),
        n_processes=n_processes,
    )


def dry() -> Extent:
    """The extent of a dry run: every step on a CPU within a minute, with the smallest shapes and a few tests."""
    return Extent(
        device=torch.device("cpu"),
        dtype=torch.float32,
        shapes=TINY,
        models={"tiny": "demo"},
        n_batch=2,
        n_tokens=17,
        row_s=0.0,
        n_runs=5,
        decode_batches=(1, 2),
        more_decode_batches=(3,),
        decode_context=12,
        n_new_tokens=4,
        memory_batches=(1, 2),
        contexts=(8, 16),
        baselines=("hf-sdpa",),
        compiled_baselines=("hf-sdpa",),
        tiers=("eager",),
        cold_starts=(1, 1),
        tests={"layer_norm": ("tests/kernels/layer_norm/test_layer_norm.py::test_wrong_shapes_are_refused",)},
        n_processes=1,
    )


@dataclass
class Run:
    """What a step is given: how large everything is, and what is known so far, by step and in each by part."""

    extent: Extent
    result: dict[str, Any]
    say: Callable[[str], None]
    _base: dict[str, tuple[GPT2LMHeadModel, str]] = field(default_factory=dict)

    def load(self, size: str) -> tuple[GPT2LMHeadModel, str]:
        """The model of a size on the device, in float32, and where its weights are from; one is held at a time."""
        if size not in self._base:
            self._base.clear()
            with self.extent.device:  # A CPU takes half a minute to draw the weights of gpt2-xl.
                base, weights = workloads.load_base(self.extent.models[size])
            self._base[size] = base.to(self.extent.device), weights  # type: ignore[arg-type]
        return self._base[size]


class Part(NamedTuple):
    """A part of a step. measure: returns what to write down. limit_s: it is stopped when it takes longer."""

    name: str
    measure: Callable[[], Any]
    limit_s: float = 60.0


# Yields the parts of a step. It is sent to another process, so it must be a module's function or a partial of one.
Step = Callable[[Run], Iterator[Part]]
