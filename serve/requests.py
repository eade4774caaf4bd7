"""What a client may ask of the policy: the reviewed fields of each OpenAI route, and their bounds."""

from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self, cast

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from serve.refusal import Refusal

_CHARS_PER_TOKEN = 64
"""No tokenizer packs more characters into a token of text; a longer prompt need not be tokenized to know."""
_MAX_LOGPROBS = 20
_GRAMMAR = "a grammar is compiled by the engine that all requests share"
_PARTS = "the policy reads text only"
_REASONS = {
    "allowed_token_ids": "weigh tokens with logit_bias",
    "best_of": "ask for n completions and choose",
    "chat_template": "a template is a program; the policy's own is used",
    "chat_template_kwargs": "the template belongs to the policy",
    "ec_transfer_params": "the replicas share no cache",
    "functions": "the policy is served without tools",
    "kv_transfer_params": "the replicas share no cache",
    "media_io_kwargs": _PARTS,
    "mm_processor_kwargs": _PARTS,
    "modalities": _PARTS,
    "priority": "requests are served in the order in which they come",
    "prompt_embeds": "send text or token ids",
    "prompt_logprobs": "/v1/completions gives those of the prompt with echo and logprobs",
    "request_id": "the server names requests",
    "structured_outputs": _GRAMMAR,
    "tools": "the policy is served without tools",
    "truncate_prompt_tokens": "cut the prompt before you send it",
    "use_beam_search": "ask for n completions and choose",
    "vllm_xargs": "the engine has no extensions",
}
"""Why a field that other servers take is not taken here, or what to do instead."""

TokenId = Annotated[int, Field(ge=0, lt=2**31)]
ShortText = Annotated[str, Field(min_length=1, max_length=256)]
_FAST = Field(fail_fast=True)  # One error is told; a million would be made.
TokenIds = Annotated[list[TokenId], Field(min_length=1, fail_fast=True)]


@dataclass(frozen=True, slots=True)
class Bounds:
    """How much one request may ask for."""

    context_length: int
    max_n: int
    max_completions: int
    max_messages: int
    max_new_tokens: int | None
    writes_json: bool
    """Whether the policy's vocabulary can spell it."""

    def check_text(self, chars: int, param: str) -> None:
        longest = _CHARS_PER_TOKEN * self.context_length
        if chars > longest:
            raise Refusal(f"{param} has {chars} characters: send at most {longest}", param=param)

    def check_count(self, count: int, most: int, param: str, what: str) -> None:
        if count > most:
            raise Refusal(f"{param}: {count} {what} are too many: at most {most}", param=param)


class Strict(BaseModel):
    """Types are not converted: what was checked is what is passed on. null is as good as left out."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, fields: Any) -> Any:
        if not isinstance(fields, dict):
            return fields
        # Of unknown fields too: clients send back the messages that they were given, with all their nulls.
        return {name: value for name, value in fields.items() if value is not None}


class StreamOptions(Strict):
    include_usage: bool = False
    continuous_usage_stats: bool = False


class JsonSchema(Strict):
    """What an answer must fit in; vLLM checks the schema itself."""

    name: ShortText
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(Strict):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    def check(self, bounds: Bounds) -> None:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise Refusal("response_format: give a json_schema with that type, and with no other")
        if self.type != "text" and not bounds.writes_json:  # The engine would fail: 500.
            raise Refusal(
                "response_format: the policy's vocabulary cannot spell JSON, ask for text",
                param="response_format",
            )


class TextPart(Strict):
    type: Literal["text"]
    text: str


class Message(Strict):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(min_length=1, max_length=64, fail_fast=True)] = Field(
        description="must be text, or a list of {type: text, text: …}"
    )
    name: ShortText | None = None

    @property
    def plain(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(p.text for p in self.content)


class Reviewed(Strict):
    """A body that is read field by field before a route gets it."""

    def bounded(self, bounds: Bounds) -> Self:
        """Itself, with bounds where it names none. Refusal: it asks for too much."""
        raise NotImplementedError


class _Request(Reviewed):
    """A body of a route that vLLM answers."""

    model: ShortText | None = None


class _Generation(_Request):
    """What chats and completions have in common."""

    n: int = Field(default=1, ge=1)
    max_tokens: int | None = Field(default=None, ge=0)
    stream: bool = False
    stream_options: StreamOptions | None = None
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=-1, lt=2**31)
    min_p: float | None = Field(default=None, ge=0, le=1)
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2)
    presence_penalty: float | None = Field(default=None, ge=-2, le=2)
    repetition_penalty: float | None = Field(default=None, gt=0, le=10)
    logit_bias: (
        dict[Annotated[str, Field(pattern=r"^[0-9]{1,9}$")], Annotated[float, Field(ge=-100, le=100)]] | None
    ) = Field(default=None, max_length=300)
    stop: ShortText | Annotated[list[ShortText], Field(max_length=16)] | None = Field(
        default=None, description="must be 1 to 256 characters, or a list of at most 16 such texts"
    )
    stop_token_ids: Annotated[list[TokenId], Field(max_length=64)] | None = None
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    min_tokens: int = Field(default=0, ge=0)
    skip_special_tokens: bool = True
    add_special_tokens: bool | None = None
    response_format: ResponseFormat | None = None
    return_token_ids: bool = False
    return_tokens_as_token_ids: bool = False
    user: Annotated[str, Field(max_length=256)] | None = None

    def _bounded(self, bounds: Bounds, asked: int | None, field: str) -> Self:
        if self.response_format is not None:
            self.response_format.check(bounds)
        bounds.check_count(self.n, bounds.max_n, "n", "completions")
        most = bounds.max_new_tokens or bounds.context_length
        bounds.check_count(asked or 0, most, field, "new tokens")
        bounds.check_count(self.min_tokens, most, "min_tokens", "new tokens")
        if asked is None and bounds.max_new_tokens is not None:
            return self.model_copy(update={field: bounds.max_new_tokens})
        return self


class ChatRequest(_Generation):
    """POST /v1/chat/completions"""

    messages: list[Message] = Field(min_length=1, fail_fast=True)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    logprobs: bool = False
    top_logprobs: int | None = Field(default=None, ge=0, le=_MAX_LOGPROBS)

    def bounded(self, bounds: Bounds) -> Self:
        check_messages(self.messages, bounds)
        if self.max_completion_tokens is None:
            return self._bounded(bounds, self.max_tokens, "max_tokens")
        return self._bounded(bounds, self.max_completion_tokens, "max_completion_tokens")


class CompletionRequest(_Generation):
    """POST /v1/completions"""

    prompt: str | TokenIds | Annotated[list[str], _FAST] | Annotated[list[TokenIds], _FAST] = Field(
        min_length=1,
        description="must be text, token ids, a list of texts, or lists of token ids, and not empty",
    )
    echo: bool = False
    logprobs: int | None = Field(default=None, ge=0, le=_MAX_LOGPROBS)

    def bounded(self, bounds: Bounds) -> Self:
        prompts = self.prompts()
        bounds.check_count(len(prompts) * self.n, bounds.max_completions, "prompt", "completions")
        for prompt in prompts:
            if isinstance(prompt, str):
                bounds.check_text(len(prompt), "prompt")
            else:
                bounds.check_count(len(prompt), bounds.context_length, "prompt", "tokens")
        return self._bounded(bounds, self.max_tokens, "max_tokens")

    def prompts(self) -> list[str] | list[list[int]]:
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [cast(list[int], self.prompt)]
        return cast(list[str] | list[list[int]], self.prompt)


class TokenizeRequest(_Request):
    """POST /tokenize"""

    prompt: str | None = None
    messages: Annotated[list[Message], Field(min_length=1, fail_fast=True)] | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool = False

    @model_validator(mode="after")
    def _one_of_both(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give either prompt or messages")
        return self

    def bounded(self, bounds: Bounds) -> Self:
        bounds.check_text(len(self.prompt or ""), "prompt")
        check_messages(self.messages or [], bounds)
        return self


class DetokenizeRequest(_Request):
    """POST /detokenize"""

    tokens: Annotated[list[TokenId], Field(fail_fast=True)]

    def bounded(self, bounds: Bounds) -> Self:
        bounds.check_count(len(self.tokens), bounds.context_length, "tokens", "tokens")
        return self


REQUESTS: dict[str, type[_Request]] = {
    "/v1/chat/completions": ChatRequest,
    "/v1/completions": CompletionRequest,
    "/tokenize": TokenizeRequest,
    "/detokenize": DetokenizeRequest,
}


def reviewed(request_type: type[Reviewed], body: dict[str, Any], bounds: Bounds) -> dict[str, Any]:
    """The body to pass on: no field in it is unreviewed or out of bounds. Refusal: one is."""
    for name, value in body.items():
        if name not in request_type.model_fields and value is not None:
            raise _unreviewed(name, request_type)
    try:
        request = request_type.model_validate(body)
    except ValidationError as error:
        raise _refusal(request_type, error) from None
    return request.bounded(bounds).model_dump(exclude_unset=True, exclude_none=True, by_alias=True)


def check_messages(messages: list[Message], bounds: Bounds) -> None:
    bounds.check_count(len(messages), bounds.max_messages, "messages", "messages")
    bounds.check_text(sum(len(message.plain) for message in messages), "messages")


def _refusal(request_type: type[Reviewed], error: ValidationError) -> Refusal:
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    if not first["loc"]:
        return Refusal(first["msg"].removeprefix("Value error, "))
    name, *below = (str(step)[:64] for step in first["loc"])
    field = request_type.model_fields[name]
    if name == "messages" and len(below) > 1:
        name, field = f"{name}.{below[0]}.{below[1]}", Message.model_fields.get(below[1], field)
        below = below[2:]
    if field.description:
        return Refusal(f"{name} {field.description}", param=name)
    return Refusal(f"{'.'.join([name, *below[:1]])}: {first['msg']}", param=name)


def _unreviewed(name: str, request_type: type[Reviewed]) -> Refusal:
    taken = ", ".join(sorted(request_type.model_fields))
    why = _REASONS.get(name, f"leave it out (taken are {taken})")
    return Refusal(f"{name[:64]} is not taken here: {why}", param=name[:64])
