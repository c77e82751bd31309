"""Serve a base model with any number of adapters over HTTP, as OpenAI's API does, with all requests in one batch.

    python generate/serve.py --adapter_dir out
    curl localhost:8000/v1/models
    curl localhost:8000/v1/chat/completions -H "Content-Type: application/json" \\
        -d '{"model": "demo", "temperature": 0, "messages": [{"role": "user", "content": "Why is the sky blue?"}]}'

"model" names the adapter, of any method: by the folder of its run, or by the path of its file in the folder without
".safetensors"; "base" is the model without one. "adapter_scale" turns it up and down: 0 is the base, 1 the adapter as
it was trained. New files in the folder can be used at once. A page to try it is at http://localhost:8000.
"""

import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_llama.base import style_of
from lit_llama.checkpoint import model_without_weights, open_weights, read_config
from lit_llama.files import require_extra
from lit_llama.script.command_line import run
from lit_llama.script.opening import say_precision
from lit_llama.serving.store import AdapterStore
from lit_llama.serving.worker import Opening, Worker
from lit_llama.tables import counted
from lit_llama.tokenizer import Tokenizer

if TYPE_CHECKING:  # slow to import, which --help should not be
    from lit_llama.serving.access import Access
    from lit_llama.serving.api import Limits

PAGE = Path(__file__).with_name("page.html")
LOOPBACK = ("127.0.0.1", "localhost", "::1")


def main(
    checkpoint_dir: Path = Path("checkpoints/SmolLM2-135M-Instruct"),
    adapter_dir: Path = Path("out"),
    host: str = "127.0.0.1",
    port: int = 8000,
    max_waiting: int = 64,
    max_body_bytes: int = 1_000_000,
    timeout: float = 120.0,
    temperature: float = 1.0,
    allowed_host: list[str] | None = None,
    allowed_origin: list[str] | None = None,
    docs: bool = False,
    **options: Any,
) -> None:
    """Serve, until interrupted.

    Args:
        checkpoint_dir: folder of the base model.
        adapter_dir: folder of the adapters.
        host: address to listen on. 127.0.0.1 serves this machine alone, 0.0.0.0 everybody who can reach it; then set
            ALIGNER_API_KEY in the environment, which clients must send as a bearer token.
        port: port to listen on.
        max_waiting: number of requests that may wait while others are answered; more are refused with status 429.
        max_body_bytes: longest body of a request.
        timeout: seconds that an answer may take. The body of a request must come within 10 seconds.
        temperature: temperature of requests that do not say one. OpenAI's default is 1, which makes a small model
            look broken; 0 takes the likeliest token.
        allowed_host: name under which the server may be asked, in addition to localhost, 127.0.0.1 and --host; may be
            repeated. It keeps pages on the web from reaching the server under a name of their own. With --host
            0.0.0.0 any IP address is accepted. "*" accepts any name.
        allowed_origin: origin of pages elsewhere that may use the server from a browser, such as
            http://localhost:3000; may be repeated. "*" accepts any origin.
        docs: describe the API at /docs and /openapi.json, to anyone, with or without the key.
        options: how the base model and its adapters are opened and answered with, see `Opening`.
    """
    for module in ("fastapi", "uvicorn"):
        require_extra(module, "serve")
    from lit_llama.serving.access import access_to
    from lit_llama.serving.api import Limits

    opening = Opening(checkpoint_dir, adapter_dir, **options)
    limits = Limits(opening.max_rows, max_waiting, opening.max_length, timeout, temperature)
    api_key = os.environ.get("ALIGNER_API_KEY") or None
    if host not in LOOPBACK and api_key is None:
        print(f"warning: {host} is open to others and there is no key: set ALIGNER_API_KEY", file=sys.stderr)
    access = access_to(host, api_key, allowed_host or [], allowed_origin or [], max_body_bytes, timeout, docs)
    serve_folder(opening, limits, access, host, port)


def serve_folder(opening: Opening, limits: "Limits", access: "Access", host: str, port: int) -> None:
    """Check all that can be checked without the model, take the port, load the model, and answer requests.

    Args:
        opening: the base model and the folder of adapters.
        limits: what is accepted.
        access: who may ask for what.
        host: address to listen on.
        port: port to listen on.
    """
    from lit_llama.serving.api import Api, make_app
    from lit_llama.serving.http import Ending, bind, serve

    config, tokenizer = read_config(opening.checkpoint_dir), Tokenizer(opening.checkpoint_dir)
    opening = replace(opening, max_length=min(opening.max_length, config.block_size))
    base = model_without_weights(*open_weights(opening.checkpoint_dir))
    store = AdapterStore(opening.adapter_dir, base, opening.allow_other_base, opening.quantize)
    style_of(None, None, tokenizer)  # renders the base's chat template, which may fail
    listener, address = bind(host, port)
    ending = Ending()
    say_precision(opening.precision, opening.quantize)
    unusable = store.unusable()
    for name, error in list(unusable.items())[:3]:
        print(f"warning: {name} cannot be used: {error}", file=sys.stderr)
    if len(unusable) > 3:
        print(f"... and {len(unusable) - 3} more", file=sys.stderr)
    found = f"{counted(len(store), 'adapter')} in {opening.adapter_dir}"
    found += f", and {len(unusable)} that cannot be used" if unusable else ""
    print(f"{found}; the model is being loaded", file=sys.stderr)
    worker = Worker(opening)
    try:
        limits = replace(limits, max_length=opening.max_length)
        app = make_app(Api(worker, tokenizer, store, limits), access, PAGE)
        worker.wait_until_ready()
        serve(app, worker, listener, address, ending)
    finally:
        worker.close()


if __name__ == "__main__":
    run(main)
