"""`fusenorm store`: what is stored, whether it is intact, and what can go."""

from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

from fusenorm_openood.storage.maintenance import Entry, listing, prune, verify
from fusenorm_openood.storage.shards import delete
from fusenorm_openood.version import __version__

TOLD = ("postprocessor", "network", "checkpoint", "version")  # entries of a record that are listed


def add_arguments(parser: ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    summaries = {
        "list": "the sets of scores, what they were computed with, and how complete they are",
        "verify": "read all shards and report damaged ones (exit status 1)",
        "prune": "remove sets of other versions of this package, and leftover temporary files",
    }
    parsers = {}
    for name, summary in summaries.items():
        parsers[name] = actions.add_parser(name, help=summary, description=f"{summary}.")
        help = "folder of the stored scores (default: results/store)"
        parsers[name].add_argument("--store", default="results/store", metavar="DIR", help=help)
    parsers["verify"].add_argument("--discard", action="store_true", help="delete damaged shards")
    add = parsers["prune"].add_argument
    add("--incomplete", action="store_true", help="also remove sets with missing shards")
    add("--all", action="store_true", help="remove all sets")
    add("--dry-run", action="store_true", help="only print what would be removed")


def run(args: Namespace) -> int:
    """List, verify or prune a store; 0 = success, 1 = damaged shards were found."""
    store = Path(args.store)
    if args.action == "list":
        return _list(store)
    if args.action == "verify":
        return _verify(store, args.discard)
    return _prune(store, args)


def _list(store: Path) -> int:
    import pandas as pd  # takes long to import, and the other actions do not need it

    entries = listing(store)
    if not entries:
        print(f"{store} has no sets of scores")
        return 0
    table = pd.DataFrame([_row(entry) for entry in entries])
    print(table.to_string(index=False))
    complete = sum(entry.complete for entry in entries)
    size = sum(entry.size for entry in entries)
    print(f"\n{len(entries)} sets, {complete} complete, {_megabytes(size)} MB")
    return 0


def _verify(store: Path, discard: bool) -> int:
    checked = verify(store)
    damaged = {path: error for path, error in checked.items() if error}
    for path, error in damaged.items():
        print(error)
        if discard:
            delete(path)
    print(f"{len(checked)} shards read, {len(damaged)} {'discarded' if discard else 'damaged'}")
    return int(bool(damaged))


def _prune(store: Path, args: Namespace) -> int:
    removals = prune(
        store,
        __version__,
        incomplete=args.incomplete,
        everything=args.all,
        dry_run=args.dry_run,
    )
    verb = "would remove" if args.dry_run else "removed"
    for removal in removals:
        print(f"{verb} {removal.path} ({removal.reason}): {_megabytes(removal.size)} MB")
    total = sum(removal.size for removal in removals)
    print(f"{verb} {len(removals)} sets and files: {total} bytes")
    return 0


def _row(entry: Entry) -> dict[str, Any]:
    told = {name: str(entry.record.get(name, "-"))[:16] for name in TOLD}
    shards = f"{entry.present}/{entry.shards}"
    size = _megabytes(entry.size)
    return {"set": entry.folder.name, **told, "rows": entry.rows, "shards": shards, "MB": size}


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.2f}"
