"""What a container limits: its control group's memory and cores count where the machine has more."""

from pathlib import Path

import psutil
import pytest

from fastgpt import container, doctor
from fastgpt.generate import copies, products

GIB = 2**30
# Of both versions: where the groups lie, and in a group the files of its limit and of what it uses, and the field of
# memory.stat with what can be freed.
VERSIONS = {
    2: ("", "memory.max", "memory.current", "inactive_file"),
    1: ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine of 64 GiB, half of it free, whose control groups lie in the folder `groups`."""
    has = type("Memory", (), {"total": 64 * GIB, "available": 32 * GIB})
    monkeypatch.setattr(psutil, "virtual_memory", lambda: has)
    monkeypatch.setattr(container, "_GROUPS_OF_PROCESS", tmp_path / "process")
    monkeypatch.setattr(container, "_MOUNTED_AT", tmp_path / "groups")
    return tmp_path


def add_group(machine: Path, version: int, name: str, limit: str, used: int = 0, freed: int = 0) -> None:
    root, limit_file, used_file, field = VERSIONS[version]
    folder = machine / "groups" / root / name
    folder.mkdir(parents=True)
    (folder / limit_file).write_text(f"{limit}\n")
    (folder / used_file).write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon {used}\n{field} {freed}\n")


def enter(machine: Path, version: int, group: str) -> None:
    of_version = f"0::{group}" if version == 2 else f"7:cpu,memory:{group}\n0::/elsewhere"
    (machine / "process").write_text(f"9:name=systemd:/\n{of_version}\n")


def test_without_control_groups_it_is_the_machine_s(machine: Path) -> None:
    assert (container.total_memory(), container.available_memory()) == (64 * GIB, 32 * GIB)


@pytest.mark.parametrize("version", VERSIONS)
def test_a_container_s_limit_counts(machine: Path, version: int) -> None:
    """What it has read from files can be freed, and so is available."""
    add_group(machine, version, "", str(4 * GIB), used=3 * GIB, freed=GIB)
    enter(machine, version, "/")
    assert (container.total_memory(), container.available_memory()) == (4 * GIB, 2 * GIB)
    assert copies.limit_bytes() == GIB // 2
    assert products.has_memory_for(GIB)
    assert not products.has_memory_for(GIB + 1)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(("inner", "outer"), [(8, 16), (16, 8)])
def test_the_smallest_limit_around_a_process_counts(machine: Path, version: int, inner: int, outer: int) -> None:
    add_group(machine, version, "pod", str(outer * GIB), used=GIB)
    add_group(machine, version, "pod/container", str(inner * GIB), used=GIB)
    enter(machine, version, "/pod/container")
    assert (container.total_memory(), container.available_memory()) == (8 * GIB, 7 * GIB)


@pytest.mark.parametrize("version", VERSIONS)
def test_a_group_that_is_not_there_leaves_those_around_it(machine: Path, version: int) -> None:
    """As in a container that sees its own group as the root, and is told the path which it has outside."""
    add_group(machine, version, "", str(4 * GIB))
    enter(machine, version, "/docker/3f2a")
    assert container.total_memory() == 4 * GIB


@pytest.mark.parametrize(("version", "limit"), [(2, "max"), (1, str(2**63 - 4096)), (2, str(128 * GIB))])
def test_a_group_without_a_limit_changes_nothing(machine: Path, version: int, limit: str) -> None:
    add_group(machine, version, "", limit, used=60 * GIB)
    enter(machine, version, "/")
    assert (container.total_memory(), container.available_memory()) == (64 * GIB, 32 * GIB)


@pytest.mark.parametrize(
    ("file", "content", "available"),
    [("memory.stat", None, 1), ("memory.stat", "anon 7\n", 1), ("memory.current", None, 4)],
)
def test_files_that_a_sandbox_does_not_have(machine: Path, file: str, content: str | None, available: int) -> None:
    add_group(machine, 2, "", str(4 * GIB), used=3 * GIB, freed=GIB)
    enter(machine, 2, "/")
    path = machine / "groups" / file
    path.unlink() if content is None else path.write_text(content)
    assert container.available_memory() == available * GIB


def test_a_group_that_is_over_its_limit_has_nothing(machine: Path) -> None:
    add_group(machine, 2, "", str(GIB), used=GIB + 4096)
    enter(machine, 2, "/")
    assert container.available_memory() == 0


# --- cores ----------------------------------------------------------------------------------------------------------


def limit_cores(machine: Path, version: int, group: str, quota: str, period: str) -> None:
    folder = machine / "groups" / ("cpu" if version == 1 else "") / group
    folder.mkdir(parents=True, exist_ok=True)
    if version == 2:
        (folder / "cpu.max").write_text(f"{quota} {period}\n")
    else:
        (folder / "cpu.cfs_quota_us").write_text(f"{quota}\n")
        (folder / "cpu.cfs_period_us").write_text(f"{period}\n")


@pytest.mark.parametrize(
    ("version", "quota", "expected"), [(2, "150000", 1.5), (1, "150000", 1.5), (2, "max", None), (1, "-1", None)]
)
def test_cores_of_a_container(machine: Path, version: int, quota: str, expected: float | None) -> None:
    limit_cores(machine, version, "pod", quota, "100000")
    limit_cores(machine, version, "", "800000" if expected else quota, "100000")
    enter(machine, version, "/pod")
    assert container.cores() == expected


def test_without_control_groups_no_core_is_limited(machine: Path) -> None:
    assert container.cores() is None


@pytest.mark.parametrize(
    ("n_threads", "cores", "expected"),
    [
        (4, None, "4"),
        (4, 8.0, "4"),
        (1, 0.5, "1"),
        (4, 1.0, "4, but this container has 1 core: set OMP_NUM_THREADS=1"),
        (64, 2.5, "64, but this container has 2.5 cores: set OMP_NUM_THREADS=2"),
    ],
)
def test_doctor_says_when_threads_wait_for_cores(n_threads: int, cores: float | None, expected: str) -> None:
    assert doctor.describe_threads(n_threads, cores) == expected
