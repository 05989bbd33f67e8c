"""Prints what models launch on sm_90, as JSON: kernels and what they are compiled for; run without TRITON_INTERPRET."""

import itertools
import json
from collections.abc import Iterator
from typing import Any
from unittest import mock

import fastgpt_kernels
import torch
from fastgpt_kernels import audit
from fastgpt_kernels.audit.shipped import Call
from transformers import GPT2Config

import fastgpt
from fastgpt import generate as engine

# As wide as gpt2, with as long a context: tiles and specialisations are those of the whole model.
SIZES: dict[str, Any] = {
    "n_layer": 3,
    "n_embd": 768,
    "n_head": 12,
    "vocab_size": 131,
    "bos_token_id": 130,
    "eos_token_id": 130,
}
IDS = torch.arange(32).view(2, 16)
PADDED = torch.ones_like(IDS)
PADDED[0, :3] = 0


def calls() -> Iterator[Call]:
    for dropout in (0.1, 0.0):
        config = GPT2Config(**SIZES, attn_pdrop=dropout, embd_pdrop=dropout, resid_pdrop=dropout)
        model = fastgpt.GPT2LMHeadModel(config)
        yield Call("training", "autocast", lambda model=model: train(model, autocast=True))
        for dtype in (torch.float32, torch.bfloat16):
            model = model.to(dtype)  # type: ignore[arg-type]
            yield Call("training", str(dtype), lambda model=model: train(model, autocast=False))
    for dtype in (torch.float32, torch.bfloat16):
        model = model.to(dtype)  # type: ignore[arg-type]
        yield Call("evaluation", str(dtype), lambda model=model: evaluate(model))
        for n_rows in (1, 4, 8) if dtype == torch.bfloat16 else (1, 4):
            yield Call("decoding", f"{dtype} B={n_rows}", lambda model=model, n_rows=n_rows: decode(model, n_rows))


def train(model: fastgpt.GPT2LMHeadModel, autocast: bool) -> None:
    model.train()
    for mask in (None, PADDED):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(IDS, attention_mask=mask, labels=IDS, use_cache=False).loss
        loss.backward()


@torch.no_grad()
def evaluate(model: fastgpt.GPT2LMHeadModel) -> None:
    model.eval()
    for mask in (None, PADDED):
        model(IDS, attention_mask=mask, use_cache=False)


def decode(model: fastgpt.GPT2LMHeadModel, n_rows: int) -> None:
    """The first tokens of many."""
    ids = IDS[:1, :8].repeat(n_rows, 1)
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 1000, "do_sample": False, "pad_token_id": 0}
    with engine.tier("eager"):
        for _ in itertools.islice(model.eval().stream(ids, **options), 3):
            pass


with mock.patch.object(fastgpt_kernels, "_interprets", return_value=True), fastgpt.backend("triton"):
    launches = audit.record(calls(), "sm_90")
print(json.dumps([(launch.kernel, launch.specialization, launch.label) for launch in launches]))
