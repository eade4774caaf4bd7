"""A run's preferences at the terminal: `python -m dpo_ray.buffer stats --run_dir RUN`."""

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import get_args

import sqlalchemy as sa
import yaml
from rich.console import Console

from dpo_ray.buffer import tables
from dpo_ray.buffer.database import PAIR_ID_LENGTH, PAIRS, default_url
from dpo_ray.buffer.lineage import pairs_of_version, versions_that_saw
from dpo_ray.buffer.store import PreferenceBuffer
from dpo_ray.buffer.transfer import export_pairs, import_pairs
from dpo_ray.config import exit_with
from dpo_ray.preference_data import LongPrompts
from dpo_ray.registry import PolicyRegistry
from dpo_ray.storage import Storage


def main(arguments: Sequence[str], console: Console) -> None:
    """Look at a run's preferences, move them out and in, see who was trained on them, forget a person's."""
    parsed = _parser().parse_args(arguments)
    commands = {
        "stats": _stats,
        "export": _export,
        "import": _import,
        "show": _show,
        "trace": _trace,
        "versions": _versions,
        "forget": _forget,
    }
    try:
        commands[parsed.command](parsed, Storage(parsed.run_dir), console)
    except (ValueError, OSError) as error:
        exit_with(str(error))


def _stats(parsed: argparse.Namespace, storage: Storage, console: Console) -> None:
    with _opened(parsed, storage) as buffer:
        console.print(tables.sources(buffer.sources()))


def _export(parsed: argparse.Namespace, storage: Storage, console: Console) -> None:
    conditions = [PAIRS.c.source.in_(parsed.source)] if parsed.source else []
    if parsed.first_round is not None:
        conditions.append(PAIRS.c.round >= parsed.first_round)
    if parsed.last_round is not None:
        conditions.append(PAIRS.c.round <= parsed.last_round)
    with _opened(parsed, storage) as buffer:
        exported = export_pairs(buffer, parsed.folder, *conditions)
    left_out = f"; left out: {exported.unpaired} single answers" if exported.unpaired else ""
    console.print(f"{exported.pairs} pairs in {parsed.folder}/train.parquet{left_out}", soft_wrap=True)


def _import(parsed: argparse.Namespace, storage: Storage, console: Console) -> None:
    from dpo_ray.models import load_tokenizer  # Imports torch.

    with _opened(parsed, storage) as buffer:
        imported = import_pairs(
            buffer,
            parsed.rows,
            split=parsed.split,
            tokenizer=load_tokenizer(PolicyRegistry(storage).fetch(0)),
            max_tokens=parsed.max_length,
            long_prompts=parsed.long_prompts,
        )
    dropped = ", ".join(f"{count} {reason}" for reason, count in imported.dropped.items()) or "none"
    receipt = imported.receipt
    console.print(f"{receipt.added} pairs added, {receipt.known} known; dropped: {dropped}", soft_wrap=True)


def _show(parsed: argparse.Namespace, storage: Storage, console: Console) -> None:
    with _opened(parsed, storage) as buffer:
        console.print(tables.pair(_one_pair(buffer, parsed.pair_id)))


def _trace(parsed: argparse.Namespace, storage: Storage, console: Console) -> None:
    rounds = pairs_of_version(storage, parsed.version)
    if parsed.ids:
        for pair_id in sorted(set().union(*rounds.values())):
            console.print(pair_id)
    else:
        console.print(tables.rounds(parsed.version, rounds))


def _versions(parsed: argparse.Namespace, storage: Storage, console: Console) -> None:
    pair_id = parsed.pair_id
    if len(pair_id) < PAIR_ID_LENGTH:
        with _opened(parsed, storage) as buffer:
            pair_id = _one_pair(buffer, pair_id)["pair_id"]
    _print_uses([pair_id], storage, console)


def _forget(parsed: argparse.Namespace, storage: Storage, console: Console) -> None:
    with _opened(parsed, storage) as buffer:
        forgotten = buffer.forget(parsed.author)
    console.print(f"{len(forgotten)} pairs of {parsed.author} are deleted.")
    if _print_uses(forgotten, storage, console):
        console.print("Snapshots and versions stay: to be rid of what is in them, delete their folders.")


def _print_uses(pair_ids: Sequence[str], storage: Storage, console: Console) -> bool:
    """Whether any version was trained on any of the pairs."""
    uses = versions_that_saw(storage, pair_ids)
    if uses:
        console.print(tables.uses(uses, live=PolicyRegistry(storage).live()))
    else:
        console.print("No version was trained on any of them.")
    return bool(uses)


def _one_pair(buffer: PreferenceBuffer, beginning: str) -> dict:
    found = buffer.rows(PAIRS.c.pair_id.startswith(beginning, autoescape=True))
    if len(found) != 1:
        raise ValueError(f"{len(found)} pairs have an id that begins with {beginning!r}: give all of one id")
    return found[0]


@contextmanager
def _opened(parsed: argparse.Namespace, storage: Storage) -> Iterator[PreferenceBuffer]:
    """The run's buffer; ValueError where there is none yet."""
    url = sa.make_url(parsed.url or _run_url(storage))
    if url.get_backend_name() == "sqlite":
        if not Path(url.database or "").is_file():
            raise ValueError(f"there is no buffer {url.database}: give the folder of a run as --run_dir")
        # A job that uses the file does not soon let go of it.
        url = url.update_query_dict({"timeout": "1"})
    buffer = PreferenceBuffer(url.render_as_string(hide_password=False), storage)
    try:
        yield buffer
    finally:
        buffer.close()


def _run_url(storage: Storage) -> str:
    if not storage.exists("config.yaml"):
        raise ValueError(f"{storage.root} holds no run: give the folder of one as --run_dir")
    config = yaml.safe_load(storage.read_text("config.yaml"))
    return config.get("buffer", {}).get("url") or default_url(storage)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m dpo_ray.buffer", description=main.__doc__, allow_abbrev=False
    )
    shared = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    shared.add_argument("--run_dir", required=True, help="Folder of the run, or its URL.")
    shared.add_argument("--url", help="Of the store; unset: the run's own.")
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name: str, meaning: str) -> argparse.ArgumentParser:
        return commands.add_parser(
            name, help=meaning, description=meaning, parents=[shared], allow_abbrev=False
        )

    command("stats", "What there is of each source.")
    export = command("export", "Write the pairs as a data set for TRL and `datasets`.")
    export.add_argument("folder", help="Where train.parquet goes.")
    export.add_argument("--source", action="append", help="Only this source; may be repeated.")
    export.add_argument("--first_round", type=int, help="Only this round and later ones.")
    export.add_argument("--last_round", type=int, help="Only this round and earlier ones.")
    rows = command("import", "Put the pairs of a file, a folder or a data set's name into the buffer.")
    rows.add_argument("rows", help="What jobs/offline_dpo.py reads, or an export.")
    rows.add_argument("--split", default="train", help="Split, where it is a data set's name.")
    rows.add_argument(
        "--max_length", type=int, default=1024, help="Longest prompt plus completion, in tokens."
    )
    rows.add_argument(
        "--long_prompts", choices=get_args(LongPrompts), default="drop", help="What becomes of longer rows."
    )
    command("show", "One pair.").add_argument("pair_id", help="Its id, or how the id begins.")
    trace = command("trace", "Which pairs made a policy version.")
    trace.add_argument("version", type=int, help="The version.")
    trace.add_argument("--ids", action="store_true", help="Print the ids of all pairs.")
    versions = command("versions", "Which policy versions saw a pair.")
    versions.add_argument("pair_id", help="Its id, or how the id begins.")
    forget = command("forget", "Delete a person's pairs, and say which versions were trained on them.")
    forget.add_argument("--author", required=True, help="The person's name, as votes have it.")
    return parser


if __name__ == "__main__":
    main(sys.argv[1:], Console(highlight=False))
