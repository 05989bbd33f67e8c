"""Captum's attributions and nnsight's interventions on the bundled model, as on transformers' model."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

PROMPT = "ROMEO: I will go to the"


def embedded(model: Any, ids: Tensor) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """The scores of the next token as a function of the embeddings (B, T, C), and the prompt's."""
    return lambda vectors: model(inputs_embeds=vectors).logits[:, -1], model.transformer.wte(ids).detach()


def embeddings(captum: Any, model: Any, ids: Tensor) -> Tensor:
    scores, vectors = embedded(model, ids)
    return captum.IntegratedGradients(scores).attribute(vectors, target=5, n_steps=8)


def embedding_layer(captum: Any, model: Any, ids: Tensor) -> Tensor:
    method = captum.LayerIntegratedGradients(lambda ids: model(ids).logits[:, -1], model.transformer.wte)
    return method.attribute(ids, baselines=torch.zeros_like(ids), target=5, n_steps=8)


def product_inside(captum: Any, model: Any, ids: Tensor) -> Tensor:
    method = captum.LayerGradientXActivation(lambda ids: model(ids).logits[:, -1], model.transformer.h[1].attn.c_proj)
    return method.attribute(ids, target=5)


def neuron(captum: Any, model: Any, ids: Tensor) -> Tensor:
    scores, vectors = embedded(model, ids)
    return captum.NeuronGradient(scores, model.transformer.h[2].mlp.c_fc).attribute(vectors.requires_grad_(), (0, 3))


def ablated(captum: Any, model: Any, ids: Tensor) -> Tensor:
    return captum.FeatureAblation(lambda ids: model(ids).logits[:, -1]).attribute(ids, target=5, baselines=0)


@pytest.mark.parametrize("attribution", [embeddings, embedding_layer, product_inside, neuron, ablated])
def test_attribution(attribution: Callable, demo_pair) -> None:
    captum = pytest.importorskip("captum.attr", reason="pip install captum")
    *models, tokenizer = demo_pair()
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    theirs, ours = (attribution(captum, model, ids).detach() for model in models)
    assert theirs.abs().max() > 0
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def block_output(model: Any) -> Any:
    with model.trace(PROMPT):
        hidden_states = model.transformer.h[1].output.save()
    return hidden_states


def zeroed_mlp(model: Any) -> Any:
    with model.trace(PROMPT):
        model.transformer.h[1].mlp.output[:] = 0
        scores = model.lm_head.output.save()
    return scores


def zeroed_head_of_attention(model: Any) -> Any:
    with model.trace(PROMPT):
        model.transformer.h[1].attn.c_proj.input[..., :16] = 0
        scores = model.output.logits.save()
    return scores


def gradient(model: Any) -> Any:
    with model.trace(PROMPT):
        hidden_states = model.transformer.h[1].output
        hidden_states = hidden_states if isinstance(hidden_states, Tensor) else hidden_states[0]
        with model.lm_head.output.sum().backward():
            wanted: Any = hidden_states.grad
            wanted = wanted.save()
    return wanted


def generated_with_zeroed_mlp(model: Any) -> Any:
    with model.generate(PROMPT, max_new_tokens=6, do_sample=False) as steps:
        tokens: Any = list()  # noqa: C408 - nnsight adds `save` to what is called, not to what is written
        tokens = tokens.save()
        for _ in steps.iter[:]:
            model.transformer.h[1].mlp.output[:] = 0
            tokens.append(model.lm_head.output[0, -1].argmax(-1))
    return torch.stack(list(tokens))


INTERVENTIONS = [block_output, zeroed_mlp, zeroed_head_of_attention, gradient, generated_with_zeroed_mlp]


@pytest.mark.parametrize("intervention", INTERVENTIONS)
@pytest.mark.filterwarnings("ignore")
def test_intervention(intervention: Callable, demo_pair) -> None:
    nnsight = pytest.importorskip("nnsight", reason="pip install nnsight")
    *models, tokenizer = demo_pair()
    theirs, ours = (intervention(nnsight.LanguageModel(model, tokenizer=tokenizer)) for model in models)
    theirs, ours = (x if isinstance(x, Tensor) else x[0] for x in (theirs, ours))
    assert theirs.abs().max() > 0
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
