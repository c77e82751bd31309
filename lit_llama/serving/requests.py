"""The bodies of requests to the server: what clients may ask for, and how what they may not is refused by its name."""

from difflib import get_close_matches
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from lit_llama.serving.http import ApiError

BASE = "base"  # name of the base model without an adapter

# Fields that change nothing about the answer: who asks, what is kept of it, how it is cached and billed.
HARMLESS = {
    *("user", "safety_identifier", "metadata", "store", "service_tier"),
    *("prompt_cache_key", "prompt_cache_retention", "cache_prompt", "parallel_tool_calls"),
}
# Fields of OpenAI's and of other servers' that this one does not have, with the values that ask for nothing.
NOT_DONE: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("tools", "functions", "stop_token_ids", "bad_words"), ([],)),
    **dict.fromkeys(("tool_choice", "function_call"), ("none", "auto")),
    **dict.fromkeys(("logprobs", "echo", "ignore_eos", "use_beam_search"), (False,)),
    **dict.fromkeys(("frequency_penalty", "presence_penalty", "top_logprobs", "min_p", "min_tokens"), (0,)),
    **dict.fromkeys(("repetition_penalty", "repeat_penalty", "typical_p", "length_penalty", "best_of", "n"), (1,)),
    **dict.fromkeys(("audio", "prediction", "web_search_options", "grammar", "chat_template_kwargs"), ()),
    **dict.fromkeys(("guided_json", "guided_regex", "guided_choice", "structured_outputs", "moderation"), ()),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "logit_bias": ({},),
    "suffix": ("",),
    "reasoning_effort": ("none",),
    "verbosity": ("medium",),
}
# Of a turn: what clients send back with an earlier answer, and the speaker's name, which the templates have no use for.
HARMLESS_IN_TURNS = frozenset({"name", "refusal", "annotations", "reasoning_content"})


class Fields(BaseModel):
    """A body of which null is the default of any field, and no field is ignored."""

    model_config = ConfigDict(allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _check_names(cls, fields: Any) -> Any:
        if not isinstance(fields, dict):
            return fields
        given = {name: value for name, value in fields.items() if value is not None}
        if "aligner_scale" in given and "adapter_scale" in cls.model_fields:  # the field's earlier name
            if "adapter_scale" in given:
                message = "adapter_scale and aligner_scale are two names of one field: give one of them"
                raise ApiError(400, message, param="adapter_scale")
            given["adapter_scale"] = given.pop("aligner_scale")
        for name in given.keys() - cls.model_fields.keys() - HARMLESS:
            if name not in NOT_DONE:
                near = get_close_matches(name[:100], list(cls.model_fields), n=1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise ApiError(400, f"unknown field {name[:100]!r}{hint}", "unknown_parameter", name)
            value = given[name]
            # True and 1 are equal in Python, and not the same wish.
            if not any(value == off and isinstance(value, bool) == isinstance(off, bool) for off in NOT_DONE[name]):
                raise ApiError(400, f"{name} is not supported by this server", "unsupported_parameter", name)
        return given


class Turn(BaseModel):
    """One message of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: str

    @model_validator(mode="before")
    @classmethod
    def _read(cls, turn: Any) -> Any:
        if not isinstance(turn, dict):
            return turn
        role, content = turn.get("role"), turn.get("content")
        if role in ("tool", "function") or turn.get("tool_calls") or turn.get("function_call"):
            raise ApiError(400, "messages: tools are not supported by this server", "unsupported_parameter", "messages")
        for name in turn.keys() - {"role", "content"} - HARMLESS_IN_TURNS:
            if turn[name]:
                raise ApiError(
                    400, f"messages: {name[:100]!r} of a turn is not supported", "unsupported_parameter", "messages"
                )
        if isinstance(content, list):
            content = "".join(map(_text_of_part, content))
        elif content is None and role == "assistant":
            content = ""
        return {"role": "system" if role == "developer" else role, "content": content}


def _text_of_part(part: Any) -> str:
    kind = part.get("type") if isinstance(part, dict) else type(part).__name__
    if kind != "text":
        raise ApiError(
            400,
            f"messages: parts of the type {str(kind)[:100]!r} are not supported by this server, only text",
            "unsupported_parameter",
            "messages",
        )
    if not isinstance(part.get("text"), str):
        raise ApiError(400, "messages: a part of the type 'text' has no text", param="messages")
    return part["text"]


class StreamOptions(Fields):
    """What a stream tells in addition."""

    include_usage: bool = False
    include_obfuscation: bool = False  # which this server has no use for


class Options(Fields):
    """What chat completions and completions have in common; OpenAI's API has no `adapter_scale` and no `top_k`."""

    model: Annotated[str, Field(max_length=1000)] = BASE
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=1)] | None = None
    seed: int | None = None
    stop: Annotated[list[Annotated[str, Field(max_length=256)]], Field(max_length=4)] = []
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    adapter_scale: Annotated[float, Field(ge=-10, le=10)] = 1.0

    @field_validator("max_tokens", "max_completion_tokens", mode="before")
    @classmethod
    def _no_limit(cls, value: Any) -> Any:
        return None if value == -1 else value  # as llama.cpp and LM Studio take it

    @field_validator("top_k", mode="before")
    @classmethod
    def _all_tokens(cls, value: Any) -> Any:
        return None if value in (0, -1) else value  # as llama.cpp and vLLM take it

    @field_validator("stop", mode="before")
    @classmethod
    def _one_stop(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    def sampling(self, default_temperature: float) -> dict[str, Any]:
        """`temperature`, `top_k` and `top_p` of `lit_llama.decoder.GenerationRequest`."""
        if self.top_p == 0:  # the likeliest token alone
            return {"temperature": 0.0, "top_k": None, "top_p": 1.0}
        temperature = default_temperature if self.temperature is None else self.temperature
        return {"temperature": temperature, "top_k": self.top_k, "top_p": self.top_p}


class ChatRequest(Options):
    """The body of /v1/chat/completions."""

    messages: Annotated[list[Turn], Field(min_length=1)]


class CompletionRequest(Options):
    """The body of /v1/completions."""

    prompt: str

    @field_validator("prompt", mode="before")
    @classmethod
    def _one_text(cls, prompt: Any) -> Any:
        if isinstance(prompt, list):
            if len(prompt) != 1 or not isinstance(prompt[0], str):
                raise ApiError(400, "prompt: one text is supported, not several or token ids", param="prompt")
            return prompt[0]
        return prompt
