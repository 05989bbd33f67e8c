"""How well a model predicts a text: its loss over a sliding window, as perplexity and as bits per byte.

B windows at a time, T tokens in each, V vocabulary. A text is `ids`, as `corpus.encode` returns them.
"""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from . import ops
from .corpus import encode
from .model.rounded import head_weight
from .modeling import GPT2LMHeadModel
from .progress import Progress

IGNORED = -100  # the label of a position that is not counted


@dataclass(frozen=True)
class Evaluation:
    """How well a text was predicted. loss: in nats per token. seconds: without loading and tokenising."""

    loss: float
    perplexity: float
    bits_per_byte: float
    n_tokens: int
    n_bytes: int
    context: int
    stride: int
    device: str
    dtype: str
    backend: str
    seconds: float
    tokens_per_s: float

    def result(self) -> str:
        tokens = f"{self.n_tokens:,} token{'s' * (self.n_tokens != 1)}"
        return (
            f"loss {self.loss:.4f} nats per token, perplexity {self.perplexity:.2f}, {self.bits_per_byte:.4f} bits per "
            f"byte: {tokens} in windows of {self.context}, stride {self.stride}"
        )

    def speed(self) -> str:
        return f"{self.tokens_per_s:,.0f} tokens/s ({self.backend} path on {self.device}, {self.dtype})"


def settle_windows(n_positions: int, context: int | None = None, stride: int | None = None) -> tuple[int, int]:
    """(context, stride) in tokens; None takes the model's whole context, and half of the context.

    Raises ValueError on a context longer than the model's, and on a stride longer than the context, which would leave
    tokens out.
    """
    context = n_positions if context is None else context
    if not 1 <= context <= n_positions:
        raise ValueError(f"the context must be in [1, {n_positions}], the model's positions, not {context}")
    stride = max(1, context // 2) if stride is None else stride
    if not 1 <= stride <= context:
        raise ValueError(f"the stride must be in [1, {context}], the context, not {stride}")
    return context, stride


def windows(n_ids: int, context: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """(start, end, n) of each window: ids[start:end] predict ids[start + 1 : end + 1], of which the last n count.

    Every token after the first counts once, with at least context - stride tokens before it where the text has them.
    """
    start, n_settled = 0, 1
    while n_settled < n_ids:
        end = min(start + context, n_ids - 1)
        yield start, end, end + 1 - n_settled
        start, n_settled = start + stride, end + 1


@torch.no_grad()
def mean_loss(
    model: GPT2LMHeadModel,
    ids: Tensor,
    *,
    context: int | None = None,
    stride: int | None = None,
    batch: int = 8,
    progress: Progress | None = None,
) -> float:
    """The model's mean negative log-likelihood of ids[1:], in nats per token: of each in float32, their sum in float64.

    ids: (n + 1,) int64. context, stride: see `settle_windows`. batch: windows at a time.
    Raises ValueError when there is no token to predict.
    """
    context, stride = settle_windows(model.config.n_positions, context, stride)
    if len(ids) < 2:
        raise ValueError(f"{len(ids)} token in the text, and the first only predicts: give a longer text")
    spans = list(windows(len(ids), context, stride))
    total = 0.0
    weight = head_weight(model.lm_head, model.dtype)  # (V, C)
    for first in range(0, len(spans), batch):
        rows = spans[first : first + batch]
        # Padding on the right changes nothing before it, because attention is causal.
        inputs = pad_sequence([ids[start:end] for start, end, _ in rows], batch_first=True)  # (B, T)
        labels = pad_sequence(
            [F.pad(ids[end + 1 - n : end + 1], (end - start - n, 0), value=IGNORED) for start, end, n in rows],
            batch_first=True,
            padding_value=IGNORED,
        ).to(model.device)
        hidden = model.transformer(inputs.to(model.device), use_cache=False).last_hidden_state  # (B, T, C)
        is_counted = labels != IGNORED
        losses = ops.linear_cross_entropy(hidden[is_counted], weight, labels[is_counted], reduction="none")
        total += losses.cpu().double().sum().item()
        if progress is not None:
            progress("scoring", first + len(rows), len(spans))
    return total / (len(ids) - 1)


def perplexity(loss: float) -> float:
    """exp(loss): among how many equally likely tokens a model in effect chooses. Infinite above what a float holds."""
    return math.exp(loss) if loss < 700 else math.inf


def bits_per_byte(loss: float, ids: Tensor, text: str) -> float:
    """A loss in nats per token of `ids` in bits per byte of `text` in UTF-8: the same for every tokenizer."""
    return loss * (len(ids) - 1) / math.log(2) / len(text.encode())


def evaluate_text(
    text: str,
    model: GPT2LMHeadModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    context: int | None = None,
    stride: int | None = None,
    batch: int = 8,
    progress: Progress | None = None,
) -> Evaluation:
    """Score a text after an end-of-text token. Arguments and errors as for `mean_loss`."""
    context, stride = settle_windows(model.config.n_positions, context, stride)
    ids = encode(tokenizer, text, progress)
    started = time.perf_counter()
    loss = mean_loss(model, ids, context=context, stride=stride, batch=batch, progress=progress)
    seconds = time.perf_counter() - started
    return Evaluation(
        loss=loss,
        perplexity=perplexity(loss),
        bits_per_byte=bits_per_byte(loss, ids, text),
        n_tokens=len(ids) - 1,
        n_bytes=len(text.encode()),
        context=context,
        stride=stride,
        device=str(model.device),
        dtype=str(model.dtype).removeprefix("torch."),
        backend="triton" if ops.runs_kernels(model.device) else "torch",
        seconds=seconds,
        tokens_per_s=(len(ids) - 1) / seconds,
    )
