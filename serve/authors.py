"""Who wrote an answer: the policy version of each token, as the engine reports it to the HTTP request."""

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
class Authors:
    """The versions that wrote the choices of one HTTP answer, as far as they are known yet."""

    first: int | None = None
    """Version of the first token that came."""
    last: int | None = None
    """Version of the last token of the choice that ended last."""
    choices: dict[int, list[Span]] = field(default_factory=dict)
    """Of the choices that have ended."""
    num_prompts: int = 0

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
        return self._reported(outputs, authors, first_choice=(authors.num_prompts - 1) * params.n)

    async def _reported(
        self, outputs: AsyncGenerator[Any, None], authors: Authors, *, first_choice: int
    ) -> AsyncGenerator[Any, None]:
        async for output in outputs:
            for completion in output.outputs:
                if completion.weight_versions is not None:
                    spans = [Span(int(s.version), s.start, s.end) for s in completion.weight_versions]
                    authors.end_choice(first_choice + completion.index, spans)
            if authors.first is None:
                authors.first = self._llm.first_version(output.request_id)
            yield output
