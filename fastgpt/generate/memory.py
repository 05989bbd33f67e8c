"""The memory that there is for copies of weights on a CPU: the machine's, or the container's that the process runs in.

psutil knows the machine's alone. A container is a control group of Linux with a limit of its own, past which the kernel
ends processes, and whoever runs one in Docker or Kubernetes has it far below the machine's memory.
"""

import ctypes
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import psutil

_GROUPS_OF_PROCESS = Path("/proc/self/cgroup")
_MOUNTED_AT = Path("/sys/fs/cgroup")
# By the controllers in a line of the first file, which names none for version 2: the folder of the groups, and in a
# group the files with the limit and with what is in use, and what of that the kernel can free (a field of memory.stat).
_VERSIONS = {
    "": ("", "memory.max", "memory.current", "inactive_file"),
    "memory": ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}


def total_bytes() -> int:
    return min([psutil.virtual_memory().total, *(group.limit for group in _limiting_groups())])


def available_bytes() -> int:
    return min([psutil.virtual_memory().available, *(group.available() for group in _limiting_groups())])


def return_freed() -> None:
    """Give back to the system what this process has freed.

    glibc keeps it for the next allocation. But between copies of many matrices it finds no use for the gaps that the
    temporaries of making them leave, which are as large as the copies or larger.
    """
    trim = _malloc_trim()
    if trim is not None:
        trim(0)


@functools.cache
def _malloc_trim() -> Callable[[int], Any] | None:
    try:
        return ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):  # not glibc
        return None


class _Group(NamedTuple):
    """A control group. limit: bytes."""

    limit: int
    folder: Path
    used: str
    freed: str

    def available(self) -> int:
        used = _number(self.folder / self.used)
        return self.limit if used is None else min(self.limit, max(0, self.limit - used + self._freed()))

    def _freed(self) -> int:
        try:
            lines = (self.folder / "memory.stat").read_text().splitlines()
        except OSError:
            return 0
        return sum(int(value) for name, value in map(str.split, lines) if name == self.freed)


def _limiting_groups() -> Iterator[_Group]:
    """The control groups around this process whose limit is below the machine's memory."""
    try:
        lines = _GROUPS_OF_PROCESS.read_text().splitlines()
    except OSError:  # not Linux
        return
    total = psutil.virtual_memory().total
    for line in lines:
        _, controllers, group = line.split(":", 2)
        for controller in _VERSIONS.keys() & controllers.split(","):
            folder, limit, *names = _VERSIONS[controller]
            # In a container, the groups that the process is told of may not be there, but only those around them.
            for around in (Path(group), *Path(group).parents):
                of_group = _MOUNTED_AT / folder / around.relative_to("/")
                n_bytes = _number(of_group / limit)
                if n_bytes is not None and n_bytes < total:
                    yield _Group(n_bytes, of_group, *names)


def _number(file: Path) -> int | None:
    """None where there is no file or no number in it, such as "max"."""
    try:
        return int(file.read_text())
    except (OSError, ValueError):
        return None
