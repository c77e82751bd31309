"""Download a model from the Hugging Face hub: a folder that all scripts open as it is.

    python scripts/download.py --repo_id TinyLlama/TinyLlama-1.1B-Chat-v1.0
    HF_TOKEN=... python scripts/download.py --repo_id meta-llama/Llama-2-7b-hf

An interrupted download continues where it stopped when the command is run again. A gated model needs the access token
of an account that may read it, in the environment variable HF_TOKEN or as `--access_token`.
"""

import sys
from pathlib import Path

from lit_llama.files import require_extra
from lit_llama.script.command_line import run

PATTERNS = ["*.json", "*.jinja", "tokenizer.model", "LICENSE*"]


def main(repo_id: str, output_dir: Path | None = None, access_token: str | None = None) -> None:
    """Download.

    Args:
        repo_id: name of the model on the hub, as OWNER/NAME.
        output_dir: folder that is written; models/NAME if not given.
        access_token: access token for a gated model; if not given, the environment variable HF_TOKEN is used.
    """
    hub = require_extra("huggingface_hub", "hub")
    errors = require_extra("huggingface_hub.errors", "hub")
    require_extra("huggingface_hub.utils.logging", "hub").set_verbosity_error()  # its retries are no news
    if repo_id.count("/") != 1:
        raise ValueError(f"--repo_id {repo_id!r} is not of the form OWNER/NAME")
    output_dir = output_dir or Path("models") / repo_id.split("/")[1]
    try:
        files = hub.list_repo_files(repo_id, token=access_token)
        safe = any(file.endswith(".safetensors") for file in files)
        weights = "model*.safetensors" if safe else "pytorch_model*.bin"
        hub.snapshot_download(repo_id, local_dir=output_dir, allow_patterns=[*PATTERNS, weights], token=access_token)
    except errors.GatedRepoError:
        raise ValueError(f"{repo_id} is gated: ask for access on its page, then set HF_TOKEN") from None
    except errors.RepositoryNotFoundError:
        raise ValueError(f"the hub has no model {repo_id}, or it is private and needs HF_TOKEN") from None
    except Exception as error:
        # The HTTP library under the hub's client differs between its versions, and so do the errors of a lost network.
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise OSError(
            f"the Hugging Face hub cannot be reached ({reason}): check the network, or copy the files of "
            f"{repo_id} into {output_dir} by other means"
        ) from None
    print(
        f"next: python generate/chat.py --checkpoint_dir {output_dir}",
        file=sys.stderr,
    )


if __name__ == "__main__":
    run(main)
