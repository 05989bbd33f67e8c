"""Which of an operation's kernel and torch is faster on a GPU, as far as it is known: the backend that `auto` takes.

Tables are measured: one of this machine, which `fastgpt doctor --measure` writes, and those in `measured.json`, which
ship. A table is of one GPU with one torch and one triton, and counts only there. A row has the median seconds of one
pass of an operation, "forward" or "forward+backward", in one precision: the name of a dtype, or "tf32" for float32
where torch may round it so. Where nothing is measured, `measured.json` says what is expected, by count of instructions:
the kernels use no tensor cores for exact products of float32 and float64, and their tiles are not tuned for tf32.
"""

import json
import math
import os
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from fastgpt_kernels.common.precision import tf32_is_allowed

SHIPPED = Path(__file__).with_name("measured.json")
MEASURE = "fastgpt doctor --measure"
# The backend, and why.
Choice = tuple[str, str]
_KERNEL: Choice = ("triton", "kernel available")


class Known(NamedTuple):
    """choices: by operation and precision. note: one line on this machine's table."""

    choices: dict[tuple[str, str], Choice]
    note: str


def choice(operation: str, dtype: torch.dtype | None, device: torch.device) -> Choice:
    """The backend that `auto` takes on a GPU where the kernel runs.

    dtype: in which the operation computes; None asks for what holds where nothing is known.
    """
    if dtype is None:
        return _KERNEL
    is_tf32 = dtype == torch.float32 and tf32_is_allowed()
    precision = "tf32" if is_tf32 else str(dtype).removeprefix("torch.")
    return known(device).choices.get((operation, precision), _KERNEL)


# As in fastgpt_kernels: torch.compile calls it while tracing instead of tracing it.
choice._dynamo_marked_constant = True  # type: ignore[attr-defined]

_known: dict[torch.device, Known] = {}


def known(device: torch.device) -> Known:
    """What is known of a GPU; its table is read at the first call of the process."""
    if device not in _known:
        _known[device] = _read(device)
    return _known[device]


def machine(device: torch.device) -> dict[str, str]:
    """The GPU and the versions that a table is measured with."""
    import triton  # It need not be installed, but kernels run on the device, so here it is.

    return {"gpu": torch.cuda.get_device_name(device), "torch": str(torch.__version__), "triton": triton.__version__}


# --- reading --------------------------------------------------------------------------------------------------------


def _read(device: torch.device) -> Known:
    here, shipped = machine(device), json.loads(SHIPPED.read_text())
    choices = {
        (operation, precision): ("torch", f"torch's products in {precision} are expected to be faster")
        for operation, precisions in shipped["expected_in_torch"].items()
        for precision in precisions
    }
    for table in shipped["tables"]:
        if _subject(table) == here:
            choices |= _choices(table)
    path = _path(here["gpu"])
    try:
        table = json.loads(path.read_text())
        subject, measured = _subject(table), _choices(table)
    except FileNotFoundError:
        return Known(choices, f"none: {MEASURE} times every operation here")
    # A file may hold anything, and a call of a model must not fail for it.
    except (OSError, ValueError, TypeError, LookupError, ArithmeticError, RecursionError) as error:
        return Known(choices, f"ignored: {path} is no table ({type(error).__name__}: {error}): run {MEASURE}")
    if subject != here:
        of = ", ".join(f"{name} {value}" for name, value in subject.items())
        return Known(choices, f"ignored: {path} is of {of}: run {MEASURE}")
    return Known(choices | measured, str(path))


def _subject(table: dict[str, Any]) -> dict[str, str]:
    return {name: table[name] for name in ("gpu", "torch", "triton")}


def _choices(table: dict[str, Any]) -> dict[tuple[str, str], Choice]:
    """torch where the kernel is slower in either pass. Raises some error on anything that is no table."""
    slowest: dict[tuple[str, str], tuple[float, str]] = {}
    for row in table["rows"]:
        ratio = row["kernel_s"] / row["torch_s"]
        if not 0.0 < ratio < math.inf:
            raise ValueError(f"a kernel that takes {ratio} times as long as torch")
        key = row["operation"], row["precision"]
        slowest[key] = max(slowest.get(key, (0.0, "")), (ratio, row["pass"]))
    return {
        key: ("torch" if ratio > 1.0 else "triton", f"measured: its kernel takes {ratio:.2f} of torch's time, {passed}")
        for key, (ratio, passed) in slowest.items()
    }


# --- writing --------------------------------------------------------------------------------------------------------


def _folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "fastgpt")


def _path(gpu: str) -> Path:
    return _folder() / f"{'-'.join(gpu.lower().split()).replace(os.sep, '-')}.json"


def check_writable() -> None:
    """Raise OSError, before minutes of work, where no table can be written."""
    folder, cure = _folder(), "set XDG_CACHE_HOME to a folder of yours"
    if not folder.is_absolute():  # Without a home folder it begins with "~", which would be made here.
        raise OSError(f"no table can be written to {folder}, which is no absolute path: {cure}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(f"no table can be written to {folder} ({error.strerror}): {cure}") from error


def write(table: dict[str, Any]) -> Path:
    """Keep a table where this and later processes find it, whole or not at all. Raises OSError as `check_writable`."""
    check_writable()
    path = _path(table["gpu"])
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        file = Path(folder, path.name)
        file.write_text(json.dumps(table, indent=1) + "\n")
        file.replace(path)
    _known.clear()
    return path
