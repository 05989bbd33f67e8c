"""Every command of the documentation is one that its program takes: it is parsed as the program would, but not run."""

import re
import shlex
from collections.abc import Iterator
from importlib import import_module
from typing import Any

import pytest
import typer
from paths import ROOT

from benchmarks import __main__ as benchmarks
from fastgpt import cli

PAGES = [
    *ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), ROOT / "benchmarks" / "README.md", ROOT / "tests" / "README.md",
]  # fmt: skip
BLOCK = re.compile(r"^```(?:bash)?\n(.*?)^```", re.DOTALL | re.MULTILINE)
SPAN = re.compile(r"`([^`\n]+)`")


CALL = re.compile(r"(?:\w+=\S+ )*(?:\S*/)?(fastgpt|python -m benchmarks) ([a-z].*)")


def commands() -> dict[tuple[str, str], Any]:
    """The commands of fastgpt and its benchmarks, by program and name."""
    of_fastgpt: Any = typer.main.get_command(cli.app)
    found = {("fastgpt", name): command for name, command in of_fastgpt.commands.items()}
    for name, module in benchmarks.COMMANDS.items():
        app = typer.Typer()
        app.command()(import_module(module).main)
        found["python -m benchmarks", name] = typer.main.get_command(app)
    return found


COMMANDS = commands()


def calls_of(text: str) -> Iterator[tuple[str, list[str]]]:
    """(program, words after it) of every call in a text, without variables and the folder that a program is in."""
    for line in re.split(r"\n|&&|>", text.replace("\\\n", " ")):
        if call := CALL.fullmatch(line.strip()):
            yield call[1], shlex.split(call[2], comments=True)


def command_of(program: str, words: list[str]) -> Any:
    assert (program, words[0]) in COMMANDS, f"there is no {program} {words[0]}"
    return COMMANDS[program, words[0]]


IN_BLOCKS = [call for page in PAGES for block in BLOCK.findall(page.read_text()) for call in calls_of(block)]
IN_PROSE = [
    (program, [name, *words[1:]])
    for page in PAGES
    for span in SPAN.findall(re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE))
    for program, words in calls_of(span.replace("\\|", "|"))
    for name in words[0].split("|")  # where several are named in one place
]


@pytest.mark.parametrize(("program", "words"), IN_BLOCKS, ids=lambda it: it if isinstance(it, str) else " ".join(it))
def test_a_command_to_copy_is_taken(program: str, words: list[str]) -> None:
    command_of(program, words).make_context(words[0], words[1:])


def test_commands_in_prose_and_their_options_exist() -> None:
    for program, words in IN_PROSE:
        options = {option for parameter in command_of(program, words).params for option in parameter.opts}
        assert {word for word in words if word.startswith("--")} <= options, f"{program} {shlex.join(words)}"


def test_there_are_commands() -> None:
    assert len(IN_BLOCKS) > 10
    assert len(IN_PROSE) > 10
