"""A GPU that is not there: triton compiles for it and launches on it with its own C code, down to a driver of stubs.

Kernels are compiled to PTX and never run. Tensors stay in the CPU's memory, and what torch computes it computes there.
"""

import ctypes
import os
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import fastgpt_kernels
from fastgpt_kernels.common import chip
from triton import knobs
from triton.backends import nvidia
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import compiler as nvidia_compiler
from triton.backends.nvidia.driver import CudaDriver, CudaLauncher, CudaUtils
from triton.runtime import driver

SOURCE = Path(__file__).with_suffix(".c")
N_MULTIPROCESSORS = 132


class _StubDriver(CudaDriver):
    """Triton's driver of a GPU without torch's part of it, which needs a torch for CUDA."""

    def __init__(self, architecture: str):
        self.architecture, self.stream = architecture, 0
        self.utils, self.launcher_cls = CudaUtils(), CudaLauncher

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return self.stream

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", int(self.architecture[3:]), 32)


def _build(folder: Path) -> ctypes.CDLL:
    library = folder / "libcuda.so.1"
    include = Path(nvidia.__path__[0], "include")
    options = ["-shared", "-fPIC", "-O1", f"-Wl,-soname,{library.name}", f"-I{include}"]
    subprocess.run([os.environ.get("CC", "gcc"), *options, "-o", library, SOURCE], check=True)
    # Whoever asks for a library of this name after this gets the stub.
    return ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)


def _yes() -> bool:
    return True  # Faster than a mock, because its time is measured with that of every operation.


@contextmanager
def stub_gpu(architecture: str = "sm_90") -> Iterator[ctypes.CDLL]:
    """Launch every kernel on a GPU that answers and does nothing. TRITON_INTERPRET must not be set.

    Gives the library of stubs. Once a process: triton keeps what it has built with it.
    """
    with tempfile.TemporaryDirectory() as folder, knobs.cache.scope(), knobs.nvidia.scope():
        knobs.cache.dir = str(Path(folder, "cache"))  # Its entries have no machine code.
        knobs.nvidia.libcuda_path = folder
        library = _build(Path(folder))
        before = driver._active
        driver.set_active(_StubDriver(architecture))  # type: ignore[arg-type]
        try:
            with (
                chip.assume(chip.Chip(architecture, N_MULTIPROCESSORS)),
                mock.patch.object(nvidia_compiler.CUDABackend, "make_cubin", return_value=b"none"),
                mock.patch.object(fastgpt_kernels, "_interprets", new=_yes),
            ):
                yield library
        finally:
            driver._active = before
