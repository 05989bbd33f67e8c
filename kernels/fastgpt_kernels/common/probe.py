"""Whether a machine can compile and launch kernels: tried once for each GPU, with the smallest possible kernel."""

import os
import shutil
import sysconfig
import tempfile
from pathlib import Path

import torch
import triton
import triton.language as tl
from torch.utils._python_dispatch import _disable_current_modes
from triton import knobs

from .launch import launch


@triton.jit
def _probe_kernel(out_ptr):
    """out[0] = 1"""
    tl.store(out_ptr, 1.0)


_faults: dict[torch.device, str | None] = {}


def fault(device: torch.device) -> str | None:
    """Why kernels do not run on a GPU, and the cure, in one line; None where they run.

    The first call compiles, launches and waits. Later calls cost nothing, nor do those while torch traces or captures.
    """
    if device not in _faults:
        if torch.compiler.is_compiling() or (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()):
            return None
        _faults[device] = _try_to_launch(device)
    return _faults[device]


def _output(device: torch.device) -> torch.Tensor:
    return torch.zeros(1, dtype=torch.float32, device=device)


def _try_to_launch(device: torch.device) -> str | None:
    try:
        with _disable_current_modes():  # FakeTensorMode would give a tensor without memory
            out = _output(device)
            launch(_probe_kernel, 1, out)
            result = out.item()
    except Exception as error:  # A compiler, a linker, a driver or a file system may raise anything; it is the answer.
        return explain(error)
    return (
        None if result == 1 else f"the first kernel wrote {result} and not 1: reinstall torch with the triton it names"
    )


# --- what is wrong --------------------------------------------------------------------------------------------------


def explain(error: Exception) -> str:
    """The cause of a launch that failed, and its cure, in one line."""
    return _what_is_missing() or _what_was_said(error)


def _what_is_missing() -> str | None:
    compiler = os.environ.get("CC")
    if not (shutil.which(compiler) if compiler else shutil.which("gcc") or shutil.which("clang")):
        what = f"CC names {compiler!r}, which is not there" if compiler else "there is no C compiler"
        return f"{what}, and triton builds its launcher with one: apt-get install gcc, or set CC"
    if not Path(sysconfig.get_paths(_scheme())["include"], "Python.h").exists():
        what = "Python's headers are missing (Python.h)"
        return f"{what}, and triton builds its launcher with them: apt-get install python3-dev"
    try:
        Path(knobs.cache.dir).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=knobs.cache.dir):
            pass
    except OSError as error:
        what = f"triton cannot write its cache, {knobs.cache.dir} ({error.strerror})"
        return f"{what}: set TRITON_CACHE_DIR to a folder of yours"
    return None


def _scheme() -> str:
    """Where triton looks for headers: Debian's own scheme has none."""
    scheme = sysconfig.get_default_scheme()
    return "posix_prefix" if scheme == "posix_local" else scheme


def _what_was_said(error: Exception) -> str:
    text = " ".join(str(error).split()).partition(" Repro command")[0]
    said, version = f"{type(error).__name__}: {text[:200]}", triton.__version__
    if "ptxas" in text:
        what = f"the ptxas of triton {version} cannot compile here"
        cure = "install a newer torch and the triton it asks for, or set TRITON_PTXAS_PATH"
    elif "libcuda" in text:
        what = "triton does not find the driver's libcuda.so.1"
        cure = "set TRITON_LIBCUDA_PATH to its folder, under WSL /usr/lib/wsl/lib"
    elif "[CUDA]" in text or "active drivers" in text:
        what, cure = f"the GPU's driver refuses what triton {version} made", "update the driver"
    else:
        what, cure = "a first kernel did not run", "FASTGPT_BACKEND=torch does without kernels"
    return f"{what} ({said}): {cure}"
