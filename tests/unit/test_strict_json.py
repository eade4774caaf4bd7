"""JSON that parsers disagree about, and what is too much of it."""

import json
import re
import time

import pytest

from serve.strict_json import parse_object


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        ("{", "the body is not JSON"),
        ("[1]", "the body is a JSON array: send an object"),
        ("null", "the body is a JSON null"),
        ('{"n": 1, "n": 2}', "the key 'n' is given twice"),
        ('{"x": [{"n": 1, "n": 2}]}', "the key 'n' is given twice"),
        ('{"temperature": NaN}', "NaN is no JSON number"),
        ('{"temperature": -Infinity}', "-Infinity is no JSON number"),
        ('{"temperature": 1e400}', "1e400 is too large"),
        ('{"seed": 9223372036854775808}', "9223372036854775808 is too large"),
        ('{"seed": ' + "9" * 5000 + "}", "is too large for an integer"),
        ('{"prompt": "\\ud800"}', "half a surrogate pair"),
        ('{"\\udfff": 1}', "half a surrogate pair"),
        ('{"prompt": ["a\\u0000"]}', "the character NUL"),
        (b'{"prompt": "\xff"}', "the body is not UTF-8"),
        (json.dumps({"prompt": "a"}).encode("utf-16"), "the body is not UTF-8"),
        ('{"prompt": ' + "[" * 32 + "]" * 32 + "}", "nests deeper than 32 levels"),
        ('{"prompt": ' + "[" * 100_000, "nests deeper than 32 levels"),
    ],
)
def test_json_that_can_be_read_in_two_ways_is_refused(body: str | bytes, sentence: str) -> None:
    with pytest.raises(ValueError, match=re.escape(sentence)):
        parse_object(body if isinstance(body, bytes) else body.encode())


def test_the_deepest_nesting_is_32_and_the_largest_integer_fits_64_bits() -> None:
    deepest = '{"a": ' + "[" * 31 + "]" * 31 + "}"
    assert parse_object(deepest.encode()) == json.loads(deepest)
    in_text = {"a[": "[{" * 40 + '\\"' + "[" * 40}
    assert parse_object(json.dumps(in_text).encode()) == in_text
    assert parse_object(b'{"a": [9223372036854775807, -9223372036854775807]}')["a"][0] == 2**63 - 1


def test_hostile_nesting_is_found_in_linear_time() -> None:
    for text in ('"' + '\\"' * 500_000, '"' * 1_000_001, "[" * 1_000_000, '{"a":' * 200_000):
        started = time.process_time()
        with pytest.raises(ValueError, match="the body "):
            parse_object(text.encode())
        assert time.process_time() - started < 2
