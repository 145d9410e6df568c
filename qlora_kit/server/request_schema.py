"""Request bodies of OpenAI's API as this server takes them: every field known, every number bounded."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema, field_validator, model_validator

MAX_CHOICES = 8
MAX_STOPS = 16
MAX_STOP_CHARACTERS = 256
MAX_MESSAGES = 1000
MAX_PROMPTS = 16
MAX_SEED = 2**32 - 1
MAX_NEW_TOKENS = 131_072
# Fields of OpenAI's API that this server does not act on, with the values that ask for nothing; null always does.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "best_of": (1,),
    "echo": (False,),
    "frequency_penalty": (0,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "logit_bias": ({},),
    "modalities": (["text"],),
    "moderation": (),
    "parallel_tool_calls": (True, False),
    "prediction": (),
    "presence_penalty": (0,),
    "reasoning_effort": ("none",),
    "response_format": ({"type": "text"},),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "verbosity": ("medium",),
    "web_search_options": (),
}
_TEMPLATE_FIELDS = ("chat_template", "chat_template_kwargs", "add_generation_prompt", "continue_final_message")
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


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class ChatMessage(_Strict):
    """One turn of a conversation; ``developer`` is OpenAI's newer word for ``system``."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Text
    annotations: Any = None
    audio: Any = None
    function_call: Any = None
    name: Any = None
    refusal: Any = None
    tool_calls: Any = None

    @field_validator("annotations", "audio", "function_call", "name", "refusal", "tool_calls")
    @classmethod
    def _only_neutral(cls, value: Any) -> None:
        """Clients send an answer back with all of its fields; none of these ever says anything here."""
        if value is not None and value != []:
            raise ValueError("this server does not support it; leave it out")


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
    top_k: int | None = Field(None, ge=0, le=1_000_000, description="0 for all tokens; not in OpenAI's API")
    min_p: float | None = Field(None, ge=0, le=1, description="Not in OpenAI's API")
    repetition_penalty: float | None = Field(None, ge=0.1, le=10, description="Not in OpenAI's API")
    n: int | None = Field(None, ge=1, le=MAX_CHOICES)
    seed: int | None = Field(None, ge=0, le=MAX_SEED)
    stop: Stops = ()
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = Field(None, max_length=512, description="Has no effect")
    metadata: dict[str, Any] | None = Field(None, description="Has no effect")
    frequency_penalty: Any = None
    logit_bias: Any = None
    presence_penalty: Any = None
    service_tier: Any = None
    store: Any = None

    @model_validator(mode="before")
    @classmethod
    def _refuse_half_characters(cls, content: Any) -> Any:
        """JSON can spell a lone surrogate, which no tokenizer takes and no response could repeat."""
        try:
            json.dumps(content if isinstance(content, dict) else {}, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ValueError("a text holds half a character (a lone surrogate such as \\ud83d)") from None
        return content

    @model_validator(mode="before")
    @classmethod
    def _refuse_templates(cls, content: Any) -> Any:
        for name in _TEMPLATE_FIELDS:
            if isinstance(content, dict) and name in content:
                raise ValueError(f"{name} is refused: an adapter is served with the chat template of its training")
        return content

    @model_validator(mode="after")
    def _options_need_a_stream(self) -> GenerationFields:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is for streams only; set stream to true, or leave it out")
        return self


def _require_neutral(value: Any, name: str) -> Any:
    if value is None or any(type(value) is type(fine) and value == fine for fine in NEUTRAL[name]):
        return value
    if isinstance(value, float) and value in NEUTRAL[name]:
        return value
    neutral = " or ".join(repr(fine) for fine in NEUTRAL[name])
    raise ValueError(f"this server does not support it; leave it out{f' or send {neutral}' if neutral else ''}")


class ChatRequest(GenerationFields):
    """A conversation to answer."""

    messages: list[ChatMessage] = Field(min_length=1, max_length=MAX_MESSAGES)
    max_completion_tokens: int | None = Field(None, ge=1, le=MAX_NEW_TOKENS)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    prompt_cache_key: str | None = Field(None, max_length=512, description="Has no effect")
    safety_identifier: str | None = Field(None, max_length=512, description="Has no effect")
    audio: Any = None
    function_call: Any = None
    functions: Any = None
    modalities: Any = None
    moderation: Any = None
    parallel_tool_calls: Any = None
    prediction: Any = None
    reasoning_effort: Any = None
    response_format: Any = None
    tool_choice: Any = None
    tools: Any = None
    verbosity: Any = None
    web_search_options: Any = None

    @field_validator(
        *(name for name in NEUTRAL if name not in ("best_of", "echo", "suffix")), mode="after", check_fields=False
    )
    @classmethod
    def _only_neutral(cls, value: Any, info: Any) -> Any:
        return _require_neutral(value, info.field_name)

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
    best_of: Any = None
    echo: Any = None
    suffix: Any = None

    @field_validator(
        "best_of", "echo", "suffix", "frequency_penalty", "logit_bias", "presence_penalty", "service_tier", "store"
    )
    @classmethod
    def _only_neutral(cls, value: Any, info: Any) -> Any:
        return _require_neutral(value, info.field_name)
