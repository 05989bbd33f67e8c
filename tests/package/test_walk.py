"""How many files and functions a reader meets who follows a call of `generate()`, or one of its later tokens.

docs/architecture.md has the table, and says why what is left is crossed.
"""

import re
import sys
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from interpreter import DEVICE
from models import tiny_config, token_ids
from paths import ROOT

import fastgpt

TABLE = re.compile(r"^\| a (call|token), (torch|triton) \| (\d+) \| (\d+) \|$", re.MULTILINE)
LIMITS = {
    (step, backend): (int(files), int(functions))
    for step, backend, files, functions in TABLE.findall((ROOT / "docs" / "architecture.md").read_text())
}


def crossed(work: Callable[[], Any]) -> set[tuple[str, str]]:
    """The file and name of every function of fastgpt or its kernels that runs; comprehensions count as no function."""
    found = set()

    def note(frame: Any, event: str, _: Any) -> None:
        file, name = frame.f_code.co_filename, frame.f_code.co_qualname
        if event == "call" and file.startswith((f"{ROOT}/fastgpt/", f"{ROOT}/kernels/")) and not name.endswith(">"):
            found.add((file.removeprefix(f"{ROOT}/"), name))

    sys.setprofile(note)
    try:
        work()
    finally:
        sys.setprofile(None)
    return found


@cache
def walks(backend: str) -> dict[str, set[tuple[str, str]]]:
    """The walks of calls after the first, which compares the model with a twin and compiles."""
    device = DEVICE if backend == "triton" else "cpu"
    plain: Any = fastgpt.GPT2LMHeadModel(tiny_config(n_layer=1))
    model = plain.eval().to(device)
    ids = token_ids(1, 5, 131).to(device)
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "attention_mask": torch.ones_like(ids)}
    with fastgpt.backend(backend):
        model.generate(ids, **options)
        call = crossed(lambda: model.generate(ids, **options))
        tokens = model.stream(ids, **options)
        for _ in range(2):  # from the prompt, and from the first step
            next(tokens)
        token = crossed(lambda: next(tokens))
        tokens.close()
    return {"call": call, "token": token}


@pytest.mark.parametrize(("step", "backend"), LIMITS)
def test_a_reader_meets_no_more_than_the_architecture_says(step: str, backend: str) -> None:
    found = walks(backend)[step]
    files = sorted({file for file, _ in found})
    n_files, n_functions = LIMITS[step, backend]
    assert len(files) <= n_files, "\n".join(files)
    assert len(found) <= n_functions, "\n".join(map(" ".join, sorted(found)))
    expected = {"call": "fastgpt/generate/api.py", "token": "fastgpt/generate/host_loop.py"}
    assert backend == "triton" or expected[step] in files


def test_the_table_has_every_walk() -> None:
    assert len(LIMITS) == 4
