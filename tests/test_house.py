"""The house stays in order: small files and functions, scripts that know nothing of each other, a map that is complete.

What imports what inside the library is checked by import-linter, in `make lint`.
"""

import ast
import re

import pytest
from conftest import ROOT

SCRIPT_FOLDERS = ("finetune", "generate", "evaluate", "scripts", "benchmarks")
FILES = sorted(path for folder in ("lit_llama", *SCRIPT_FOLDERS) for path in (ROOT / folder).rglob("*.py"))
MOST_LINES = 400
MOST_LINES_OF_A_FUNCTION = 60  # of code, from its first statement on: options and what explains them may be many


def name(path):
    return path.relative_to(ROOT).as_posix()


def code_lines(function):
    """Lines from the first statement after the docstring to the last."""
    start = function.body[1 if ast.get_docstring(function) is not None and len(function.body) > 1 else 0].lineno
    return function.end_lineno - start + 1


def long_ones(path):
    text = path.read_text(encoding="utf-8")
    if len(text.splitlines()) > MOST_LINES:
        yield name(path)
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and code_lines(node) > MOST_LINES_OF_A_FUNCTION:
            yield f"{name(path)}::{node.name}"


def test_files_and_functions_are_short():
    assert sorted({one for path in FILES for one in long_ones(path)}) == []


@pytest.mark.parametrize("folder", SCRIPT_FOLDERS)
def test_scripts_do_not_import_each_other(folder):
    scripts = {path.stem for other in SCRIPT_FOLDERS for path in (ROOT / other).glob("*.py")} | set(SCRIPT_FOLDERS)
    for path in (ROOT / folder).glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            imported = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{name(path)}, line {node.lineno}"
                imported = [node.module or ""]
            for module in imported:
                assert module.split(".")[0] not in scripts, f"{name(path)}, line {node.lineno}: {module}"


def test_plain_english():
    """Descriptions of arguments begin with a noun, and no word needs to be guessed at."""
    riddles = re.compile(r"^ +\w+: of |\b(beside|lest|anew|whatever)\b", re.IGNORECASE)
    texts = [*FILES, *ROOT.glob("*.md"), *ROOT.glob("howto/*.md"), *ROOT.glob("examples/*.md")]
    lines = [(name(path), line) for path in texts for line in path.read_text(encoding="utf-8").splitlines()]
    assert [(where, line) for where, line in lines if riddles.search(line)] == []


def test_the_map_names_every_room():
    """Each file of the library stands in a wing that CONTRIBUTING.md names, or is named there itself."""
    rows = [line for line in (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").splitlines() if line[:1] == "|"]
    named = set(re.findall(r"`([\w/.]+)`", "\n".join(rows)))
    paths = [path.relative_to(ROOT / "lit_llama") for path in FILES if path.is_relative_to(ROOT / "lit_llama")]
    wings = {f"lit_llama/{path.parts[0]}/" for path in paths if len(path.parts) > 1}
    rooms = {path.name for path in paths if len(path.parts) == 1} - {"__init__.py"}
    assert sorted((wings | rooms) - named) == []
    there = wings | rooms | {f"{folder}/" for folder in SCRIPT_FOLDERS}
    assert sorted(named - there) == [], "the map names what is not there"
