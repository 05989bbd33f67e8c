"""What building native code takes, as triton and torch.compile do: many ordinary machines lack it."""

import shutil
import sysconfig
from pathlib import Path

import pytest

_HAS_HEADERS = Path(sysconfig.get_path("include"), "Python.h").is_file()

WITHOUT_CXX = "torch.compile builds with g++ and Python's headers"
HAS_CXX = shutil.which("g++") is not None and _HAS_HEADERS

needs_launcher = pytest.mark.skipif(
    shutil.which("gcc") is None or not _HAS_HEADERS, reason="triton's launcher is built with gcc and Python's headers"
)
needs_inductor = pytest.mark.skipif(not HAS_CXX, reason=WITHOUT_CXX)
