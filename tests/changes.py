"""Changes that users make to a GPT-2; the tests make each to transformers' model and to ours."""

from collections.abc import Callable
from contextlib import ExitStack
from functools import wraps
from types import FunctionType
from typing import Any
from unittest import mock

import peft
import torch
from torch import nn
from torch.nn.modules import module as torch_module
from transformers import GenerationMixin
from transformers.activations import NewGELUActivation
from transformers.models.gpt2 import modeling_gpt2 as hf
from transformers.pytorch_utils import Conv1D

Change = Callable[[Any, ExitStack], Any]


def _replace(owner: Any, name: str, wrap: Callable[[Any], Any]) -> Change:
    """Patch a function of a class; closing the stack restores it."""

    def change(model: Any, stack: ExitStack) -> None:
        stack.enter_context(mock.patch.object(owner, name, wrap(getattr(owner, name))))

    return change


def _scaled(forward: Callable) -> Callable:
    def scaled(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = forward(self, *args, **kwargs)
        if isinstance(output, tuple):
            return (output[0] * 0.7, *output[1:])
        return output * 0.7

    return scaled


def _logits_scaled(forward: Callable) -> Callable:
    def scaled(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = forward(self, *args, **kwargs)
        output.logits = -output.logits
        if output.loss is not None:
            output.loss = output.loss * 2
        return output

    return scaled


def _logits_scaled_as_said(forward: Callable) -> Callable:
    return wraps(forward)(_logits_scaled(forward))  # transformers derives the inputs from the signature


def _shown_less(prepare: Callable) -> Callable:
    """Inputs in which every token id is changed."""

    def prepared(*args: Any, **kwargs: Any) -> Any:
        inputs = prepare(*args, **kwargs)
        return inputs | {"input_ids": (inputs["input_ids"] + 1) % 131}

    return prepared


def _moved(update: Callable) -> Callable:
    """Position ids that lag one behind the tokens."""

    def updated(*args: Any, **kwargs: Any) -> Any:
        options = update(*args, **kwargs)
        return options | {"position_ids": options["position_ids"] - 1}

    return updated


def _prefilled(prefill: Callable) -> Callable:
    """Negated logits: the first token is the least likely one."""

    def negated(*args: Any, **kwargs: Any) -> Any:
        output = prefill(*args, **kwargs)
        output.logits = -output.logits
        return output

    return negated


def _ended(loop: Callable) -> Callable:
    """The result of the loop with one more token."""

    def longer(*args: Any, **kwargs: Any) -> Any:
        return nn.functional.pad(loop(*args, **kwargs), (0, 1), value=7)

    return longer


# Functions of transformers' generate() that others replace, on an instance or on the class.
_LOOP: dict[str, Callable[[Callable], Callable]] = {
    "prepare_inputs_for_generation": _shown_less,
    "_update_model_kwargs_for_generation": _moved,
    "_prefill": _prefilled,
    "_sample": _ended,
    "_assisted_decoding": _ended,
    "_beam_search": _ended,
}


def _method(name: str, wrap: Callable[[Any], Any]) -> Change:
    def change(model: Any, stack: ExitStack) -> None:
        setattr(model, name, wrap(getattr(model, name)))

    return change


def _attribute(path: str, name: str, value: Any) -> Change:
    return lambda model, stack: setattr(model.get_submodule(path), name, value)


def _call_of(path: str, factor: float) -> Change:
    """Replace the forward of one module on the instance."""

    def change(model: Any, stack: ExitStack) -> None:
        module = model.get_submodule(path)
        forward = module.forward
        module.forward = lambda *args, **kwargs: forward(*args, **kwargs) * factor

    return change


def _hook(path: str) -> Change:
    def change(model: Any, stack: ExitStack) -> None:
        model.get_submodule(path).register_forward_hook(lambda module, inputs, output: output * 0.8)

    return change


def _head_bias(model: Any, stack: ExitStack) -> None:
    model.lm_head.bias = nn.Parameter(torch.linspace(-3, 3, model.lm_head.out_features))


def _reorder(model: Any, stack: ExitStack) -> None:
    blocks = model.transformer.h
    blocks._modules = type(blocks._modules)(zip(blocks._modules, reversed(blocks), strict=True))


def _exchange_attention(model: Any, stack: ExitStack) -> None:
    first, last = model.transformer.h[0], model.transformer.h[-1]
    first.attn, last.attn = last.attn, first.attn


def _twice(model: Any, stack: ExitStack) -> None:
    model.transformer.h[-1] = model.transformer.h[0]


def _fewer(model: Any, stack: ExitStack) -> None:
    model.transformer.h = model.transformer.h[:-1]


def _distilled(model: Any, stack: ExitStack) -> None:
    """Remove the last layer from the model and the configuration."""
    _fewer(model, stack)
    model.config.n_layer = len(model.transformer.h)


def _other_block(model: Any, stack: ExitStack) -> None:
    class Skip(nn.Module):
        def forward(self, hidden_states: Any, *args: Any, **kwargs: Any) -> Any:
            return hidden_states + 0.5

    model.transformer.h[-1] = Skip()


def _norm_without(**options: bool) -> Change:
    def change(model: Any, stack: ExitStack) -> None:
        for block in model.transformer.h:
            norm = nn.LayerNorm(model.config.n_embd, eps=block.ln_2.eps, **options)
            block.ln_2 = norm.to(model.dtype)
            block.ln_1 = nn.LayerNorm(model.config.n_embd, eps=block.ln_1.eps, **options)

    return change


def _norm_loses(name: str) -> Change:
    """Remove a parameter of a norm whose class is already fastgpt's."""
    return lambda model, stack: setattr(model.transformer.h[0].ln_2, name, None)


def _linear(model: Any, stack: ExitStack) -> None:
    product: Any = model.transformer.h[0].mlp.c_fc
    linear = nn.Linear(*product.weight.shape)
    linear.weight.data, linear.bias.data = product.weight.data.t().contiguous(), -product.bias.data
    model.transformer.h[0].mlp.c_fc = linear


def _widen(model: Any, stack: ExitStack) -> None:
    """A wider MLP whose new channels contribute to the output."""
    mlp = model.transformer.h[0].mlp
    for product, dim in ((mlp.c_fc, 1), (mlp.c_proj, 0)):
        wide = torch.cat(
            [product.weight.data, product.weight.data[:4] if dim == 0 else product.weight.data[:, :4]], dim
        )
        product.weight = nn.Parameter(wide)
    mlp.c_fc.bias = nn.Parameter(torch.cat([mlp.c_fc.bias.data, mlp.c_fc.bias.data[:4]]))
    mlp.c_fc.nf, mlp.c_proj.nx = mlp.c_fc.nf + 4, mlp.c_proj.nx + 4


def _adapter(model: Any, stack: ExitStack) -> None:
    torch.manual_seed(0)
    lora = peft.LoraConfig(target_modules=["c_attn", "c_fc"], fan_in_fan_out=True, init_lora_weights=False)
    peft.inject_adapter_in_model(lora, model)


def _other_table(model: Any, stack: ExitStack) -> None:
    """Other parameters, in a dictionary of their own, as DeepSpeed's ZeRO gives a module one."""
    norm = model.transformer.ln_f
    norm._parameters = {name: nn.Parameter(-parameter.data) for name, parameter in norm._parameters.items()}


def _weights(model: Any, stack: ExitStack) -> None:
    with torch.no_grad():
        model.transformer.h[0].mlp.c_fc.weight.neg_()


CHANGES: dict[str, Change] = {
    "lm_head given a bias": _head_bias,
    "wte.max_norm": _attribute("transformer.wte", "max_norm", 0.05),
    "wpe.max_norm": _attribute("transformer.wpe", "max_norm", 0.01),
    "attn.is_causal = False": _attribute("transformer.h.0.attn", "is_causal", False),
    "config.is_causal = False": lambda model, stack: setattr(model.config, "is_causal", False),
    "attn.scaling": _attribute("transformer.h.0.attn", "scaling", 0.9),
    "attn.num_heads": _attribute("transformer.h.0.attn", "num_heads", 2),
    "attn.head_dim": _attribute("transformer.h.1.attn", "head_dim", 32),
    "ln_1.eps": _attribute("transformer.h.0.ln_1", "eps", 0.5),
    "ln_2.eps": _attribute("transformer.h.1.ln_2", "eps", 0.5),
    "mlp.act.act": _attribute("transformer.h.0.mlp.act", "act", torch.tanh),
    "mlp.act": _attribute("transformer.h.0.mlp", "act", nn.Tanh()),
    "mlp.act of one layer": _attribute("transformer.h.1.mlp", "act", nn.ReLU()),
    "attention modules exchanged": _exchange_attention,
    "blocks reordered": _reorder,
    "a block used twice": _twice,
    "a block replaced": _other_block,
    "a layer removed": _fewer,
    "a layer removed from model and configuration": _distilled,
    "LayerNorm without affine": _norm_without(elementwise_affine=False),
    "LayerNorm without bias": _norm_without(bias=False),
    "LayerNorm loses its bias": _norm_loses("bias"),
    "LayerNorm loses its weight": _norm_loses("weight"),
    "a product becomes nn.Linear": _linear,
    "a wider MLP": _widen,
    "an adapter": _adapter,
    "a weight negated": _weights,
    "a table of parameters exchanged": _other_table,
    "forward of a product": _call_of("transformer.h.0.mlp.c_proj", 0.5),
    "forward of a norm": _call_of("transformer.h.1.ln_2", 0.5),
    "forward of an activation": _call_of("transformer.h.1.mlp.act", 0.5),
    "_call_impl of a product": lambda model, stack: setattr(
        model.transformer.h[0].mlp.c_fc, "_call_impl", lambda x: model.transformer.h[0].mlp.c_fc.forward(x) * 0.5
    ),
    "a hook on a norm": _hook("transformer.h.0.ln_2"),
    "a hook on a product": _hook("transformer.h.1.mlp.c_fc"),
    **{name: _method(name, wrap) for name, wrap in _LOOP.items()},
    **{f"{name} of the class": _replace(GenerationMixin, name, wrap) for name, wrap in _LOOP.items()},
    **{
        f"{kind.__name__}.forward": _replace(kind, "forward", _scaled)
        for kind in (
            *(nn.Linear, nn.Embedding, nn.LayerNorm, nn.Dropout, Conv1D, NewGELUActivation),
            *(hf.GPT2Attention, hf.GPT2MLP, hf.GPT2Block),
        )
    },
    "GPT2LMHeadModel.forward": _replace(hf.GPT2LMHeadModel, "forward", _logits_scaled_as_said),
    "GPT2LMHeadModel.forward of another signature": _replace(hf.GPT2LMHeadModel, "forward", _logits_scaled),
}

# --- of single modules ----------------------------------------------------------------------------------------------


def some_hook(*_: Any) -> None:
    """Do nothing."""


class StandsForAFunction:
    """Like the wrappers of the package wrapt, with which tools that observe programs replace functions."""

    __class__ = FunctionType  # type: ignore[assignment]

    def __init__(self, wrapped: Callable):
        self.__wrapped__ = wrapped
        self.__globals__, self.__code__ = wrapped.__globals__, wrapped.__code__

    def __get__(self, instance: Any, owner: type) -> Any:
        return self

    def __eq__(self, other: object) -> bool:
        return self.__wrapped__ == other

    __hash__ = None  # type: ignore[assignment]


class OtherParameter(nn.Parameter):
    """A subclass of Parameter, which may compute differently."""


def hooked(register: str) -> Change:
    return lambda module, stack: getattr(module, register)(some_hook)


def hook_everywhere(_: Any, stack: ExitStack) -> None:
    stack.callback(torch_module.register_module_forward_hook(some_hook).remove)


def of_subclass(module: Any, stack: ExitStack) -> None:
    module.__class__ = type("Special", (type(module),), {})


HOOKED: dict[str, Change] = {
    f"{register}": hooked(register)
    for register in (
        *("register_forward_hook", "register_forward_pre_hook"),
        *("register_full_backward_hook", "register_full_backward_pre_hook"),
    )
}
