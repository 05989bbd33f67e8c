"""Every cell of docs/support.md: what transformers gives, on what the page says."""

import inspect
import re

import pytest
import transformers
from models import HEADS
from paths import ROOT
from transformers import GenerationMixin

from .forward import FORWARD, Row
from .generation import GENERATION
from .page import TABLES, missing, observe, read, render

PAGE = (ROOT / "docs" / "support.md").read_text()
CELLS = [(table, row, column) for table, (rows, columns) in TABLES.items() for row in rows for column in columns]


@pytest.mark.parametrize(("table", "row", "column"), CELLS, ids=lambda it: it.name if isinstance(it, Row) else it)
def test_a_cell_equals_transformers(table: str, row: Row, column: str) -> None:
    told = read(PAGE)[table, row.name, column]
    if missing(row):
        assert told == f"needs {missing(row)}"
        pytest.skip(told)
    found = observe(row, column)
    assert row.needs or found == told


def test_the_page_is_what_the_command_prints() -> None:
    assert render(read(PAGE)) == PAGE


@pytest.mark.parametrize("head", HEADS)
def test_every_argument_of_forward_has_a_row(head: str) -> None:
    parameters = [*inspect.signature(getattr(transformers, head).forward).parameters]
    assert {*parameters} - {"self", "kwargs"} <= frozenset().union(*(row.takes for row in FORWARD))


def test_every_option_of_generate_that_makes_a_processor_or_a_criterion_has_a_row() -> None:
    makers = GenerationMixin._get_logits_processor, GenerationMixin._get_stopping_criteria  # type: ignore[attr-defined]
    options = {name for maker in makers for name in re.findall(r"generation_config\.(\w+)", inspect.getsource(maker))}
    assert len(options) > 20
    # Made from other options by transformers, or only for the draft model of an assisted call.
    own = {"_eos_token_tensor", "max_length", "assistant_confidence_threshold", "is_assistant"}
    names = " ".join(row.name for row in GENERATION)
    assert [name for name in options - own if name not in names] == []
