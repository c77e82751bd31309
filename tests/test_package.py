"""The package as people install it: a wheel, built without network, that opens a base with no checkout in sight."""

import os
import shutil
import subprocess
import sys
import zipfile

import pytest
from conftest import ROOT

CODE = """
import sys, lit_llama
from pathlib import Path
from lit_llama import open_base
assert Path(lit_llama.__file__).is_relative_to(sys.argv[1]), lit_llama.__file__
assert sys.argv[3] not in sys.path
print(open_base(sys.argv[2]).generate("Count to 3.", max_new_tokens=4))
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The folder that the wheel is installed to."""
    folder = tmp_path_factory.mktemp("package")
    for name in ("lit_llama", "LICENSE", "README.md", "pyproject.toml"):  # a build writes next to its sources
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / "source" / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            (folder / "source").mkdir(exist_ok=True)
            shutil.copy(source, folder / "source" / name)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    build = ["wheel", "--no-index", "--no-deps", "--no-build-isolation", f"--wheel-dir={folder}", folder / "source"]
    subprocess.run([*pip, *build], check=True, capture_output=True, text=True)
    [wheel] = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as file:
        file.extractall(folder / "installed")  # what installing a wheel of plain Python comes to
    return folder / "installed"


def test_the_wheel_has_every_file_of_the_library_and_the_licence(installed):
    expected = {path.relative_to(ROOT) for path in (ROOT / "lit_llama").rglob("*") if path.is_file()}
    expected = {path for path in expected if "__pycache__" not in path.parts}
    found = {path.relative_to(installed) for path in (installed / "lit_llama").rglob("*") if path.is_file()}
    assert found == expected
    [licence] = installed.glob("*.dist-info/licenses/LICENSE")
    assert licence.read_text() == (ROOT / "LICENSE").read_text()


def test_what_is_installed_opens_a_base(installed, base_dir, tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(installed), "PYTHONSAFEPATH": "1"}
    command = [sys.executable, "-c", CODE, installed, base_dir, str(ROOT)]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip()
