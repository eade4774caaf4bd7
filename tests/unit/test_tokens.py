"""Who may do what with a served policy, and what is kept of their tokens."""

import asyncio
import hashlib
import json
import stat
from pathlib import Path

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from dpo_ray.config import ServingConfig
from dpo_ray.storage import Storage
from serve.guard import Abilities, guarded
from serve.tokens import Tokens, main

USER, LABELER, ADMIN = "/v1/completions", "/v1/preferences/undo", "/v1/policy/rollback"
BODIES = {USER: {"prompt": "a"}, LABELER: {"id": "vote-1"}, ADMIN: {}}


@pytest.fixture
def tokens(tmp_path: Path) -> Tokens:
    return Tokens(Storage(str(tmp_path)), fresh_s=0)


async def who(request: Request) -> Response:
    return JSONResponse(request.state.caller.name)


def served(tokens: Tokens, **settings: object) -> ASGIApp:
    routes = [Route(path, who, methods=["POST"]) for path in (USER, LABELER, ADMIN)]
    app = Starlette(routes=[*routes, Route("/", who), Route("/metrics", who), Route("/v1/models", who)])
    return guarded(app, ServingConfig.model_validate(settings), tokens, Abilities(64, writes_json=True))


def ask(app: ASGIApp, path: str, token: str | None = None, **way: str) -> httpx.Response:
    """Ask for `host`, on a connection from the address `client` to the address `at`."""
    headers = [(b"host", way.get("host", "127.0.0.1").encode())]
    if token is not None:
        headers.append((b"authorization", f"{way.get('scheme', 'Bearer')} {token}".encode("latin-1")))
    transport = httpx.ASGITransport(app, client=(way.get("client", "127.0.0.1"), 1))

    async def send() -> httpx.Response:
        address = f"http://{way.get('at', '127.0.0.1')}"
        async with httpx.AsyncClient(transport=transport, base_url=address) as client:
            if path in BODIES:
                return await client.post(path, json=BODIES[path], headers=headers)
            return await client.get(path, headers=headers)

    return asyncio.run(send())


def test_each_role_may_do_what_those_below_it_may(tokens: Tokens) -> None:
    app = served(tokens)
    given = {role: tokens.add(f"{role}-1", role) for role in ("user", "labeler", "admin")}
    statuses = {
        role: [ask(app, path, given[role]).status_code for path in (USER, LABELER, ADMIN)] for role in given
    }
    assert statuses == {"user": [200, 403, 403], "labeler": [200, 200, 403], "admin": [200, 200, 200]}
    assert ask(app, ADMIN, given["admin"]).json() == "admin-1"


@pytest.mark.parametrize("path", [USER, LABELER, ADMIN, "/v1/models", "/metrics"])
def test_with_tokens_only_the_page_needs_none(tokens: Tokens, path: str) -> None:
    token = tokens.add("ann", "admin")
    app = served(tokens)
    for wrong in (None, "", token[:-1], token + "x", "ann", hashlib.sha256(token.encode()).hexdigest(), "é"):
        refused = ask(app, path, wrong)
        assert refused.status_code == 401
        assert refused.headers["www-authenticate"] == "Bearer"
        assert refused.json()["error"]["type"] == "authentication_error"
    assert ask(app, path, token, scheme="Basic").status_code == 401
    assert ask(app, path, token, scheme="bearer").status_code == 200
    assert ask(app, "/").status_code == 200


def test_without_tokens_this_machine_may_all_but_promote(tokens: Tokens) -> None:
    app = served(tokens)
    assert [ask(app, path).status_code for path in (USER, LABELER, ADMIN)] == [200, 200, 403]
    assert "python -m serve.tokens" in ask(app, ADMIN).json()["error"]["message"]


@pytest.mark.parametrize("host", ["localhost", "localhost:8000", "127.0.0.1:1", "[::1]:8000", "127.9.9.9"])
def test_without_tokens_names_of_this_machine_are_answered(tokens: Tokens, host: str) -> None:
    assert ask(served(tokens), USER, host=host).status_code == 200


@pytest.mark.parametrize(
    "host", ["evil.example", "localhost.evil.example", "10.0.0.7", "", "[::1", "0.0.0.0"]
)
def test_without_tokens_a_page_that_lures_a_browser_here_gets_nothing(tokens: Tokens, host: str) -> None:
    assert ask(served(tokens), USER, host=host).status_code == 403
    assert ask(served(tokens), USER, tokens.add("ann", "user"), host=host).status_code == 200


def test_without_tokens_a_port_that_other_machines_reach_answers_nothing(tokens: Tokens) -> None:
    assert ask(served(tokens), USER, host="localhost", at="10.0.0.7").status_code == 403
    assert ask(served(tokens, host="0.0.0.0"), USER).status_code == 401


def test_tokens_come_and_go_while_the_policy_is_served(tokens: Tokens, tmp_path: Path) -> None:
    app = served(Tokens(Storage(str(tmp_path)), fresh_s=0))
    assert ask(app, USER).status_code == 200
    token = tokens.add("ann", "user")
    assert [ask(app, USER).status_code, ask(app, USER, token).status_code] == [401, 200]
    tokens.remove("ann")
    assert ask(app, USER, token).status_code == 401  # The last token's end does not open the door.


def test_a_damaged_file_opens_nothing(tokens: Tokens, tmp_path: Path) -> None:
    token = tokens.add("ann", "user")
    (tmp_path / "tokens.json").write_text("{}")
    assert ask(served(tokens), USER, token).status_code == 503
    assert ask(served(tokens), USER).status_code == 503


def test_a_token_has_its_own_allowance(tokens: Tokens) -> None:
    app = served(tokens, requests_per_minute=1)
    ann, bob = tokens.add("ann", "user", requests_per_minute=2), tokens.add("bob", "user")
    assert [ask(app, USER, ann).status_code for _ in range(3)] == [200, 200, 429]
    assert [ask(app, USER, bob).status_code for _ in range(2)] == [200, 429]


def test_without_tokens_an_address_has_its_own_allowance(tokens: Tokens) -> None:
    app = served(tokens, requests_per_minute=1)
    addresses = ("127.0.0.1", "127.0.0.1", "127.0.0.2")
    assert [ask(app, USER, client=address).status_code for address in addresses] == [200, 429, 200]


def test_only_hashes_are_kept_and_only_for_this_user(tokens: Tokens, tmp_path: Path) -> None:
    token = tokens.add("ann", "user")
    file = tmp_path / "tokens.json"
    assert len(token) >= 43  # 256 bits, six to a character.
    assert token not in file.read_text()
    assert json.loads(file.read_text())["tokens"][0]["sha256"] == hashlib.sha256(token.encode()).hexdigest()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_tokens_are_kept_where_the_run_is() -> None:
    storage = Storage("mock:///run")
    token = Tokens(storage).add("ann", "labeler")
    caller = asyncio.run(Tokens(storage).caller(token))
    assert caller is not None
    assert (caller.name, caller.role) == ("ann", "labeler")


def test_the_command_adds_lists_and_removes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = ["--run_dir", str(tmp_path)]
    main([*run, "add", "ann", "--role", "admin", "--requests_per_minute", "5"])
    token = capsys.readouterr().out.strip()
    caller = asyncio.run(Tokens(Storage(str(tmp_path))).caller(token))
    assert caller is not None
    assert caller.role == "admin"
    main([*run, "list"])
    assert capsys.readouterr().out == "ann admin 5\n"
    main([*run, "remove", "ann"])
    main([*run, "list"])
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["add", "ann", "--role", "user"], "ann has a token already: remove it first"),
        (["add", "a b", "--role", "user"], "name: "),
        (["add", "bob", "--role", "user", "--requests_per_minute", "0"], "requests_per_minute: "),
        (["remove", "bob"], "bob has no token: there are ['ann']"),
    ],
)
def test_a_wrong_command_ends_with_one_sentence(
    tokens: Tokens, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], sentence: str
) -> None:
    tokens.add("ann", "user")
    with pytest.raises(SystemExit) as ended:
        main(["--run_dir", str(tmp_path), *arguments])
    printed = capsys.readouterr().err
    assert ended.value.code == 2
    assert sentence in printed
    assert len(printed.splitlines()) == 1
