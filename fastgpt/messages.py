"""Errors of other libraries, and values that anybody may have given, as parts of a message of one line."""


def one_line(error: BaseException, limit: int = 300) -> str:
    """The message of another library's error on one line of at most `limit` characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else text[:limit] + "..."


def first_line(error: BaseException) -> str:
    """The type of an error, and of a message of several lines the first."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def shown(value: object) -> str:
    """A name from a file, or any other value: quoted, on one line, not too long."""
    text = repr(value).replace("\n", " ")
    return text if len(text) <= 100 else f"{text[:100]}..."
