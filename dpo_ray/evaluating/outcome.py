"""An evaluation, from the names of its policies to what is found of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import assert_never

from dpo_ray.config import EvaluateConfig, JudgeConfig
from dpo_ray.evaluating.duels import AskJudge, Contest, Judged, Place, judge_alone, judge_together, meet
from dpo_ray.evaluating.endpoint import api_key, sample_endpoint
from dpo_ray.evaluating.findings import Comparison, JudgeBill, Measures, bill, compare, measure
from dpo_ray.evaluating.local import divergence_refused, sample_local, with_divergence
from dpo_ray.evaluating.plan import Plan, make_plan
from dpo_ray.evaluating.policies import (
    EndpointModel,
    LocalPolicy,
    NamedModel,
    PolicyName,
    RunVersion,
    fetch_version,
    find_model,
    parse_policy,
)
from dpo_ray.evaluating.samples import Sample
from dpo_ray.generation import Drawing
from dpo_ray.judges import check_judges, require_judged
from dpo_ray.judges.actor import JudgeActor
from dpo_ray.terminal import Terminal
from dpo_ray.types import Completion, Judgement, Prompt, ScoredCompletion

Policy = LocalPolicy | EndpointModel
Samples = dict[str, list[Sample]]
"""Of each policy by name, in one order of prompts."""


@dataclass(frozen=True, slots=True)
class Verdicts:
    """What the judge said."""

    alone: dict[str, list[Judged]]
    """Of each policy's completions by themselves; empty of a judge that only compares."""
    contests: dict[str, list[Contest]]
    """Of each policy but the baseline."""
    judgements: list[Judgement]
    """All that were asked for."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of an evaluation; the first policy is the baseline."""

    prompts: list[Prompt]
    judge: str
    samples: Samples
    verdicts: Verdicts
    measures: list[Measures]
    comparisons: list[Comparison]
    bill: JudgeBill
    notes: list[str]
    """What was left out, and why."""

    def rewards(self, policy: str) -> dict[Place, float | None]:
        """By prompt and number, of a judge that rates each completion by itself."""
        return {each.place: each.judgement.reward for each in self.verdicts.alone.get(policy, [])}

    def win_shares(self, policy: str) -> dict[Place, float | None]:
        """By prompt and number, against the baseline's completion of that number; {} of other judges."""
        if self.verdicts.alone:
            return {}
        contests = self.verdicts.contests.get(policy, [])
        return {each.ours.place: each.ours.judgement.reward for each in contests}


def evaluate(config: EvaluateConfig, terminal: Terminal) -> Outcome:
    """ValueError: a policy, prompts or judge cannot be used. EndpointError, JudgeError: one failed."""
    names = [parse_policy(name) for name in config.policies]
    policies = [find_policy(name) for name in names]
    local = [policy for policy in policies if isinstance(policy, LocalPolicy)]
    api_key(config.endpoint.api_key_variable)
    plan = make_plan(config, names, local)
    check_judges(plan.judge)
    notes = [f"{plan.dropped} prompts were dropped: too long"] if plan.dropped else []
    samples = {policy.name: draw_samples(policy, plan, config, terminal) for policy in policies}
    samples, left_out = add_divergence(samples, policies, plan, config, terminal)
    with terminal.phase("judge", f"judge by {plan.judge.full_name}"):
        verdicts = ask_judge(JudgeActor(plan.judge, config.run_dir), samples, plan.judge)
    with terminal.phase("measure"):
        return find(plan, config, samples, verdicts, [*notes, *left_out])


def find_policy(name: PolicyName) -> Policy:
    match name:
        case EndpointModel():
            return name
        case RunVersion():
            return fetch_version(name)
        case NamedModel():
            return find_model(name)
        case _:
            assert_never(name)


def draw_samples(policy: Policy, plan: Plan, config: EvaluateConfig, terminal: Terminal) -> list[Sample]:
    drawing = Drawing(
        n=config.samples_per_prompt,
        max_new_tokens=plan.max_new_tokens,
        seed=config.seed,
        temperature=config.temperature,
    )
    with terminal.phase("sample", f"sample {policy.name}") as on_progress:
        match policy:
            case EndpointModel():
                return sample_endpoint(
                    policy, plan.prompts, drawing, config.endpoint, on_progress=on_progress
                )
            case LocalPolicy():
                token_ids = plan.token_ids[policy.name]
                return sample_local(policy, plan.prompts, token_ids, drawing, on_progress=on_progress)
            case _:
                assert_never(policy)


def add_divergence(
    samples: Samples, policies: Sequence[Policy], plan: Plan, config: EvaluateConfig, terminal: Terminal
) -> tuple[Samples, list[str]]:
    """The samples with their KL to the baseline, and why some have none."""
    baseline, measured, notes = policies[0], dict(samples), list[str]()
    for policy in policies[1:]:
        refused = _divergence_refused(policy, baseline, plan, config)
        if refused:
            notes.append(f"{policy.name} has no KL: {refused}")
            continue
        assert isinstance(policy, LocalPolicy) and isinstance(baseline, LocalPolicy)
        with terminal.phase("compare", f"KL of {policy.name} to {baseline.name}"):
            token_ids = plan.token_ids[policy.name]
            measured[policy.name] = with_divergence(samples[policy.name], token_ids, policy, baseline)
    return measured, notes


def ask_judge(judge: JudgeActor, samples: Samples, config: JudgeConfig) -> Verdicts:
    """Each completion alone, where its reward means something by itself; else beside the baseline's."""
    judgements: list[Judgement] = []

    def ask(completions: Sequence[Completion]) -> list[ScoredCompletion]:
        scored = judge.judge(completions)
        require_judged(scored, config)
        judgements.extend(item.judgement for item in scored)
        return scored

    alone, contests = _in_contest(ask, samples) if config.is_relative else _alone(ask, samples)
    return Verdicts(alone, contests, judgements)


def find(
    plan: Plan, config: EvaluateConfig, samples: Samples, verdicts: Verdicts, notes: list[str]
) -> Outcome:
    baseline, *_ = samples
    return Outcome(
        prompts=plan.prompts,
        judge=plan.judge.full_name,
        samples=samples,
        verdicts=verdicts,
        measures=[measure(name, own, verdicts.alone.get(name), config) for name, own in samples.items()],
        comparisons=[
            compare(name, contests, config, baseline=baseline, is_relative=plan.judge.is_relative)
            for name, contests in verdicts.contests.items()
        ],
        bill=bill(verdicts.judgements),
        notes=notes,
    )


def _alone(ask: AskJudge, samples: Samples) -> tuple[dict[str, list[Judged]], dict[str, list[Contest]]]:
    judged = {name: judge_alone(ask, own) for name, own in samples.items()}
    (_, baseline), *others = judged.items()
    return judged, {name: meet(own, baseline) for name, own in others}


def _in_contest(ask: AskJudge, samples: Samples) -> tuple[dict[str, list[Judged]], dict[str, list[Contest]]]:
    (_, baseline), *others = samples.items()
    return {}, {name: judge_together(ask, own, baseline) for name, own in others}


def _divergence_refused(policy: Policy, baseline: Policy, plan: Plan, config: EvaluateConfig) -> str:
    if isinstance(policy, EndpointModel) or isinstance(baseline, EndpointModel):
        return "an endpoint does not show its weights"
    if config.temperature != 1:
        return f"samples at temperature {config.temperature:g} are not the policy's own, set it to 1"
    if plan.token_ids[policy.name] != plan.token_ids[baseline.name]:
        return f"{baseline.name} reads other tokens of the same prompts"
    return divergence_refused(policy, baseline)
