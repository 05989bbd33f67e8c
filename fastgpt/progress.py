"""How far a long piece of work is: what it calls, and a bar that shows it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import transformers
from rich import progress
from rich.console import Console

# Called with a description of the step, how many steps are done, and how many there are.
Progress = Callable[[str, int, int], None]


@contextmanager
def progress_bar(console: Console) -> Iterator[Progress]:
    """A progress bar on a rich console while the block runs; none where nobody looks at the console."""
    if not console.is_terminal:  # Before rich 15 a bar that shows nothing still writes an empty line.
        yield lambda what, n_done, n_steps: None
        return
    times = progress.TimeElapsedColumn(), progress.TextColumn("left"), progress.TimeRemainingColumn()
    columns = progress.TextColumn("{task.description}"), progress.BarColumn(), *times
    with without_transformers_bars(), progress.Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("starting")
        yield lambda what, n_done, n_steps: bar.update(task, description=what, completed=n_done, total=n_steps)


@contextmanager
def without_transformers_bars() -> Iterator[None]:
    """transformers draws no bars of its own inside the block: they would be written across what is shown there."""
    was_enabled = transformers.logging.is_progress_bar_enabled()
    transformers.logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_enabled:
            transformers.logging.enable_progress_bar()
