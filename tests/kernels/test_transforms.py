"""The training loss under torch.func's transforms and on tensors without values."""

from typing import Any

import pytest
import torch
from models import assert_same_within_rounding, pair, tiny_config, token_ids
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.func import functional_call, grad, jvp, vjp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel


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


def test_fake_tensors() -> None:
    with FakeTensorMode():
        _, ours = pair(tiny_config(n_layer=1))
        ids = torch.ones(2, 9, dtype=torch.int64)
        output = ours.train()(ids, labels=ids)
        output.loss.backward()
        assert output.logits.shape == (2, 9, 131)
