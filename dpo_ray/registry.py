"""Policy versions in storage, and the pointer to the one that is live."""

import hashlib
import subprocess
from datetime import UTC, datetime
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from dpo_ray.storage import Storage, files_below, sha256_file

_MANIFEST = "manifest.json"


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
    created_at: str = ""


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
        if not self._storage.exists("policies/LIVE"):
            return None
        return int(self._storage.read_text("policies/LIVE"))

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
                "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
                "git_commit": _git_commit(),
            }
        )
        text = whole.model_dump_json(indent=2)
        self._storage.publish_folder(folder, _folder(manifest.version), marker=_MANIFEST, text=text)
        return whole

    def promote(self, version: int) -> None:
        """Make a complete version live."""
        self.manifest(version)
        self._storage.write_text("policies/LIVE", f"{version}\n")

    def fetch(self, version: int) -> Path:
        """A local folder with exactly the published files; a changed or missing file is an error."""
        manifest = self.manifest(version)
        content = hashlib.sha256(manifest.model_dump_json().encode()).hexdigest()
        folder = self._storage.local_copy(_folder(version), content=content)
        for name, expected in manifest.files.items():
            if not (folder / name).exists() or sha256_file(folder / name) != expected:
                raise ValueError(f"{folder / name} is not the file that version {version} was published with")
        return folder


def _folder(version: int) -> str:
    return f"policies/v{version:05d}"


def _git_commit() -> str | None:
    try:
        args = ["git", "rev-parse", "HEAD"]
        return subprocess.run(
            args, capture_output=True, text=True, check=True, cwd=Path(__file__).parent
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
