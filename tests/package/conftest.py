"""The command line, called in this process."""

import pytest
from commands import Result

from fastgpt import cli


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]):
    def run_command(*arguments: str) -> Result:
        with pytest.raises(SystemExit) as exit_info:
            cli.main(list(arguments))
        captured = capsys.readouterr()
        assert isinstance(exit_info.value.code, int)
        return Result(exit_info.value.code, captured.out, captured.err)

    return run_command
