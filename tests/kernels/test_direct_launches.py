"""Direct launches tell a GPU's driver what triton's own tell it, and hooks still reach triton."""

import os
import subprocess
import sys
from pathlib import Path

from compilers import needs_launcher
from paths import ROOT

SCRIPT = Path(__file__).with_name("direct_launches.py")


@needs_launcher
def test_direct_launches_equal_triton_s_own() -> None:
    # In a process without the interpreter, where triton's own launcher is linked with a stub of the driver.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    places = str(ROOT), str(ROOT / "kernels"), environment.get("PYTHONPATH", "")
    environment["PYTHONPATH"] = os.pathsep.join(places)
    finished = subprocess.run([sys.executable, SCRIPT, "4"], env=environment, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
