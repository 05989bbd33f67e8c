"""Train on several processes with torch's DDP; fastgpt needs no code of its own for it.

torchrun --nproc-per-node 2 examples/ddp.py
"""

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import fastgpt

on_gpus = torch.cuda.is_available()
dist.init_process_group("nccl" if on_gpus else "gloo")
rank, n_ranks = dist.get_rank(), dist.get_world_size()
device = torch.device("cuda", rank % torch.cuda.device_count()) if on_gpus else torch.device("cpu")


def train() -> None:
    model, tokenizer = fastgpt.load_demo()
    model = DistributedDataParallel(model.to(device).train())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    text = "What, ho! apothecary! Come hither, man. I see that thou art poor. " * 8
    ids = tokenizer(text, return_tensors="pt")["input_ids"][0]
    batch = torch.stack([ids[start : start + 64] for start in range(rank, 4 * n_ranks, n_ranks)]).to(device)

    for step in range(5):
        optimizer.zero_grad()
        loss = model(batch, labels=batch).loss
        loss.backward()  # DDP averages the gradients of all ranks here
        optimizer.step()
        dist.all_reduce(loss.detach_())
        if rank == 0:
            print(f"step {step}: loss {loss.item() / n_ranks:.4f} over {n_ranks} ranks", flush=True)


train()  # a function, so that the model and the threads of DDP end before the process group does
dist.barrier()
dist.destroy_process_group()
