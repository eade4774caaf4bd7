"""The judges that the settings ask for."""

from collections import Counter
from collections.abc import Sequence
from typing import assert_never

from dpo_ray.config import LIVE, JudgeConfig, JudgeTerm
from dpo_ray.judges.asking import BUDGET, Asker, Service
from dpo_ray.judges.budget import Spending
from dpo_ray.judges.ensemble import ensemble_judge
from dpo_ray.judges.function import JudgeError, JudgeFunction, load_judge
from dpo_ray.judges.pairwise import pairwise_judge
from dpo_ray.judges.verifiers import exact_judge, math_judge, regex_judge
from dpo_ray.types import Completion, ScoredCompletion


def make_judge(config: JudgeConfig, spending: Spending, *, live_url: str = "") -> JudgeFunction:
    """One judge, or several as one. ValueError: one of them cannot be made."""
    judges = [(term.name, make_single_judge(term, spending, live_url=live_url)) for term in config.terms]
    return ensemble_judge(judges, config.combine) if config.plus else judges[0][1]


def make_single_judge(term: JudgeTerm, spending: Spending, *, live_url: str = "") -> JudgeFunction:
    match term.kind:
        case "function":
            return load_judge(term.function)
        case "pairwise":
            return pairwise_judge(load_judge(term.function), term.name, both_orders=term.both_orders)
        case "regex":
            return regex_judge(term.pattern)
        case "exact":
            return exact_judge(term.column)
        case "math":
            return math_judge(term.column)
        case "reward_model":
            from dpo_ray.judges.reward_model import RewardModelJudge

            return RewardModelJudge(term)
        case "llm":
            return _llm_judge(term, spending, live_url)
        case "http":
            from dpo_ray.judges.remote import RemoteService

            return _rating(RemoteService(term), term, spending)
        case _:
            assert_never(term.kind)


def check_judges(config: JudgeConfig) -> None:
    """ValueError, before anything is started, where a judge cannot be made."""
    for term in config.terms:
        if term.kind == "reward_model":
            from dpo_ray.judges.reward_model import check_reward_model

            check_reward_model(term.model)
        else:
            make_single_judge(term, Spending(config.budget), live_url="http://127.0.0.1/v1")


def require_judged(scored: Sequence[ScoredCompletion], config: JudgeConfig) -> None:
    """JudgeError where nothing was judged, or where the budget is spent and that is to stop the job."""
    reasons = Counter(item.judgement.reason for item in scored if item.judgement.reason)
    is_nothing = reasons.total() == len(scored)
    spent = reasons.pop(BUDGET, 0)
    if spent and config.budget.on_exhausted == "stop":
        raise JudgeError(
            f"judge {config.full_name}: the budget is spent, {spent} of {len(scored)} completions are not "
            "judged: raise judge.budget and start the job again, or set its on_exhausted to continue"
        )
    if is_nothing and reasons:
        [(reason, count)] = reasons.most_common(1)
        raise JudgeError(
            f"judge {config.full_name} judged none of {len(scored)} completions: {reason} ({count} times)"
        )


def prompt_shares(completions: Sequence[Completion], num: int) -> list[list[Completion]]:
    """At most `num` parts of about equal length, in order; a prompt's completions in a row stay together."""
    share = -(-len(completions) // num)
    parts: list[list[Completion]] = []
    for place, completion in enumerate(completions):
        is_new = place == 0 or completions[place - 1].prompt.token_ids != completion.prompt.token_ids
        if not parts or (is_new and len(parts[-1]) >= share):
            parts.append([])
        parts[-1].append(completion)
    return parts


def _llm_judge(term: JudgeTerm, spending: Spending, live_url: str) -> JudgeFunction:
    from dpo_ray.judges.llm import ModelService

    if term.url == LIVE:
        if not live_url:
            raise ValueError(f"judge.url={LIVE}: no policy is live here: give its URL (http://…/v1)")
        # Another policy answers after each push.
        term = term.model_copy(update={"keep_answers": False})
    service = ModelService(term, live_url if term.url == LIVE else term.url)
    if term.mode == "pointwise":
        return _rating(service, term, spending)
    return pairwise_judge(Asker(service, term, spending), term.name, both_orders=term.both_orders)


def _rating(service: Service, term: JudgeTerm, spending: Spending) -> JudgeFunction:
    asker = Asker(service, term, spending)
    return lambda completions: asker([(completion,) for completion in completions])
