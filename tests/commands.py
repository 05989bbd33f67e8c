"""What a command of the command line printed, and how an error must look."""


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
