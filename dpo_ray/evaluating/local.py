"""Samples of policies whose weights are here, and how far these are from a baseline's."""

from collections.abc import Sequence
from dataclasses import replace

import torch

from dpo_ray.batching import sequence_groups, split_by_tokens
from dpo_ray.evaluating.policies import LocalPolicy
from dpo_ray.evaluating.samples import Sample
from dpo_ray.generation import Drawing, generate
from dpo_ray.lm_head import CompletionSums
from dpo_ray.logprobs import CompletionScorer, Wanted
from dpo_ray.models import load_model, load_tokenizer
from dpo_ray.terminal import OnProgress
from dpo_ray.types import Completion, Prompt, TokenSequence

_TOKENS_PER_PASS = 1024
"""All logits of a pass are held at once."""


def sample_local(
    policy: LocalPolicy,
    prompts: Sequence[Prompt],
    token_ids: Sequence[tuple[int, ...]],
    drawing: Drawing,
    *,
    on_progress: OnProgress,
) -> list[Sample]:
    """`drawing.n` samples in a row of each prompt; `token_ids`: the prompts as the policy reads them."""
    drawn = generate(policy.source, token_ids, drawing, device=_device(), on_progress=on_progress)
    asked = [(place, number) for place in range(len(prompts)) for number in range(drawing.n)]
    sequences = [TokenSequence(token_ids[place], new) for (place, _), new in zip(asked, drawn, strict=True)]
    logps = score(_scorer(policy), sequences).logp.tolist()
    tokenizer = load_tokenizer(policy.source)
    return [
        Sample(
            place,
            number,
            Completion(
                prompt=prompts[place],
                text=str(tokenizer.decode(new, skip_special_tokens=True)),
                token_ids=tuple(new),
                logp=logp,
                policy_version=policy.version,
                finish_reason="length" if len(new) == drawing.max_new_tokens else "stop",
            ),
            num_tokens=len(new),
        )
        for (place, number), new, logp in zip(asked, drawn, logps, strict=True)
    ]


def divergence_refused(policy: LocalPolicy, baseline: LocalPolicy) -> str:
    """Why there is no KL between the two; "" where there is one."""
    ours, theirs = (load_tokenizer(each.source).get_vocab() for each in (policy, baseline))
    return "" if ours == theirs else f"its vocabulary is not that of {baseline.name}"


def with_divergence(
    samples: Sequence[Sample],
    token_ids: Sequence[tuple[int, ...]],
    policy: LocalPolicy,
    baseline: LocalPolicy,
) -> list[Sample]:
    """The policy's samples with their KL to a baseline of the same vocabulary, exact and sampled.

    Exact: at each token, sum_v p(v) (log p(v) - log q(v)) over the whole vocabulary, summed over the tokens
    of the sample. Its mean and the mean of log p(sample) - log q(sample) estimate the same sequence KL; the
    first varies less.
    """
    completions = [sample.completion for sample in samples if sample.completion is not None]
    assert len(completions) == len(samples), "a local policy answers each prompt"
    sequences = [
        TokenSequence(token_ids[sample.prompt], completion.token_ids)
        for sample, completion in zip(samples, completions, strict=True)
    ]
    reference = _scorer(baseline)
    theirs = score(reference, sequences).logp.tolist()
    kl = score(_scorer(policy), sequences, reference=reference).kl
    assert kl is not None
    return [
        replace(sample, kl=exact, logp_gain=completion.logp - other)
        for sample, completion, exact, other in zip(samples, completions, kl.tolist(), theirs, strict=True)
    ]


@torch.no_grad()
def score(
    scorer: CompletionScorer,
    sequences: Sequence[TokenSequence],
    *,
    reference: CompletionScorer | None = None,
) -> CompletionSums:
    """[C] summed log-probs of all sequences in order, and with a reference the KL to it."""
    groups = sequence_groups(sequences)
    passes = [
        scorer([groups[place] for place in places], wanted=Wanted(kl="to_reference"), reference=reference)[1]
        for places in split_by_tokens(groups, _TOKENS_PER_PASS)
    ]
    kls = [sums.kl for sums in passes if sums.kl is not None]
    return CompletionSums(torch.cat([sums.logp for sums in passes]), kl=torch.cat(kls) if kls else None)


def _scorer(policy: LocalPolicy) -> CompletionScorer:
    """On padded rows, which every model has."""
    return CompletionScorer(load_model(policy.source, device=_device()), flat=False)


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
