"""Commands of the command line: in a process of their own, what they printed, and how an error must look."""

import os
import subprocess
import sys


class Result:
    def __init__(self, code: int, out: str, err: str):
        self.code, self.out, self.err = code, out, err


def assert_one_line_error(result: Result, code: int, *words: str) -> None:
    assert result.code == code
    assert result.err.startswith("error: ")
    assert result.err.count("\n") == 1, result.err
    assert "Traceback" not in result.err
    for word in words:
        assert word in result.err
    assert result.out == ""


def in_process(arguments: list[str], **options) -> subprocess.Popen:
    """A running command; its standard error is a pipe."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)} | options.pop("environment", {})
    command = [sys.executable, "-m", "fastgpt", *arguments]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, **options)
