"""Imports run downwards: no cycle of modules, none of folders, and none hidden inside a function."""

import ast
import re
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from paths import ROOT

PARENTS = {"fastgpt": ROOT, "fastgpt_kernels": ROOT / "kernels", "benchmarks": ROOT}
# What need not be installed is imported where it is used, and so are the modules that import triton.
OPTIONAL = {
    "triton", "accelerate", "matplotlib",
    "ctranslate2", "gguf", "llama_cpp", "onnx", "onnxruntime", "openvino",
    "liger_kernel", "cut_cross_entropy", "quack", "flash_attn",
}  # fmt: skip


def module_of(file: Path, parent: Path) -> str:
    return ".".join(file.relative_to(parent).with_suffix("").parts).removesuffix(".__init__")


FILES = {module_of(file, parent): file for name, parent in PARENTS.items() for file in (parent / name).rglob("*.py")}


def imported(module: str, node: ast.AST) -> Iterator[str]:
    """The modules that an import statement names, by their absolute names.

    `from package import module` names both: the package itself could define the name.
    """
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        package = module.split(".") if FILES[module].name == "__init__.py" else module.split(".")[:-1]
        above = package[: len(package) - node.level + 1] if node.level else []
        source = ".".join([*above, *filter(None, [node.module])])
        yield source
        yield from (inner for alias in node.names if (inner := f"{source}.{alias.name}") in FILES)


def imports_of(module: str, node: ast.AST) -> set[str]:
    return {name for inner in ast.walk(node) for name in imported(module, inner)} - {module}


TREES = {module: ast.parse(file.read_text()) for module, file in FILES.items()}
GRAPH = {module: imports_of(module, tree) & FILES.keys() for module, tree in TREES.items()}


def folder_of(module: str) -> str:
    """The folder of a module; one that lies beside folders counts as a folder of its own."""
    file = FILES[module]
    return module if file.name == "__init__.py" else module.rpartition(".")[0] or module


def test_the_graph_is_the_code() -> None:
    assert {"fastgpt.ops", "fastgpt.generate.api", "fastgpt.model.blocks"} <= GRAPH["fastgpt.modeling"]
    assert "fastgpt_kernels.operations.layer_norm.op" in GRAPH["fastgpt_kernels.operations.decode_step.op"]
    assert {"fastgpt", "fastgpt.ops"} <= GRAPH["fastgpt.text"]  # from . import ops
    with pytest.raises(ValueError, match="cycle"):
        TopologicalSorter({"a": {"b"}, "b": {"a"}}).prepare()


def test_no_cycle_of_modules() -> None:
    TopologicalSorter(GRAPH).prepare()


def test_no_cycle_of_folders() -> None:
    """The package itself, which gathers names, is not counted."""
    folders: dict[str, set[str]] = {}
    for module, targets in GRAPH.items():
        here = folder_of(module)
        if here not in PARENTS:
            folders.setdefault(here, set()).update({folder_of(target) for target in targets} - {here, *PARENTS})
    TopologicalSorter(folders).prepare()


def all_imports_of(module: str) -> set[str]:
    """Also those of the modules that it imports."""
    found, pending = set(), {module}
    while pending:
        new = pending.pop()
        found.add(new)
        pending |= imports_of(new, TREES[new]) - found if new in FILES else set()
    return found


@pytest.mark.parametrize("module", FILES)
def test_only_what_is_optional_is_imported_inside_a_function(module: str) -> None:
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            names = imports_of(module, node)
            for name in names - {name.rpartition(".")[0] for name in names}:  # A package counts through its module.
                packages = {need.partition(".")[0] for need in all_imports_of(name)}
                assert packages & OPTIONAL, f"{module}.{node.name} imports {name}"


FOLDERS = re.findall(r"^\| `fastgpt/(\w+)/` \| (.*) \|$", (ROOT / "docs" / "architecture.md").read_text(), re.MULTILINE)


@pytest.mark.parametrize(("folder", "described"), FOLDERS, ids=[folder for folder, _ in FOLDERS])
def test_the_architecture_names_every_module_of_a_folder(folder: str, described: str) -> None:
    modules = {file.stem for file in (ROOT / "fastgpt" / folder).glob("*.py")} - {"__init__"}
    assert modules == modules & set(re.findall(r"`(\w+)`", described))


def test_the_architecture_has_every_folder() -> None:
    assert {folder for folder, _ in FOLDERS} == {file.parent.name for file in (ROOT / "fastgpt").glob("*/__init__.py")}
