"""Runs a row of the support matrix with a class, compares it with transformers, and says on what it ran."""

import inspect
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from typing import Any
from unittest import mock

import fastgpt_kernels
import torch
import torch.nn.functional as F
import transformers
from fastgpt_kernels import reference
from models import HEADS, assert_same_within_rounding, pair, tiny_config
from torch import Tensor
from transformers import Cache
from transformers.utils import ModelOutput

import fastgpt
from fastgpt import ops

from .forward import FORWARD, Row, ids_for
from .generation import GENERATION

KERNELS = "GPT2LMHeadModel on kernels"
GENERATING = ["GPT2LMHeadModel", "GPT2DoubleHeadsModel"]
TABLES = {"Forward": (FORWARD, [*HEADS, KERNELS]), "Generation": (GENERATION, [*GENERATING, KERNELS])}
# What a block calls once in a forward.
PARTS = {"causal_attention": "attention", "gelu_mlp": "MLP", "add_layer_norm": "norm"}
TEXT = """\
# What runs on what

Written by `PYTHONPATH=.:tests:kernels python -m support > docs/support.md`; `tests/support/` runs every cell and
compares the result with transformers' (values, gradients aside, within rounding; tokens exactly).

| cell | meaning |
|---|---|
| fused | every block runs on the fused operations; of a class with a loss that is fused too, "with the loss" |
| fused but attention | the attention is torch's or transformers', the rest of the block fused |
| engine | `generate()` runs on the engine, without Python modules in a decode step |
| loop: why | `generate()` runs transformers' loop over fused blocks; without a reason: in this class always |
| refused | an error, as in transformers |
| - | the class has no such argument |
| needs ... | compared where that is installed |

On a CPU the fused operations run in torch. The last column runs them on the Triton kernels, but for a loop, where torch
stands in for the kernels, because the first table has tried them.
"""


# --- observing ------------------------------------------------------------------------------------------------------


def missing(row: Row) -> str | None:
    """What the row needs and this machine lacks."""
    if row.needs is None or (torch.cuda.is_available() if row.needs == "cuda" else _is_installed(row.needs)):
        return None
    return "a GPU" if row.needs == "cuda" else row.needs


def _is_installed(package: str) -> bool:
    parent = package.partition(".")[0]
    return find_spec(parent) is not None and find_spec(package) is not None


def observe(row: Row, column: str) -> str:
    """The text of a cell. Raises AssertionError where fastgpt does not give what transformers gives."""
    head, is_on_kernels = column.partition(" ")[0], column == KERNELS
    if row.takes and not row.takes & {*_parameters(head), *_parameters("GPT2Model")}:
        return "-"
    is_loop = is_on_kernels and row in GENERATION and observe(row, head) != "engine"
    changes = {"classifier_dropout": 0.0, "summary_first_dropout": 0.0, "n_layer": 1 if is_on_kernels else 2}
    options = {"attn_implementation": row.attention} if row.attention else {}
    theirs, ours = pair(tiny_config(**changes | row.config), head, **options)
    if row.attention:
        ours.set_attn_implementation(row.attention)
    call = (is_on_kernels and row.kernels) or row.call

    def outcome(model: Any) -> Any:
        try:
            with torch.set_grad_enabled(row.is_trained):
                return call(model.train(row.is_trained), ids_for(head))
        except Exception as error:
            return error

    expected = outcome(theirs)
    backend, kernel = "triton" if is_on_kernels else "torch", fastgpt_kernels.kernel
    with noted(partial(getattr, reference) if is_loop else kernel) as notes, fastgpt.backend(backend):
        found = outcome(ours)
    assert_same(found, expected)
    # Asking whether kernels can run asks for some, too.
    assert notes.on_kernels >= notes.fused if is_on_kernels else not notes.on_kernels
    return "refused" if isinstance(expected, Exception) else describe(notes)


def _parameters(head: str) -> Iterable[str]:
    return inspect.signature(getattr(transformers, head).forward).parameters


@dataclass
class Notes:
    """How often each fused operation ran, and on a kernel; how often other attention; what `generate()` said."""

    fused: Counter[str] = field(default_factory=Counter)
    on_kernels: Counter[str] = field(default_factory=Counter)
    n_other_attention: int = 0
    said: list[str] = field(default_factory=list)


@contextmanager
def noted(kernel: Callable[[str], Any]) -> Iterator[Notes]:
    """Take notes of what runs; `kernel` gives what runs as the kernel of an operation."""
    notes, logger = Notes(), logging.getLogger("fastgpt")
    handler, level, attend = logging.Handler(), logger.level, F.scaled_dot_product_attention
    handler.emit = lambda record: notes.said.append(record.getMessage())  # type: ignore[method-assign]

    def operation(name: str, function: Any) -> Any:
        def noting(*args: Any, **kwargs: Any) -> Any:
            # A block calls the sum and its norm once more, with nothing to add.
            notes.fused[name] += not (name == "add_layer_norm" and args[0] is None)
            n_before = notes.n_other_attention  # The reference of attention calls torch's.
            result = function(*args, **kwargs)
            notes.n_other_attention = n_before
            return result

        return noting

    def kernel_of(name: str) -> Any:
        notes.on_kernels[name] += 1
        return kernel(name)

    def other_attention(*args: Any, **kwargs: Any) -> Any:
        notes.n_other_attention += 1
        return attend(*args, **kwargs)

    with ExitStack() as stack:
        for name in fastgpt_kernels.OPERATIONS:
            stack.enter_context(mock.patch.object(ops, name, operation(name, getattr(ops, name))))
        stack.enter_context(mock.patch.object(fastgpt_kernels, "kernel", kernel_of))
        stack.enter_context(mock.patch.object(F, "scaled_dot_product_attention", other_attention))
        logger.addHandler(handler)
        stack.callback(logger.removeHandler, handler)
        logger.setLevel(logging.DEBUG)
        stack.callback(logger.setLevel, level)
        yield notes


def describe(notes: Notes) -> str:
    if notes.said:
        where = notes.said[0].removeprefix("generate: ").replace("transformers' loop, because", "loop:")
        return "loop" if "is not a plain module: GPT2" in where else where.replace("the ", "", 1)
    most = max(notes.fused[name] for name in PARTS)
    absent = [part for name, part in PARTS.items() if notes.fused[name] < most]
    text = "fused" + (f" but {' and '.join(absent)}" if absent else "") if most else "reference"
    if notes.n_other_attention and not absent:
        text += ", cross-attention in torch"
    return text + (", with the loss" if notes.fused["linear_cross_entropy"] else "")


# --- comparing ------------------------------------------------------------------------------------------------------


def assert_same(found: Any, expected: Any, where: str = "") -> None:
    """Equal tokens, values within rounding, the same fields; of errors the same class and text, or a ValueError."""
    if isinstance(expected, Exception):
        is_same = type(found) is type(expected) and str(found) == str(expected)
        assert is_same or isinstance(found, ValueError), (where, found, expected)
    elif isinstance(found, Exception):
        raise AssertionError(f"{where}: only fastgpt raised") from found
    elif isinstance(expected, Cache):
        assert type(found) is type(expected), where
        assert_same(stored(found), stored(expected), f"{where}.cache")
    elif isinstance(expected, dict | ModelOutput):
        assert list(found) == list(expected), where
        for name in expected:
            assert_same(found[name], expected[name], f"{where}.{name}")
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected), where
        for i, (one, other) in enumerate(zip(found, expected, strict=True)):
            assert_same(one, other, f"{where}[{i}]")
    elif isinstance(expected, Tensor) and expected.is_floating_point():
        is_finite = expected.isfinite()
        assert torch.equal(found.masked_fill(is_finite, 0), expected.masked_fill(is_finite, 0)), where
        assert_same_within_rounding(found[is_finite].detach(), expected[is_finite].detach(), n_ulps=256)
    elif isinstance(expected, Tensor):
        assert torch.equal(found, expected), where
    else:
        assert found == expected, where


def stored(cache: Any) -> Any:
    """Keys and values of the layers, of both caches where there are two."""
    if hasattr(cache, "self_attention_cache"):
        return stored(cache.self_attention_cache), stored(cache.cross_attention_cache)
    return [(layer.keys, layer.values) for layer in cache.layers]


# --- the page -------------------------------------------------------------------------------------------------------

Cells = dict[tuple[str, str, str], str]


def render(cells: Cells) -> str:
    """The page, from the text of each cell by table, row and column."""
    lines = [TEXT]
    for table, (rows, columns) in TABLES.items():
        lines += [f"## {table}\n", f"| | {' | '.join(columns)} |", "|" + "---|" * (len(columns) + 1)]
        lines += [f"| {row.name} | {' | '.join(cells[table, row.name, c] for c in columns)} |" for row in rows]
        lines += [""]
    return "\n".join(lines).rstrip("\n") + "\n"


def read(page: str) -> Cells:
    """The cells of a page. Raises KeyError on a table that is not there."""
    parts = dict(part.split("\n", 1) for part in page.split("\n## ")[1:])
    cells: Cells = {}
    for table in TABLES:
        lines = [
            [cell.strip() for cell in line.split("|")[1:-1]]
            for line in parts[table].splitlines()
            if line.startswith("| ")
        ]
        header, *rows = lines
        cells |= {
            (table, row[0], column): cell for row in rows for column, cell in zip(header[1:], row[1:], strict=True)
        }
    return cells
