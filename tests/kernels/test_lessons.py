"""The README of each operation quotes its kernels, links to files that exist, and has plain torch that is right."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accuracy import random
from fastgpt_kernels import reference

OPERATIONS = Path(__file__).parents[2] / "kernels" / "fastgpt_kernels" / "operations"
READMES = sorted(OPERATIONS.glob("*/README.md"))


def _lines(code: str) -> list[str]:
    """The lines without whitespace and comments."""
    return ["".join(line.partition("#")[0].split()) for line in code.splitlines()]


def test_every_operation_has_a_lesson() -> None:
    assert [readme.parent for readme in READMES] == sorted(path.parent for path in OPERATIONS.glob("*/kernels.py"))


@pytest.mark.parametrize("readme", READMES, ids=lambda path: path.parent.name)
def test_the_central_lines_are_those_of_the_kernels(readme: Path) -> None:
    lesson = readme.read_text().split("**The central lines**", 1)[1]
    quoted = re.search(r"```python\n(.*?)```", lesson, re.DOTALL)
    assert quoted is not None

    # One string, because a statement may be wrapped in the kernel, where it is indented.
    kernels = "".join(_lines(readme.with_name("kernels.py").read_text()))
    assert [line for line in _lines(quoted[1]) if line not in kernels] == []


@pytest.mark.parametrize("readme", READMES, ids=lambda path: path.parent.name)
def test_links_and_pictures_exist(readme: Path) -> None:
    prose = re.sub(r"```.*?```", "", readme.read_text(), flags=re.DOTALL)
    targets = re.findall(r"\]\(([^)\s]+)\)", prose)
    files = [target.partition("#")[0] for target in targets if "://" not in target]
    assert files
    assert [file for file in files if not (readme.parent / file).exists()] == []


def plain_torch(operation: str) -> Any:
    """The function with which a lesson begins."""
    names: dict[str, Any] = {"torch": torch, "F": F}
    problem = (OPERATIONS / operation / "README.md").read_text().partition("**The idea")[0]
    (code,) = re.findall(r"```python\n(.*?)```", problem, re.DOTALL)
    exec(code, names)
    (name,) = re.findall(r"^def (\w+)", code, re.MULTILINE)
    return names[name]


def attention(plain: Callable, reference: Any) -> tuple[Any, Any]:
    q, k, v = random(3, 2, 3, 7, 16)
    return plain(q, k, v, 0.3), reference.causal_attention(q, k, v, scale=0.3)


def gelu_mlp(plain: Callable, reference: Any) -> tuple[Any, Any]:
    x, *weights, residual = random(5, 8), random(8, 32), random(32), random(32, 8), random(8), random(5, 8, seed=1)
    return plain(x, *weights, residual, 0.0), reference.gelu_mlp(x, *weights, residual=residual)


def layer_norm(plain: Callable, reference: Any) -> tuple[Any, Any]:
    inputs = random(5, 8), random(5, 8, seed=1), random(8), random(8, seed=1), 1e-5
    return plain(*inputs), reference.add_layer_norm(*inputs)


def linear_cross_entropy(plain: Callable, reference: Any) -> tuple[Any, Any]:
    inputs = random(5, 8).float(), random(19, 8).float(), torch.arange(5)
    return plain(*inputs), reference.linear_cross_entropy(*inputs)


@pytest.mark.parametrize("compare", [attention, gelu_mlp, layer_norm, linear_cross_entropy], ids=lambda it: it.__name__)
def test_the_plain_torch_of_a_lesson_gives_what_the_reference_gives(compare: Callable[..., tuple[Any, Any]]) -> None:
    torch.testing.assert_close(*compare(plain_torch(compare.__name__), reference))


def test_the_plain_torch_of_sampling_draws_among_the_likeliest() -> None:
    logits = random(4, 50)
    tokens = plain_torch("sampling")(logits, temperature=0.7, k=3)
    assert tokens.shape == (4, 1)
    assert (logits.topk(3).indices == tokens).any(1).all()
