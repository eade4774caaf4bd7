"""Where preferences are kept, and what of them a round trains on."""

from dpo_ray.buffer.commits import StoreError
from dpo_ray.buffer.database import default_url
from dpo_ray.buffer.feedback import (
    ConflictError,
    FeedbackError,
    ForeignError,
    ServedCompletion,
    ShownAnswer,
    ShownPair,
    UnknownError,
)
from dpo_ray.buffer.quarantine import Released
from dpo_ray.buffer.sampling import SnapshotQuery
from dpo_ray.buffer.snapshots import (
    SnapshotManifest,
    read_pair_ids,
    read_snapshot,
    read_snapshot_manifest,
    snapshot_query,
)
from dpo_ray.buffer.store import PreferenceBuffer, PutReceipt
from dpo_ray.buffer.votes import Ballot, Tally, TrialVotes, VoteReceipt, VoteState

__all__ = [
    "Ballot",
    "ConflictError",
    "FeedbackError",
    "ForeignError",
    "PreferenceBuffer",
    "PutReceipt",
    "Released",
    "ServedCompletion",
    "ShownAnswer",
    "ShownPair",
    "SnapshotManifest",
    "SnapshotQuery",
    "StoreError",
    "Tally",
    "TrialVotes",
    "UnknownError",
    "VoteReceipt",
    "VoteState",
    "default_url",
    "read_pair_ids",
    "read_snapshot",
    "read_snapshot_manifest",
    "snapshot_query",
]
