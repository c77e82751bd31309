"""Serve a base model with any number of Aligners over HTTP, as OpenAI's API, all requests in one batch.

    python generate/serve.py --aligner_dir out
    curl localhost:8000/v1/models
    curl localhost:8000/v1/chat/completions -H "Content-Type: application/json" \\
        -d '{"model": "demo", "temperature": 0, "messages": [{"role": "user", "content": "Why is the sky blue?"}]}'

"model" names the Aligner: the folder of its run, or else the path of its file in the folder without ".safetensors";
"base" is the model without one. "aligner_scale" turns it up and down. New files in the folder can be used at once.
A page to try it is at http://localhost:8000.
"""

import os
import sys
from pathlib import Path

import torch

from lit_llama.checkpoint import base_fingerprint, read_config
from lit_llama.devices.layouts import WeightOnly
from lit_llama.devices.precision import Precision
from lit_llama.devices.quantization import Quantize
from lit_llama.files import require_extra
from lit_llama.model import LLaMA
from lit_llama.script.command_line import run
from lit_llama.serving.store import AlignerStore
from lit_llama.tensor_files import TensorFiles, weight_files
from lit_llama.tokenizer import Tokenizer

PAGE = Path(__file__).with_name("page.html")
BODY_SECONDS = 10.0  # in which a request's body must have come
LOOPBACK = ("127.0.0.1", "localhost", "::1")


def main(
    checkpoint_dir: Path = Path("checkpoints/SmolLM2-135M-Instruct"),
    aligner_dir: Path = Path("out"),
    host: str = "127.0.0.1",
    port: int = 8000,
    max_rows: int = 16,
    max_waiting: int = 64,
    max_length: int = 2048,
    max_body_bytes: int = 1_000_000,
    timeout: float = 120.0,
    temperature: float = 1.0,
    allowed_host: list[str] | None = None,
    allowed_origin: list[str] | None = None,
    docs: bool = False,
    precision: Precision = "auto",
    quantize: Quantize | WeightOnly | None = None,
    compile: bool = False,
    allow_other_base: bool = False,
) -> None:
    """Serve, until interrupted.

    Args:
        checkpoint_dir: folder of the base model.
        aligner_dir: folder of the Aligners.
        host: "127.0.0.1" serves this machine alone, "0.0.0.0" all that can reach it; then set ALIGNER_API_KEY in the
            environment, which clients must send as a bearer token.
        port: to listen on.
        max_rows: number of requests that are generated at once.
        max_waiting: number of requests that may wait in addition; more are refused with status 429.
        max_length: longest row in tokens, prompt included.
        max_body_bytes: longest body of a request.
        timeout: seconds that an answer may take; a request's body must come within 10 of them.
        temperature: of requests that do not say. OpenAI's default is 1, which makes a small model look broken; 0 takes
            the likeliest token.
        allowed_host: name under which the server may be asked, in addition to those of this machine alone (localhost,
            127.0.0.1) and --host; may be repeated. So no page on the web can reach the server by a name of its own.
            With --host 0.0.0.0, any IP address will do. "*" is any name.
        allowed_origin: origin of pages elsewhere that may use the server from a browser, such as
            http://localhost:3000; may be repeated. "*" is any origin.
        docs: describe the API at /docs and /openapi.json, to anyone, key or not.
        precision: "auto" is bf16-true on a GPU that has it and 32-true elsewhere.
        quantize: keep the weights in fewer bits: "nf4" or "int8" by bitsandbytes, to save memory; "int4-weights" or
            "int8-weights", by torchao on a GPU, for speed.
        compile: compile the decoding step, with CUDA graphs on a GPU; takes a while at the first requests.
        allow_other_base: accept Aligners that were trained on other weights.
    """
    for module in ("fastapi", "uvicorn"):
        require_extra(module, "serve")
    from lit_llama.serving.api import Api, Limits, default_style, make_app
    from lit_llama.serving.http import Access, Ending, allowed_hosts, bind, serve
    from lit_llama.serving.worker import Opening, Worker

    sizes = {"max_rows": max_rows, "max_length": max_length, "max_body_bytes": max_body_bytes, "timeout": timeout}
    for name, value in {**sizes, "max_waiting": max_waiting + 1}.items():
        if value <= 0:
            raise ValueError(f"--{name} is too small")
    if not 0 <= temperature <= 2:
        raise ValueError(f"--temperature is {temperature}, it must be from 0 to 2")
    api_key = os.environ.get("ALIGNER_API_KEY") or None
    if host not in LOOPBACK and api_key is None:
        print(f"warning: {host} is open to others and there is no key: set ALIGNER_API_KEY", file=sys.stderr)
    config = read_config(checkpoint_dir)
    with torch.device("meta"):
        base = LLaMA(config)
    base.fingerprint = base_fingerprint(TensorFiles(weight_files(checkpoint_dir)))
    store = AlignerStore(aligner_dir, base, allow_other_base)
    limits = Limits(max_rows, max_waiting, min(max_length, config.block_size), timeout, temperature)
    open_paths = {"/", "/health"} | ({"/docs", "/openapi.json"} if docs else set())
    hosts, any_address = allowed_hosts(host, allowed_host or [])
    access = Access(
        api_key,
        frozenset(open_paths),
        hosts,
        any_address,
        frozenset(allowed_origin or []),
        max_body_bytes,
        min(timeout, BODY_SECONDS),
    )
    tokenizer = Tokenizer(checkpoint_dir)
    default_style(tokenizer)  # what fails does so before the model is loaded
    listener, address = bind(host, port)
    opening = Opening(
        checkpoint_dir, aligner_dir, precision, quantize, compile, allow_other_base, max_rows, limits.max_length
    )
    ending = Ending()
    print(f"{len(store)} Aligners in {aligner_dir}; the model is being loaded", file=sys.stderr)
    worker = Worker(opening)
    try:
        app = make_app(Api(worker, tokenizer, store, limits), access, PAGE, docs)
        worker.wait_until_ready()
        serve(app, worker, listener, address, ending)
    finally:
        worker.close()


if __name__ == "__main__":
    run(main)
