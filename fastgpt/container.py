"""What a container leaves its processes of the machine: memory and cores, which psutil and torch count on the machine.

A container, in Docker or Kubernetes, is a control group of Linux, whose files state its limits. Past that of memory the
kernel ends processes; past that of cores it lets them wait.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import psutil

_GROUPS_OF_PROCESS = Path("/proc/self/cgroup")
_MOUNTED_AT = Path("/sys/fs/cgroup")
# By the version of the groups: the files with the limit of memory and with what is in use, and in memory.stat the name
# of what the kernel can free of that.
_MEMORY = {
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    2: ("memory.max", "memory.current", "inactive_file"),
}


def total_memory() -> int:
    """Bytes of the machine or, if that is less, of the container."""
    return min([psutil.virtual_memory().total, *(group.limit for group in _memory_groups())])


def available_memory() -> int:
    """Bytes that are still free there."""
    return min([psutil.virtual_memory().available, *(group.available() for group in _memory_groups())])


def cores() -> float | None:
    """How many cores the container may use at a time, such as 1.5; None where it has no such limit."""
    limits = []
    for folder, version in _groups("cpu"):
        names = ("cpu.max",) if version == 2 else ("cpu.cfs_quota_us", "cpu.cfs_period_us")
        words = [word for name in names for word in _text(folder / name).split()]
        if len(words) == 2 and words[0].isdecimal():  # "max" or -1 is no limit
            limits.append(int(words[0]) / int(words[1]))
    return min(limits, default=None)


class _MemoryGroup(NamedTuple):
    """limit: bytes. folder: the group's. used, freed: as in _MEMORY."""

    limit: int
    folder: Path
    used: str
    freed: str

    def available(self) -> int:
        used = _text(self.folder / self.used)
        if not used:
            return self.limit
        lines = map(str.split, _text(self.folder / "memory.stat").splitlines())
        freed = sum(int(n_bytes) for name, n_bytes in lines if name == self.freed)
        return min(self.limit, max(0, self.limit - int(used) + freed))


def _memory_groups() -> Iterator[_MemoryGroup]:
    """Those with less than the machine's memory."""
    total = psutil.virtual_memory().total
    for folder, version in _groups("memory"):
        limit = _text(folder / ("memory.max" if version == 2 else "memory.limit_in_bytes")).strip()
        names = (
            ("memory.current", "inactive_file") if version == 2 else ("memory.usage_in_bytes", "total_inactive_file")
        )
        if limit.isdecimal() and int(limit) < total:
            yield _MemoryGroup(int(limit), folder, *names)


def _groups(controller: str) -> Iterator[tuple[Path, int]]:
    """The folders of the control groups around this process that limit one thing, with the version of their files.

    In a container, the groups that the process is told of may not be there, but only those around them.
    """
    for line in _text(_GROUPS_OF_PROCESS).splitlines():
        _, controllers, group = line.split(":", 2)
        version = 1 if controllers else 2
        if version == 2 or controller in controllers.split(","):
            root = _MOUNTED_AT / controller if version == 1 else _MOUNTED_AT
            yield from ((root / around.relative_to("/"), version) for around in (Path(group), *Path(group).parents))


def _text(file: Path) -> str:
    """Nothing where there is no such file, as on other systems than Linux."""
    try:
        return file.read_text()
    except OSError:
        return ""
