"""Contenders beside torch and transformers, left out with a reason where not installed or where results differ.

On a CPU whole models: ctranslate2 and onnxruntime on the very weights, for prefill and decode. On a GPU operations:
liger-kernel, cut-cross-entropy, flash-attn, quack-kernels. Shapes: B batch, T tokens, H heads, V vocabulary.
"""

import os
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from transformers import DynamicCache, GenerationConfig, GPT2LMHeadModel

from fastgpt import machine
from fastgpt.accounting import Shape
from fastgpt.benchmark import MakeWork
from fastgpt.parity import ParityError
from fastgpt.workloads import Work

from . import operations

# --- whole models ---------------------------------------------------------------------------------------------------


class Engine(Protocol):
    """Another implementation of one model with its weights. n_bytes: of its model files."""

    n_bytes: int

    def logits(self, ids: Tensor) -> Tensor:
        """(B, T, V) logits of ids (B, T)."""
        ...

    def generate(self, ids: Tensor, n_tokens: int) -> tuple[Tensor, list[float]]:
        """(B, n_tokens) greedy tokens after ids (B, T), at no end token, and when each column of them was there."""
        ...


def _contender(build: Callable[[GPT2LMHeadModel, int], Engine]) -> MakeWork:
    """build: makes the engine of a model in float32 on the CPU, for B sequences."""
    # Converting takes longer than timing: prefill and decode share an engine.
    build = lru_cache(maxsize=1)(build)

    def make(workload: str, base: GPT2LMHeadModel, ids: Tensor, n_new_tokens: int, dtype: torch.dtype) -> Work:
        if ids.device.type != "cpu" or dtype != torch.float32 or workload == "train":
            raise ValueError("runs here only on a CPU, in float32, for prefill and decode")
        engine = build(base, ids.shape[0])
        check_engine(engine, base, ids, n_new_tokens)
        if workload == "prefill":
            return Work(
                lambda: engine.logits(ids),
                lambda: machine.seconds(lambda: engine.logits(ids), ids.device),
                ids.numel(),
                lambda: engine.n_bytes,
            )

        def counted_seconds() -> float:
            times = engine.generate(ids, n_new_tokens)[1]
            return times[-1] - times[0]

        n_counted = ids.shape[0] * (n_new_tokens - 1)
        return Work(lambda: engine.generate(ids, n_new_tokens), counted_seconds, n_counted, lambda: engine.n_bytes)

    return make


def check_engine(engine: Engine, base: GPT2LMHeadModel, ids: Tensor, n_new_tokens: int) -> None:
    """The gate: logits within 64 steps of the largest of transformers', and equal greedy tokens. Raises ParityError."""
    with torch.no_grad():
        theirs = base(ids, use_cache=False).logits
    difference = (engine.logits(ids) - theirs).abs().max().item()
    allowed = 64 * torch.finfo(torch.float32).eps * theirs.abs().max().item()
    if not difference <= allowed:
        raise ParityError(f"its logits differ from transformers' by {difference:.3g}, allowed {allowed:.3g}")
    settings = GenerationConfig(max_new_tokens=n_new_tokens, pad_token_id=0, do_sample=False)
    sequences = base.generate(ids, attention_mask=torch.ones_like(ids), generation_config=settings)  # type: ignore[operator]
    if not torch.equal(engine.generate(ids, n_new_tokens)[0], sequences[:, ids.shape[1] :]):
        raise ParityError("its greedy tokens are not transformers'")


class CTranslate2:
    """The model converted in memory: its tokens are the ids as text, so that no tokenizer is needed."""

    def __init__(self, base: GPT2LMHeadModel, n_batch: int):
        # Its idle threads would keep the cores from whoever comes next for 200 ms, read when its OpenMP is loaded.
        os.environ.setdefault("KMP_BLOCKTIME", "1")
        import ctranslate2  # type: ignore[import-not-found]
        from ctranslate2.converters.transformers import GPT2Loader  # type: ignore[import-not-found]

        self._storage = ctranslate2.StorageView
        self._vocab_size = base.config.vocab_size
        with torch.no_grad():
            spec = GPT2Loader().get_model_spec(base)
        spec.register_vocabulary([str(token) for token in range(self._vocab_size)])
        spec.config.bos_token = spec.config.eos_token = spec.config.unk_token = "0"
        spec.validate()
        spec.optimize()
        with tempfile.TemporaryDirectory() as folder:
            spec.save(folder)
            self.n_bytes = _n_bytes(folder)
            self._generator = ctranslate2.Generator(
                folder, device="cpu", compute_type="float32", inter_threads=1, intra_threads=torch.get_num_threads()
            )

    def logits(self, ids: Tensor) -> Tensor:
        lengths = torch.full(ids.shape[:1], ids.shape[1], dtype=torch.int32)
        tokens, lengths = (self._storage.from_array(x.int().numpy()) for x in (ids, lengths))
        return torch.from_numpy(np.array(self._generator.forward_batch(tokens, lengths)))

    def generate(self, ids: Tensor, n_tokens: int) -> tuple[Tensor, list[float]]:
        times = [0.0] * n_tokens

        def note(token: Any) -> bool:
            times[token.step] = time.perf_counter()
            return False

        results = self._generator.generate_batch(
            [[str(token) for token in row] for row in ids.tolist()],
            max_length=n_tokens,
            end_token=[self._vocab_size],  # which is no token
            include_prompt_in_result=False,  # else the prompt is decoded one token at a time
            callback=note,
        )
        return torch.tensor([result.sequences_ids[0] for result in results]), times


class OnnxRuntime:
    """The model exported with its cache as inputs and outputs, which stay where the runtime put them."""

    def __init__(self, base: GPT2LMHeadModel, n_batch: int):
        import onnxruntime  # type: ignore[import-not-found]

        self._value = onnxruntime.OrtValue
        config = base.config
        self._empty = torch.zeros(n_batch, config.n_head, 0, config.n_embd // config.n_head)
        # Sizes of 0 and 1 would be taken for constants, and one tensor in several places for one input.
        past = [
            self._empty.new_zeros(n_batch, config.n_head, 3, self._empty.shape[3]) for _ in range(2 * config.n_layer)
        ]
        free = torch.export.Dim.DYNAMIC
        program: Any = torch.onnx.export(
            _CachedStep(base).eval(),
            (torch.zeros(n_batch, 2, dtype=torch.long), *past),
            dynamo=True,
            dynamic_shapes=({1: free}, tuple({2: free} for _ in past)),
            verbose=False,
        )
        settings = onnxruntime.SessionOptions()
        settings.intra_op_num_threads = torch.get_num_threads()
        # Idle threads must not keep the cores from whoever comes next.
        settings.add_session_config_entry("session.force_spinning_stop", "1")
        settings.log_severity_level = 3  # errors
        with tempfile.TemporaryDirectory() as folder:
            program.save(f"{folder}/model.onnx", external_data=True)
            self.n_bytes = _n_bytes(folder)
            self._session = onnxruntime.InferenceSession(f"{folder}/model.onnx", settings)
        self._inputs = [value.name for value in self._session.get_inputs()]
        self._outputs = [value.name for value in self._session.get_outputs()]

    def logits(self, ids: Tensor) -> Tensor:
        return torch.from_numpy(self._run(self._outputs[:1], ids, self._no_past())[0].numpy())

    def generate(self, ids: Tensor, n_tokens: int) -> tuple[Tensor, list[float]]:
        past, tokens, times = self._no_past(), [], []
        for _ in range(n_tokens):
            logits, *past = self._run(self._outputs, ids, past)
            ids = torch.from_numpy(logits.numpy())[:, -1:].argmax(-1)  # (B, 1)
            tokens.append(ids)
            times.append(time.perf_counter())
        return torch.cat(tokens, 1), times

    def _no_past(self) -> list[Any]:
        return [self._value.ortvalue_from_numpy(self._empty.numpy())] * (len(self._inputs) - 1)

    def _run(self, outputs: list[str], ids: Tensor, past: list[Any]) -> list[Any]:
        values = self._value.ortvalue_from_numpy(ids.numpy()), *past
        return self._session.run_with_ort_values(outputs, dict(zip(self._inputs, values, strict=True)))


class _CachedStep(nn.Module):
    """ids (B, T) and the keys and values of every layer -> logits (B, T, V) and the longer keys and values."""

    def __init__(self, model: GPT2LMHeadModel):
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, *past: Tensor) -> tuple[Tensor, ...]:
        cache: Any = DynamicCache()
        for layer in range(self.model.config.n_layer):
            cache.update(past[2 * layer], past[2 * layer + 1], layer)
        logits = self.model(ids, past_key_values=cache, use_cache=True).logits
        present = (tensor for layer in cache.layers for tensor in (layer.keys, layer.values))
        return (logits, *present)


def _n_bytes(folder: str) -> int:
    return sum(file.stat().st_size for file in Path(folder).iterdir())


# By name, for `benchmark.run_benchmark`.
CPU_PEERS: dict[str, MakeWork] = {
    "ctranslate2": _contender(CTranslate2),
    "onnxruntime": _contender(OnnxRuntime),
}

# --- operations -----------------------------------------------------------------------------------------------------

# A function of a case's inputs, made only where its package can be imported.
MakeOperation = Callable[[Shape], Callable[..., Any]]


def _liger_layer_norm(shape: Shape) -> Callable[..., Any]:
    from liger_kernel.transformers.functional import liger_layer_norm  # type: ignore[import-not-found]

    return lambda x, weight, bias: liger_layer_norm(x, weight, bias, 1e-5)


def _liger_linear_cross_entropy(shape: Shape) -> Callable[..., Any]:
    from liger_kernel.transformers.functional import (  # type: ignore[import-not-found]
        liger_fused_linear_cross_entropy,
    )

    return liger_fused_linear_cross_entropy


def _cut_cross_entropy(shape: Shape) -> Callable[..., Any]:
    from cut_cross_entropy import linear_cross_entropy  # type: ignore[import-not-found]

    return linear_cross_entropy


def _quack_linear_cross_entropy(shape: Shape) -> Callable[..., Any]:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy  # type: ignore[import-not-found]

    return chunked_linear_cross_entropy


def _flash_attn_2(shape: Shape) -> Callable[..., Any]:
    from flash_attn import flash_attn_func  # type: ignore[import-not-found]

    return lambda packed: _on_packed(flash_attn_func, packed, shape.n_head)


def _flash_attn_4(shape: Shape) -> Callable[..., Any]:
    from flash_attn.cute import flash_attn_func  # type: ignore[import-not-found]

    return lambda packed: _on_packed(flash_attn_func, packed, shape.n_head)


def _on_packed(attend: Callable[..., Any], packed: Tensor, n_heads: int) -> Tensor:
    """Attention over (B, T, H, D) views of the projection's output (B, T, 3*C)."""
    B, T, width = packed.shape
    out = attend(*packed.view(B, T, 3, n_heads, -1).unbind(2), causal=True)
    out = out[0] if isinstance(out, tuple) else out  # the log-sum-exp comes along in some versions
    return out.reshape(B, T, width // 3)


# By the operation's name. Attention with dropout has none: other random numbers than ours leave nothing to check.
OPERATION_PEERS: dict[str, dict[str, MakeOperation]] = {
    "layer_norm": {"liger": _liger_layer_norm},
    "causal_attention": {"flash-attn 2": _flash_attn_2, "flash-attn 4": _flash_attn_4},
    "linear_cross_entropy": {
        "liger": _liger_linear_cross_entropy,
        "cut-cross-entropy": _cut_cross_entropy,
        "quack": _quack_linear_cross_entropy,
    },
}


def with_peers(case: operations.Case, shape: Shape) -> tuple[operations.Case, list[dict[str, Any]]]:
    """A case with the peers that are installed and agree with the reference, and for each other a row that says why."""
    contenders, left_out = dict(case.contenders), []
    for name, reason, function in _judged(case, shape):
        if reason is None:
            contenders[name] = function
        else:
            left_out.append({"operation": case.operation, "contender": name, "skipped": reason})
    return replace(case, contenders=contenders), left_out


def _judged(case: operations.Case, shape: Shape) -> Iterator[tuple[str, str | None, Callable[..., Any]]]:
    for name, make in OPERATION_PEERS.get(case.operation, {}).items():
        function: Callable[..., Any] = make
        try:
            function = make(shape)
            reason = operations.check(replace(case, contenders={name: function, "torch": case.contenders["torch"]}))
        except Exception as error:  # A package may be missing, or fail on this GPU, in more ways than can be named.
            reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        yield name, reason, function
