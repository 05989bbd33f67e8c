"""Other implementations of GPT-2 on a CPU with the weights of a model: their processes, ctranslate2 and onnxruntime.

Each runs in a process of its own, which takes the time itself. Shapes: B batch, T tokens, H heads, V vocabulary.
"""

import logging
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import transformers
from torch import Tensor, nn
from transformers import DynamicCache, GPT2LMHeadModel
from transformers.cache_utils import DynamicLayer

from fastgpt.bench import machine
from fastgpt.model.compat import CACHE

CPU = torch.device("cpu")


class Engine(Protocol):
    """Another implementation of one model with its weights. n_bytes: of its model files."""

    n_bytes: int

    def logits(self, ids: Tensor) -> Tensor:
        """(B, T, V) logits of ids (B, T)."""
        ...

    def generate(self, ids: Tensor, n_tokens: int) -> tuple[Tensor, list[float]]:
        """The greedy tokens (B, n_tokens) after ids (B, T), and when each column was ready. No end token stops them."""
        ...


# --- a process of its own -------------------------------------------------------------------------------------------


class Remote:
    """An engine in a process of its own, which is idle between the calls below.

    ctranslate2 binds the OpenMP library that torch has loaded. In one process the library then counts more threads than
    CPUs and lets torch's sleep between its loops: a decode step of torch took 31 ms in place of 21 while such an engine
    lived.
    """

    def __init__(self, build: Callable[[GPT2LMHeadModel, int, int], Engine], base: GPT2LMHeadModel, n_batch: int):
        """build: makes the engine of a model in float32 on the CPU, for B sequences and a number of threads."""
        self._process = ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn"))
        with tempfile.TemporaryDirectory() as folder:
            base.save_pretrained(folder)
            self.n_bytes: int = self._call(_start, build, folder, n_batch, torch.get_num_threads())

    def logits(self, ids: Tensor) -> Tensor:
        return torch.from_numpy(self._call(_logits, ids.numpy()))

    def generate(self, ids: Tensor, n_tokens: int) -> tuple[Tensor, list[float]]:
        tokens, times = self._call(_generate, ids.numpy(), n_tokens)
        return torch.from_numpy(tokens), times

    def seconds(self, workload: str, ids: Tensor, n_tokens: int) -> float:
        """Time by the clock of the engine's own process. Decoding is timed from the first token to the last."""
        return self._call(_seconds, workload, ids.numpy(), n_tokens)

    def peak_growth(self, workload: str, ids: Tensor, n_tokens: int) -> tuple[int | None, str]:
        """What `machine.resident_growth` measures, for the engine's process."""
        return self._call(_peak_growth, workload, ids.numpy(), n_tokens)

    def close(self) -> None:
        self._process.shutdown()

    def _call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return self._process.submit(function, *arguments).result()


_engine: Engine  # of the process that `Remote` started


def _start(build: Callable[[GPT2LMHeadModel, int, int], Engine], folder: str, n_batch: int, n_threads: int) -> int:
    global _engine
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it misses torchvision
    torch.set_num_threads(1)  # The engine has the threads; torch's own would compete with them.
    _engine = build(GPT2LMHeadModel.from_pretrained(folder, dtype=torch.float32).eval(), n_batch, n_threads)
    return _engine.n_bytes


def _logits(ids: np.ndarray) -> np.ndarray:
    return _engine.logits(torch.from_numpy(ids)).numpy()


def _generate(ids: np.ndarray, n_tokens: int) -> tuple[np.ndarray, list[float]]:
    tokens, times = _engine.generate(torch.from_numpy(ids), n_tokens)
    return tokens.numpy(), times


def _seconds(workload: str, ids: np.ndarray, n_tokens: int) -> float:
    if workload == "prefill":
        taken_s = machine.seconds(lambda: _engine.logits(torch.from_numpy(ids)), CPU)
    else:
        times = _engine.generate(torch.from_numpy(ids), n_tokens)[1]
        taken_s = times[-1] - times[0]
    time.sleep(0.05)  # Its threads spin for a few ms more, and the next contender is timed when this returns.
    return taken_s


def _peak_growth(workload: str, ids: np.ndarray, n_tokens: int) -> tuple[int | None, str]:
    return machine.resident_growth(lambda: _seconds(workload, ids, n_tokens))


# --- engines --------------------------------------------------------------------------------------------------------


class CTranslate2:
    """The model, converted in memory. Its tokens are the ids as text, so that no tokenizer is needed."""

    compute_type = "float32"

    def __init__(self, base: GPT2LMHeadModel, n_batch: int, n_threads: int):
        import ctranslate2  # type: ignore[import-not-found]
        from ctranslate2.converters.transformers import GPT2Loader  # type: ignore[import-not-found]

        self._storage = ctranslate2.StorageView
        self._vocab_size = base.config.vocab_size
        with torch.no_grad():
            spec = GPT2Loader().get_model_spec(base)
        spec.register_vocabulary([str(token) for token in range(self._vocab_size)])
        config: Any = spec.config
        config.bos_token = config.eos_token = config.unk_token = "0"
        spec.validate()
        spec.optimize(quantization=None if self.compute_type == "float32" else self.compute_type)
        with tempfile.TemporaryDirectory() as folder:
            spec.save(folder)
            self._generator = ctranslate2.Generator(
                folder, device="cpu", compute_type=self.compute_type, inter_threads=1, intra_threads=n_threads
            )
            self.n_bytes = n_bytes(folder)

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
    """The model, exported with its cache as inputs and outputs. The runtime keeps these in its own memory."""

    def __init__(self, base: GPT2LMHeadModel, n_batch: int, n_threads: int):
        import onnxruntime  # type: ignore[import-not-found]

        self._value = onnxruntime.OrtValue
        config = base.config
        self._empty = torch.zeros(n_batch, config.n_head, 0, config.n_embd // config.n_head)
        # The export would take sizes of 0 and 1 for constants, and one tensor passed several times for a single input.
        past = [
            self._empty.new_zeros(n_batch, config.n_head, 3, self._empty.shape[3]) for _ in range(2 * config.n_layer)
        ]
        free = torch.export.Dim.DYNAMIC
        program: Any = torch.onnx.export(
            CachedStep(self._as_exported(base)).eval(),
            (torch.zeros(n_batch, 2, dtype=torch.long), *past),
            dynamo=True,
            dynamic_shapes=({1: free}, tuple({2: free} for _ in past)),
            verbose=False,
        )
        settings = onnxruntime.SessionOptions()
        settings.intra_op_num_threads = n_threads
        # Idle threads must not keep the cores from whoever comes next.
        settings.add_session_config_entry("session.force_spinning_stop", "1")
        settings.log_severity_level = 3  # errors
        with tempfile.TemporaryDirectory() as folder:
            file = f"{folder}/float32/model.onnx"
            Path(file).parent.mkdir()
            program.save(file, external_data=True)
            file = self._rounded(file, f"{folder}/model.onnx")
            self.n_bytes = n_bytes(str(Path(file).parent))
            self._session = onnxruntime.InferenceSession(file, settings)
        self._inputs = [value.name for value in self._session.get_inputs()]
        self._outputs = [value.name for value in self._session.get_outputs()]

    def _as_exported(self, base: GPT2LMHeadModel) -> GPT2LMHeadModel:
        """The model in the form that is exported."""
        return base

    def _rounded(self, file: str, to: str) -> str:
        """The file of the model to run: the exported one, or one at `to`, such as with int8 weights."""
        return file

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
        return list(self._session.run_with_ort_values(outputs, dict(zip(self._inputs, values, strict=True))))


class CachedStep(nn.Module):
    """ids (B, T) and the keys and values of every layer -> logits (B, T, V) and the longer keys and values."""

    def __init__(self, model: GPT2LMHeadModel):
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, *past: Tensor) -> tuple[Tensor, ...]:
        cache: Any = DynamicCache()
        for keys, values in zip(past[::2], past[1::2], strict=True):
            # The cache's own first update would append them to a tensor without axes, which OpenVINO refuses.
            layer = DynamicLayer()
            layer.lazy_initialization(keys, values)
            layer.keys, layer.values = keys, values
            cache.layers.append(layer)
        logits = self.model(ids, use_cache=True, **{CACHE: cache}).logits
        present = (tensor for layer in cache.layers for tensor in (layer.keys, layer.values))
        return (logits, *present)


def n_bytes(folder: str) -> int:
    return sum(file.stat().st_size for file in Path(folder).iterdir() if file.is_file())
