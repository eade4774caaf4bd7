"""Ids of comparisons that nobody can make up, and that say whose they are and until when."""

import hashlib
import hmac
import secrets
from http import HTTPStatus

from dpo_ray.storage import Storage
from serve.refusal import Refusal

_FILE = "comparisons.key"


def run_secret(storage: Storage) -> bytes:
    """The run's own, made once; only who may read the run's folder knows it."""
    if not storage.exists(_FILE):
        storage.write_private(_FILE, secrets.token_hex(32))
    return bytes.fromhex(storage.read_text(_FILE))


class ComparisonIds:
    """`cmp-EXPIRES.NONCE.SEAL.OWNER`: the seal says that the id is ours, the owner who asked for it."""

    def __init__(self, secret: bytes) -> None:
        self._secret = secret

    def new(self, caller: str, *, expires_at: int) -> str:
        """`expires_at` in seconds since 1970."""
        plain = f"cmp-{expires_at:x}.{secrets.token_hex(8)}"
        return f"{plain}.{self._sign(plain)}.{self._sign(plain, caller)}"

    def check(self, comparison_id: str, caller: str, *, now_s: float) -> None:
        """Refusal: it is none of ours, another caller's, or too old."""
        plain, seal, owner = [*comparison_id.rsplit(".", 2), "", ""][:3]
        if not hmac.compare_digest(seal.encode(), self._sign(plain).encode()):
            raise Refusal(
                "there is no comparison of this id: ask for one with POST /v1/comparisons",
                status=HTTPStatus.NOT_FOUND,
                param="comparison_id",
            )
        if not hmac.compare_digest(owner.encode(), self._sign(plain, caller).encode()):
            raise Refusal(
                "this comparison is another person's: ask for your own with POST /v1/comparisons",
                status=HTTPStatus.FORBIDDEN,
                param="comparison_id",
            )
        if int(plain.removeprefix("cmp-").partition(".")[0], 16) < now_s:
            raise Refusal(
                "this comparison has expired: ask for a new one with POST /v1/comparisons",
                status=HTTPStatus.GONE,
                param="comparison_id",
            )

    def _sign(self, *parts: str) -> str:
        # A caller's name holds no blank, so that no two lists of parts read the same.
        return hmac.new(self._secret, " ".join(parts).encode(), hashlib.sha256).hexdigest()[:32]
