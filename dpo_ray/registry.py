"""Policy versions in storage, the pointer to the one that is live, and how it came to be there."""

import hashlib
import subprocess
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from dpo_ray import node_files
from dpo_ray.node_files import note_sha256, sha256_file, sha256_once
from dpo_ray.storage import Storage, files_below
from dpo_ray.tensors import TensorSpec, read_tensors

ADAPTER = "adapter"
"""Folder of a version that was trained as an adapter, beside the merged weights."""
_MANIFEST = "manifest.json"
_LIVE = "policies/LIVE"
_CANDIDATE = "policies/CANDIDATE"
_EVENTS = "policies/events.jsonl"


class Canary(BaseModel):
    """A fixed token sequence and what the learner's weights say of it: the proof of a push."""

    model_config = ConfigDict(frozen=True)

    token_ids: list[int]
    logprobs: list[float]
    """Log-prob of each token but the first, in nats."""


class SnapshotRef(BaseModel):
    """The snapshot that a version was trained on."""

    model_config = ConfigDict(frozen=True)

    round: int
    rows: int
    sha256: str


class PolicyManifest(BaseModel):
    """What a version is, and where it comes from."""

    model_config = ConfigDict(frozen=True, ser_json_inf_nan="constants")

    version: int
    parent: int | None = None
    snapshot: SnapshotRef | None = None
    step: int = 0
    """Optimizer steps of the whole run up to this version."""
    metrics: dict[str, float] = {}
    """Those of the last optimizer step that made it."""
    stopped_early: str = ""
    """Why training ended before the round's last step."""
    canaries: list[Canary] = []
    config: dict[str, object] = {}
    """The training settings that made it."""
    git_commit: str | None = None
    files: dict[str, str] = {}
    """sha256 of every file."""
    tensors: dict[str, TensorSpec] = {}
    """What the weight files hold, by name."""
    created_at: str = ""


class PolicyEvent(BaseModel):
    """A move of LIVE."""

    model_config = ConfigDict(frozen=True)

    kind: Literal["promote", "rollback"]
    version: int
    """Live from then on."""
    previous: int | None
    """Live until then; None before the first promotion."""
    by: str
    """A person's name, or `job`."""
    reason: str
    at: str
    """UTC, as ISO 8601."""


class Candidate(BaseModel):
    """A version that one of several replicas holds beside the live one, to be evaluated."""

    model_config = ConfigDict(frozen=True)

    version: int
    share: float = Field(ge=0, le=1)
    """Of the live traffic, that it may answer."""


class PolicyRegistry:
    """Versions only grow; a version is complete or absent; LIVE moves atomically."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage

    def versions(self) -> list[int]:
        """All complete versions, ascending."""
        names = [name for name in self._storage.list("policies") if name[1:].isdigit()]
        return [int(name[1:]) for name in names if self.has(int(name[1:]))]

    def has(self, version: int) -> bool:
        return self._storage.exists(f"{_folder(version)}/{_MANIFEST}")

    def live(self) -> int | None:
        """The live version; None before the first promotion."""
        if not self._storage.exists(_LIVE):
            return None
        return int(self._storage.read_text(_LIVE))

    def manifest(self, version: int) -> PolicyManifest:
        if not self.has(version):
            raise ValueError(
                f"policy version {version} is not in {self._storage.root}: it has {self.versions()}"
            )
        return PolicyManifest.model_validate_json(self._storage.read_text(f"{_folder(version)}/{_MANIFEST}"))

    def publish(self, folder: Path, manifest: PolicyManifest) -> PolicyManifest:
        """Make the Hugging Face model in `folder` a version; publishing it again changes nothing."""
        if self.has(manifest.version):
            return self.manifest(manifest.version)
        files = [name for name in files_below(folder) if name != _MANIFEST]
        whole = manifest.model_copy(
            update={
                "files": {name: sha256_file(folder / name) for name in files},
                "tensors": read_tensors(folder),
                "created_at": _now(),
                "git_commit": _git_commit(),
            }
        )
        text = whole.model_dump_json(indent=2)
        self._storage.publish_folder(folder, _folder(manifest.version), marker=_MANIFEST, text=text)
        if self._storage.local_root is not None:
            for name, sha256 in whole.files.items():
                note_sha256(self._storage.local_root / _folder(manifest.version) / name, sha256)
        return whole

    def promote(self, version: int, *, by: str = "job", reason: str = "") -> PolicyEvent:
        """Make a complete version live; promoting what is live adds no event."""
        with self._storage.locked(_LIVE):
            return self._move("promote", version, by=by, reason=reason)

    def rollback(self, version: int | None = None, *, by: str, reason: str) -> PolicyEvent:
        """Make a version live again: `version`, or the one that the present one was promoted over.

        A second rollback goes one further back. ValueError: there is no such version.
        """
        with self._storage.locked(_LIVE):
            before, live = self._before(), self.live()
            target = before[-1] if version is None and before else version
            if target is None or target not in (*before, live):
                raise ValueError(
                    f"{'no version' if version is None else f'version {version}'} was live before {live}, "
                    f"which came after {before or 'nothing'}: promote the version that you want"
                )
            return self._move("rollback", target, by=by, reason=reason)

    def events(self) -> list[PolicyEvent]:
        """Every move of LIVE, the oldest first."""
        if not self._storage.exists(_EVENTS):
            return []
        lines = self._storage.read_bytes(_EVENTS).splitlines()
        events = [PolicyEvent.model_validate_json(line) for line in lines]
        # An event is written before LIVE moves: until then, it has not happened.
        return events if not events or events[-1].version == self.live() else events[:-1]

    def offer(self, version: int, *, share: float) -> Candidate:
        """Let one of several replicas hold a complete version that is not live."""
        self.manifest(version)
        if version == self.live():
            raise ValueError(f"version {version} is live already: offer another one")
        candidate = Candidate(version=version, share=share)
        self._storage.write_text(_CANDIDATE, candidate.model_dump_json())
        return candidate

    def withdraw(self) -> None:
        """End the offer; where there is none, nothing changes."""
        with suppress(FileNotFoundError):  # Another process was faster.
            self._storage.remove(_CANDIDATE)

    def candidate(self) -> Candidate | None:
        """The version on offer."""
        try:
            candidate = Candidate.model_validate_json(self._storage.read_text(_CANDIDATE))
        except FileNotFoundError:
            return None
        return None if candidate.version == self.live() else candidate

    def _move(
        self, kind: Literal["promote", "rollback"], version: int, *, by: str, reason: str
    ) -> PolicyEvent:
        self.manifest(version)
        live, events = self.live(), self.events()
        if not events or version != live:
            at = _now()
            events.append(PolicyEvent(kind=kind, version=version, previous=live, by=by, reason=reason, at=at))
            self._storage.write_text(_EVENTS, "".join(f"{event.model_dump_json()}\n" for event in events))
            self._storage.write_text(_LIVE, f"{version}\n")
        self.withdraw()
        return events[-1]

    def _before(self) -> list[int]:
        """Versions that were live before the present one, each promoted over the one to its left."""
        events = self.events()
        lineage = [event.previous for event in events[:1] if event.previous is not None]
        for event in events:
            if event.kind == "rollback" and event.version in lineage:
                while lineage[-1] != event.version:
                    lineage.pop()
            else:
                lineage.append(event.version)
        return lineage[:-1]

    def fetch(self, version: int, *, part: str = "") -> Path:
        """A local folder with exactly the published files, or those of its subfolder `part`.

        ValueError: one is changed or missing, or there is no such part.
        """
        names = self.files(version, part=part)
        path, content = f"{_folder(version)}/{part}".rstrip("/"), self._content(version, part)
        folder = node_files.kept(self._storage.root, content) or self._storage.local_copy(
            path, content=content
        )
        for name, expected in names.items():
            if not (folder / name).exists() or sha256_once(folder / name) != expected:
                node_files.forget(self._storage.root, content)  # The next time from storage.
                raise ValueError(f"{folder / name} is not the file that version {version} was published with")
        return folder

    def files(self, version: int, *, part: str = "") -> dict[str, str]:
        """sha256 by name of a version's files, or of those in its subfolder `part`; names are below it."""
        prefix = f"{part}/" if part else ""
        every = self.manifest(version).files
        files = {name.removeprefix(prefix): sha for name, sha in every.items() if name.startswith(prefix)}
        if not files:
            raise ValueError(f"version {version} has no {part}: it was trained without one")
        return files

    def bring(self, version: int, fill: Callable[[Path], None], *, part: str = "") -> None:
        """Let `fill` put a version's files into a folder of this node, which `fetch` then gives."""
        owner, content = self._storage.root, self._content(version, part)
        node_files.forget(owner, content)
        node_files.bring(owner, content, fill)

    def _content(self, version: int, part: str) -> str:
        """A name for what the files hold."""
        return hashlib.sha256(f"{part} {self.manifest(version).model_dump_json()}".encode()).hexdigest()


def _folder(version: int) -> str:
    return f"policies/v{version:05d}"


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _git_commit() -> str | None:
    try:
        args = ["git", "rev-parse", "HEAD"]
        return subprocess.run(
            args, capture_output=True, text=True, check=True, cwd=Path(__file__).parent
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
