"""What ptxas makes of PTX: registers, and the number of machine instructions."""

import re
import subprocess
import tempfile
from pathlib import Path

from triton.backends import nvidia


def registers_and_instructions(text: str, architecture: str) -> tuple[int, int]:
    """Of a thread of the kernel, and in its machine code, without padding. architecture: sm_90, for example."""
    tools = Path(nvidia.__path__[0], "bin")
    target = architecture + "a" * (architecture == "sm_90")  # wgmma is of sm_90a
    with tempfile.TemporaryDirectory() as folder:
        source, code = Path(folder, "kernel.ptx"), Path(folder, "kernel.cubin")
        source.write_text(text)
        command = [tools / "ptxas", "-v", f"--gpu-name={target}", source, "-o", code]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
        listing = subprocess.run([tools / "nvdisasm", "-c", code], capture_output=True, text=True, check=True).stdout
    found = re.search(r"Used (\d+) registers", said)
    assert found is not None, said
    instructions = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?(\w+)", listing, re.M)
    return int(found[1]), sum(name != "NOP" for name in instructions)
