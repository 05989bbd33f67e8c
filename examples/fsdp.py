"""Train on several processes with torch's FSDP2; a run that was killed goes on from its last checkpoint.

torchrun --nproc-per-node 2 examples/fsdp.py --steps 6 --out sharded

Every process holds its part of the weights and of the optimiser's state and saves it by itself. The model that is saved
at the end has all weights in one file, which transformers loads.
"""

from pathlib import Path
from typing import Annotated

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import typer
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.fsdp import fully_shard

import fastgpt

TEXT = "What, ho! apothecary! Come hither, man. I see that thou art poor. " * 8


def main(
    out: Annotated[Path, typer.Option(help="Folder of checkpoints and of the trained model.")] = Path("sharded"),
    steps: Annotated[int, typer.Option(min=1)] = 6,
    every: Annotated[int, typer.Option(min=1, help="Steps between two checkpoints.")] = 2,
) -> None:
    on_gpus = torch.cuda.is_available()
    dist.init_process_group("nccl" if on_gpus else "gloo")
    rank, n_ranks = dist.get_rank(), dist.get_world_size()
    device = torch.device("cuda", rank % torch.cuda.device_count()) if on_gpus else torch.device("cpu")
    if on_gpus:
        torch.cuda.set_device(device)

    model, tokenizer = fastgpt.load_demo()
    model = model.to(device).train()  # type: ignore[arg-type]
    model.gradient_checkpointing_enable()  # each block computes its activations again in backward
    for block in model.transformer.h:
        fully_shard(block)
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    # The file .metadata is written last, so that a checkpoint without one is not whole.
    whole = {int(file.parent.name.removeprefix("step-")): file.parent for file in out.glob("step-*/.metadata")}
    first = max(whole, default=0)
    if whole:
        weights, moments = get_state_dict(model, optimizer)
        dcp.load({"model": weights, "optimizer": moments}, checkpoint_id=whole[first])
        set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=moments)

    ids = tokenizer(TEXT, return_tensors="pt")["input_ids"][0]
    for step in range(first + 1, steps + 1):
        torch.manual_seed(step * n_ranks + rank)  # of the batch and of dropout, in a run that goes on too
        batch = torch.stack([ids[start : start + 64] for start in torch.randint(len(ids) - 64, (4,)).tolist()])
        loss = model(batch.to(device), labels=batch.to(device)).loss
        loss.backward()  # FSDP averages the gradients of all ranks, and leaves each its part
        optimizer.step()
        optimizer.zero_grad()
        dist.all_reduce(loss.detach_())
        if rank == 0:
            print(f"step {step}: loss {loss.item() / n_ranks:.4f} over {n_ranks} ranks", flush=True)
        if step % every == 0:
            weights, moments = get_state_dict(model, optimizer)
            dcp.save({"model": weights, "optimizer": moments}, checkpoint_id=out / f"step-{step}")

    weights = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if rank == 0:
        model.save_pretrained(out, state_dict=weights)
        tokenizer.save_pretrained(out)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    typer.run(main)
