"""Exact parameter counts: a formula for GPT-2 of any size, modules without weights for other architectures.

In the formulas: L layers, C channels, F hidden width of the MLP, V vocabulary, P positions.
"""

import difflib
import os
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import torch
import transformers
from torch import nn
from transformers import PreTrainedConfig

from ..checkpoint.blame import faulty_key
from ..checkpoint.fit import field_problems
from ..checkpoint.headers import CheckpointError, read_json
from ..checkpoint.loading import load_without_code
from ..messages import one_line, shown

# --- sizes ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shape:
    """The size of a GPT-2: the fields of transformers' GPT2Config on which its parameters depend.

    n_inner: None stands for 4 * n_embd. Raises ValueError on a size below 1 or heads that do not divide the channels.
    """

    n_layer: int
    n_embd: int
    n_head: int
    n_positions: int = 1024
    vocab_size: int = 50257
    n_inner: int | None = None
    tied_head: bool = True
    cross_attention: bool = False

    def __post_init__(self) -> None:
        for field in ("n_layer", "n_embd", "n_head", "n_positions", "vocab_size", "hidden_width"):
            if type(getattr(self, field)) is not int:
                raise ValueError(f"{field} must be a whole number, not {getattr(self, field)!r}")
            if getattr(self, field) < 1:
                raise ValueError(f"{field} must be 1 or more, not {getattr(self, field)}")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd {self.n_embd} is not divisible by n_head {self.n_head}")

    @property
    def hidden_width(self) -> int:
        """F, the width of the MLP."""
        return 4 * self.n_embd if self.n_inner is None else self.n_inner


PRESETS: dict[str, Shape] = {
    "gpt2": Shape(n_layer=12, n_embd=768, n_head=12),
    "gpt2-medium": Shape(n_layer=24, n_embd=1024, n_head=16),
    "gpt2-large": Shape(n_layer=36, n_embd=1280, n_head=20),
    "gpt2-xl": Shape(n_layer=48, n_embd=1600, n_head=25),
    "distilgpt2": Shape(n_layer=6, n_embd=768, n_head=12),
    # arXiv 2005.14165, table 2.1. Two of its rows contradict themselves and are corrected: 13B has 40 heads of
    # 128 in 5140 channels (they need 5120), and xl has 24 heads of 128 in 2048 channels (which hold 16).
    "gpt3-small": Shape(n_layer=12, n_embd=768, n_head=12, n_positions=2048),
    "gpt3-medium": Shape(n_layer=24, n_embd=1024, n_head=16, n_positions=2048),
    "gpt3-large": Shape(n_layer=24, n_embd=1536, n_head=16, n_positions=2048),
    "gpt3-xl": Shape(n_layer=24, n_embd=2048, n_head=16, n_positions=2048),
    "gpt3-2.7b": Shape(n_layer=32, n_embd=2560, n_head=32, n_positions=2048),
    "gpt3-6.7b": Shape(n_layer=32, n_embd=4096, n_head=32, n_positions=2048),
    "gpt3-13b": Shape(n_layer=40, n_embd=5120, n_head=40, n_positions=2048),
    "gpt3-175b": Shape(n_layer=96, n_embd=12288, n_head=96, n_positions=2048),
}
ALIASES = {
    "gpt2-small": "gpt2",
    "gpt3": "gpt3-175b",
    "gpt3-125m": "gpt3-small",
    "gpt3-350m": "gpt3-medium",
    "gpt3-760m": "gpt3-large",
    "gpt3-1.3b": "gpt3-xl",
}

# --- sources --------------------------------------------------------------------------------------------------------

# A preset's name, demo, a directory with a config.json, a shape, a transformers configuration, or a model.
Source: TypeAlias = "str | os.PathLike[str] | Shape | PreTrainedConfig | nn.Module"

_DEMO = str(Path(__file__).parents[1] / "demo")


def shape_of(source: Source) -> Shape:
    """The shape of a GPT-2. A model's shape is read from its configuration.

    Raises ValueError when the name is unknown or the architecture is not GPT-2.
    """
    if isinstance(source, nn.Module):
        source = getattr(source, "config", source)
    name, model = describe(source)
    if not isinstance(model, Shape):
        raise ValueError(f"{name} is not a GPT-2: only that architecture has a Shape")
    return model


def describe(source: Source) -> "tuple[str, Shape | PreTrainedConfig | nn.Module]":
    """A name to print, and the model: a module unchanged, the shape of a GPT-2, or another configuration.

    Raises ValueError on an unknown name or a directory that describes no model, TypeError on anything else.
    """
    if isinstance(source, nn.Module):
        return type(source).__name__, source
    if isinstance(source, Shape):
        return "GPT-2", source
    if isinstance(source, str | os.PathLike):
        name = os.fspath(source)
        # As in from_pretrained, a directory takes precedence over a model of the same name.
        if (Path(name) / "config.json").is_file():
            return name, _shape_or_config(_read_config(name))
        preset = name.lower().removeprefix("openai-community/").removeprefix("distilbert/")
        preset = ALIASES.get(preset, preset)
        if preset == "demo":
            return preset, _shape_or_config(_read_config(_DEMO))
        if preset not in PRESETS:
            raise ValueError(_unknown_name(name))
        return preset, PRESETS[preset]
    if hasattr(source, "model_type") and not isinstance(source, type):
        return type(source).__name__.removesuffix("Config"), _shape_or_config(source)
    given = f"the class {source.__name__}" if isinstance(source, type) else type(source).__name__
    raise TypeError(f"expected a preset's name, a directory, a configuration or a model, not {given}")


def _unknown_name(name: str) -> str:
    if Path(name).is_dir():
        return f"directory {name!r} holds no config.json"
    close = difflib.get_close_matches(name.lower(), ["demo", *PRESETS, *ALIASES], n=1)
    suggestion = f" (did you mean {close[0]}?)" if close else ""
    names = ", ".join(["demo", *PRESETS])
    return f"unknown model {name!r}{suggestion}: give one of {names}, or a directory with a config.json"


def _read_config(directory: str) -> PreTrainedConfig:
    file, written = Path(directory) / "config.json", {}
    try:
        written = read_json(file)
        for problem in field_problems(written):
            raise CheckpointError(problem)
        config = load_without_code(transformers.AutoConfig, directory, local_files_only=True)
        _shape_or_config(config)
        return config
    except Exception as error:  # fields of a wrong type reach code that does not check them

        def describe_again(fields: dict) -> None:
            model_type = fields.pop("model_type", None)
            _shape_or_config(
                transformers.AutoConfig.for_model(model_type if isinstance(model_type, str) else "gpt2", **fields)
            )

        is_told = not written or isinstance(error, CheckpointError)
        key = None if is_told else faulty_key(written, describe_again)
        where = "" if key is None else f"{key} {shown(written[key])}: "
        raise CheckpointError(f"{file}: describes no known model: {where}{one_line(error)}") from error


def _shape_or_config(config: PreTrainedConfig) -> "Shape | PreTrainedConfig":
    if config.model_type != "gpt2":
        return config
    return Shape(
        n_layer=config.n_layer,
        n_embd=config.n_embd,
        n_head=config.n_head,
        n_positions=config.n_positions,
        vocab_size=config.vocab_size,
        n_inner=config.n_inner,
        tied_head=config.tie_word_embeddings,
        cross_attention=config.add_cross_attention,
    )


# --- counting -------------------------------------------------------------------------------------------------------

# Building a layer without weights takes milliseconds, so the time to count is bounded.
_MOST_LAYERS_BUILT = 1_000


@dataclass(frozen=True)
class Component:
    """`count` equal parts of `each` parameters. formula: what gives `each`, empty where parameters were counted."""

    name: str
    formula: str
    each: int
    count: int = 1

    @property
    def subtotal(self) -> int:
        return self.each * self.count


@dataclass(frozen=True)
class ParameterCount:
    model: str
    components: tuple[Component, ...]

    @property
    def total(self) -> int:
        return sum(component.subtotal for component in self.components)


def count_parameters(config_or_model: Source) -> ParameterCount:
    """Count parameters exactly; a shared parameter counts once.

    config_or_model: a preset's name, a directory with a config.json, a Shape, a transformers configuration of any
    architecture (with its language-modelling head, where it has one), or a module (its own parameters).
    GPT-2 is counted by formula; other architectures are built without weights, on the meta device.
    Raises ValueError on an unknown name or a directory that describes no model.
    """
    name, model = describe(config_or_model)
    if isinstance(model, Shape):
        return ParameterCount(name, _gpt2_components(model))
    return ParameterCount(name, _module_components(model if isinstance(model, nn.Module) else _build_on_meta(model)))


def _gpt2_components(shape: Shape) -> tuple[Component, ...]:
    C, F, V, L = shape.n_embd, shape.hidden_width, shape.vocab_size, shape.n_layer
    cross_attention = [
        Component("cross-attention", "4*C^2 + 4*C", 4 * C**2 + 4 * C, L),
        Component("cross-attention norm", "2*C", 2 * C, L),
    ]
    return (
        Component("token embedding", "V*C", V * C),
        Component("position embedding", "P*C", shape.n_positions * C),
        Component("attention", "4*C^2 + 4*C", 4 * C**2 + 4 * C, L),
        *(cross_attention if shape.cross_attention else []),
        Component("MLP", "8*C^2 + 5*C" if F == 4 * C else "2*C*F + F + C", 2 * C * F + F + C, L),
        Component("two layer norms", "2 * 2*C", 4 * C, L),
        Component("final norm", "2*C", 2 * C),
        Component("head, tied", "0", 0) if shape.tied_head else Component("head", "V*C", V * C),
    )


def _build_on_meta(config: PreTrainedConfig) -> nn.Module:
    if type(config) not in transformers.MODEL_FOR_CAUSAL_LM_MAPPING and type(config) not in transformers.MODEL_MAPPING:
        raise ValueError(f"transformers has no model for {type(config).__name__} (model_type {config.model_type!r})")
    for field, value in config.to_dict().items():
        if "layer" in field and isinstance(value, int) and value > _MOST_LAYERS_BUILT:
            raise ValueError(f"{field} {value} is more than the {_MOST_LAYERS_BUILT} that are built to be counted")
    auto_class = (
        transformers.AutoModelForCausalLM
        if type(config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING
        else transformers.AutoModel
    )
    try:
        with torch.device("meta"):
            return auto_class.from_config(config, trust_remote_code=False)
    except Exception as error:  # fields of a wrong type reach code that does not check them
        raise ValueError(f"no model can be built from this {type(config).__name__}: {one_line(error)}") from error


def _module_components(module: nn.Module) -> tuple[Component, ...]:
    """One component per top-level part; layers of a list are one component if their sizes are equal."""
    parts: dict[tuple[str, str], int] = defaultdict(int)
    for name, parameter in module.named_parameters():
        path = name.split(".")[:-1]
        first_index = next((i for i, part in enumerate(path) if part.isdigit()), None)
        if first_index:
            parts[".".join(path[:first_index]), path[first_index]] += parameter.numel()
        else:
            parts[".".join(path[:2]) or name, ""] += parameter.numel()
    counts = Counter((group, size) for (group, _), size in parts.items())
    return tuple(Component(group, "", size, count) for (group, size), count in counts.items())
