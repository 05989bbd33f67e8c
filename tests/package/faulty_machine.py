"""A machine with a GPU that is not there, and one thing wrong with it: prints as JSON what fastgpt makes of it.

    python faulty_machine.py none|old-gpu|new-gpu|old-driver|no-libcuda|no-headers|no-triton

Triton compiles for real, and builds a launcher with the C compiler, the headers and the cache that it finds; only the
GPU's driver is a stand-in, which keeps its tensors in the CPU's memory.
"""

import json
import sys
import sysconfig
import tempfile
import warnings
from types import SimpleNamespace
from typing import Any

from fastgpt_kernels.common import chip

FAULT = sys.argv[1]
if FAULT == "no-triton":
    sys.modules["triton"] = None  # type: ignore[assignment]

import fastgpt_kernels  # noqa: E402
import torch  # noqa: E402

from fastgpt import backend, ops  # noqa: E402

ARCHITECTURE = {"old-gpu": "sm_75", "new-gpu": "sm_190"}.get(FAULT, "sm_90")
MODULE = """
#include <Python.h>
static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "stand_in", NULL, -1, NULL};
PyMODINIT_FUNC PyInit_stand_in(void) { return PyModule_Create(&module); }
"""


def stand_in() -> Any:
    """A driver that builds its launcher as triton's own do, and whose GPU knows one kernel."""
    # Here and not above, because one of the machines has no triton.
    from triton.backends.compiler import GPUTarget
    from triton.runtime.build import compile_module_from_src

    def load_binary(*_: Any) -> tuple[object, ...]:
        if FAULT == "old-driver":
            raise RuntimeError("Triton Error [CUDA]: device kernel image is invalid")
        return object(), object(), 16, 0, 1024

    class Launcher:
        def __init__(self, *_: Any) -> None:
            if FAULT == "no-libcuda":
                raise AssertionError("libcuda.so cannot found!")
            compile_module_from_src(MODULE, "stand_in", [], [], [])

        def __call__(self, *arguments: Any) -> None:
            (out,) = (argument for argument in arguments if isinstance(argument, torch.Tensor))
            out.fill_(1)

    limits = {"max_shared_mem": 232448, "max_num_regs": 65536, "multiprocessor_count": 132, "warpSize": 32}
    return SimpleNamespace(
        get_current_device=lambda: 0,
        get_current_stream=lambda device: 0,
        get_current_target=lambda: GPUTarget("cuda", int(ARCHITECTURE[3:]), 32),
        utils=SimpleNamespace(load_binary=load_binary, get_device_properties=lambda device: limits),
        launcher_cls=Launcher,
    )


def compiled(x: torch.Tensor) -> str:
    """What runs while torch.compile traces, which may neither raise nor look into the machine."""
    return ops.explain("gelu_mlp", "cuda:0")[0]


def main() -> None:
    chip._chip_of = lambda device: chip.Chip(ARCHITECTURE, 132)  # type: ignore[assignment]
    if FAULT != "no-triton":
        from fastgpt_kernels.common import probe
        from triton.runtime import driver

        driver.set_active(stand_in())
        probe._output = lambda device: torch.zeros(1)
    if FAULT == "no-headers":
        paths, nowhere = sysconfig.get_paths, tempfile.mkdtemp()
        sysconfig.get_paths = lambda *a, **k: paths(*a, **k) | {"include": nowhere}

    by_name = None
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        with backend("auto"):
            ran = [ops.explain(operation, "cuda:0")[0] for operation in fastgpt_kernels.OPERATIONS * 2]
            ran.append(torch.compile(compiled, backend="eager", fullgraph=True)(torch.ones(1)))
    try:
        with backend("triton"):
            ops.explain("layer_norm", "cuda:0")
    except fastgpt_kernels.KernelUnavailableError as error:
        by_name = str(error)
    print(json.dumps({"ran": sorted(set(ran)), "warnings": [str(w.message) for w in said], "by_name": by_name}))


if __name__ == "__main__":
    main()
