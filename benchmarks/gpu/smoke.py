"""Steps of `benchmarks gpu` that come first: every operation, tier and model once, with what is wrong named.

They run side by side, each in a process of its own, and time nothing.
"""

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import GPT2LMHeadModel

from fastgpt import generate as engine
from fastgpt import ops
from fastgpt.bench import operations, parity, workloads
from fastgpt.bench.parity import ParityError

from .models import check_greedy_tokens
from .run import Part, Run, Step


def steps(dtypes: Mapping[str, torch.dtype]) -> dict[str, Step]:
    """All of them by name. dtypes: by name, the one that is timed first."""
    by_dtype = {
        f"smoke {what}, {name}": partial(step, dtype=dtype)
        for what, step in (("operations", smoke_operations), ("generate", smoke_generate), ("model", smoke_model))
        for name, dtype in dtypes.items()
    }
    return by_dtype | {"smoke compile": smoke_compile}


# --- operations -----------------------------------------------------------------------------------------------------


def smoke_operations(run: Run, dtype: torch.dtype) -> Iterator[Part]:
    """Outputs and gradients of every operation at the first size, on two ragged sequences."""
    extent = run.extent
    shape = next(iter(extent.shapes.values()))
    for case in operations.cases(shape, 2, extent.n_tokens * 3 // 8 + 1, extent.device, dtype):
        yield Part(case.operation, partial(_agrees, case), 90)


def _agrees(case: operations.Case) -> str:
    with ops.backend("triton"):
        if fault := operations.check(case):
            raise ParityError(fault)
    return "agrees"


# --- generation -----------------------------------------------------------------------------------------------------


def smoke_generate(run: Run, dtype: torch.dtype) -> Iterator[Part]:
    """Greedy tokens of every tier, of one row and of left-padded ones, twice."""
    size = next(iter(run.extent.models))
    for tier in run.extent.tiers:
        for n_rows in (1, 4, 5):
            yield Part(f"{tier}, {n_rows} rows", partial(_greedy, run, size, dtype, tier, n_rows), 90)
    yield Part("in inference mode and then outside", partial(_in_and_out_of_inference_mode, run, size, dtype))


def _prompt(run: Run, n_rows: int) -> dict[str, Tensor]:
    """Rows of which the last is not padded."""
    n_tokens = min(37, run.extent.n_tokens // 2)
    ids = torch.randint(1, 60, (n_rows, n_tokens), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    for row in range(n_rows - 1):
        mask[row, : row + 1] = 0
    return {"input_ids": ids.to(run.extent.device), "attention_mask": mask.to(run.extent.device)}


def _greedy(run: Run, size: str, dtype: torch.dtype, tier: str, n_rows: int) -> Any:
    base, _ = run.load(size)
    ours = workloads.contender(workloads.OURS, base, run.extent.device, dtype)
    inputs = _prompt(run, n_rows)
    options: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "max_new_tokens": 6}
    with engine.tier(tier), torch.no_grad():
        if run.extent.device.type == "cuda" and (obstacle := engine.obstacle(ours, n_rows)):  # type: ignore[arg-type]
            return f"not taken: {obstacle}"
        first, again = (ours.generate(**inputs, **options) for _ in range(2))  # type: ignore[operator]
    if not torch.equal(first, again):
        raise ParityError("the same call gave other tokens")
    n_prompt = inputs["input_ids"].shape[1]
    check_greedy_tokens(base, first[-1:], n_prompt, dtype)
    if dtype == torch.float32:
        expected = base.generate(**inputs, **options)  # type: ignore[operator]
        if not torch.equal(first, expected):
            raise ParityError(f"rows {(first != expected).any(-1).nonzero().flatten().tolist()} differ")
    return "agrees"


def _in_and_out_of_inference_mode(run: Run, size: str, dtype: torch.dtype) -> str:
    base, _ = run.load(size)
    ours = workloads.contender(workloads.OURS, base, run.extent.device, dtype)
    options: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "max_new_tokens": 4}
    with torch.inference_mode():
        inside = ours.generate(**_prompt(run, 2), **options).tolist()  # type: ignore[operator]
    if inside != ours.generate(**_prompt(run, 2), **options).tolist():  # type: ignore[operator]
        raise ParityError("the tokens differ")
    return "agrees"


# --- whole models ---------------------------------------------------------------------------------------------------


def smoke_model(run: Run, dtype: torch.dtype) -> Iterator[Part]:
    """Logits, loss and gradients of the first size, compared with transformers' and with float64."""
    size = next(iter(run.extent.models))
    yield Part("logits and tokens", partial(_inference, run, size, dtype), 120)
    yield Part("training step", partial(_training, run, size, dtype), 120)


def _ids(run: Run) -> Tensor:
    n_tokens = run.extent.n_tokens // 2
    return torch.randint(1, 60, (2, n_tokens), generator=torch.Generator().manual_seed(0)).to(run.extent.device)


def _inference(run: Run, size: str, dtype: torch.dtype) -> dict[str, Any]:
    return parity.check_inference(run.load(size)[0], _ids(run), 4, dtype)


def _training(run: Run, size: str, dtype: torch.dtype) -> dict[str, Any]:
    return parity.check_training(run.load(size)[0], _ids(run), dtype)


def smoke_compile(run: Run) -> Iterator[Part]:
    """torch.compile of a forward as one graph, in this process in which nothing was compiled before."""
    yield Part("fullgraph", partial(_compiled, run, next(iter(run.extent.models))), 150)


def _compiled(run: Run, size: str) -> dict[str, float]:
    model: GPT2LMHeadModel = workloads.contender(workloads.OURS, run.load(size)[0], run.extent.device, torch.float32)
    ids = _ids(run)[:, :16]
    with torch.no_grad():
        eager = model(ids, use_cache=False).logits
        compiled = torch.compile(model, fullgraph=True)(ids, use_cache=False).logits
    difference = ((compiled - eager).abs().max() / eager.abs().max()).item()
    if not difference <= 1e-5:
        raise ParityError(f"compiled logits differ by {difference:.2e} of the largest")
    return {"difference": difference}
