"""llama.cpp with the weights of a model, as float32, Q8_0 and Q4_0 files.

The file is written by the package gguf and read by the library that llama-cpp-python builds.
Shapes: B batch, T tokens, V vocabulary.
"""

import ctypes
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D


class LlamaCpp:
    """The model with its weights in float32. Its table of GELU holds float16, which the logits show."""

    quantization: str | None = None  # one of the library's own kinds of file, to round the weights to
    cache_type = "F32"

    def __init__(self, base: GPT2LMHeadModel, n_batch: int, n_threads: int):
        from llama_cpp import llama_cpp as library  # type: ignore[import-not-found]

        self._library: Any = library
        self._log = library.llama_log_callback(lambda *_: None)  # alive for as long as the library may call it
        library.llama_log_set(self._log, None)
        library.llama_backend_init()
        with tempfile.TemporaryDirectory() as folder:
            file = f"{folder}/float32.gguf"
            _write_gguf(base, file)
            file = self._rounded(file, f"{folder}/model.gguf", n_threads)
            self.n_bytes = Path(file).stat().st_size
            settings = library.llama_model_default_params()
            self._model = library.llama_model_load_from_file(file.encode(), settings)
        self._vocab_size, n_positions = base.config.vocab_size, base.config.n_positions

        settings = library.llama_context_default_params()
        settings.n_ctx = settings.n_batch = settings.n_ubatch = n_batch * n_positions
        settings.n_outputs_max = n_batch * n_positions
        settings.n_seq_max = n_batch
        settings.n_threads = settings.n_threads_batch = n_threads
        settings.type_k = settings.type_v = getattr(library, f"GGML_TYPE_{self.cache_type}")
        self._context = library.llama_init_from_model(self._model, settings)
        self._batch = library.llama_batch_init(n_batch * n_positions, 0, 1)

    def _rounded(self, file: str, to: str, n_threads: int) -> str:
        """The file of the model to run: the one given, or one at `to` with rounded weights."""
        if self.quantization is None:
            return file
        settings = self._library.llama_model_quantize_default_params()
        settings.nthread = n_threads
        settings.ftype = getattr(self._library, f"LLAMA_FTYPE_MOSTLY_{self.quantization}")
        if self._library.llama_model_quantize(file.encode(), to.encode(), ctypes.byref(settings)):
            raise RuntimeError(f"llama.cpp could not round the model to {self.quantization}")
        return to

    def logits(self, ids: Tensor) -> Tensor:
        self._forget()
        return torch.from_numpy(self._run(ids.numpy(), 0, all_logits=True)).view(*ids.shape, -1)

    def generate(self, ids: Tensor, n_tokens: int) -> tuple[Tensor, list[float]]:
        columns, times = [], []
        n_past, new_ids = 0, ids.numpy()
        self._forget()
        for _ in range(n_tokens):
            logits = self._run(new_ids, n_past, all_logits=False)
            n_past += new_ids.shape[1]
            new_ids = logits.argmax(-1)[:, None]  # (B, 1)
            columns.append(new_ids)
            times.append(time.perf_counter())
        return torch.from_numpy(np.concatenate(columns, 1)), times

    def _forget(self) -> None:
        self._library.llama_memory_clear(self._library.llama_get_memory(self._context), False)

    def _run(self, ids: np.ndarray, n_past: int, all_logits: bool) -> np.ndarray:
        """Logits of ids (B, T) after n_past others: (B * T, V), or the last of each row (B, V)."""
        n_batch, n_tokens = ids.shape
        batch = self._batch
        batch.n_tokens = ids.size
        _filled(batch.token, ids)
        _filled(batch.pos, np.broadcast_to(np.arange(n_past, n_past + n_tokens), ids.shape))
        _filled(batch.n_seq_id, np.ones_like(ids))
        _filled(batch.logits, np.broadcast_to(all_logits | (np.arange(n_tokens) == n_tokens - 1), ids.shape))
        for number in range(ids.size):
            batch.seq_id[number][0] = number // n_tokens
        if code := self._library.llama_decode(self._context, batch):
            raise RuntimeError(f"llama_decode returned {code}")
        n_rows = ids.size if all_logits else n_batch
        values = self._library.llama_get_logits(self._context)
        return np.ctypeslib.as_array(values, shape=(n_rows, self._vocab_size)).copy()


class LlamaCppBFloat16(LlamaCpp):
    """Weights in bfloat16, and a cache in float16, as its users have it."""

    quantization, cache_type = "BF16", "F16"


class LlamaCppQ8(LlamaCpp):
    """Q8_0: int8 weights with a scale for each 32 inputs, of the head too; products round their rows likewise."""

    quantization = "Q8_0"


class LlamaCppQ4(LlamaCpp):
    """Q4_0: 4-bit weights with a scale for each 32 inputs; the head and the embeddings have 6 bits."""

    quantization = "Q4_0"


def _filled(pointer: Any, values: np.ndarray) -> None:
    """Write values where a field of the batch points."""
    np.ctypeslib.as_array(pointer, shape=(values.size,))[:] = values.reshape(-1)


def _write_gguf(base: GPT2LMHeadModel, file: str) -> None:
    """The weights in float32 and the sizes, with no vocabulary: ids are all that the benchmark needs."""
    import gguf  # type: ignore[import-not-found]

    config = base.config
    kind = gguf.MODEL_ARCH.GPT2
    writer = gguf.GGUFWriter(file, gguf.MODEL_ARCH_NAMES[kind])
    writer.add_block_count(config.n_layer)
    writer.add_context_length(config.n_positions)
    writer.add_embedding_length(config.n_embd)
    writer.add_feed_forward_length(config.n_inner or 4 * config.n_embd)
    writer.add_head_count(config.n_head)
    writer.add_layer_norm_eps(config.layer_norm_epsilon)
    writer.add_tokenizer_model("no_vocab")
    writer.add_vocab_size(config.vocab_size)

    names = gguf.get_tensor_name_map(kind, config.n_layer)
    transposed = {f"{name}.weight" for name, module in base.named_modules() if isinstance(module, Conv1D)}
    for name, weight in base.named_parameters():  # without the head where it is the embedding
        weight = weight.detach().float()
        writer.add_tensor(
            names.get_name(name, try_suffixes=(".weight", ".bias")),
            np.ascontiguousarray((weight.t() if name in transposed else weight).numpy()),
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
