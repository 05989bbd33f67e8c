"""The activations that `gelu_mlp` knows, in plain torch."""

from collections.abc import Callable
from functools import partial

import torch.nn.functional as F
from torch import Tensor

# GPT-2 was trained with the tanh form; gelu_fast is the same function with a rounded constant.
_gelu_tanh = partial(F.gelu, approximate="tanh")
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu_new": _gelu_tanh,
    "gelu": F.gelu,
    "gelu_fast": _gelu_tanh,
    "relu": F.relu,
    "silu": F.silu,
}
