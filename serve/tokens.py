"""Who may ask the served policy for what: `python -m serve.tokens --run_dir RUN add NAME --role user`."""

import argparse
import asyncio
import hashlib
import hmac
import ipaddress
import secrets
import sys
import time
from collections.abc import Sequence
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from dpo_ray.config import exit_with
from dpo_ray.storage import Storage

Role = Literal["user", "labeler", "admin"]
ROLES: tuple[Role, ...] = ("user", "labeler", "admin")
"""Each may do what those before it may."""
_FILE = "tokens.json"


class Caller(BaseModel):
    """Who sent a request: what the routes find as `scope["state"]["caller"]`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(min_length=1, max_length=64, pattern=r"^[\w.@-]+$")
    role: Role
    requests_per_minute: int | None = Field(default=None, ge=1)
    """Unset: serving.requests_per_minute holds."""
    trust: float = Field(default=1.0, ge=0, le=1, allow_inf_nan=False)
    """How far this person's votes are trusted: see the settings `votes`."""

    def may_act_as(self, role: Role) -> bool:
        return ROLES.index(self.role) >= ROLES.index(role)


class _Token(Caller):
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


class _TokenFile(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    tokens: list[_Token]


class Tokens:
    """The tokens of a run, in its folder, as hashes; they are random, so that a plain hash keeps them."""

    def __init__(self, storage: Storage, *, fresh_s: float = 3.0) -> None:
        self._storage = storage
        self._fresh_s = fresh_s
        """Age beyond which a server reads the file again."""
        self._known: list[_Token] | None = None
        self._read_at = float("-inf")
        self._reading = asyncio.Lock()

    def read(self) -> list[_Token] | None:
        """What the file holds; None where there is none, and so no token is asked for."""
        if not self._storage.exists(_FILE):
            return None
        try:
            return _TokenFile.model_validate_json(self._storage.read_bytes(_FILE)).tokens
        except ValidationError as error:
            raise ValueError(
                f"{_FILE} in {self._storage.root} is not as `python -m serve.tokens` writes it "
                f"({error.error_count()} errors): restore it, or remove it and add the tokens again"
            ) from None

    async def asked_for(self) -> bool:
        """Whether requests need a token. ValueError: the file cannot be read."""
        return await self._fresh() is not None

    async def caller(self, token: str) -> Caller | None:
        """Whose token this is."""
        digest = _digest(token)
        for known in await self._fresh() or []:
            if hmac.compare_digest(known.sha256, digest):
                return known
        return None

    async def _fresh(self) -> list[_Token] | None:
        async with self._reading:
            if time.monotonic() - self._read_at > self._fresh_s:
                self._known = await asyncio.to_thread(self.read)  # The folder may be far away.
                self._read_at = time.monotonic()
            return self._known

    def add(
        self, name: str, role: Role, *, requests_per_minute: int | None = None, trust: float = 1.0
    ) -> str:
        """A new token, which is shown this once. ValueError: the name has one already."""
        known = self.read() or []
        if any(token.name == name for token in known):
            raise ValueError(f"{name} has a token already: remove it first")
        token = secrets.token_urlsafe(32)
        added = _Token(
            name=name,
            role=role,
            requests_per_minute=requests_per_minute,
            trust=trust,
            sha256=_digest(token),
        )
        self._write([*known, added])
        return token

    def remove(self, name: str) -> None:
        """ValueError: there is none of this name."""
        known = self.read() or []
        left = [token for token in known if token.name != name]
        if len(left) == len(known):
            raise ValueError(f"{name} has no token: there are {[token.name for token in known]}")
        self._write(left)

    def _write(self, tokens: list[_Token]) -> None:
        self._storage.write_private(_FILE, _TokenFile(tokens=tokens).model_dump_json(indent=2))


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches the address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _digest(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()


def main(arguments: Sequence[str]) -> None:
    """Add a token and print it, list the names, or remove one; servers notice within seconds."""
    parsed = _parser().parse_args(arguments)
    tokens = Tokens(Storage(parsed.run_dir))
    try:
        if parsed.command == "add":
            bounds = {"requests_per_minute": parsed.requests_per_minute, "trust": parsed.trust}
            print(tokens.add(parsed.name, parsed.role, **bounds))
        elif parsed.command == "remove":
            tokens.remove(parsed.name)
        else:
            for token in tokens.read() or []:
                trust = f"trust={token.trust:g}" if token.trust < 1 else ""
                print(token.name, token.role, token.requests_per_minute or "", *filter(None, [trust]))
    except ValidationError as error:
        exit_with("; ".join(f"{first['loc'][0]}: {first['msg']}" for first in error.errors()))
    except (ValueError, OSError) as error:
        exit_with(str(error))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m serve.tokens", description=main.__doc__, allow_abbrev=False
    )
    parser.add_argument("--run_dir", required=True, help="Folder of the run, or its URL.")
    commands = parser.add_subparsers(dest="command", required=True)
    add = commands.add_parser("add", help="Make a token and print it, this once.")
    add.add_argument("name", help="Whose it is.")
    add.add_argument(
        "--role", required=True, choices=ROLES, help="user asks, labeler also votes, admin promotes."
    )
    add.add_argument("--requests_per_minute", type=int, help="Most requests; unset: the server's own bound.")
    add.add_argument(
        "--trust", type=float, default=1.0, help="Trust in the votes, from 0 to 1: see votes.min_trust."
    )
    commands.add_parser("list", help="Names, roles, bounds and trust.")
    remove = commands.add_parser("remove", help="Make a token worthless.")
    remove.add_argument("name", help="Whose it is.")
    return parser


if __name__ == "__main__":
    main(sys.argv[1:])
