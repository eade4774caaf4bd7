"""A language model as a judge, on any OpenAI-compatible endpoint."""

import json
import os
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import openai
from jinja2.meta import find_undeclared_variables

from dpo_ray.config import JudgeTerm
from dpo_ray.judges.asking import CallError, HopelessCallError, LateCallError, Reply
from dpo_ray.judges.budget import Usage
from dpo_ray.judges.function import Question
from dpo_ray.types import Text

_PROMPTS = Path(__file__).parent / "prompts"
_LAST_OBJECT = re.compile(r"\{[^{}]*\}\s*\Z")
_WRAPPING_TOKENS = 64
"""At most what a chat template writes around one message."""
_REPEATABLE = (408, 409, 425, 429)
_MILLION = 1_000_000
_VARIABLES = ("prompt", "fields", "rubric", "scale", "first", "second")
"""What a template may use: the prompt and its row's other columns, settings, one or two completions."""


@dataclass(frozen=True, slots=True)
class Form:
    """What an answer says beside its reason, and the reward that this means."""

    field: str
    rewards: dict[str | int, float]

    @property
    def schema(self) -> dict[str, Any]:
        properties = {"reason": {"type": "string"}, self.field: {"enum": list(self.rewards)}}
        return {
            "type": "object",
            "properties": properties,
            "required": list(properties),
            "additionalProperties": False,
        }


class ModelService:
    """Asks for one completion's score, or for the better of two."""

    batch_size = 1

    def __init__(self, term: JudgeTerm, url: str) -> None:
        """ValueError: the template or the API key is not there. `url`: the endpoint's."""
        self._term = term
        self._form = answer_form(term)
        self._template = load_template(term)
        self._key = api_key(term)
        self._client = openai.OpenAI(
            base_url=url, api_key=self._key or "none", timeout=term.timeout_s, max_retries=0
        )
        asked = term.model_dump(
            include={"model", "rubric", "scale", "output", "temperature", "max_new_tokens"}
        )
        self.identity = json.dumps(["llm", url, term.mode, template_text(term), asked], sort_keys=True)

    def most(self, questions: Sequence[Question]) -> Usage:
        """A token is a byte or more."""
        [question] = questions
        return self._usage(len(self._ask(question).encode()) + _WRAPPING_TOKENS, self._term.max_new_tokens)

    def call(self, questions: Sequence[Question]) -> Reply:
        [question] = questions
        try:
            answer = self._client.chat.completions.create(
                model=self._term.model,
                messages=[{"role": "user", "content": self._ask(question)}],
                max_completion_tokens=self._term.max_new_tokens,
                **self._options(),
            )
        except openai.APITimeoutError:
            raise LateCallError(f"no answer within {self._term.timeout_s:g} s") from None
        except openai.APIStatusError as error:
            raise status_error(error.status_code, error.message, self._key) from None
        except (openai.OpenAIError, json.JSONDecodeError) as error:
            raise CallError(f"{type(error).__name__}: {error}") from None
        try:
            return self._reply(answer, questions)
        except (AttributeError, TypeError, IndexError):  # The client checks no answer's form.
            return Reply("", self.most(questions))

    def rewards(self, text: str, questions: Sequence[Question]) -> list[float | None]:
        return [read_answer(text, self._form)]

    def _ask(self, question: Question) -> str:
        return render(self._template, self._term, question)

    def _options(self) -> dict[str, Any]:
        options: dict[str, Any] = {}
        if self._term.temperature is not None:
            options["temperature"] = self._term.temperature
        if self._term.output == "json_schema":
            schema = {"name": "judgement", "strict": True, "schema": self._form.schema}
            options["response_format"] = {"type": "json_schema", "json_schema": schema}
        return options

    def _reply(self, answer: Any, questions: Sequence[Question]) -> Reply:
        usage = answer.usage  # Which not every server counts.
        used = self._usage(usage.prompt_tokens, usage.completion_tokens) if usage else self.most(questions)
        return Reply(answer.choices[0].message.content or "", used)

    def _usage(self, input_tokens: int, output_tokens: int) -> Usage:
        money = input_tokens * self._term.input_price + output_tokens * self._term.output_price
        return Usage(1, input_tokens + output_tokens, money / _MILLION)


def answer_form(term: JudgeTerm) -> Form:
    if term.mode == "pairwise":
        return Form("better", {"A": 1.0, "B": 0.0, "tie": 0.5})
    return Form("score", {score: float(score) for score in range(1, term.scale + 1)})


def read_answer(text: str, form: Form) -> float:
    """The reward of the one JSON object that ends an answer. ValueError: there is none of this form."""
    answer = _last_object(text)
    value = answer.get(form.field)
    if set(answer) <= {"reason", form.field}:
        for known, reward in form.rewards.items():
            if value == known and type(value) is type(known):  # True is no score of 1.
                return reward
    raise ValueError(f"{form.field} is not one of {list(form.rewards)} in {text[-60:]!r}")


def _last_object(text: str) -> dict[str, Any]:
    """All of a text, or what ends it and has no braces inside."""
    found = _LAST_OBJECT.search(text)
    for candidate in (text, found.group() if found else ""):
        with suppress(json.JSONDecodeError):
            answer = json.loads(candidate)
            if isinstance(answer, dict):
                return answer
    raise ValueError(f"no JSON object at the end of {text[-60:]!r}")


def load_template(term: JudgeTerm) -> jinja2.Template:
    """ValueError: it is no template, or uses what there is not."""
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined)
    text = template_text(term)
    try:
        unknown = find_undeclared_variables(environment.parse(text)) - set(_VARIABLES)
    except jinja2.TemplateError as error:
        raise ValueError(f"judge.template {term.template} is no Jinja template: {error}") from None
    if unknown:
        raise ValueError(
            f"judge.template {term.template} uses {', '.join(sorted(unknown))}: "
            f"there are {', '.join(_VARIABLES)}"
        )
    return environment.from_string(text)


def template_text(term: JudgeTerm) -> str:
    path = Path(term.template) if term.template else _PROMPTS / f"{term.mode}.jinja"
    if not path.is_file():
        raise ValueError(f"judge.template {term.template}: there is no such file")
    return path.read_text()


def render(template: jinja2.Template, term: JudgeTerm, question: Question) -> str:
    """The question as the judge reads it."""
    sides = dict(zip(("first", "second"), (completion.text for completion in question), strict=False))
    prompt = question[0].prompt
    return template.render(
        prompt=as_transcript(prompt.text), fields=prompt.fields, rubric=term.rubric, scale=term.scale, **sides
    )


def as_transcript(text: Text) -> str:
    """Messages as one text."""
    if isinstance(text, str):
        return text
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in text)


def api_key(term: JudgeTerm) -> str:
    """From the environment; "" where none is asked for."""
    if not term.api_key_variable:
        return ""
    key = os.environ.get(term.api_key_variable, "")
    if not key:
        raise ValueError(
            f"judge.api_key_variable: ${term.api_key_variable} is not set: put the API key there, where the "
            "job is started and on Ray's nodes"
        )
    return key


def status_error(status: int, message: str, key: str) -> CallError:
    """What an HTTP status means for the next call; the key is never part of it."""
    text = f"HTTP {status}: {message.replace(key, '***') if key else message}"[:200]
    return CallError(text) if status >= 500 or status in _REPEATABLE else HopelessCallError(text)
