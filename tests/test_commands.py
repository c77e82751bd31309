"""The command lines of README, how-tos and docstrings: their scripts know the options, git ignores what they write."""

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import ROOT, load_script

from lit_llama.script.parser import parse

SCRIPT = re.compile(r"(?:finetune|generate|evaluate|scripts|benchmarks)/\w+\.py$")
PAGES = ["README.md", "RESULTS.md", *(f"howto/{path.name}" for path in sorted((ROOT / "howto").glob("*.md")))]
PAGES += [str(path.relative_to(ROOT)) for path in sorted(ROOT.glob("*/*.py")) if path.parent.name != "tests"]


def commands(page: Path) -> list[list[str]]:
    """Every command of a page that runs a script of the repo, from the script on, without comments and redirections."""
    text = page.read_text(encoding="utf-8")
    if page.suffix == ".md":
        blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
        inline = re.findall(r"`([^`]+)`", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE))
        lines = [line for block in blocks for line in re.sub(r"\s*\\\n\s*", " ", block).splitlines()]
        lines += [re.sub(r"\s+", " ", code) for code in inline if code.startswith("python ") and " --" in code]
    else:
        docstring = re.match(r'"""(.*?)"""', text, re.DOTALL)
        lines = re.sub(r"\s*\\\\\n\s*", " ", docstring[1] if docstring else "").splitlines()
        lines = [line for line in lines if line.startswith("    ")]
    found = []
    for line in lines:
        for command in re.split(r"[|;]|&&", line):
            if re.search(r"\b(python|torchrun|fabric|srun)\b", command):
                command = re.sub(r"--config \S+", "", re.split(r"\s(?:2?>|#)", command)[0])  # a run's, not there yet
                command = re.sub(r"\$[A-Z]+", "1", command)
                parts = shlex.split(command)
                start = next((i for i, part in enumerate(parts) if SCRIPT.match(part)), len(parts))
                found += [parts[start:]] if start < len(parts) else []
    return found


def test_the_pages_are_read():
    assert len(commands(ROOT / "README.md")) > 8
    assert [len(commands(ROOT / "generate" / name)) for name in ("base.py", "aligner.py")] == [3, 4]


@pytest.mark.parametrize("page", PAGES)
def test_scripts_know_the_options_of(page, capsys):
    for script, *args in commands(ROOT / page):
        assert (ROOT / script).is_file(), f"{page} runs {script}, which is not there"
        try:
            parse(load_script(script).main, args)
        except SystemExit:
            pytest.fail(f"{page}: {script} {shlex.join(args)}\n{capsys.readouterr().err}")


def test_git_ignores_what_the_commands_write(tmp_path):
    written = set()
    for page in PAGES:
        for script, *args in commands(ROOT / page):
            options = parse(load_script(script).main, args)
            names = ("output_path", "output_dir", "output_file", "out_dir")
            written |= {str(options[name]) for name in names if options.get(name) is not None}
    assert len(written) > 20
    shutil.copy(ROOT / ".gitignore", tmp_path)
    subprocess.run(["git", "init", "--quiet"], cwd=tmp_path, check=True)
    ignored = subprocess.run(["git", "check-ignore", *written], cwd=tmp_path, capture_output=True, text=True)
    assert sorted(written - set(ignored.stdout.splitlines())) == []
