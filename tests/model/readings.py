"""Ways to read the logits of a training step, which have no values before."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

READINGS: dict[str, Callable[[Tensor], Any]] = {
    "indexing": lambda logits: logits[:, -1],
    "as keyword": lambda logits: torch.softmax(input=logits, dim=-1),
    "in a list": lambda logits: torch.cat([logits, logits]),
    "numpy": lambda logits: torch.from_numpy(logits.detach().numpy()),
    "array": lambda logits: torch.tensor(np.asarray(logits.detach())),
    "dlpack": lambda logits: torch.from_dlpack(logits.detach()),
    "tolist": lambda logits: torch.tensor(logits.tolist()),
    "item": lambda logits: torch.tensor(logits[0, 0, 0].item()),
    "data": lambda logits: logits.data,
    "bfloat16": lambda logits: logits.bfloat16() + 0,
}
