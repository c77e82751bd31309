"""Serve a base model with any number of Aligners over HTTP, as OpenAI's API, all requests in one batch.

    python generate/serve.py --aligner_dir out
    curl localhost:8000/v1/models
    curl localhost:8000/v1/chat/completions -H "Content-Type: application/json" \\
        -d '{"model": "demo/aligner", "messages": [{"role": "user", "content": "Why is the sky blue?"}]}'

"model" names the Aligner, by its path in the folder without ".safetensors"; "base" is none. "aligner_scale" turns it up
and down. New files in the folder can be used at once. A page to try it is at http://localhost:8000.
"""

import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch

from lit_llama.checkpoint import Precision, TensorFiles, base_fingerprint, read_config, weight_files
from lit_llama.cli import run
from lit_llama.files import require_extra
from lit_llama.inference import WeightOnly
from lit_llama.model import LLaMA
from lit_llama.quantization import Quantize
from lit_llama.store import AlignerStore
from lit_llama.tokenizer import Tokenizer

PAGE = Path(__file__).with_name("page.html")


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
        max_rows: requests that are generated at once.
        max_waiting: requests that wait, beside those; more are refused with status 429.
        max_length: longest row in tokens, prompt included.
        max_body_bytes: of a request.
        timeout: seconds that a request may take.
        precision: "auto" is bf16-true on a GPU that has it and 32-true elsewhere.
        quantize: keep the weights in fewer bits: "nf4" or "int8" by bitsandbytes, to save memory; "int4-weights" or
            "int8-weights", by torchao on a GPU, for speed.
        compile: compile the decoding step, with CUDA graphs on a GPU; takes a while at the first requests.
        allow_other_base: accept Aligners that were trained on other weights.
    """
    litserve = require_extra("litserve", "serve")
    from fastapi import HTTPException
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import FileResponse, JSONResponse

    from lit_llama.serving import Limits, Loop, MaxBody, Model, OpenAI, error_object

    sizes = {"max_rows": max_rows, "max_length": max_length, "max_body_bytes": max_body_bytes, "timeout": timeout}
    for name, value in {**sizes, "max_waiting": max_waiting + 1}.items():
        if value <= 0:
            raise ValueError(f"--{name} is too small")
    api_key = os.environ.get("ALIGNER_API_KEY") or None
    if host != "127.0.0.1" and api_key is None:
        print(f"warning: {host} is open to others and there is no key: set ALIGNER_API_KEY", file=sys.stderr)
    config = read_config(checkpoint_dir)
    with torch.device("meta"):
        base = LLaMA(config)
    base.fingerprint = base_fingerprint(TensorFiles(weight_files(checkpoint_dir)))
    store = AlignerStore(aligner_dir, base, allow_other_base)
    limits = Limits(max_rows, max_waiting, min(max_length, config.block_size), timeout)
    spec = OpenAI(Tokenizer(checkpoint_dir), store, limits, api_key)
    api = Model(
        checkpoint_dir, aligner_dir, precision, quantize, compile, allow_other_base, limits, spec=spec, loop=Loop()
    )
    server = litserve.LitServer(api, devices=1, timeout=False, middlewares=[(MaxBody, {"max_bytes": max_body_bytes})])

    app = server.app
    app.router.routes[:] = [route for route in app.router.routes if getattr(route, "path", "") != "/"]  # LitServe's own
    app.add_api_route("/", lambda: FileResponse(PAGE), include_in_schema=False)

    async def refused(_: Any, error: HTTPException) -> JSONResponse:
        return JSONResponse({"error": error_object(error.status_code, error.detail)}, error.status_code)

    async def malformed(_: Any, error: RequestValidationError) -> JSONResponse:
        found = [f"{'.'.join(map(str, one['loc'][1:]))}: {one['msg']}" for one in error.errors()]
        return JSONResponse({"error": error_object(400, "; ".join(found))}, 400)

    app.add_exception_handler(HTTPException, refused)
    app.add_exception_handler(RequestValidationError, malformed)
    server.uvicorn_graceful_timeout = 5  # seconds that answers have left when it is told to end
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # LitServe ends in order on an interruption alone
    print(f"{len(store)} Aligners in {aligner_dir}; soon at http://{host}:{port}", file=sys.stderr)
    server.run(host=host, port=port, num_api_servers=1, generate_client_file=False, log_level="warning")


if __name__ == "__main__":
    run(main)
