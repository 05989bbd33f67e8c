"""OpenVINO with the weights of a model, in float32 and with int8 weights.

The keys and values are variables of its model, so that nothing but ids goes in and nothing but logits comes out.
Shapes: B batch, T tokens, H heads, D head size, V vocabulary.
"""

import time
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import GPT2LMHeadModel

from .cpu_engines import CachedStep


class OpenVino:
    """The model, exported by torch with its cache as inputs and outputs, which become variables."""

    precision = (
        "f32"  # of products and of the cache; it would choose bfloat16 and bytes where the CPU is faster in them
    )

    def __init__(self, base: GPT2LMHeadModel, n_batch: int, n_threads: int):
        import openvino  # type: ignore[import-not-found]

        model = self._rounded(_stateful(_exported(base, n_batch)))
        # What the files of a model would hold: the weights.
        self.n_bytes = sum(op.data.nbytes for op in model.get_ops() if op.get_type_name() == "Constant")
        settings = {
            "INFERENCE_NUM_THREADS": n_threads,
            "NUM_STREAMS": 1,
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": self.precision,
            "KV_CACHE_PRECISION": self.precision,
        }
        self._request = openvino.Core().compile_model(model, "CPU", settings).create_infer_request()
        self._rows = np.arange(n_batch, dtype=np.int32)

    def _rounded(self, model: Any) -> Any:
        """The model to run: the exported one, or one with int8 weights."""
        return model

    def logits(self, ids: Tensor) -> Tensor:
        self._request.reset_state()
        return self._run(ids).clone()

    def generate(self, ids: Tensor, n_tokens: int) -> tuple[Tensor, list[float]]:
        tokens, times = [], []
        self._request.reset_state()
        for _ in range(n_tokens):
            ids = self._run(ids)[:, -1:].argmax(-1)  # (B, 1)
            tokens.append(ids)
            times.append(time.perf_counter())
        return torch.cat(tokens, 1), times

    def _run(self, ids: Tensor) -> Tensor:
        """(B, T, V) logits of ids after those since the last reset, in memory that the next call writes again."""
        self._request.infer([ids.numpy(), self._rows])
        return torch.from_numpy(self._request.get_output_tensor(0).data)


class OpenVinoBFloat16(OpenVino):
    """bfloat16 products and cache. Its model keeps the weights in float32 and rounds them once, when it is compiled."""

    precision = "bf16"


class OpenVinoInt8(OpenVino):
    """int8 weights with a scale for each column, of the head too, as NNCF's INT8_SYM writes them.

    OpenVINO then rounds the rows of these products to int8 as well, each 32 inputs with a scale of their own, where the
    CPU has instructions for it.
    """

    def _rounded(self, model: Any) -> Any:
        from openvino import Type, opset13  # type: ignore[import-not-found]

        for product in [op for op in model.get_ordered_ops() if op.get_type_name() == "MatMul"]:
            weight = product.input_value(1).get_node()
            if weight.get_type_name() != "Constant":  # a product of attention
                continue
            inputs_axis = 1 if product.get_attributes()["transpose_b"] else 0
            scale = np.abs(weight.data).max(inputs_axis, keepdims=True) / 127
            rounded = opset13.constant(np.round(weight.data / scale).astype(np.int8))
            values = opset13.multiply(opset13.convert(rounded, Type.f32), opset13.constant(scale))
            product.input(1).replace_source_output(values.output(0))
        model.validate_nodes_and_infer_types()
        return model


def _exported(base: GPT2LMHeadModel, n_batch: int) -> Any:
    """OpenVINO's model of what `CachedStep` takes and returns."""
    import openvino  # type: ignore[import-not-found]

    config = base.config
    head_size = config.n_embd // config.n_head
    # The export would take sizes of 0 and 1 for constants, and one tensor passed several times for a single input.
    past = [torch.zeros(n_batch, config.n_head, 3, head_size) for _ in range(2 * config.n_layer)]
    free = torch.export.Dim.DYNAMIC
    program = torch.export.export(
        CachedStep(base).eval(),
        (torch.zeros(n_batch, 2, dtype=torch.long), *past),
        dynamic_shapes={"ids": {1: free}, "past": tuple({2: free} for _ in past)},
    )
    model = openvino.convert_model(program)
    shapes = [(n_batch, -1), *[(n_batch, config.n_head, -1, head_size)] * len(past)]
    model.reshape({value: openvino.PartialShape(shape) for value, shape in zip(model.inputs, shapes, strict=True)})
    return model


def _stateful(model: Any) -> Any:
    """The model with its keys and values as variables that begin empty.

    They are read through a choice of rows, as a beam search needs it: OpenVINO only then keeps the cache inside of its
    fused attention.
    """
    from openvino import Type, opset13  # type: ignore[import-not-found]
    from openvino._offline_transformations import (  # type: ignore[import-not-found]
        apply_make_stateful_transformation,
    )

    past = model.inputs[1:]
    shape = past[0].get_partial_shape()
    n_batch, n_head, _, head_size = (0 if size.is_dynamic else size.get_length() for size in shape)
    rows = opset13.parameter([n_batch], Type.i32)
    for value in past:
        readers = value.get_target_inputs()
        chosen = opset13.gather(value.get_node(), rows, opset13.constant(0))
        for reader in readers:
            reader.replace_source_output(chosen.output(0))
    model.add_parameters([rows])

    names = {}
    for number, (value, longer) in enumerate(zip(past, model.outputs[1:], strict=True)):
        value.get_tensor().set_names({f"past {number}"})
        longer.get_tensor().set_names({f"present {number}"})
        names[f"past {number}"] = f"present {number}"
    apply_make_stateful_transformation(model, names)
    # The first shape of a variable is 0 in every free size unless it is given its first value.
    nothing = opset13.constant(np.zeros((n_batch, n_head, 0, head_size), dtype=np.float32))
    for reading in [op for op in model.get_ops() if op.get_type_name() == "ReadValue"]:
        reading.set_arguments([nothing])
    model.validate_nodes_and_infer_types()
    return model
