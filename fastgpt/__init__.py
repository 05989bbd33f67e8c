"""GPT-2 with Hugging Face weights on fused Triton kernels, with a pure-torch path for CPUs."""

from .modeling import (
    GPT2DoubleHeadsModel,
    GPT2ForQuestionAnswering,
    GPT2ForSequenceClassification,
    GPT2ForTokenClassification,
    GPT2LMHeadModel,
    GPT2Model,
    patch,
    unpatch,
)
from .ops import backend

__version__ = "0.1.0"

__all__ = [
    "GPT2DoubleHeadsModel",
    "GPT2ForQuestionAnswering",
    "GPT2ForSequenceClassification",
    "GPT2ForTokenClassification",
    "GPT2LMHeadModel",
    "GPT2Model",
    "backend",
    "patch",
    "unpatch",
]
