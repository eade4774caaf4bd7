"""Samples of policies here and at endpoints, and the KL between two that are here."""

from pathlib import Path
from typing import Any

import pytest
import torch
from judge_server import Body, JudgeServer, chat, serving

from dpo_ray.config import EndpointConfig
from dpo_ray.evaluating.endpoint import EndpointError, sample_endpoint
from dpo_ray.evaluating.local import divergence_refused, sample_local, with_divergence
from dpo_ray.evaluating.policies import EndpointModel, LocalPolicy
from dpo_ray.evaluating.samples import Sample
from dpo_ray.generation import Drawing
from dpo_ray.models import load_model, load_tokenizer, save_policy
from dpo_ray.types import Completion, Prompt

DRAWING = Drawing(n=2, max_new_tokens=6, seed=0)


def silent(done: int, total: int) -> None:
    pass


def asked(folder: Path, *texts: str) -> list[Prompt]:
    tokenizer = load_tokenizer(folder)
    return [Prompt(text, tuple(tokenizer(text)["input_ids"])) for text in texts]  # type: ignore[arg-type]


def drawn(policy: LocalPolicy, prompts: list[Prompt], drawing: Drawing = DRAWING) -> list[Sample]:
    return sample_local(policy, prompts, [p.token_ids for p in prompts], drawing, on_progress=silent)


def test_kl_is_the_sum_over_the_vocabulary_at_each_token(tiny_model: Path, near_model: Path) -> None:
    policy, baseline = LocalPolicy("near", near_model), LocalPolicy("tiny", tiny_model)
    prompts = asked(tiny_model, "the film was", "these songs")
    token_ids = [prompt.token_ids for prompt in prompts]
    measured = with_divergence(drawn(policy, prompts), token_ids, policy, baseline)
    p, q = load_model(near_model), load_model(tiny_model)
    for sample in measured:
        assert sample.completion is not None
        before, new = token_ids[sample.prompt], sample.completion.token_ids
        kl = gain = 0.0
        for place, token in enumerate(new):  # One forward pass per token, and every token of the vocabulary.
            context = torch.tensor([[*before, *new[:place]]])
            with torch.no_grad():
                ours, theirs = (m(context).logits[0, -1].double().log_softmax(-1) for m in (p, q))
            kl += sum((each.exp() * (each - other)).item() for each, other in zip(ours, theirs, strict=True))
            gain += (ours[token] - theirs[token]).item()
        assert (sample.kl, sample.logp_gain) == pytest.approx((kl, gain), abs=1e-4)
        assert kl > 0.01


def test_a_policy_is_nowhere_from_itself(tiny_model: Path) -> None:
    policy = LocalPolicy("tiny", tiny_model)
    prompts = asked(tiny_model, "the film")
    [first, _] = with_divergence(drawn(policy, prompts), [prompts[0].token_ids], policy, policy)
    assert (first.kl, first.logp_gain) == pytest.approx((0.0, 0.0), abs=1e-5)


def test_the_same_weights_and_seed_give_the_same_completions_and_another_seed_others(
    tiny_model: Path,
) -> None:
    prompts = asked(tiny_model, "the film was", "these songs", "the plot")
    first, again = (drawn(LocalPolicy(name, tiny_model), prompts) for name in ("a", "b"))
    assert first == again
    assert drawn(LocalPolicy("a", tiny_model), prompts, Drawing(2, 6, seed=1)) != first
    assert [(s.prompt, s.number) for s in first] == [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1)]
    assert all(s.completion and s.num_tokens == len(s.completion.token_ids) <= 6 for s in first)


def test_at_temperature_0_all_samples_of_a_prompt_are_the_likeliest_one(tiny_model: Path) -> None:
    first, second = drawn(
        LocalPolicy("tiny", tiny_model), asked(tiny_model, "the film"), Drawing(2, 6, seed=0, temperature=0)
    )
    assert first.completion == second.completion


def test_policies_with_other_vocabularies_have_no_kl(tiny_model: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(tiny_model)
    tokenizer.add_tokens(["masterpiece"])
    save_policy(load_model(tiny_model), tokenizer, tmp_path)
    policy, baseline = LocalPolicy("wider", tmp_path), LocalPolicy("tiny", tiny_model)
    assert divergence_refused(policy, baseline) == "its vocabulary is not that of tiny"
    assert divergence_refused(baseline, baseline) == ""


def answering(body: Body) -> Body:
    """Chat with a sentence, a completion with another one."""
    if "messages" in body:
        return {**chat("I am asked.", completion_tokens=4), "policy_version": 3}
    choice = {"index": 0, "finish_reason": "length", "text": " and goes on"}
    return {"id": "1", "object": "text_completion", "created": 0, "model": "fake", "choices": [choice]}


def from_endpoint(server: JudgeServer, *prompts: Prompt, **config: Any) -> list[Sample]:
    policy = EndpointModel("there", server.url, "policy")
    settings = EndpointConfig(**{"retries": 0, "concurrency": 1, **config})
    return sample_endpoint(policy, prompts, DRAWING, settings, on_progress=silent)


def test_text_is_continued_and_messages_are_answered() -> None:
    messages = Prompt([{"role": "user", "content": "Who?"}], (2,))
    with serving(JudgeServer(answering)) as server:
        text, _, answer, _ = from_endpoint(server, Prompt("It begins", (1,)), messages)
    assert text.completion and answer.completion
    assert (text.completion.text, text.completion.finish_reason) == (" and goes on", "length")
    assert (text.num_tokens, text.completion.policy_version) == (None, 0)
    assert (answer.completion.text, answer.num_tokens) == ("I am asked.", 4)
    assert answer.completion.policy_version == 3
    assert len({body["seed"] for body in server.requests}) == 4
    assert {body.get("max_tokens") or body["max_completion_tokens"] for body in server.requests} == {6}


def test_a_request_that_fails_is_counted_and_no_text() -> None:
    with serving(JudgeServer(answering, faults=[400, "no JSON", '{"choices": []}'])) as server:
        samples = from_endpoint(server, Prompt("one", (1,)), Prompt("two", (2,)))
    assert [sample.completion is None for sample in samples] == [True, True, True, False]
    assert samples[0].error.startswith("HTTP 400")
    assert samples[1].error and samples[2].error


def test_a_request_that_fails_once_is_repeated() -> None:
    with serving(JudgeServer(answering, faults=[503])) as server:
        assert all(sample.completion for sample in from_endpoint(server, Prompt("one", (1,)), retries=1))


def test_an_endpoint_that_answers_nothing_is_named_with_its_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", "sesame")
    with (
        serving(JudgeServer(answering, faults=[401, 401])) as server,
        pytest.raises(
            EndpointError, match=r"there gave none of 2 completions: HTTP 401: .* \(2 times\)"
        ) as e,
    ):
        from_endpoint(server, Prompt("one", (1,)), api_key_variable="MY_KEY")
    assert server.headers[0]["authorization"] == "Bearer sesame"
    assert "sesame" not in str(e.value)


def test_an_endpoint_that_fails_from_the_first_request_on_is_not_asked_for_all() -> None:
    prompts = [Prompt(f"Prompt {number}", (number,)) for number in range(40)]
    with serving(JudgeServer(answering, faults=[404] * 80)) as server, pytest.raises(EndpointError):
        from_endpoint(server, *prompts)
    assert 16 <= len(server.requests) <= 20


def test_a_key_that_is_not_set_is_named() -> None:
    with pytest.raises(ValueError, match=r"api_key_variable: \$NO_SUCH_KEY is not set"):
        from_endpoint(JudgeServer(answering), Prompt("one", (1,)), api_key_variable="NO_SUCH_KEY")


def test_without_token_ids_words_show_a_loop() -> None:
    def flaw(text: str) -> str:
        return Sample(0, 0, Completion(Prompt("Q", (1,)), text, (), 0.0, 0, "stop")).flaw

    assert flaw("never ends " * 10) == "loop"
    assert flaw(" ".join(map(str, range(30)))) == ""
    assert flaw(" ") == "empty"
