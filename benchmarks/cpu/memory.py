"""The peak memory of a prefill or a training step.

On a GPU it is measured. On a CPU it is counted over fake tensors, which have shapes and no values, so that any size
fits. The count is that of torch's profiler over a real run, with two exceptions: what an operation allocates and frees
within itself is not seen, and the sum of two gradients is a new tensor where autograd would add in place, so that a
step of few tokens may count one more gradient of the embedding.
"""

import copy
import gc
import weakref
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from transformers import AutoModelForCausalLM, GPT2LMHeadModel

from fastgpt.bench import machine, workloads


def peak(workload: str, name: str, base: GPT2LMHeadModel, ids: Tensor, dtype: torch.dtype) -> dict[str, Any]:
    """The most bytes that contender `name` holds at once in a run over ids (B, T), and how they were found.

    The run is the second, because the first allocates the optimiser's state. Raises torch.OutOfMemoryError on a GPU.
    """
    if ids.device.type == "cpu":
        counted = _counted(workload, name, base, ids, dtype)
        return {"peak_memory_bytes": counted, "memory_measure": "counted allocations"}
    work = workloads.make_work(workload, name, base, ids, 1, dtype)
    work.run()
    growth, measure = machine.peak_growth(work.run, ids.device)
    return {"peak_memory_bytes": work.held_bytes() + growth, "memory_measure": measure}


def _counted(workload: str, name: str, base: GPT2LMHeadModel, ids: Tensor, dtype: torch.dtype) -> int:
    weights_dtype = torch.float32 if workload == "train" else dtype
    with FakeTensorMode(), _Allocations() as allocations:
        model = AutoModelForCausalLM.from_config(
            copy.deepcopy(base.config), dtype=weights_dtype, trust_remote_code=False
        ).eval()
        model = workloads.as_contender(name, model)
        fake_ids = torch.zeros(ids.shape, dtype=ids.dtype)
        is_train = workload == "train"
        work = workloads.train(name, model, fake_ids, dtype) if is_train else workloads.prefill(name, model, fake_ids)
        work.run()
        gc.collect()
        allocations.peak = allocations.held
        work.run()
    return allocations.peak


class _Allocations(TorchDispatchMode):
    """Counts the bytes of what torch's operations return. held: of the tensors alive now. peak: the most so far."""

    def __init__(self) -> None:
        super().__init__()
        self.held = self.peak = 0
        self._alive: dict[int, int] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = function(*args, **(kwargs or {}))
        for tensor in tree_iter(results):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return results

    def _count(self, storage: torch.UntypedStorage) -> None:
        place = storage._cdata
        if place not in self._alive:
            self._alive[place] = storage.nbytes()
            self.held += storage.nbytes()
            self.peak = max(self.peak, self.held)
            weakref.finalize(storage, self._free, place)

    def _free(self, place: int) -> None:
        self.held -= self._alive.pop(place)
