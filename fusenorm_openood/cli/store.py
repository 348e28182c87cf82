"""`fusenorm store`: what is stored, whether it is intact, and what can go."""

from argparse import ArgumentParser, Namespace
from pathlib import Path

from fusenorm_openood import __version__
from fusenorm_openood.cli import options
from fusenorm_openood.storage import maintenance, shards

LISTED = ("postprocessor", "network", "checkpoint", "version")  # of what scores depend on


def add_store(parser: ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    summaries = {
        "list": "the sets of scores, what they were computed with, and how complete they are",
        "verify": "read all shards and report damaged ones (exit status 1)",
        "prune": "remove sets of other versions of this package, and leftover temporary files",
    }
    parsers = {}
    for name, summary in summaries.items():
        parsers[name] = actions.add_parser(name, help=summary, description=f"{summary}.")
        folder = "folder of the stored scores (default: results/store)"
        options.add(parsers[name], "--store", help=folder)
    parsers["verify"].add_argument("--discard", action="store_true", help="delete damaged shards")
    add = parsers["prune"].add_argument
    add("--incomplete", action="store_true", help="also remove sets with missing shards")
    add("--all", action="store_true", help="remove all sets")
    add("--dry-run", action="store_true", help="only print what would be removed")


def run_store(args: Namespace) -> int:
    """List, verify or prune a store; 0 = success, 1 = damaged shards were found."""
    return {"list": _list, "verify": _verify, "prune": _prune}[args.action](Path(args.store), args)


def _list(store: Path, args: Namespace) -> int:
    import pandas as pd  # takes long to import, and the other actions do not need it

    entries = maintenance.listing(store)
    if not entries:
        print(f"{store} has no sets of scores")
        return 0
    rows = [
        {
            "set": entry.folder.name,
            **{name: str(entry.record.get(name, "-"))[:16] for name in LISTED},
            "rows": entry.rows,
            "shards": f"{entry.present}/{entry.shards}",
            "MB": f"{entry.size / 1e6:.2f}",
        }
        for entry in entries
    ]
    print(pd.DataFrame(rows).to_string(index=False))
    complete, size = sum(e.complete for e in entries), sum(e.size for e in entries)
    print(f"\n{len(entries)} sets, {complete} complete, {size / 1e6:.2f} MB")
    return 0


def _verify(store: Path, args: Namespace) -> int:
    checked = maintenance.verify(store)
    damaged = {path: error for path, error in checked.items() if error}
    for path, error in damaged.items():
        print(error)
        if args.discard:
            shards.delete(path)
    verb = "discarded" if args.discard else "damaged"
    print(f"{len(checked)} shards read, {len(damaged)} {verb}")
    return int(bool(damaged))


def _prune(store: Path, args: Namespace) -> int:
    what = {"incomplete": args.incomplete, "everything": args.all, "dry_run": args.dry_run}
    removals = maintenance.prune(store, __version__, **what)
    verb = "would remove" if args.dry_run else "removed"
    for removal in removals:
        print(f"{verb} {removal.path} ({removal.reason}): {removal.size / 1e6:.2f} MB")
    total = sum(removal.size for removal in removals)
    print(f"{verb} {len(removals)} sets and files: {total} bytes")
    return 0
