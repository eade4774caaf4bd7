"""Who wrote an answer, and what: the tokens and their policy versions, as the engine reports them."""

from collections.abc import AsyncGenerator
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Span:
    """Consecutive tokens of one choice that one version wrote."""

    version: int
    start: int
    end: int
    """One past the last token."""


@dataclass(slots=True)
class Written:
    """One choice as the engine wrote it."""

    request_id: str
    """The engine's, which begins with the id of the answer."""
    prompt_number: int
    prompt_ids: tuple[int, ...] = ()
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logp: float | None = None


@dataclass(slots=True)
class Authors:
    """The versions that wrote the choices of one HTTP answer, as far as they are known yet."""

    first: int | None = None
    """Version of the first token that came."""
    last: int | None = None
    """Version of the last token of the choice that ended last."""
    choices: dict[int, list[Span]] = field(default_factory=dict)
    """Of the choices that have ended."""
    num_prompts: int = 0
    written: dict[int, Written] | None = None
    """What the choices say, where somebody wants to know."""

    def end_choice(self, index: int, spans: list[Span]) -> None:
        self.choices[index] = spans
        if spans:
            self.first = spans[0].version if self.first is None else self.first
            self.last = spans[-1].version


request_authors: ContextVar[Authors | None] = ContextVar("request_authors", default=None)


class ReportingEngine:
    """The engine as vLLM's routes see it: whatever it writes, it reports to the request under way."""

    def __init__(self, llm: Any) -> None:
        self._llm = llm

    def __getattr__(self, name: str) -> Any:
        return getattr(self._llm, name)

    def generate(
        self, prompt: Any, params: Any, request_id: str, **options: Any
    ) -> AsyncGenerator[Any, None]:
        """The engine's own. A request's prompts come in order, and have `params.n` choices each."""
        outputs = self._llm.generate(prompt, params, request_id, **options)
        authors = request_authors.get()
        if authors is None:
            return outputs
        authors.num_prompts += 1
        return self._reported(outputs, authors, prompt_number=authors.num_prompts - 1, n=params.n)

    async def _reported(
        self, outputs: AsyncGenerator[Any, None], authors: Authors, *, prompt_number: int, n: int
    ) -> AsyncGenerator[Any, None]:
        async for output in outputs:
            for completion in output.outputs:
                index = prompt_number * n + completion.index
                if authors.written is not None:
                    start = Written(output.request_id, prompt_number)
                    _extend(authors.written.setdefault(index, start), output, completion)
                if completion.weight_versions is not None:
                    spans = [Span(int(s.version), s.start, s.end) for s in completion.weight_versions]
                    authors.end_choice(index, spans)
            if authors.first is None:
                authors.first = self._llm.first_version(output.request_id)
            yield output


def _extend(written: Written, output: Any, completion: Any) -> None:
    """What vLLM's routes ask for comes in parts, or whole at the end: nothing comes twice."""
    written.prompt_ids = tuple(output.prompt_token_ids or written.prompt_ids)
    written.text += completion.text
    written.token_ids += completion.token_ids
    written.logp = completion.cumulative_logprob
