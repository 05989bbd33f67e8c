"""The benchmarks as commands, each with --help:

python -m benchmarks gpu|tune|cpu|curves|traffic|lookup|host|launches|guard|report
"""

import sys
from importlib import import_module

import typer

# Where the function of a command is: imported when asked for, because some need triton or a GPU.
COMMANDS = {
    "gpu": "benchmarks.gpu.command",
    "tune": "benchmarks.gpu.tune",
    "cpu": "benchmarks.cpu.command",
    "curves": "benchmarks.cpu.curves",
    "traffic": "benchmarks.cpu.traffic",
    "lookup": "benchmarks.cpu.lookup",
    "host": "benchmarks.cpu.host",
    "launches": "benchmarks.cpu.launches",
    "guard": "benchmarks.cpu.guard",
    "report": "benchmarks.report.command",
}


def main() -> None:
    name, *arguments = sys.argv[1:] or [""]
    if name in ("-h", "--help"):
        print(__doc__)
        return
    if name not in COMMANDS:
        print(f"unknown benchmark {name!r}: choose one of {', '.join(COMMANDS)}", file=sys.stderr)
        sys.exit(2)
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(import_module(COMMANDS[name]).main)
    app(arguments, prog_name=f"python -m benchmarks {name}")


if __name__ == "__main__":
    main()
