"""An iterative run: its prompts, what is done, what is left, and what the rounds leave behind."""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from dpo_ray.buffer import SnapshotManifest, TrialVotes, read_pair_ids
from dpo_ray.config import IterativeDPOConfig, JobConfig, SamplingConfig
from dpo_ray.evaluation import Evaluation, read_evaluation, summary, win_rate
from dpo_ray.gate import Verdict, judge_samples
from dpo_ray.judges import check_judges
from dpo_ray.learner import TrainingError
from dpo_ray.metrics import read_steps, vote_metrics
from dpo_ray.models import load_context_length, load_tokenizer, make_canaries, make_scorer, save_policy
from dpo_ray.pairing import AnswerReader, MadePairs, PairYield, load_rule, make_pairs
from dpo_ray.prompts import load_prompts, round_prompts, split_prompts
from dpo_ray.registry import PolicyManifest, PolicyRegistry
from dpo_ray.run_folder import RunFolder
from dpo_ray.run_warnings import RunWarning, round_warnings
from dpo_ray.starter import make_starter
from dpo_ray.storage import Storage
from dpo_ray.terminal import Terminal
from dpo_ray.types import Prompt, ScoredCompletion

_CANARY_TOKENS = 34
"""A block of the prefix cache, and some more: what is scored after it shows whether the cache was emptied."""
_SCORED = TypeAdapter(ScoredCompletion)


class Run:
    """Opened again after a crash, it says what is left: every phase leaves a file when it is done."""

    def __init__(
        self, config: IterativeDPOConfig, prompts: Sequence[Prompt], answers: AnswerReader | None = None
    ) -> None:
        self.config = config
        self._answers = answers
        self.folder = RunFolder(config)
        self.storage = self.folder.storage
        self.registry = self.folder.registry
        self._training_prompts, held_out = split_prompts(
            prompts, held_out=config.evaluation.prompts, seed=config.seed
        )
        self.held_out = list(held_out)

    def remaining_rounds(self) -> range:
        """The rounds that are not finished."""
        return range(self.folder.finished_rounds(), self.config.rounds)

    def prompts(self, round_: int) -> list[Prompt]:
        """What the policy is sampled with in a round."""
        num = self.config.sampling.prompts_per_round
        return round_prompts(self._training_prompts, round_=round_, num=num, seed=self.config.seed)

    def canary_sequences(self) -> tuple[tuple[int, ...], ...]:
        """Fixed token sequences that every pushed version is proven with."""
        return canary_sequences([prompt.token_ids for prompt in self.held_out])

    def scored(self, round_: int) -> list[ScoredCompletion] | None:
        """The round's scored completions; None before they are kept."""
        if not self.storage.exists(_samples_file(round_)):
            return None
        # Lines of bytes: those of text also end at separators that JSON allows inside of strings.
        lines = self.storage.read_bytes(_samples_file(round_)).splitlines()
        return [_SCORED.validate_json(line) for line in lines]

    def keep_scored(self, round_: int, scored: list[ScoredCompletion]) -> list[ScoredCompletion]:
        """Keep them: after a crash the round goes on with the same ones."""
        lines = [_SCORED.dump_json(item).decode() for item in scored]
        self.storage.write_text(_samples_file(round_), "\n".join(lines) + "\n")
        return scored

    def make_pairs(self, round_: int, scored: list[ScoredCompletion]) -> MadePairs:
        """The same of the same completions, however often the round is done again."""
        return make_pairs(
            scored, self.config.pairing, round_=round_, seed=self.config.seed, answer_of=self._answers
        )

    def count_pairs(self, made: MadePairs, snapshot: SnapshotManifest) -> PairYield:
        """What became of a round's completions; TrainingError where the round has nothing to train on."""
        pair_ids = read_pair_ids(self.storage, snapshot)
        counts = made.in_snapshot(pair_ids, min_policy_version=snapshot.query.min_policy_version)
        if not snapshot.rows:
            raise TrainingError(
                f"round {snapshot.round} has no pair to train on: {counts.sentence()}. To get some, "
                f"{counts.advice()}"
            )
        return counts

    def start(self) -> None:
        """Write down how version 0 does, once."""
        if not self.folder.rows():
            row = {"kind": "start", "round": -1, "step": 0, "policy_version": 0}
            self.folder.write_rows([{**row, **self._evaluation_metrics(0)}])

    def live(self) -> int:
        live = self.registry.live()
        assert live is not None, "open_run promotes version 0"
        return live

    def parent(self) -> int:
        """The version that training goes on from: the round before's, or the live one where that was refused.

        Also the live one where a person has moved LIVE since.
        """
        *_, last = [row for row in self.folder.rows() if row["kind"] == "round"] or [None]
        live = self.live()
        if last is None or not last["gate/passed"] or last["policy_version"] != live:
            return live
        return last["round"] + 1

    def is_push_due(self, round_: int) -> bool:
        """Whether the round's candidate goes to the sampler; others are only trained on."""
        done = round_ + 1
        return done % self.config.sampling.push_every_rounds == 0 or done == self.config.rounds

    def verdict(self, version: int, votes: TrialVotes) -> Verdict:
        """What the gate says of an evaluated version."""
        candidate, previous, start = self._evaluations(version)
        return judge_samples(candidate, previous=previous, start=start, config=self.config.gate, votes=votes)

    def end_trial(self) -> None:
        """Take back the candidate of an unfinished round: its trial starts over.

        Until then, replicas that start take a version that is known to be good.
        """
        self.registry.withdraw()
        *_, last = self.registry.events() or [None]
        if last is None or (last.kind, last.by) != ("promote", "job"):
            return
        if last.version > self.folder.finished_rounds():
            self.registry.rollback(by="job", reason="the job ended before this version's round did")

    def warnings(self, candidate: int, metrics: dict[str, Any]) -> list[RunWarning]:
        """What the round that made a candidate gives cause for; `metrics` are of its samples and pairs."""
        start, evaluation = read_evaluation(self.storage, 0), read_evaluation(self.storage, candidate)
        return round_warnings(
            {**metrics, **(summary(evaluation) if evaluation else {})},
            read_steps(self.storage, candidate - 1),
            start=summary(start) if start else {},
            config=self.config.warnings,
        )

    def finish(
        self, round_: int, metrics: dict[str, Any], verdict: Verdict, warnings: Sequence[RunWarning] = ()
    ) -> dict[str, Any]:
        """Write the round's row: from here on, the round is done."""
        gate = {"gate/passed": verdict.passed, "gate/reason": verdict.reason, **vote_metrics(verdict.votes)}
        live = self.live()
        measured = {**metrics, **self._evaluation_metrics(live), **gate}
        return self.folder.finish_round(round_, live, measured, warnings)

    def _evaluation_metrics(self, version: int) -> dict[str, float]:
        evaluation, previous, start = self._evaluations(version)
        return {
            **summary(evaluation),
            "win_rate/vs_start": win_rate(evaluation, start),
            "win_rate/vs_previous": win_rate(evaluation, previous),
        }

    def _evaluations(self, version: int) -> tuple[Evaluation, Evaluation, Evaluation]:
        """Of a version, of the last one before that was evaluated, and of the start."""
        evaluation, start = read_evaluation(self.storage, version), read_evaluation(self.storage, 0)
        assert evaluation is not None
        assert start is not None
        previous, ancestor = None, self.registry.manifest(version).parent
        while previous is None and ancestor is not None:  # Those between two pushes never answered.
            previous = read_evaluation(self.storage, ancestor)
            ancestor = self.registry.manifest(ancestor).parent
        return evaluation, previous or start, start


def canary_sequences(prompts: Sequence[Sequence[int]]) -> tuple[tuple[int, ...], ...]:
    """Two short token sequences from the first prompts: their log-probs depend on every layer."""
    # A short prompt says little of the weights, and fills no block of a prefix cache: it is repeated.
    ends = [tuple(ids[-64:]) for ids in prompts[:2]]
    return tuple((ids * _CANARY_TOKENS)[: max(_CANARY_TOKENS, len(ids))] for ids in ends)


def open_run(config: IterativeDPOConfig, terminal: Terminal) -> Run:
    """The run of `config.run_dir`, with version 0 published and live.

    ValueError: model, prompts, judge or pair rule cannot be used, or the folder holds another run.
    """
    check_judges(config.judge)
    if ":" in config.pairing.rule:
        load_rule(config.pairing.rule)
    registry = PolicyRegistry(Storage(config.run_dir))
    folder = registry.fetch(0) if registry.has(0) else starting_model(config, terminal)
    prompts = _load_prompts(config, folder, terminal)
    run = Run(config, prompts, _answers(config, folder, prompts))
    publish_start(registry, folder, run.canary_sequences())
    run.end_trial()
    return run


def publish_start(registry: PolicyRegistry, folder: Path | str, canaries: Sequence[Sequence[int]]) -> None:
    """Make a starting model version 0, and live; a run that has it is left as it is."""
    if not registry.has(0):
        with tempfile.TemporaryDirectory() as copy:
            scorer = make_scorer(folder)
            save_policy(scorer.model, load_tokenizer(folder), Path(copy))
            manifest = PolicyManifest(version=0, canaries=make_canaries(scorer, canaries))
            registry.publish(Path(copy), manifest)
    if registry.live() is None:
        registry.promote(0)


def starting_model(config: JobConfig, terminal: Terminal) -> Path | str:
    """The folder or hub name of the policy that a job starts from."""
    if config.model != "film_reviews":
        return config.model
    with terminal.phase("start", "make the tiny starting model (once, then cached)") as on_progress:
        return make_starter(config.seed, lambda step, total, loss: on_progress(step, total))


def longest_prompt(folder: Path | str, sampling: SamplingConfig, max_prompt_tokens: int | None) -> int:
    """Tokens that a prompt may have. ValueError: completions leave it none."""
    longest = load_context_length(folder)
    context = min(longest, sampling.max_model_len or longest)
    room = context - sampling.max_new_tokens
    if room < 1:
        raise ValueError(
            f"sampling.max_new_tokens={sampling.max_new_tokens} leaves no room for a prompt "
            f"in a context of {context} tokens: lower it"
        )
    return min(room, max_prompt_tokens or room)


def _load_prompts(config: IterativeDPOConfig, folder: Path | str, terminal: Terminal) -> Sequence[Prompt]:
    prompt_set = load_prompts(
        config.prompts,
        split=config.prompts_split,
        column=config.prompts_column,
        tokenizer=load_tokenizer(folder),
        max_tokens=longest_prompt(folder, config.sampling, config.max_prompt_tokens),
    )
    dropped = {"too long": prompt_set.dropped_too_long, "empty": prompt_set.dropped_empty}
    for reason, count in dropped.items():
        if count:
            terminal.say(f"{count} prompts were dropped: {reason}")
    return prompt_set.prompts


def _answers(
    config: IterativeDPOConfig, folder: Path | str, prompts: Sequence[Prompt]
) -> AnswerReader | None:
    """Reads what the prompts' rows answer, where the pair rule asks for it."""
    column = config.pairing.answer_column
    if column is None:
        return None
    answers = AnswerReader(column, load_tokenizer(folder), load_context_length(folder))
    answers.check(prompts)
    return answers


def _samples_file(round_: int) -> str:
    return f"rounds/{round_:05d}/samples.jsonl"
