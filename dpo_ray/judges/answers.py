"""Answers of judges, kept across runs by what was asked: one small database per machine."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import sqlalchemy as sa

from dpo_ray.judges.function import Question
from dpo_ray.storage import cache_folder

_ANSWERS = sa.Table(
    "judge_answers",
    sa.MetaData(),
    sa.Column("question", sa.String(64), primary_key=True),
    sa.Column("reward", sa.Double, nullable=True),
)
_CHUNK = 500


def question_key(judge: str, question: Question) -> str:
    """sha256 of whatever decides the answer: the judge's identity, the prompt with its row, the texts."""
    prompt = question[0].prompt
    content = [judge, prompt.text, prompt.fields, *(completion.text for completion in question)]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


class AnswerCache:
    """Rewards by `question_key`, None where the judge could not say; processes and threads may share it."""

    def __init__(self, folder: Path | None = None) -> None:
        folder = folder or cache_folder()
        folder.mkdir(parents=True, exist_ok=True)
        self._engine = sa.create_engine(
            f"sqlite:///{folder / 'judge_answers.sqlite'}", connect_args={"timeout": 60}
        )
        with self._engine.begin() as connection:
            connection.execute(sa.schema.CreateTable(_ANSWERS, if_not_exists=True))

    def read(self, keys: Sequence[str]) -> dict[str, float | None]:
        """Those that are known."""
        known: dict[str, float | None] = {}
        with self._engine.connect() as connection:
            for start in range(0, len(keys), _CHUNK):
                query = sa.select(_ANSWERS).where(_ANSWERS.c.question.in_(keys[start : start + _CHUNK]))
                known.update((row.question, row.reward) for row in connection.execute(query))
        return known

    def write(self, rewards: Mapping[str, float | None]) -> None:
        rows = [{"question": key, "reward": reward} for key, reward in rewards.items()]
        with self._engine.begin() as connection:
            connection.execute(_ANSWERS.insert().prefix_with("OR REPLACE"), rows)
