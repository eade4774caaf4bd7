"""Where preferences are kept, and what of them a round trains on."""

from dpo_ray.buffer.commits import StoreError
from dpo_ray.buffer.database import default_url
from dpo_ray.buffer.sampling import SnapshotQuery
from dpo_ray.buffer.snapshots import (
    SnapshotManifest,
    read_pair_ids,
    read_snapshot,
    read_snapshot_manifest,
    snapshot_query,
)
from dpo_ray.buffer.store import PreferenceBuffer, PutReceipt

__all__ = [
    "PreferenceBuffer",
    "PutReceipt",
    "SnapshotManifest",
    "SnapshotQuery",
    "StoreError",
    "default_url",
    "read_pair_ids",
    "read_snapshot",
    "read_snapshot_manifest",
    "snapshot_query",
]
