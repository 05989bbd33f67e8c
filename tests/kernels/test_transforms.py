"""The training loss under torch.func's transforms and on tensors without values."""

from typing import Any

import pytest
import torch
from fastgpt_kernels.common import probe
from interpreter import DEVICE
from models import assert_same_within_rounding, pair, tiny_config, token_ids
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.func import functional_call, grad, jvp, vjp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

import fastgpt


def results(model: Any, transform: str) -> Tensor:
    ids = token_ids(2, 9, 131)
    weights = {name: parameter.detach() for name, parameter in model.train().named_parameters()}

    def loss(weights: dict[str, Tensor], ids: Tensor = ids) -> Tensor:
        return functional_call(model, weights, kwargs={"input_ids": ids, "labels": ids, "use_cache": False}).loss

    with sdpa_kernel(SDPBackend.MATH):
        if transform == "grad":
            return torch.cat([g.flatten() for g in grad(loss)(weights).values()])
        if transform == "vjp":
            return torch.cat([g.flatten() for g in vjp(loss, weights)[1](torch.ones(()))[0].values()])
        if transform == "jvp":
            return torch.stack(jvp(loss, (weights,), (weights,)))
        rows = vmap(grad(loss), in_dims=(None, 0))(weights, ids[:, None])
        return torch.cat([g.flatten() for g in rows.values()])


@pytest.mark.parametrize("transform", ["grad", "vjp", "jvp", "vmap"])
def test_transform_equals_transformers(transform: str) -> None:
    # With a padding token, transformers looks for it in the ids, which vmap does not allow.
    theirs, ours = pair(tiny_config(n_layer=1, pad_token_id=None), attn_implementation="eager")
    assert_same_within_rounding(results(ours, transform), results(theirs, transform), n_ulps=64)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_fake_tensors(backend: str) -> None:
    with FakeTensorMode(), torch.device(DEVICE), fastgpt.backend(backend):
        _, ours = pair(tiny_config(n_layer=1))
        ids = torch.ones(2, 9, dtype=torch.int64)
        output = ours.train()(ids, labels=ids)
        output.loss.backward()
        assert output.logits.shape == (2, 9, 131)


def test_the_first_kernel_of_a_process_is_tried_on_real_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "_faults", {})
    with FakeTensorMode():
        assert probe.fault(torch.device(DEVICE)) is None


def test_a_dispatch_mode_sees_operations_and_changes_nothing() -> None:
    """As counters of FLOPs and of memory do, on real tensors."""

    names = set()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            names.add(str(function))
            return function(*args, **(kwargs or {}))

    _, ours = pair(tiny_config(n_layer=1))
    ids = token_ids(2, 9, 131).to(DEVICE)
    ours.train().to(DEVICE)
    with fastgpt.backend("triton"):
        expected = ours(ids, labels=ids).loss
        with Watch():
            loss = ours(ids, labels=ids).loss
            loss.backward()
    assert torch.equal(loss, expected)
    operations = {name.split(".")[1] for name in names if name.startswith("fastgpt_kernels")}
    assert operations >= {"causal_attention", "gelu_mlp", "add_layer_norm", "linear_cross_entropy_sum"}
    assert operations >= {"causal_attention_backward", "gelu_mlp_backward"}
