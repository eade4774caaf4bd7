"""What may stand in a request to the policy, field by field."""

from dataclasses import replace
from typing import Any

import pytest

from serve.refusal import Refusal
from serve.requests import REQUESTS, Bounds, reviewed

BOUNDS = Bounds(
    context_length=8, max_n=4, max_completions=6, max_messages=2, max_new_tokens=None, writes_json=True
)
CHAT, COMPLETION, TOKENIZE, DETOKENIZE = "/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize"
HELLO = {"role": "user", "content": "hello"}


def refused(path: str, body: dict[str, Any], bounds: Bounds = BOUNDS) -> str:
    with pytest.raises(Refusal) as refusal:
        reviewed(REQUESTS[path], body, bounds)
    return str(refusal.value)


def vllm_fields() -> dict[str, set[str]]:
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest
    from vllm.entrypoints.serve.tokenize.protocol import (
        DetokenizeRequest,
        TokenizeChatRequest,
        TokenizeCompletionRequest,
    )

    return {
        CHAT: {*ChatCompletionRequest.model_fields},
        COMPLETION: {*CompletionRequest.model_fields},
        TOKENIZE: {*TokenizeCompletionRequest.model_fields, *TokenizeChatRequest.model_fields},
        DETOKENIZE: {*DetokenizeRequest.model_fields},
    }


def test_every_reviewed_field_is_one_that_the_engine_knows() -> None:
    known = vllm_fields()
    assert {path: {*request.model_fields} - known[path] for path, request in REQUESTS.items()} == {
        path: set() for path in REQUESTS
    }


@pytest.mark.parametrize("path", [CHAT, COMPLETION])
def test_every_other_field_of_the_engine_is_refused_by_name(path: str) -> None:
    start = {"messages": [HELLO]} if path == CHAT else {"prompt": "a"}
    others = vllm_fields()[path] - {*REQUESTS[path].model_fields}
    assert {"chat_template", "mm_processor_kwargs"} <= others or path != CHAT
    assert {"structured_outputs", "kv_transfer_params", "priority", "vllm_xargs", "use_beam_search"} <= others
    for field in others:
        assert refused(path, {**start, field: 1}).startswith(f"{field} is not taken here: ")


PASSES = [
    (COMPLETION, {"prompt": "a", "stop": ["x"], "logit_bias": {"5": -100}, "stream": True, "seed": -1}),
    (COMPLETION, {"prompt": [1] * 8, "max_tokens": 0, "echo": True, "logprobs": 20}),
    (COMPLETION, {"prompt": [[1], [2]], "n": 3, "response_format": {"type": "text"}}),
    (COMPLETION, {"prompt": "a", "response_format": {"type": "json_object"}}),
    (
        CHAT,
        {
            "messages": [HELLO],
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "a", "schema": {"type": "object"}, "strict": True},
            },
        },
    ),
    (CHAT, {"messages": [HELLO], "max_completion_tokens": 8, "logprobs": True, "top_logprobs": 0}),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}, HELLO]}),
    (TOKENIZE, {"prompt": ""}),
    (TOKENIZE, {"messages": [HELLO]}),
    (DETOKENIZE, {"tokens": []}),
]


@pytest.mark.parametrize(("path", "body"), PASSES)
def test_what_is_allowed_passes_as_it_is(path: str, body: dict[str, Any]) -> None:
    assert reviewed(REQUESTS[path], body, BOUNDS) == body


def test_null_is_as_good_as_left_out() -> None:
    answered = {"role": "assistant", "content": "hi", "refusal": None, "audio": None, "function_call": None}
    body = {"messages": [answered, HELLO], "n": None, "tools": None, "stop": None}
    passed = {"messages": [{"role": "assistant", "content": "hi"}, HELLO]}
    assert reviewed(REQUESTS[CHAT], body, BOUNDS) == passed


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        ({"n": 5}, "n: 5 completions are too many: at most 4"),
        ({"prompt": ["a"] * 3, "n": 3}, "prompt: 9 completions are too many: at most 6"),
        ({"prompt": "a" * 513}, "prompt has 513 characters: send at most 512"),
        ({"prompt": [1] * 9}, "prompt: 9 tokens are too many: at most 8"),
        ({"prompt": [[1], [1] * 9]}, "prompt: 9 tokens are too many: at most 8"),
        ({"max_tokens": 9}, "max_tokens: 9 new tokens are too many: at most 8"),
        ({"min_tokens": 9}, "min_tokens: 9 new tokens are too many: at most 8"),
        ({"prompt": []}, "prompt must be text, token ids"),
        ({"prompt": [1, "a"]}, "prompt must be text, token ids"),
        ({"prompt": [-1]}, "prompt must be text, token ids"),
        ({"prompt": [[]]}, "prompt must be text, token ids"),
        ({"prompt": [True]}, "prompt must be text, token ids"),
        ({"prompt": [2**31]}, "prompt must be text, token ids"),
        ({"n": 0}, "n: Input should be greater than or equal to 1"),
        ({"n": True}, "n: Input should be a valid integer"),
        ({"n": 1.0}, "n: Input should be a valid integer"),
        ({"temperature": "1"}, "temperature: Input should be a valid number"),
        ({"temperature": 2.1}, "temperature: Input should be less than or equal to 2"),
        ({"temperature": float("nan")}, "temperature: "),
        ({"logprobs": 21}, "logprobs: Input should be less than or equal to 20"),
        ({"logprobs": -1}, "logprobs: Input should be greater than or equal to 0"),
        ({"top_k": 2**31}, "top_k: Input should be less than 2147483648"),
        ({"stop": [""]}, "stop must be 1 to 256 characters"),
        ({"stop": ["a"] * 17}, "stop must be 1 to 256 characters, or a list of at most 16"),
        ({"stop_token_ids": [0] * 65}, "stop_token_ids: List should have at most 64 items"),
        ({"logit_bias": {"-1": 1}}, "logit_bias.-1: String should match"),
        ({"logit_bias": {"1": 101}}, "logit_bias.1: Input should be less than or equal to 100"),
        (
            {"logit_bias": {str(i): 1 for i in range(301)}},
            "logit_bias: Dictionary should have at most 300 items",
        ),
        (
            {"response_format": {"type": "grammar"}},
            "response_format.type: Input should be 'text', 'json_object' or 'json_schema'",
        ),
        (
            {"response_format": {"type": "json_schema"}},
            "response_format: give a json_schema with that type, and with no other",
        ),
        (
            {"response_format": {"type": "text", "json_schema": {"name": "a", "schema": {}}}},
            "response_format: give a json_schema with that type, and with no other",
        ),
        ({"stream_options": {"x": 1}}, "stream_options.x: Extra inputs are not permitted"),
        ({"user": "x" * 257}, "user: String should have at most 256 characters"),
        ({"best_of": 3}, "best_of is not taken here: ask for n completions and choose"),
        ({"nonsense": 3}, "nonsense is not taken here: leave it out (taken are add_special_tokens, echo, "),
    ],
)
def test_a_completion_that_asks_for_too_much_is_told_what_is_allowed(
    body: dict[str, Any], sentence: str
) -> None:
    assert refused(COMPLETION, {"prompt": "a", **body}).startswith(sentence)


@pytest.mark.parametrize(
    ("messages", "sentence"),
    [
        ([], "messages: List should have at least 1 item"),
        ([HELLO] * 3, "messages: 3 messages are too many: at most 2"),
        ([{**HELLO, "content": "a" * 513}], "messages has 513 characters: send at most 512"),
        (
            [{"role": "tool", "content": "a"}],
            "messages.0.role: Input should be 'system', 'developer', 'user'",
        ),
        ([{"role": "user"}], "messages.0.content must be text, or a list of"),
        (
            [{**HELLO, "content": [{"type": "image_url", "image_url": "x"}]}],
            "messages.0.content must be text",
        ),
        ([{**HELLO, "tool_calls": [1]}], "messages.0.tool_calls: Extra inputs are not permitted"),
    ],
)
def test_a_chat_that_is_none_is_told_what_one_is(messages: list[Any], sentence: str) -> None:
    assert refused(CHAT, {"messages": messages}).startswith(sentence)


def test_text_in_parts_counts_as_much_as_in_one() -> None:
    parts = [{"type": "text", "text": "a" * 300}] * 2
    assert refused(CHAT, {"messages": [{**HELLO, "content": parts}]}).startswith(
        "messages has 600 characters"
    )


def test_tokenizing_takes_a_prompt_or_a_chat_within_the_same_bounds() -> None:
    assert refused(TOKENIZE, {}) == refused(TOKENIZE, {"prompt": "a", "messages": [HELLO]})
    assert refused(TOKENIZE, {"prompt": "a" * 513}).startswith("prompt has 513 characters")
    assert refused(DETOKENIZE, {"tokens": [0] * 9}).startswith("tokens: 9 tokens are too many")


def test_a_bound_on_new_tokens_holds_where_none_is_named() -> None:
    bounds = Bounds(
        context_length=8, max_n=4, max_completions=6, max_messages=2, max_new_tokens=3, writes_json=True
    )
    assert reviewed(REQUESTS[COMPLETION], {"prompt": "a"}, bounds) == {"prompt": "a", "max_tokens": 3}
    assert reviewed(REQUESTS[CHAT], {"messages": [HELLO]}, bounds)["max_tokens"] == 3
    assert (
        reviewed(REQUESTS[CHAT], {"messages": [HELLO], "max_completion_tokens": 2}, bounds)[
            "max_completion_tokens"
        ]
        == 2
    )
    for field in ("max_tokens", "max_completion_tokens"):
        assert refused(CHAT, {"messages": [HELLO], field: 4}, bounds).startswith(f"{field}: 4 new tokens")


@pytest.mark.parametrize("kind", ["json_object", "json_schema"])
def test_json_is_refused_where_the_vocabulary_cannot_spell_it(kind: str) -> None:
    wordy = replace(BOUNDS, writes_json=False)
    schema = {"json_schema": {"name": "a", "schema": {}}} if kind == "json_schema" else {}
    body = {"prompt": "a", "response_format": {"type": kind, **schema}}
    assert "vocabulary cannot spell JSON" in refused(COMPLETION, body, wordy)
    assert reviewed(REQUESTS[COMPLETION], {"prompt": "a", "response_format": {"type": "text"}}, wordy)
