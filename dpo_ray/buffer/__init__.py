"""Where preferences are kept, and what of them a round trains on."""

from dpo_ray.buffer.database import default_url
from dpo_ray.buffer.snapshots import (
    SnapshotManifest,
    SnapshotQuery,
    read_pair_ids,
    read_snapshot,
    read_snapshot_manifest,
)
from dpo_ray.buffer.store import PreferenceBuffer, PutReceipt

__all__ = [
    "PreferenceBuffer",
    "PutReceipt",
    "SnapshotManifest",
    "SnapshotQuery",
    "default_url",
    "read_pair_ids",
    "read_snapshot",
    "read_snapshot_manifest",
]
