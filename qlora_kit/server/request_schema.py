"""Request bodies of OpenAI's API as this server takes them: every field known, every number bounded."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    WithJsonSchema,
    model_validator,
)

from qlora_kit.generation.sampling import (
    MAX_LOGPROBS,
    MAX_NEW_TOKENS,
    MAX_SEED,
    MAX_STOP_CHARACTERS,
    MAX_STOPS,
    MAX_TOP_K,
    REPETITION_PENALTIES,
)

MAX_CHOICES = 8
MAX_MESSAGES = 1000
MAX_PROMPTS = 16
TEMPLATE_FIELDS = frozenset(
    {"chat_template", "chat_template_kwargs", "add_generation_prompt", "continue_final_message"}
)
_PARTS_SCHEMA = {
    "anyOf": [
        {"type": "string"},
        {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
                "required": ["type", "text"],
                "additionalProperties": False,
            },
        },
    ]
}
_STOP_SCHEMA = {
    "anyOf": [
        {"type": "string", "minLength": 1, "maxLength": MAX_STOP_CHARACTERS},
        {
            "type": "array",
            "maxItems": MAX_STOPS,
            "items": {"type": "string", "minLength": 1, "maxLength": MAX_STOP_CHARACTERS},
        },
        {"type": "null"},
    ]
}
_TOKENS_SCHEMA = {"type": "array", "minItems": 1, "items": {"type": "integer", "minimum": 0}}
_PROMPT_SCHEMA = {
    "anyOf": [
        {"type": "string", "minLength": 1},
        {"type": "array", "minItems": 1, "maxItems": MAX_PROMPTS, "items": {"type": "string", "minLength": 1}},
        _TOKENS_SCHEMA,
        {"type": "array", "minItems": 1, "maxItems": MAX_PROMPTS, "items": _TOKENS_SCHEMA},
    ]
}
PromptValue = str | tuple[int, ...]


def _text_of(content: Any) -> str:
    if isinstance(content, str):
        return content
    if isinstance(content, list) and all(_is_text_part(part) for part in content):
        return "".join(part["text"] for part in content)
    raise ValueError("expected text, or a list of parts of the type text; images and sound are not understood")


def _is_text_part(part: Any) -> bool:
    return (
        isinstance(part, dict)
        and part.keys() == {"type", "text"}
        and part["type"] == "text"
        and isinstance(part["text"], str)
    )


def _stops_of(stop: Any) -> tuple[str, ...]:
    stops = [] if stop is None else [stop] if isinstance(stop, str) else stop
    if not isinstance(stops, list) or not all(isinstance(text, str) for text in stops):
        raise ValueError("expected text or a list of texts")
    if len(stops) > MAX_STOPS or not all(0 < len(text) <= MAX_STOP_CHARACTERS for text in stops):
        raise ValueError(f"expected at most {MAX_STOPS} texts of 1 to {MAX_STOP_CHARACTERS} characters")
    return tuple(stops)


def _prompts_of(prompt: Any) -> tuple[PromptValue, ...]:
    prompts = prompt if isinstance(prompt, list) and prompt and isinstance(prompt[0], str | list) else [prompt]
    if len(prompts) > MAX_PROMPTS:
        raise ValueError(f"expected at most {MAX_PROMPTS} prompts in one request")
    return tuple(_prompt_of(entry) for entry in prompts)


def _prompt_of(prompt: Any) -> PromptValue:
    if isinstance(prompt, str) and prompt:
        return prompt
    if isinstance(prompt, list) and prompt and all(type(token) is int and token >= 0 for token in prompt):
        return tuple(prompt)
    raise ValueError("expected text or token ids, or a list of either; none of them empty")


Text = Annotated[str, BeforeValidator(_text_of), WithJsonSchema(_PARTS_SCHEMA)]
Stops = Annotated[tuple[str, ...], BeforeValidator(_stops_of), WithJsonSchema(_STOP_SCHEMA)]
Prompts = Annotated[tuple[PromptValue, ...], BeforeValidator(_prompts_of), WithJsonSchema(_PROMPT_SCHEMA)]


def _neutral(*values: Any) -> AfterValidator:
    """For a field of OpenAI's API that this server does not act on: ``values``, and null, ask for nothing."""

    def check(value: Any) -> Any:
        if value is None or any(_is_same(value, fine) for fine in values):
            return value
        wanted = " or ".join(map(repr, values))
        raise ValueError(f"this server does not support it; leave it out{f' or send {wanted}' if wanted else ''}")

    return AfterValidator(check)


def _is_same(value: Any, fine: Any) -> bool:
    """JSON's equality: 0.0 is 0, and false is not."""
    return bool(value == fine) and isinstance(value, bool) is isinstance(fine, bool)


# An answer comes back from its client with all of its fields; none of these ever says anything here.
Nothing = Annotated[Any, _neutral([])]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class ChatMessage(_Strict):
    """One turn of a conversation; ``developer`` is OpenAI's newer word for ``system``."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Text
    annotations: Nothing = None
    audio: Nothing = None
    function_call: Nothing = None
    name: Nothing = None
    refusal: Nothing = None
    tool_calls: Nothing = None


class StreamOptions(_Strict):
    """What a stream carries beside the answer."""

    include_usage: bool = False
    include_obfuscation: bool = False


class GenerationFields(_Strict):
    """The fields that both kinds of completion share. Fields left out are as the adapter's contract says."""

    model: str = Field(min_length=1, max_length=512, description="The name of an adapter, or of the base")
    max_tokens: int | None = Field(None, ge=1, le=MAX_NEW_TOKENS)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=0, le=MAX_TOP_K, description="0 for all tokens; not in OpenAI's API")
    min_p: float | None = Field(None, ge=0, le=1, description="Not in OpenAI's API")
    repetition_penalty: float | None = Field(
        None, ge=REPETITION_PENALTIES[0], le=REPETITION_PENALTIES[1], description="Not in OpenAI's API"
    )
    n: int | None = Field(None, ge=1, le=MAX_CHOICES)
    seed: int | None = Field(None, ge=0, le=MAX_SEED)
    stop: Stops = ()
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = Field(None, max_length=512, description="Has no effect")
    metadata: dict[str, Any] | None = Field(None, description="Has no effect")
    frequency_penalty: Annotated[Any, _neutral(0)] = None
    logit_bias: Annotated[Any, _neutral({})] = None
    presence_penalty: Annotated[Any, _neutral(0)] = None
    service_tier: Annotated[Any, _neutral("auto", "default")] = None
    store: Annotated[Any, _neutral(False)] = None

    @model_validator(mode="before")
    @classmethod
    def _refuse_half_characters(cls, content: Any) -> Any:
        """JSON can spell a lone surrogate, which no tokenizer takes and no response could repeat."""
        try:
            json.dumps(content if isinstance(content, dict) else {}, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ValueError("a text holds half a character (a lone surrogate such as \\ud83d)") from None
        except RecursionError:
            raise ValueError("lists or objects lie too deep in each other") from None
        return content

    @model_validator(mode="after")
    def _options_need_a_stream(self) -> GenerationFields:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is for streams only; set stream to true, or leave it out")
        return self


class ChatRequest(GenerationFields):
    """A conversation to answer."""

    messages: list[ChatMessage] = Field(min_length=1, max_length=MAX_MESSAGES)
    max_completion_tokens: int | None = Field(None, ge=1, le=MAX_NEW_TOKENS)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    prompt_cache_key: str | None = Field(None, max_length=512, description="Has no effect")
    safety_identifier: str | None = Field(None, max_length=512, description="Has no effect")
    audio: Annotated[Any, _neutral()] = None
    function_call: Annotated[Any, _neutral("none", "auto")] = None
    functions: Annotated[Any, _neutral([])] = None
    modalities: Annotated[Any, _neutral(["text"])] = None
    moderation: Annotated[Any, _neutral()] = None
    parallel_tool_calls: Annotated[Any, _neutral(True, False)] = None
    prediction: Annotated[Any, _neutral()] = None
    prompt_cache_options: Annotated[Any, _neutral({}, {"mode": "implicit"})] = None
    prompt_cache_retention: Annotated[Any, _neutral("in_memory")] = None
    reasoning_effort: Annotated[Any, _neutral("none")] = None
    response_format: Annotated[Any, _neutral({"type": "text"})] = None
    tool_choice: Annotated[Any, _neutral("none", "auto")] = None
    tools: Annotated[Any, _neutral([])] = None
    verbosity: Annotated[Any, _neutral("medium")] = None
    web_search_options: Annotated[Any, _neutral()] = None

    @model_validator(mode="after")
    def _check_together(self) -> ChatRequest:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs to be true")
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise ValueError("max_tokens and max_completion_tokens differ; give one of them")
        if any(message.role in ("system", "developer") for message in self.messages[1:]):
            raise ValueError("messages: a system message stands first, or not at all")
        if self.messages[-1].role != "user":
            raise ValueError("messages: the last one is to be the user's")
        return self


class CompletionRequest(GenerationFields):
    """A text, or token ids, to go on from; no chat template is applied."""

    prompt: Prompts
    logprobs: int | None = Field(None, ge=0, le=5)
    best_of: Annotated[Any, _neutral(1)] = None
    echo: Annotated[Any, _neutral(False)] = None
    suffix: Annotated[Any, _neutral("")] = None
