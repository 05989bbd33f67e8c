"""What the commands share: checks of what was typed, where results and notes go, and how a command ends."""

import json
import math
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import TextIOWrapper
from pathlib import Path
from typing import Any

import transformers
import typer
from rich.console import Console

notes = Console(stderr=True, highlight=False)

# --- what was typed -------------------------------------------------------------------------------------------------


def words(text: str) -> list[str]:
    """What commas separate, without spaces around it, each once."""
    return list(dict.fromkeys(word.strip() for word in text.split(",")))


def numbers(option: str, text: str) -> list[int]:
    """The numbers of an option that are separated by commas. Raises BadParameter, typer's error of usage."""
    try:
        return [int(number) for number in words(text)]
    except ValueError:
        raise typer.BadParameter(f"{option} takes numbers separated by commas, not {text!r}") from None


def path(text: str) -> Path:
    """A path as it was typed. Raises BadParameter on an empty one, which `Path` would take for the current folder."""
    if not text:
        raise typer.BadParameter("the path is empty")
    return Path(text)


@contextmanager
def wrong_usage() -> Iterator[None]:
    """Turn a ValueError of the work into an error of usage."""
    try:
        yield
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


def check_text(prompt: str) -> None:
    """Raise ValueError when a shell gave bytes that are no text."""
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"the prompt is not UTF-8 from its character {error.start} on") from error


def chosen_bits(int8: bool, int4: bool) -> int | None:
    """Those to which weights are rounded. Raises ValueError when both are asked for."""
    if int8 and int4:
        raise ValueError("say --int8 or --int4, not both")
    return 8 if int8 else 4 if int4 else None


def check_outputs(files: dict[str, Path | None]) -> None:
    """Raise, before hours of work, when a result cannot be written to its file. files: by option."""
    taken: dict[Path, str] = {}
    for option, file in files.items():
        if file is None:
            continue
        if file.is_dir():
            raise typer.BadParameter(f"{option}: {file} is a directory")
        if not file.parent.is_dir():
            raise typer.BadParameter(f"{option}: there is no directory {file.parent}")
        if not os.access(file if file.exists() else file.parent, os.W_OK):
            raise typer.BadParameter(f"{option}: {file} cannot be written")
        if (other := taken.setdefault(file.resolve(), option)) != option:
            raise typer.BadParameter(f"{option} and {other} would both write {file}: give each a file of its own")


# --- what is shown --------------------------------------------------------------------------------------------------


def settle_streams() -> None:
    """Make the standard streams take what the commands write; a result that cannot be written raises OSError."""
    if sys.stdout is None:  # It was closed (>&-), so that nobody reads it.
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (as long as the process)
    if isinstance(sys.stdout, TextIOWrapper):  # What an encoding lacks is escaped, as on standard error.
        sys.stdout.reconfigure(errors="backslashreplace")
    if not isinstance(sys.stderr, _Notes):
        sys.stderr = _Notes(sys.stderr)  # type: ignore[assignment]


class _Notes:
    """Standard error that drops what cannot be written, as on a full disk: no result depends on a note."""

    def __init__(self, stream: Any):
        self.stream = stream

    def write(self, text: str) -> int:
        with suppress(OSError):
            self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError):
            self.stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def tables() -> Console:
    """Where tables go: standard output, in a fixed width where it is a pipe or a file, which have none of their own."""
    return Console() if sys.stdout.isatty() else Console(width=120)


def write_now(text: str) -> None:
    """Write a piece of text that is shown before the next one comes."""
    sys.stdout.write(text)
    sys.stdout.flush()


def print_json(value: dict[str, Any]) -> None:
    """Print a result on standard output."""
    print(strict_json(value))


def strict_json(value: Any) -> str:
    """JSON that every parser accepts: NaN and infinity become null."""
    return json.dumps(_finite(value), indent=2, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


# --- how a command ends ---------------------------------------------------------------------------------------------

# click's UsageError, wherever this version of typer keeps it.
UsageError: Any = typer.BadParameter.__base__


class Interrupted(Exception):
    """A signal ended a command, which says how to go on. code: the exit code."""

    def __init__(self, message: str, code: int):
        super().__init__(message)
        self.code = code


def run(app: typer.Typer, arguments: list[str]) -> None:
    """Run an app's command and exit with its code. An error is one line; with --debug it is raised instead."""
    n_options = arguments.index("--") if "--" in arguments else len(arguments)  # after "--" all is text
    options, rest = arguments[:n_options], arguments[n_options:]
    debug = "--debug" in options
    settle_streams()
    transformers.logging.set_verbosity_error()
    try:
        if not sys.stderr.isatty():
            transformers.logging.disable_progress_bar()
        said = [word for word in options if word != "--debug"] + rest
        code = app(said, prog_name="fastgpt", standalone_mode=False, obj=said)
        sys.stdout.flush()
    except UsageError as error:
        command = error.ctx.command_path if error.ctx else "fastgpt"
        _fail(f"{error.format_message()} (see {command} --help)", code=2)
    except Interrupted as interrupted:
        _fail(str(interrupted), interrupted.code)
    except (typer.Abort, KeyboardInterrupt):
        _fail("interrupted", code=130)
    except BrokenPipeError:
        _fail(None, code=1)
    except Exception as error:
        if debug:
            raise
        _fail(" ".join(str(error).split()) or type(error).__name__, code=1)
    else:
        if code == 130:  # typer's answer to Ctrl-C
            _fail("interrupted", code)
        sys.exit(code or 0)


def _fail(message: str | None, code: int) -> None:
    """Print the message, if there is one, on one line and exit."""
    if message is not None:
        print(f"error: {message}", file=sys.stderr)
    try:
        sys.stdout.flush()
    except OSError:
        # Nobody reads standard output. Python would flush it again at exit and print an error, so discard it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(code)
