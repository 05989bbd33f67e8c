"""What building native code takes, as triton and torch.compile do: many ordinary machines lack it."""

import shutil
import sysconfig
from pathlib import Path

import pytest

_HAS_HEADERS = Path(sysconfig.get_path("include"), "Python.h").is_file()

needs_launcher = pytest.mark.skipif(
    shutil.which("gcc") is None or not _HAS_HEADERS, reason="triton's launcher is built with gcc and Python's headers"
)
needs_inductor = pytest.mark.skipif(
    shutil.which("g++") is None or not _HAS_HEADERS, reason="torch.compile builds with g++ and Python's headers"
)
