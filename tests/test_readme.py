"""The README does what it says: its Python block and shell lines run as they stand, its map is complete, links lead on.

In a temporary folder, a tiny base and an adapter of it stand for the demo's base and its adapter. There, for real, run
the Python block and the scripts that need neither the network nor minutes (`RUN`). As to the others, `make` is asked
what it would do, the extras of `pip install` must exist, and options are parsed (`PARSED`).
"""

import json
import re
import shlex
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, load_script

from lit_llama import open_base, save_adapter
from lit_llama.checkpoint import read_config
from lit_llama.lora import LoRA
from lit_llama.script.command_line import parse

README = (ROOT / "README.md").read_text(encoding="utf-8")
RUN = {
    "generate/aligner.py",
    "scripts/prepare_alpaca.py",
    "finetune/aligner.py",
    "evaluate/side_by_side.py",
    "scripts/export_hf_checkpoint.py",
}
PARSED = {
    "scripts/download.py",  # the network
    "generate/chat.py",  # with what that fetched; tests/test_chat.py
    "scripts/export_gguf.py",  # needs the base as a GGUF file; tests/test_export.py
    "generate/serve.py",  # does not end; tests/test_serve.py
    "benchmarks/memory.py",  # half a minute
}
DEMO = "checkpoints/SmolLM2-135M-Instruct"


def blocks(language, text=README):
    """The code blocks of a language; "" for those that name none."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return [block for name, block in found if name == language]


def shell_lines():
    """The lines of the README's shell blocks, continued ones joined, without comments; and its inline commands."""
    lines = [line for block in blocks("sh") for line in re.sub(r"\\\n\s*", "", block).splitlines()]
    inline = re.findall(
        r"`((?:make|python) [^`\n]+)`", re.sub(r"^```.*?^```", "", README, flags=re.DOTALL | re.MULTILINE)
    )
    return [re.sub(r"\s+#.*", "", line) for line in [*lines, *inline]]


def scripts():
    parts = [shlex.split(line) for line in shell_lines()]
    return [words[1:] for words in parts if words[0] in ("python", ".venv/bin/python")]


@pytest.fixture
def clone(tmp_path, monkeypatch, base_dir, aligner_path):
    """A folder like a clone of the repo after `make base`, with the tiny base in the place of the demo's."""
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / DEMO).symlink_to(base_dir)
    (tmp_path / "examples/adapters").mkdir(parents=True)
    shutil.copy(aligner_path, tmp_path / "examples/adapters/captain.safetensors")
    rows = [{"instruction": f"Count to {n}.", "output": " ".join(map(str, range(n)))} for n in range(1, 21)]
    (tmp_path / "my_data.json").write_text(json.dumps(rows))
    (tmp_path / "my_prompts.txt").write_text("Count to 30.\nWho are you?\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_line_is_known():
    others = {shlex.split(line)[0] for line in shell_lines()} - {"python", ".venv/bin/python"}
    assert others == {"make", "pip", "source"}
    assert {words[0] for words in scripts()} == RUN | PARSED


def test_the_python_block(clone, capsys):
    [block] = blocks("python")
    assert len(block.splitlines()) <= 15
    names = {}
    exec(compile(block, "README.md", "exec"), names)
    assert capsys.readouterr().out.strip()
    assert (clone / "out/notebook/aligner.safetensors").is_file()
    assert names["aligner"].gates.abs().sum() > 0


def test_the_shell_lines(clone, command):
    for script, *args in scripts():
        if script in RUN:
            status, out, err = command(script, *args)
            assert status == 0, f"{script} {shlex.join(args)}\n{err}"
            assert out or script.startswith(("scripts", "finetune"))
        else:
            parse(load_script(script).main, args)
    assert (clone / "out/mine/aligner.safetensors").is_file()
    assert (clone / "export/captain/config.json").is_file()


def test_make_knows_its_targets():
    targets = {words[1] for words in map(shlex.split, shell_lines()) if words[0] == "make"}
    assert targets == {"base", "demo", "demo-dpo", "demo-distill"}
    for target in targets:
        subprocess.run(["make", "--dry-run", target], cwd=ROOT, check=True, capture_output=True)


def test_pip_knows_the_extras():
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    extras = [extra for line in shell_lines() if line.startswith("pip") for extra in re.findall(r"\[(.*)\]", line)]
    assert extras
    assert all(re.search(rf"^{extra} = \[", text, re.MULTILINE) for extra in extras)


def test_what_a_notebook_imports_is_light():
    program = (
        "import sys, lit_llama; assert 'torch' not in sys.modules; lit_llama.open_base; assert 'torch' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)


def test_what_is_not_there_is_not_imported():
    with pytest.raises(ImportError, match="nothing_of_this_name"):
        exec("from lit_llama import nothing_of_this_name", {})


def test_the_map_has_every_file_once():
    section = README.split("## Where things are")[1].split("\n## ")[0]
    listed = []
    for block in blocks("", section):
        folder = ""
        for line in block.splitlines():
            name, _, _ = line.strip().partition("  ")
            if name.endswith("/"):
                folder = name
            else:
                assert re.search(r"\S  +\S", line), f"{line}: says nothing"
                listed.append(folder + name)
    folders = ("finetune", "generate", "evaluate", "scripts", "benchmarks", "lit_llama")
    files = [str(path.relative_to(ROOT)) for name in folders for path in (ROOT / name).rglob("*.py")]
    assert sorted(listed) == sorted(file for file in files if not file.endswith("__init__.py"))


@pytest.mark.parametrize("page", ["inference.md", "baselines.md", "many_aligners.md"])
def test_the_python_blocks_of(page, clone, base_dir, aligner_path, capsys):
    lora = LoRA(read_config(base_dir))
    torch.nn.init.normal_(next(p for name, p in lora.named_parameters() if not p.any()), std=0.1)
    save_adapter("out/lora/lora.safetensors", lora, open_base(base_dir))
    for run in ("demo", "captain"):
        (clone / "out" / run).symlink_to(aligner_path.parent)
    [block] = blocks("python", (ROOT / "howto" / page).read_text(encoding="utf-8"))
    names = {}
    exec(compile(block, page, "exec"), names)
    if page == "baselines.md":  # put in and taken out again
        ids = torch.arange(5, 15)[None]
        base = open_base(base_dir).model
        torch.testing.assert_close(names["model"](ids), base(ids), atol=1e-5, rtol=0)
        assert not torch.equal(base(ids, names["lora"]), base(ids))
    else:
        assert capsys.readouterr().out


PAGES = [path for pattern in ("*.md", "howto/*.md", "examples/*.md") for path in sorted(ROOT.glob(pattern))]


def anchors(page):
    headings = re.findall(
        r"^#+ (.*)$", re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE), re.M
    )
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)\s]+)\)|src=\"([^\"]+)\"", text):
        target, _, anchor = "".join(link).partition("#")
        if not target.startswith("http"):
            file = page.parent / target if target else page
            assert file.exists(), f"{page}: {target}"
            assert not anchor or anchor in anchors(file), f"{page}: {target}#{anchor}"
