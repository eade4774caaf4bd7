"""What people may send to compare and to vote, and its bounds."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from dpo_ray import types
from serve.requests import Bounds, Message, Reviewed, check_messages

_Messages = Annotated[list[Message], Field(min_length=1, fail_fast=True)]
_Id = Annotated[str, Field(min_length=1, max_length=256)]
_Record = str | _Messages
_SHAPES = (
    {"comparison_id", "choice"},
    {"completion_id", "label"},
    {"prompt", "chosen", "rejected"},
)


class ComparisonRequest(Reviewed):
    """POST /v1/comparisons"""

    prompt: Annotated[str, Field(min_length=1)] | None = None
    messages: _Messages | None = None
    max_tokens: int | None = Field(default=None, ge=1)
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    against: Literal["live", "candidate"] = "live"
    """What the live policy is compared with: itself once more, or the candidate on offer."""
    stream: bool = False

    @model_validator(mode="after")
    def _one_of_both(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give either prompt or messages")
        return self

    def bounded(self, bounds: Bounds) -> Self:
        _check_text(self.text, bounds, "prompt")
        most = bounds.max_new_tokens or bounds.context_length
        bounds.check_count(self.max_tokens or 0, most, "max_tokens", "new tokens")
        return self

    @property
    def text(self) -> _Record:
        return self.messages or self.prompt or ""


class PreferenceRequest(Reviewed):
    """POST /v1/preferences: a vote on a comparison, a thumb, or a preference from elsewhere."""

    comparison_id: _Id | None = None
    choice: Literal["first", "second", "tie", "both_bad"] | None = None
    completion_id: _Id | None = None
    index: int = Field(default=0, ge=0, lt=2**31)
    label: bool | None = None
    """Whether the completion is good."""
    prompt: _Record | None = None
    chosen: _Record | None = None
    rejected: _Record | None = None
    reason: Annotated[str, Field(max_length=1000)] = ""

    @model_validator(mode="after")
    def _one_shape(self) -> Self:
        shape = {name for shape in _SHAPES for name in shape if getattr(self, name) is not None}
        if shape not in _SHAPES or ("index" in self.model_fields_set and "label" not in shape):
            raise ValueError(
                "give comparison_id and choice; or completion_id, label and perhaps index; "
                "or prompt, chosen and rejected"
            )
        return self

    def bounded(self, bounds: Bounds) -> Self:
        for name in ("prompt", "chosen", "rejected"):
            _check_text(getattr(self, name) or "", bounds, name)
        return self


class UndoRequest(Reviewed):
    """POST /v1/preferences/undo"""

    id: _Id

    def bounded(self, bounds: Bounds) -> Self:
        return self


FEEDBACK_REQUESTS: dict[str, type[Reviewed]] = {
    "/v1/comparisons": ComparisonRequest,
    "/v1/preferences": PreferenceRequest,
    "/v1/preferences/undo": UndoRequest,
}


def as_text(text: str | list[Message]) -> types.Text:
    """What was sent as the library writes it: the parts of a message are one text."""
    if isinstance(text, str):
        return text
    return [types.Message(role=message.role, content=message.plain) for message in text]


def _check_text(text: str | list[Message], bounds: Bounds, name: str) -> None:
    if isinstance(text, str):
        bounds.check_text(len(text), name)
    else:
        check_messages(text, bounds)
