"""Reference log-probs of pairs, kept across runs: one small database per machine."""

import hashlib
import math
from collections.abc import Sequence
from pathlib import Path

import sqlalchemy as sa

from dpo_ray.node_files import sha256_once
from dpo_ray.storage import cache_folder

_LOGPS = sa.Table(
    "reference_logps",
    sa.MetaData(),
    sa.Column("reference", sa.String(64), primary_key=True),
    sa.Column("pair_id", sa.String(80), primary_key=True),
    sa.Column("chosen", sa.Double, nullable=False),
    sa.Column("rejected", sa.Double, nullable=False),
)
_CHUNK = 500

Logps = dict[str, tuple[float, float]]
"""By pair id: log-probs of the chosen and the rejected completion, summed, in nats."""


class ReferenceCache:
    """Log-probs under one reference. Several runs may use the same file at the same time."""

    def __init__(self, reference: str, folder: Path | None = None) -> None:
        """`reference`: whatever decides the log-probs, as one text."""
        self._reference = hashlib.sha256(reference.encode()).hexdigest()
        folder = folder or cache_folder()
        folder.mkdir(parents=True, exist_ok=True)
        self._engine = sa.create_engine(
            f"sqlite:///{folder / 'reference_logps.sqlite'}", connect_args={"timeout": 60}
        )
        with self._engine.begin() as connection:
            # Other runs may be doing the same: to ask first and create then would be too late.
            connection.execute(sa.schema.CreateTable(_LOGPS, if_not_exists=True))

    def read(self, pair_ids: Sequence[str]) -> Logps:
        """Those that are known."""
        known: Logps = {}
        with self._engine.connect() as connection:
            for start in range(0, len(pair_ids), _CHUNK):
                query = sa.select(_LOGPS.c.pair_id, _LOGPS.c.chosen, _LOGPS.c.rejected).where(
                    _LOGPS.c.reference == self._reference,
                    _LOGPS.c.pair_id.in_(pair_ids[start : start + _CHUNK]),
                )
                known |= {
                    pair_id: (chosen, rejected) for pair_id, chosen, rejected in connection.execute(query)
                }
        return known

    def write(self, logps: Logps) -> None:
        """Those that are numbers: SQLite has no NaN."""
        rows = [
            {"reference": self._reference, "pair_id": pair_id, "chosen": chosen, "rejected": rejected}
            for pair_id, (chosen, rejected) in logps.items()
            if not math.isnan(chosen + rejected)
        ]
        if rows:
            with self._engine.begin() as connection:
                connection.execute(_LOGPS.insert().prefix_with("OR REPLACE"), rows)


def fingerprint(folder: Path) -> str:
    """sha256 over the weights and the configuration of a Hugging Face folder."""
    files = sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin"), folder / "config.json"])
    return hashlib.sha256("".join(sha256_once(file) for file in files).encode()).hexdigest()
