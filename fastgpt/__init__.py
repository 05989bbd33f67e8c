"""GPT-2 with Hugging Face weights on fused Triton kernels, with a pure-torch path for CPUs."""

from .accounting import count_parameters
from .checkpoint.headers import CheckpointError
from .demo import load_demo
from .generate import release
from .generate.api import warmup
from .generate.routing import explain
from .model.loss import CausalLMLoss
from .model.patching import patch, unpatch
from .model.rounded import quantize
from .modeling import (
    GPT2DoubleHeadsModel,
    GPT2ForQuestionAnswering,
    GPT2ForSequenceClassification,
    GPT2ForTokenClassification,
    GPT2LMHeadModel,
    GPT2Model,
)
from .ops import backend

__version__ = "0.1.0"

__all__ = [
    "CausalLMLoss",
    "CheckpointError",
    "GPT2DoubleHeadsModel",
    "GPT2ForQuestionAnswering",
    "GPT2ForSequenceClassification",
    "GPT2ForTokenClassification",
    "GPT2LMHeadModel",
    "GPT2Model",
    "backend",
    "count_parameters",
    "explain",
    "load_demo",
    "patch",
    "quantize",
    "release",
    "unpatch",
    "warmup",
]
