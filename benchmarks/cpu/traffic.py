"""The bytes that a training step moves through memory, by what moves them, counted and not measured.

python -m benchmarks traffic --model gpt2 --batch 16

The step runs over fake tensors, in bfloat16 under autocast, without dropout. Every operation of torch counts what it
reads and writes, and every kernel of fastgpt the tensors that it is given, as launched for an H200. Each tensor counts
once for each operation or kernel, as if the cache held all that is read again; so does one that a kernel overwrites.
"""

import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Annotated, Any
from unittest.mock import patch

import fastgpt_kernels
import torch
import transformers
import typer
from fastgpt_kernels.common import chip, launch
from fastgpt_kernels.operations.layer_norm import op as layer_norm
from fastgpt_kernels.operations.linear_cross_entropy import op as linear_cross_entropy
from torch import Tensor
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from transformers import GPT2Config, GPT2LMHeadModel

import fastgpt
from fastgpt.bench import workloads

from ..report.tables import publish

NO_DROPOUT = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
_H200 = chip.Chip("sm_90", 132)
# Operations that only reserve memory.
_WITHOUT_TRAFFIC = {
    "aten::empty",
    "aten::empty_like",
    "aten::empty_strided",
    "aten::new_empty",
    "aten::new_empty_strided",
}


def count(name: str, config: GPT2Config, n_batch: int, n_tokens: int) -> list[dict[str, Any]]:
    """A row for each kernel or operation of a step of contender `name`: how often it ran, and its bytes, most first.

    The step is the second, because the first makes the optimiser's state.
    """
    config = GPT2Config.from_dict(config.to_dict() | NO_DROPOUT)
    with FakeTensorMode(), _Traffic() as traffic, _launches_counted(traffic):
        model = workloads.as_contender(name, GPT2LMHeadModel(config))
        ids = torch.zeros(n_batch, n_tokens, dtype=torch.int64)
        work = workloads.train(name, model, ids, torch.bfloat16)
        work.run()
        traffic.clear()
        work.run()
    return [
        {"source": source, "calls": traffic.calls[source], "bytes": n_bytes}
        for source, n_bytes in traffic.bytes.most_common()
        if n_bytes
    ]


class _Traffic(TorchDispatchMode):
    """Counts calls and bytes of torch's operations that read or write memory; views do neither."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()

    def clear(self) -> None:
        self.calls.clear()
        self.bytes.clear()

    def add(self, source: str, read: Iterable[Any], written: Iterable[Any]) -> None:
        self.calls[source] += 1
        self.bytes[source] += sum(map(_n_bytes, (*read, *written)))

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        results = function(*args, **kwargs)
        read, results_of_it = (
            [x for x in tree_iter(tree) if isinstance(x, Tensor)] for tree in ((args, kwargs), results)
        )
        held = {x.untyped_storage()._cdata for x in read}
        written = [x for x in results_of_it if x.untyped_storage()._cdata not in held]
        for argument, value in zip(function._schema.arguments, args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                written += [x for x in tree_iter(value) if isinstance(x, Tensor)]
        name = function._schema.name
        if written and name not in _WITHOUT_TRAFFIC:
            self.add(name.removeprefix("aten::"), read, written)
        return results


def _n_bytes(tensor: Any) -> int:
    """The bytes of the elements that exist in memory: an axis of stride 0 has one."""
    if not isinstance(tensor, Tensor):  # a descriptor of one, or None
        return _n_bytes(tensor.base) if hasattr(tensor, "base") else 0
    n_elements = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        n_elements *= size if stride else min(size, 1)
    return n_elements * tensor.element_size()


@contextmanager
def _launches_counted(traffic: _Traffic) -> Iterator[None]:
    """fastgpt runs on its kernels, whose launches are counted and not made."""

    def note(one: launch.Launch) -> None:
        traffic.add(one.kernel.fn.__name__.strip("_"), one.pointers, ())

    def add_product(total: Tensor, a: Tensor, b: Tensor, beta: int) -> None:
        """As on a GPU, where one operation multiplies in bfloat16 and adds in float32."""
        traffic.add("addmm", (a, b, total) if beta else (a, b), (total,))

    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")
        stack.enter_context(fastgpt.backend("triton"))
        stack.enter_context(patch.object(fastgpt_kernels, "why_unavailable", lambda operation, device: None))
        stack.enter_context(chip.assume(_H200))
        stack.enter_context(patch.object(launch, "_launch", note))
        stack.enter_context(patch.object(launch, "_triton_only_launches", lambda: False))
        for module in (launch, layer_norm, linear_cross_entropy):
            stack.enter_context(patch.object(module, "is_watched", lambda: False))
        stack.enter_context(patch.object(linear_cross_entropy, "_add_product", add_product))
        stack.enter_context(patch.object(FakeTensor, "data_ptr", lambda tensor: 0))
        yield


def main(
    out: Annotated[Path, typer.Option(help="the result")],
    model: Annotated[str, typer.Option(help="a preset's name")] = "gpt2",
    batch: Annotated[int, typer.Option(help="sequences")] = 16,
    tokens: Annotated[int, typer.Option(help="of each sequence")] = 1024,
) -> None:
    """Count what moves memory in a training step, compared with transformers' sdpa."""
    transformers.logging.set_verbosity_error()
    config, rows = workloads.preset(model), []
    for name in (workloads.OURS, "hf-sdpa"):
        rows += [{"contender": name, **row} for row in count(name, config, batch, tokens)]
    publish(out, {f"traffic {model}": {f"train, {batch} x {tokens}": rows}})
