"""Predictions for many GPUs: what they count as sent is what torch sends, and how they behave at the ends."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from models import pair, tiny_config, token_ids
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity, profile

from benchmarks.report import scale
from fastgpt import accounting
from fastgpt.accounting import PRESETS, count_parameters

# Sizes that two processes share evenly; gradients of 3.3 MB, which are two buckets of DDP.
CONFIG = {"vocab_size": 132, "n_embd": 128}


def sharded(model: nn.Module) -> nn.Module:
    for block in model.get_submodule("transformer.h").children():
        fully_shard(block)
    fully_shard(model)
    return model


ENGINES = {"ddp": DistributedDataParallel, "fsdp2": sharded}


def traffic_of_a_step(model: nn.Module, rank: int) -> dict[str, tuple[int, int]]:
    """How many collective operations of each kind the third step makes, and the bytes of their whole tensors."""
    optimizer = torch.optim.AdamW(model.parameters())
    ids = token_ids(2, 9, 131, seed=rank)

    def step() -> None:
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    step()  # DDP builds its buckets again after the first
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as trace:
        step()
    whole = {"c10d::_allgather_base_": ("all_gather", 0), "c10d::_reduce_scatter_base_": ("reduce_scatter", 1)}
    if isinstance(model, DistributedDataParallel):  # gloo also reduces to scatter
        whole = {"gloo:all_reduce": ("all_reduce", 0)}
    counted: dict[str, tuple[int, int]] = {}
    for event in trace.events() or ():
        if event.name in whole:
            kind, place = whole[event.name]
            n_operations, n_bytes = counted.get(kind, (0, 0))
            counted[kind] = n_operations + 1, n_bytes + 4 * sum(event.input_shapes[place])
    return counted


def count(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    found = {
        name: traffic_of_a_step(engine(pair(tiny_config(**CONFIG))[1].train()), rank)
        for name, engine in ENGINES.items()
    }
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


def test_predicted_traffic_is_what_two_processes_send(tmp_path: Path) -> None:
    mp.spawn(count, (tmp_path,), 2)  # type: ignore[attr-defined]
    shape = accounting.shape_of(tiny_config(**CONFIG))
    predicted = {"ddp": scale.ddp_traffic(shape), "fsdp2": scale.fsdp2_traffic(shape, weight_bytes=4)}
    expected = {
        name: {part.kind: (part.n_operations, part.n_bytes) for part in parts} for name, parts in predicted.items()
    }
    for rank in range(2):
        assert torch.load(tmp_path / f"{rank}.pt") == expected


@pytest.mark.parametrize("name", PRESETS)
def test_one_gpu_sends_nothing_and_eight_send_seven_eighths(name: str) -> None:
    shape = PRESETS[name]
    n, outside = count_parameters(shape).total, scale.outside_blocks(shape)
    for predict in (scale.ddp, scale.fsdp2):
        assert predict(shape, 1).sent_bytes == 0
        assert predict(shape, 1).state_bytes == 16 * n
    assert scale.ddp(shape, 8).sent_bytes == 7 * n
    assert scale.fsdp2(shape, 8).sent_bytes == pytest.approx(7 * n - 7 / 8 * 2 * outside)
    assert scale.fsdp2(shape, 8).state_bytes == pytest.approx(2 * n, abs=16)


def test_links_bound_a_step_from_below() -> None:
    shape = PRESETS["gpt2"]
    for predict in (scale.ddp, scale.fsdp2):
        steps = [predict(shape, n_gpus) for n_gpus in scale.N_GPUS]
        assert all(step.hidden_s < step.exposed_s for step in steps)
        assert [step.exposed_s for step in steps] == sorted(step.exposed_s for step in steps)
        slow = scale.Cluster(network_rate=1e5)
        assert predict(shape, 64, slow).hidden_s == pytest.approx(predict(shape, 64).sent_bytes / 8e5, rel=1e-2)
