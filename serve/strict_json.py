"""JSON that can be read in one way only: no duplicate keys, no NaN, no text that cannot be stored."""

import json
import math
import re
from typing import Any

MAX_DEPTH = 32
MAX_INTEGER = 2**63 - 1
"""Beyond it, parsers disagree, and tensors overflow."""
# Possessive, and with or without its end: linear in any text.
_STRING = re.compile(r'"(?:[^"\\]++|\\.)*+"?', re.DOTALL)
_BRACKET = re.compile(r"[\[\]{}]")


def parse_object(body: bytes) -> dict[str, Any]:
    """The JSON object in `body`. ValueError: a sentence about what is wrong with it."""
    try:
        text = body.decode("utf-8")
    except UnicodeDecodeError:
        raise ValueError("the body is not UTF-8: encode it as UTF-8") from None
    _check_depth(text)  # Before the parser, which would meet the limit of Python's own stack.
    parsed = _parse(text)
    if not isinstance(parsed, dict):
        raise ValueError(f"the body is a JSON {_kind(parsed)}: send an object")
    if r"\u" in text:  # Only an escape spells what UTF-8 cannot.
        _check_texts(parsed)
    return parsed


def _check_depth(text: str) -> None:
    depth = 0
    for bracket in _BRACKET.findall(_STRING.sub("", text)):
        depth += 1 if bracket in "[{" else -1
        if depth > MAX_DEPTH:
            raise ValueError(f"the body nests deeper than {MAX_DEPTH} levels: flatten it")


def _parse(text: str) -> Any:
    try:
        return json.loads(
            text, object_pairs_hook=_unique, parse_constant=_refuse, parse_float=_finite, parse_int=_integer
        )
    except json.JSONDecodeError as error:
        raise ValueError(f"the body is not JSON: {error.msg} at character {error.pos}") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    parsed = dict(pairs)
    if len(parsed) < len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))
        raise ValueError(f"the key {twice[:64]!a} is given twice in one object: give it once")
    return parsed


def _refuse(constant: str) -> float:
    raise ValueError(f"{constant} is no JSON number: send finite numbers")


def _finite(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        raise ValueError(f"{digits[:32]} is too large for a number: send finite numbers")
    return number


def _integer(digits: str) -> int:
    if len(digits) > 20 or abs(int(digits)) > MAX_INTEGER:
        raise ValueError(f"{digits[:32]} is too large for an integer: send at most {MAX_INTEGER}")
    return int(digits)


def _check_texts(parsed: Any) -> None:
    if isinstance(parsed, str):
        _check_text(parsed)
    elif isinstance(parsed, list):
        for item in parsed:
            _check_texts(item)
    elif isinstance(parsed, dict):
        for key, item in parsed.items():
            _check_text(key)
            _check_texts(item)


def _check_text(text: str) -> None:
    if "\0" in text:
        raise ValueError("a string holds the character NUL: leave it out")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(
            "a string holds half a surrogate pair, which is no character: send both halves"
        ) from None


def _kind(parsed: object) -> str:
    match parsed:
        case None:
            return "null"
        case bool():
            return "boolean"
        case str():
            return "string"
        case list():
            return "array"
        case _:
            return "number"
