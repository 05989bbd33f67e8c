"""Calls of other sizes run the machine code of the first: a compilation takes seconds, on every rank."""

import json
import os
import subprocess
import sys

import fastgpt_kernels
import pytest
from paths import ROOT

# Batches and lengths: one, odd and divisible by 16, in training and in prefill.
SHAPES = [(2, 16), (1, 1), (1, 33), (3, 16), (1, 16), (5, 7), (2, 1), (1, 128), (4, 31), (1, 2), (16, 16), (3, 3)]
# Prints for every operation how many kernels its first shape compiles, and how many all shapes.
RECORD = """
import json, sys
import torch
import fastgpt_kernels
from fastgpt_kernels import audit
from fastgpt_kernels.audit.shipped import Call

n_heads, shapes = json.loads(sys.argv[1])
C = 16 * n_heads

def random(*shape):
    return torch.randn(shape, dtype=torch.bfloat16, requires_grad=True)

def forms(B, T):
    rows, residual, weight, bias = random(B, T, C), random(B, T, C), random(C), random(C)
    labels = torch.zeros(B * T, dtype=torch.int64)
    qkv = [heads.transpose(1, 2) for heads in random(B, T, 3, n_heads, 16).unbind(2)]
    layers = random(C, 4 * C), random(4 * C), random(4 * C, C), bias
    yield "layer_norm", (rows, weight, bias), {}
    yield "add_layer_norm", (rows, residual, weight, bias), {}
    for dropout in ({}, {"dropout_p": 0.1, "seed": 0}):
        yield "causal_attention", qkv, dropout
        yield "gelu_mlp", (rows, *layers), {"residual": residual, **dropout}
    for reduction in ("mean", "none"):
        yield "linear_cross_entropy", (random(B * T, C), random(131, C), labels), {"reduction": reduction}

def call(operation, B, T):
    def run():
        for name, inputs, options in forms(B, T):
            if name == operation:
                outputs = getattr(fastgpt_kernels, operation)(*inputs, **options)
                outputs = outputs if isinstance(outputs, tuple) else (outputs,)
                torch.autograd.backward(outputs, [torch.ones_like(output) for output in outputs])
    return Call(operation, f"{B}x{T}", run)

def n_compiled(operation, shapes):
    return len(audit.record([call(operation, *shape) for shape in shapes], "sm_90"))

names = fastgpt_kernels.OPERATIONS
print(json.dumps({name: (n_compiled(name, shapes[:1]), n_compiled(name, shapes)) for name in names}))
"""


@pytest.mark.parametrize("n_heads", [4, 3])
def test_other_sizes_compile_nothing(n_heads: int) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join((str(ROOT / "kernels"), environment.get("PYTHONPATH", "")))
    command = [sys.executable, "-c", RECORD, json.dumps([n_heads, SHAPES])]
    finished = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    compiled: dict[str, tuple[int, int]] = json.loads(finished.stdout)
    assert compiled.keys() == set(fastgpt_kernels.OPERATIONS)
    for operation, (n_first, n_all) in compiled.items():
        assert n_all == n_first > 0, f"{operation}: {n_first} kernels for one shape, {n_all} for {len(SHAPES)}"
