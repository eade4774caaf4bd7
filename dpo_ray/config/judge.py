"""Who gives the rewards: one judge or several, what each reads, and what they may cost."""

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from dpo_ray.config.section import Section

JudgeKind = Literal["function", "pairwise", "regex", "exact", "math", "reward_model", "llm", "http"]
LIVE = "live"
"""The url that stands for the run's own live policy."""

_ASKED = ("url", "api_key_variable", "timeout_s", "retries", "backoff_s", "concurrency", "keep_answers")
_MODEL_ASKED = ("mode", "template", "rubric", "scale", "output", "temperature", "max_new_tokens")
_PRICES = ("input_price", "output_price")
_READ_BY: dict[JudgeKind, tuple[str, ...]] = {
    "function": ("function",),
    "pairwise": ("function", "both_orders"),
    "regex": ("pattern",),
    "exact": ("column",),
    "math": ("column",),
    "reward_model": ("model", "batch_size", "dtype", "max_length"),
    "llm": ("model", "both_orders", *_ASKED, *_MODEL_ASKED, *_PRICES),
    "http": ("batch_size", *_ASKED),
}
"""The settings that each kind of judge reads; its kind always is."""
_NEEDED: dict[JudgeKind, tuple[str, ...]] = {
    "regex": ("pattern",),
    "reward_model": ("model",),
    "llm": ("url", "model"),
    "http": ("url",),
}


class JudgeTerm(Section):
    """One judge."""

    kind: JudgeKind = "function"
    """function (yours: completions in, rewards out), pairwise (yours: two completions in, a preference out),
    regex, exact (an answer key), math (an answer key, compared as mathematics), reward_model (a Hugging Face
    sequence classifier), llm (any OpenAI-compatible endpoint), http (your own service)."""
    function: str = "dpo_ray.film_reviews:judge_reviews"
    """function, pairwise: import path `module:function` of your judge."""
    pattern: str = ""
    """regex: a completion in which this is found gets reward 1, another 0."""
    column: str = "answer"
    """exact, math: column of the prompt's row with the right answer; of one with `####`, what follows it."""
    model: str = ""
    """reward_model: a Hugging Face folder or hub name. llm: the model's name at the endpoint."""
    batch_size: int = Field(default=16, ge=1)
    """reward_model: completions per forward pass. http: completions per request."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """reward_model: number format of its weights."""
    max_length: int = Field(default=2048, ge=1)
    """reward_model: longest prompt plus completion, in tokens; of a longer one the end is read."""
    url: str = ""
    """llm: base URL of the endpoint (https://…/v1), or `live`, the run's own policy. http: where to POST."""
    api_key_variable: str = ""
    """llm, http: environment variable that holds the API key; unset: none is sent."""
    mode: Literal["pairwise", "pointwise"] = "pairwise"
    """llm: pairwise asks which of two completions is better, pointwise for a score of each."""
    both_orders: bool = True
    """pairwise, llm: ask in both orders, and count a preference that changes with the order as a tie."""
    template: str = ""
    """llm: file with your own Jinja template of the question; unset: dpo_ray/judges/prompts."""
    rubric: str = "Prefer what is correct, helpful, complete and clear, and not what is merely long."
    """llm: what makes a completion good."""
    scale: int = Field(default=10, ge=2, le=100)
    """llm, pointwise: scores go from 1 to this."""
    output: Literal["json_schema", "text"] = "json_schema"
    """llm: json_schema has the endpoint keep to the form of the answer; text is for one that cannot."""
    temperature: float | None = Field(default=0.0, ge=0)
    """llm: sampling temperature of the judge; null: the endpoint's own."""
    max_new_tokens: int = Field(default=512, ge=1)
    """llm: longest answer, in tokens."""
    timeout_s: float = Field(default=60.0, gt=0)
    """llm, http: seconds to wait for an answer."""
    retries: int = Field(default=4, ge=0)
    """llm, http: how often a call is repeated that fails or is answered with nonsense."""
    backoff_s: float = Field(default=1.0, ge=0)
    """llm, http: seconds before a failed call is repeated; about twice as many before each next time."""
    concurrency: int = Field(default=8, ge=1)
    """llm, http: calls in flight at the same time, in each judge actor."""
    keep_answers: bool = True
    """llm, http: keep answers in ~/.cache/dpo_ray, and ask no question twice."""
    input_price: float = Field(default=0.0, ge=0)
    """llm: price of a million tokens of questions."""
    output_price: float = Field(default=0.0, ge=0)
    """llm: price of a million tokens of answers."""

    @property
    def name(self) -> str:
        """What completions and pairs call it."""
        match self.kind:
            case "function" | "pairwise":
                return self.function
            case "regex":
                return f"regex {self.pattern}"
            case "exact" | "math":
                return f"{self.kind} {self.column}"
            case "reward_model" | "llm":
                return f"{self.kind} {self.model}"
            case "http":
                return f"http {self.url}"

    @property
    def is_asked(self) -> bool:
        """Whether it is a service, whose calls may fail, cost and be limited."""
        return self.kind in ("llm", "http")

    @model_validator(mode="after")
    def _check_term(self) -> Self:
        for name, field in JudgeTerm.model_fields.items():
            if name not in ("kind", *_READ_BY[self.kind]) and getattr(self, name) != field.default:
                raise ValueError(_unread(self.kind, name, getattr(self, name), default=field.default))
        for name in _NEEDED.get(self.kind, ()):
            if not getattr(self, name):
                raise ValueError(f"a judge of kind {self.kind} needs {name}: set it")
        if "@" in self.url:
            raise ValueError("url holds a name or password: take it out, and name api_key_variable instead")
        if self.url == LIVE and self.kind != "llm":
            raise ValueError(f"url={LIVE} is the run's own policy: set kind to llm")
        if self.kind == "llm" and self.mode == "pointwise" and not self.both_orders:
            raise ValueError("both_orders=False is not read by mode=pointwise: leave it at True")
        if self.kind == "llm" and self.mode == "pairwise" and self.scale != 10:
            raise ValueError(f"scale={self.scale} is not read by mode=pairwise: leave it at 10")
        return self


class BudgetConfig(Section):
    """What all judges of a run may use up; a run that goes on may get more."""

    calls: int | None = Field(default=None, ge=0)
    """Most calls, repeated ones included; unset: no bound."""
    tokens: int | None = Field(default=None, ge=0)
    """Most tokens, of questions and answers; unset: no bound."""
    money: float | None = Field(default=None, ge=0)
    """Most money, by input_price and output_price; unset: no bound."""
    on_exhausted: Literal["continue", "stop"] = "continue"
    """Beyond a bound: continue with what is judged, or stop the job, which goes on with a larger budget."""

    @property
    def is_bounded(self) -> bool:
        return any(bound is not None for bound in (self.calls, self.tokens, self.money))


class JudgeConfig(JudgeTerm):
    """Who says which completion is better: one judge, or several together."""

    plus: tuple[JudgeTerm, ...] = ()
    """Further judges, each with its kind and settings: a JSON list."""
    combine: Literal["mean", "minimum", "majority"] = "mean"
    """Several judges: mean or minimum of their rewards, or majority, a vote on every two completions."""
    budget: BudgetConfig = BudgetConfig()
    """What the judges may use up."""
    actors: int = Field(default=1, ge=1)
    """Judge actors; prompts are divided among them."""
    cpus_per_actor: float = Field(default=1, ge=0)
    """CPUs that each judge actor reserves in Ray."""
    gpus_per_actor: float = Field(default=0, ge=0)
    """GPUs that each judge actor reserves in Ray, for reward models and functions; may be a share of one."""

    @property
    def terms(self) -> tuple[JudgeTerm, ...]:
        """All judges."""
        return (self, *self.plus)

    @property
    def full_name(self) -> str:
        """What completions and pairs call the judges together."""
        names = ", ".join(term.name for term in self.terms)
        return f"{self.combine} of {names}" if self.plus else names

    @property
    def is_relative(self) -> bool:
        """Whether a reward says how a completion does among the others, and means nothing beside others."""
        compared = any(
            term.kind == "pairwise" or (term.kind, term.mode) == ("llm", "pairwise") for term in self.terms
        )
        return compared or self.combine == "majority"

    @model_validator(mode="after")
    def _check_judges(self) -> Self:
        if self.combine != "mean" and not self.plus:
            raise ValueError(f"combine={self.combine} needs several judges: add them with plus")
        if self.budget.is_bounded and not any(term.is_asked for term in self.terms):
            raise ValueError("budget bounds calls of llm and http judges, of which there is none: unset it")
        if self.budget.money is not None and not any(
            term.input_price + term.output_price for term in self.terms
        ):
            raise ValueError("budget.money needs a price: set input_price and output_price")
        return self


def _unread(kind: JudgeKind, name: str, value: Any, *, default: Any) -> str:
    readers = ", ".join(other for other, names in _READ_BY.items() if name in names)
    remedy = f"leave it at {default}, or set kind to {readers}"
    return f"{name}={value} is not read by a judge of kind {kind}: {remedy}"
