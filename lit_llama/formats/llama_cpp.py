"""llama.cpp reads a GGUF file, to compare with: what it says, how likely it finds it, and how fast it is.

The package xllamacpp brings it prebuilt. Its wheels for Linux use AVX2 at most, so that they run on any machine; where
speeds are compared, a build for the machine itself is faster.
"""

from pathlib import Path
from typing import Any, NamedTuple

from lit_llama.files import require_extra


class Continuation(NamedTuple):
    """What llama.cpp made of a prompt.

    Args:
        tokens: the new tokens; without those that only begin a character, as llama.cpp tells of whole text.
        logprobs: log-probabilities of the likeliest tokens at each place, by token.
        prefill_seconds: time to read the prompt.
        decode_seconds: time for all new tokens but the first.
    """

    tokens: list[int]
    logprobs: list[dict[int, float]]
    prefill_seconds: float
    decode_seconds: float


class LlamaCpp:
    """llama.cpp with a file open.

    Args:
        path: the GGUF file.
        threads: number of threads. They wait for each other by spinning, so no more than there are idle cores.
        length: longest conversation, in tokens.
        exact: keep keys and values in float32 and leave out flash attention.

    Raises:
        ImportError: xllamacpp is not installed.
    """

    def __init__(self, path: Path, threads: int = 1, length: int = 2048, exact: bool = False) -> None:
        xllamacpp = require_extra("xllamacpp", "llama-cpp")
        params = xllamacpp.CommonParams()
        params.model.path, params.n_ctx, params.n_parallel = str(path), length, 1
        params.verbosity = 1  # errors
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
        if exact:
            params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
            params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self._server = xllamacpp.Server(params)

    def complete(self, prompt: list[int], new_tokens: int, likeliest: int = 1, fresh: bool = False) -> Continuation:
        """Continue token ids greedily, past ends of sequence.

        Args:
            prompt: the token ids.
            new_tokens: number of new ones.
            likeliest: number of tokens at each place whose log-probabilities are told; 0 leaves out the new tokens too,
                which saves time.
            fresh: read all of the prompt, even if an earlier one began in the same way.
        """
        options = {"n_predict": new_tokens, "temperature": 0, "ignore_eos": True, "n_probs": likeliest}
        answer = self._ask(self._server.handle_completions, prompt=prompt, cache_prompt=not fresh, **options)
        places = (answer["choices"][0].get("logprobs") or {"content": []})["content"]
        logprobs = [{one["id"]: one["logprob"] for one in place["top_logprobs"]} for place in places]
        milliseconds = answer["timings"]
        return Continuation(
            [place["id"] for place in places],
            logprobs,
            milliseconds["prompt_ms"] / 1000,
            milliseconds["predicted_ms"] / 1000,
        )

    def reply(self, text: str, max_new_tokens: int) -> str:
        """The greedy answer to what a user says, with the template in the file."""
        messages = [{"role": "user", "content": text}]
        options = {"temperature": 0, "max_tokens": max_new_tokens}
        answer = self._ask(self._server.handle_chat_completions, messages=messages, **options)
        return answer["choices"][0]["message"]["content"]

    def _ask(self, handle: Any, **body: Any) -> Any:
        answer = handle(body)
        if "choices" not in answer:
            raise ValueError(f"llama.cpp does not answer: {answer}")
        return answer
