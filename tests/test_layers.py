"""The house's rules that a program can check: import order, one importer of llama_cpp, packaging, names."""

import ast
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ["runtime", "quant", "cluster", "tui", "cli"]
MODULES = [
    path
    for folder in FOLDERS
    if (ROOT / folder).is_dir()
    for path in sorted((ROOT / folder).rglob("*.py"))
    if "_pb2" not in path.name  # generated
]


def imports(path):
    """(level, module) of each import, and what follows the dots of relative ones."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom):
            yield node.level, node.module or ""
        elif isinstance(node, ast.Import):
            yield from ((0, name.name) for name in node.names)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_a_folder_imports_only_those_before_it_and_by_relative_imports(path):
    parts = path.relative_to(ROOT).parts
    for level, module in imports(path):
        assert not module.startswith("localreason"), "inside the folders imports are relative"
        if level == len(parts):  # one level above the folder: the package localreason
            folder = module.split(".")[0]
            assert FOLDERS.index(folder) <= FOLDERS.index(parts[0]), f"{parts[0]} may not import {folder}"


def test_llama_cpp_is_imported_in_one_place():
    importers = [path.name for path in MODULES if any(module == "llama_cpp" for _, module in imports(path))]
    assert importers == ["native.py"]


def test_every_package_on_disk_is_in_the_wheel():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["setuptools"]
    on_disk = {".".join(("localreason", *p.parent.relative_to(ROOT).parts)) for p in MODULES if p.name == "__init__.py"}
    assert set(project["packages"]) == on_disk
    assert set(project["package-dir"]) == on_disk


def test_no_module_is_named_for_nothing():
    assert not {"utils", "helpers", "common", "base", "manager"} & {path.stem for path in MODULES}
