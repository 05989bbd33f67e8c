"""What torch and accelerate do to a module gives on ours, and on a patched one, what it gives on transformers'."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from models import assert_same_within_rounding, pair, tiny_config, token_ids
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.utils import parametrizations, prune
from torch.optim.swa_utils import AveragedModel
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.module_tracker import ModuleTracker
from transformers import GenerationConfig
from transformers.integrations import executorch

import fastgpt

IDS = token_ids(1, 10, 131)


class LogitsOnly(nn.Module):
    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        return self.model(ids, use_cache=False).logits


def logits_and_tokens(model: Any) -> tuple[Tensor, Tensor]:
    return model(IDS).logits, model.generate(IDS, max_new_tokens=5, do_sample=False, eos_token_id=None)


# --- captured ---------------------------------------------------------------------------------------------------------


def traced(model: Any) -> Tensor:
    module: Any = torch.jit.trace(LogitsOnly(model), (IDS,), strict=False)
    return module(IDS)


def exported_for_any_length(model: Any) -> Tensor:
    shapes = ({1: torch.export.Dim("T", min=2, max=40)},)
    return torch.export.export(LogitsOnly(model), (IDS,), dynamic_shapes=shapes).module()(IDS[:, :7])


def step_exported_for_any_length(model: Any) -> Tensor:
    """A slice of the labels is of T - 1 tokens, which may be one where T may be 2."""
    lengths = {1: torch.export.Dim("T", min=2, max=40)}
    shapes = {"input_ids": lengths, "labels": lengths, "use_cache": None}
    step = torch.export.export(model, (), {"input_ids": IDS, "labels": IDS, "use_cache": False}, dynamic_shapes=shapes)
    few = IDS[:, :2]
    return step.module()(input_ids=few, labels=few, use_cache=False).loss


def exported_with_a_static_cache(model: Any) -> Tensor:
    cache = {"batch_size": 1, "max_cache_len": 32, "device": "cpu"}
    model.generation_config = GenerationConfig(use_cache=True, cache_implementation="static", cache_config=cache)
    module, places = executorch.TorchExportableModuleForDecoderOnlyLM(model), torch.arange(10)
    return module.export(input_ids=IDS, cache_position=places).module()(input_ids=IDS, cache_position=places)


# --- changed ----------------------------------------------------------------------------------------------------------


def pruned(model: Any) -> list[Tensor]:
    products = [block.mlp.c_fc for block in model.transformer.h]
    for product in products:
        prune.l1_unstructured(product, "weight", 0.5)
    masked = logits_and_tokens(model)
    for product in products:
        prune.remove(product, "weight")
    return [*masked, *logits_and_tokens(model)]


def parametrized(model: Any) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)  # of the spectral norm's power iteration
    parametrizations.spectral_norm(model.transformer.h[0].mlp.c_proj)
    parametrizations.weight_norm(model.transformer.h[1].attn.c_proj)
    return logits_and_tokens(model)


def averaged(model: Any) -> tuple[Tensor, Tensor]:
    average = AveragedModel(model)
    average.update_parameters(model)
    return logits_and_tokens(average.module)


def edited(model: Any) -> tuple[Tensor, Tensor]:
    weight = model.transformer.h[0].mlp.c_proj.weight
    with torch.no_grad():
        weight += torch.outer(torch.ones(weight.shape[0]), torch.linspace(-0.1, 0.1, weight.shape[1]))
    return logits_and_tokens(model)


def ablated(model: Any) -> list[Tensor]:
    def without_first_head(module: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
        heads = inputs[0].clone()
        heads[..., :16] = 0
        return (heads,)

    hook = model.transformer.h[1].attn.c_proj.register_forward_pre_hook(without_first_head)
    found = logits_and_tokens(model)
    hook.remove()
    return [*found, *logits_and_tokens(model)]


def assigned(model: Any) -> tuple[Tensor, Tensor]:
    with torch.device("meta"):
        empty = type(model)(model.config).eval()
    empty.load_state_dict(model.state_dict(), assign=True)
    return logits_and_tokens(empty)


# --- placed -----------------------------------------------------------------------------------------------------------


def offloaded(model: Any) -> tuple[Tensor, Tensor]:
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    return logits_and_tokens(model)


def dispatched(model: Any, folder: Path) -> tuple[Tensor, Tensor]:
    places: Any = {"transformer": "cpu", "lm_head": "disk"}
    options: dict[str, Any] = {"main_device": "cpu", "offload_dir": str(folder)}
    accelerate.dispatch_model(model, places, **options)
    return logits_and_tokens(model)


def shared(model: Any) -> tuple[Tensor, Tensor]:
    return logits_and_tokens(model.share_memory())


# --- looked into ------------------------------------------------------------------------------------------------------


def flops_of_a_step(model: Any) -> int:
    with FlopCounterMode(display=False) as counter:
        model(IDS, labels=IDS, use_cache=False).loss.backward()
    return counter.get_total_flops()


def modules_seen(model: Any) -> set[str]:
    seen: set[str] = set()
    with ModuleTracker() as tracker:
        for module in model.modules():
            module.register_forward_hook(lambda *_: seen.update(tracker.parents))
        model(IDS)
    return {path.partition(".")[2] for path in seen}


def read_by_every_layer(model: Any) -> list[Tensor]:
    states = model(IDS, output_hidden_states=True).hidden_states
    return [model.lm_head(model.transformer.ln_f(state)) for state in states]


def called_part_by_part(model: Any) -> Tensor:
    body = model.transformer
    x = body.wte(IDS) + body.wpe(torch.arange(10)[None])
    for block in body.h:
        result = block(x)
        x = result[0] if isinstance(result, tuple) else result
    return model.lm_head(body.ln_f(x))


def mapped(model: Any) -> Tensor:
    parameters = dict(model.named_parameters())
    return vmap(lambda row: functional_call(model, parameters, (row[None],), {"use_cache": False}).logits)(IDS)


def gradients_of_each_example(model: Any) -> list[Tensor]:
    def loss(parameters: dict[str, Tensor], row: Tensor) -> Tensor:
        return functional_call(model, parameters, (row[None],), {"labels": row[None], "use_cache": False}).loss

    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    return list(vmap(grad(loss), in_dims=(None, 0))(parameters, torch.cat([IDS, IDS.flip(1)])).values())


TOOLS = [
    *(traced, exported_for_any_length, step_exported_for_any_length, exported_with_a_static_cache),
    *(pruned, parametrized, averaged, edited, ablated, assigned),
    *(offloaded, dispatched, shared),
    *(flops_of_a_step, modules_seen, read_by_every_layer, called_part_by_part, mapped, gradients_of_each_example),
]


@pytest.mark.parametrize("is_patched", [False, True], ids=["ours", "patched"])
@pytest.mark.parametrize("use", TOOLS, ids=lambda use: use.__name__)
def test_a_tool_sees_transformers_model(use: Callable[..., Any], is_patched: bool, tmp_path: Path) -> None:
    theirs, ours = pair(tiny_config(pad_token_id=None))
    if is_patched:
        ours = fastgpt.patch(copy.deepcopy(theirs))
    more = [tmp_path] if use is dispatched else []
    expected, found = use(theirs.eval(), *more), use(ours.eval(), *more)
    if isinstance(expected, Tensor):
        expected, found = [expected], [found]
    if isinstance(expected, int | set):
        assert found == expected
        return
    for it, reference in zip(found, expected, strict=True):
        if reference.is_floating_point():
            assert_same_within_rounding(it, reference)
        else:
            assert it.tolist() == reference.tolist()
