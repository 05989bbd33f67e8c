"""Training under DDP, FSDP and tensor parallelism on gloo: transformers' losses, and no logits computed or held."""

import itertools
from collections import Counter
from collections.abc import Callable
from functools import partial, wraps
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from fastgpt_kernels.operations.linear_cross_entropy import reference
from models import pair, tiny_config, token_ids
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FullyShardedDataParallel,
    MixedPrecisionPolicy,
    ShardingStrategy,
    fully_shard,
)
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.parallel import RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from transformers.models.gpt2.modeling_gpt2 import GPT2Block

from fastgpt import ops
from fastgpt.bench.machine import peak_growth
from fastgpt.model import outputs, recompute


def fsdp1(model: nn.Module, **options) -> nn.Module:
    blocks = ModuleWrapPolicy({GPT2Block, type(model.get_submodule("transformer.h.0"))})
    return FullyShardedDataParallel(model, auto_wrap_policy=blocks, device_id=torch.device("cpu"), **options)


def fsdp2(model: nn.Module, dtype: torch.dtype | None = None, **options) -> nn.Module:
    for block in model.get_submodule("transformer.h").children():
        fully_shard(block, mp_policy=MixedPrecisionPolicy(param_dtype=dtype))
    root = MixedPrecisionPolicy(param_dtype=dtype, output_dtype=None if dtype is None else torch.float32)
    fully_shard(model, mp_policy=root, **options)
    return model


def checkpointed_by_transformers(model: nn.Module) -> nn.Module:
    model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
    return fsdp2(model)


def checkpointed_by_accelerate(model: nn.Module) -> nn.Module:
    """By its `fsdp_activation_checkpointing`."""
    model.config.use_cache = False  # type: ignore[union-attr] - as Trainer does: keys would be appended again
    blocks: Any = model.get_submodule("transformer.h")
    for i in range(len(blocks)):
        blocks[i] = checkpoint_wrapper(blocks[i])
    return fsdp2(model)


def tensor_parallel(model: nn.Module) -> nn.Module:
    """The MLPs alone: the first product's columns and the second one's rows are on different processes."""
    shards = {"c_fc.weight": Shard(1), "c_fc.bias": Shard(0), "c_proj.weight": Shard(0), "c_proj.bias": Replicate()}
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))

    def partition(name: str, module: nn.Module, mesh: DeviceMesh) -> None:
        for part, parameter in list(module.named_parameters(recurse=False)):
            sharded = distribute_tensor(parameter.detach(), mesh, [shards[f"{name}.{part}"]])
            module.register_parameter(part, nn.Parameter(sharded))

    def replicate(module: nn.Module, inputs: Any, mesh: DeviceMesh) -> Any:
        return tuple(DTensor.from_local(x, mesh, [Replicate()]) for x in inputs)

    def collect(module: nn.Module, output: Any, mesh: DeviceMesh) -> Any:
        return output.full_tensor()

    for block in model.get_submodule("transformer.h").children():
        distribute_module(block.get_submodule("mlp"), mesh, partition, replicate, collect)
    return model


def tables_in_parallel(model: nn.Module) -> nn.Module:
    """The rows of both tables are on different processes."""
    plan: Any = {f"transformer.{table}": RowwiseParallel(input_layouts=Replicate()) for table in ("wte", "wpe")}
    return parallelize_module(model, init_device_mesh("cpu", (dist.get_world_size(),)), plan)


def norms_computed_again(wrap: Callable[[nn.Module], nn.Module], model: nn.Module) -> nn.Module:
    model.config.recompute_norms = True  # type: ignore[union-attr]
    return wrap(model)


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "DDP": DistributedDataParallel,
    "DDP, unused parameters": partial(DistributedDataParallel, find_unused_parameters=True),
    "DDP, static graph": partial(DistributedDataParallel, static_graph=True),
    "FSDP1": fsdp1,
    "FSDP1, original parameters": partial(fsdp1, use_orig_params=True),
    "FSDP1, gradients alone": partial(fsdp1, sharding_strategy=ShardingStrategy.SHARD_GRAD_OP),
    "FSDP2": fsdp2,
    "FSDP2, resharded": partial(fsdp2, reshard_after_forward=True),
    "FSDP2, half precision": partial(fsdp2, dtype=torch.bfloat16),
    "FSDP2, offloaded": partial(fsdp2, offload_policy=CPUOffloadPolicy(pin_memory=False)),
    "FSDP2, checkpointed by transformers": checkpointed_by_transformers,
    "FSDP2, checkpointed by accelerate": checkpointed_by_accelerate,
    "tensor parallel": tensor_parallel,
    "tensor parallel, tables alone": tables_in_parallel,
    "FSDP1, norms computed again": partial(norms_computed_again, fsdp1),
    "FSDP2, norms computed again": partial(norms_computed_again, fsdp2),
}


READS = ("nothing", "in the loss", "after the step")


def losses_of(model: nn.Module, batch: int, reads: str) -> list[float]:
    """The losses of three steps; `reads` says where the logits are read, if they are."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for step in range(3):
        ids = token_ids(2, 9, 131, seed=10 * step + batch)
        output = model(ids, labels=ids)
        loss = output.loss
        if reads == "in the loss":
            with torch.no_grad():
                losses.append(output.logits.float().logsumexp(-1).mean().item())
            loss = loss + 1e-2 * output.logits.float().square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if reads == "after the step":
            losses.append(output.logits.float().logsumexp(-1).mean().item())
        losses.append(loss.item())
    return losses


def train(rank: int, n_processes: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=n_processes)
    calls: list[str] = []
    outputs._Product.compute = counted(outputs._Product.compute, calls)  # type: ignore[method-assign]
    ops.gelu_mlp = counted(ops.gelu_mlp, calls)
    recompute._Recipe.follow = counted(recompute._Recipe.follow, calls)  # type: ignore[method-assign]
    results = {}
    for name, reads in itertools.product(WRAPPERS, READS):
        if ("norms" in name or "tensor" in name) and reads != "nothing":  # which changes nothing in blocks
            continue
        batch = 0 if "tensor" in name else rank  # all of its processes read the same
        theirs, ours = (
            losses_of(WRAPPERS[name](model.train()), batch, reads) for model in pair(tiny_config(n_layer=1))
        )
        results[name, reads] = theirs, ours, Counter(calls)
        calls.clear()
    torch.save(results, folder / f"{rank}.pt")
    dist.destroy_process_group()


def counted(function: Callable, calls: list[str]) -> Callable:
    @wraps(function)
    def call(*args: Any, **options: Any) -> Any:
        calls.append(function.__name__)
        return function(*args, **options)

    return call


@pytest.mark.parametrize("n_processes", [1, 2])
def test_losses_equal_transformers_under_the_same_wrapper(n_processes: int, tmp_path: Path) -> None:
    mp.spawn(train, (n_processes, tmp_path), n_processes)  # type: ignore[attr-defined]
    for rank in range(n_processes):
        for (name, reads), (theirs, ours, calls) in torch.load(tmp_path / f"{rank}.pt").items():
            tolerance = 2e-2 if "half" in name else 1e-5
            assert ours == pytest.approx(theirs, rel=tolerance), (name, reads)
            assert calls["compute"] == (0 if reads == "nothing" else 3), (name, reads)
            n_mlps = 0 if name == "tensor parallel" else 6 if "checkpointed" in name else 3
            assert calls["gelu_mlp"] == n_mlps, (name, reads)
            assert calls["follow"] == (6 if "norms" in name else 0), (name, reads)


@pytest.mark.parametrize("wrapper", ["DDP", "FSDP1", "FSDP2", "FSDP2, resharded"])
def test_a_step_holds_no_logits(wrapper: str, one_process: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Peak bytes of a step: with the loss fused, from logits, and in transformers under the same wrapper."""
    # As in a batch of the usual size, the logits are those of many chunks.
    monkeypatch.setattr(reference, "_CHUNK_LOGITS", 2**14)
    ids = token_ids(8, 40, 499)
    theirs, ours = (WRAPPERS[wrapper](model.train()) for model in pair(tiny_config(n_layer=1, vocab_size=499)))

    def peak(model: nn.Module, **options: Any) -> int:
        return peak_growth(lambda: model(ids, labels=ids, **options).loss.backward(), torch.device("cpu"))[0]

    fused, from_logits, expected = peak(ours), peak(ours, logits_to_keep=0), peak(theirs)
    n_bytes_of_logits = ids.numel() * 499 * 4
    assert fused + n_bytes_of_logits < min(from_logits, expected), (fused, from_logits, expected)
