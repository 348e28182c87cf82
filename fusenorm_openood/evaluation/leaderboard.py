"""An entry for OpenOOD's leaderboard, filled in from saved results and their checkpoints.

Since March 2025 entries are pull requests with rows of CSV files; see OpenOOD's issue 285 and the
README of the branch named in `WHERE`.
"""

import csv
import io
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from fusenorm_openood.data.benchmarks import Benchmark, ImageSet, load_benchmark
from fusenorm_openood.data.lists import read_imagelist
from fusenorm_openood.errors import DataError, os_errors
from fusenorm_openood.evaluation.evaluation import COLUMNS
from fusenorm_openood.evaluation.runs import Run
from fusenorm_openood.network import checkpoints, resnet
from fusenorm_openood.storage.configs import config_root, read_config
from fusenorm_openood.storage.files import file_digest

FULL_SIZES: dict[str, dict[str, int]] = read_config(config_root() / "leaderboard.yml")
WHERE = "the branch leaderboard of https://github.com/zjysteven/OpenOOD"
FIELDS = ("Training", "Postprocessor", "Near-OOD_AUROC", "Far-OOD_AUROC", "ID_Accuracy",
          "Outlier_Data", "Arch", "Additional_Description")  # fmt: skip
_FILES = {"imagenet200": "imagenet200_{}", "imagenet": "imagenet1k_{}"}  # ood or fsood
_LINK = "https://github.com/sunshine8641/FuseNorm"
_OURS = {
    "fusenorm": "FuseNorm (default)",
    "fusenorm_published": "FuseNorm (published)",
    "fusenorm_deviation": "FuseNorm (deviation)",
}
# Names in `utils/papers.csv` of the leaderboard; any other name is used as it is.
_UPPER = ("msp", "mls", "ebo", "odin", "knn", "nci", "gen", "she", "scale", "ash", "vim", "ras")
_LISTED = {
    **{name: name.upper() for name in (*_UPPER, "mds", "mds++", "rmds", "rmds++")},
    **{"t2fnorm": "T2FNorm", "react": "ReAct", "fdbd": "fDBD"},
    **{"logitgap": "LogitGap", "mahavar": "MahaVar"},
}
_UNKNOWN = "(to be filled in)"
# OpenOOD's trainers that use only ID images, and their names on the leaderboard.
_TRAININGS = {"base": "CrossEntropy", "t2fnorm": "T2FNorm"}
# OpenOOD's scheme for the folder of training runs: data set, network, trainer and settings.
_ROOT = re.compile(
    r"[^_]+_.+_(?P<trainer>[^_]+)_e(?P<epochs>\d+)_lr(?P<lr>\d[\d.]*(?:e-?\d+)?)(?:_.*)?"
)
_CELL = re.compile(r"\d+\.\d+(?: \u00b1 (\d+\.\d+))?")


class Split(NamedTuple):
    """A tested image list, with its number of images here and in OpenOOD (None = unknown)."""

    role: str
    imagelist: Path
    images: int | None
    full: int | None


def read_results(path: Path, benchmark: Benchmark) -> pd.DataFrame:
    """A results CSV of OpenOOD or of `fusenorm eval`, with its cells as text.

    DataError if it is no table of the benchmark, or a cell is not a percentage.
    """
    again = "evaluate again with --save-csv"
    with os_errors(DataError, f"results {path} cannot be read", again, ValueError):
        table: pd.DataFrame = pd.read_csv(path, index_col=0, dtype=str, keep_default_na=False)
    rows = [*benchmark.near, "nearood", *benchmark.far, "farood"]
    if list(table.columns) != COLUMNS or list(table.index) != rows:
        raise DataError(
            f"{path} must have the rows {', '.join(rows)} and the columns {', '.join(COLUMNS)}, as "
            f"results on {benchmark.name} do, got the rows {', '.join(map(str, table.index))} and "
            f"the columns {', '.join(map(str, table.columns))}: {again}"
        )
    for name, row in table.iterrows():
        for column, cell in row.items():
            if not _CELL.fullmatch(cell):
                raise DataError(
                    f"{column} of {name} in {path} must be a percentage or mean \u00b1 std, got "
                    f"{cell!r}: {again}"
                )
    return table


def splits(benchmark: Benchmark, fsood: bool = False) -> list[Split]:
    """The image lists behind a table, with their sizes here and in OpenOOD."""
    full = FULL_SIZES.get(benchmark.name, {})
    roles: dict[str, Iterable[ImageSet]] = {
        "ID validation": [benchmark.id["val"]],
        "ID test": [benchmark.id["test"]],
        "near-OOD": benchmark.near.values(),
        "far-OOD": benchmark.far.values(),
        "covariate-shifted ID": benchmark.csid.values() if fsood else [],
    }
    return [
        Split(role, s.imagelist, _size(s.imagelist), full.get(s.imagelist.stem))
        for role, image_sets in roles.items()
        for s in image_sets
    ]


def _size(path: Path) -> int | None:
    try:
        return len(read_imagelist(path))
    except DataError:
        return None


def leaderboard_entry(
    postprocessor: str, benchmark: Benchmark, fsood: bool, runs: Mapping[str, Run], results: Path
) -> str:
    """The entry in Markdown: warnings, rows for two files, results, checkpoints and lists.

    The results, full-spectrum or not, are those of training runs of one kind, in a CSV file;
    DataError as of `read_results`.
    """
    table, tested = read_results(results, benchmark), splits(benchmark, fsood)
    (run, first), *_ = runs.items()
    folder = first.checkpoint.parents[1] if run else first.checkpoint.parent
    name, kind = _ROOT.fullmatch(folder.resolve().name), checkpoints.network_kind(first.net)
    trainer = name["trainer"] if name else None
    other = None if trainer in _TRAININGS else trainer
    alias = {**_OURS, **_LISTED}.get(postprocessor, postprocessor)
    row = (
        other or kind.training,
        alias,
        table.loc["nearood", "AUROC"],
        table.loc["farood", "AUROC"],
        table.loc["nearood", "ACC"],
        _UNKNOWN if other else "No",
        re.sub(r"_\d+x\d+", "", kind.architecture),
        f"{name['epochs']} epochs" if name else _UNKNOWN,
    )
    file = _FILES.get(benchmark.name, benchmark.name).format("fsood" if fsood else "ood")
    about = [f"{name['epochs']} epochs", f"learning rate {name['lr']}"] if name else []
    if benchmark.norm != load_benchmark(benchmark.name).norm:
        about.append("images normalised by mean {} and std {}".format(*benchmark.norm))
    about += [f"tau {first.net.tau.item():.3g}"] if isinstance(first.net, resnet.T2FNormNet) else []
    count = f"mean \u00b1 std over {len(runs)} training runs ({', '.join(runs)})"
    about += [count if len(runs) > 1 else "1 training run", f"{benchmark.name} benchmark"]
    about.append("full-spectrum: covariate-shifted ID images count as ID" if fsood else "OOD")
    warnings = [
        *_list_warnings(benchmark, tested, fsood),
        *_run_warnings(table, results, runs.values(), kind.training, trainer),
    ]
    digests = [
        (f"`{_short(r.checkpoint)}`", f"`{file_digest(r.checkpoint)}`") for r in runs.values()
    ]
    lists = [
        (s.role, f"`{s.imagelist.name}`", *("unknown" if n is None else n for n in s[2:]))
        for s in tested
    ]
    parts = [
        *(f"**Warning:** {warning}" for warning in warnings),
        f"A pull request to {WHERE} adds these rows.",
        f"Row for `results/{file}.csv`:",
        _csv(FIELDS, row),
    ]
    if postprocessor not in _LISTED:
        link = _LINK if postprocessor == "fusenorm_published" else _UNKNOWN
        parts += ["Row for `utils/papers.csv`:", _csv(("Alias", "Link"), (alias, link))]
    parts += [
        f"Training and evaluation: {', '.join(about)}.",
        f"Results, from `{_short(results)}`:",
        markdown(["data set", *COLUMNS], table.itertuples(name=None)),
        markdown(["checkpoint", "SHA-256"], digests),
        markdown(["split", "list", "images", "images in OpenOOD v1.5"], lists),
    ]
    return "\n\n".join(parts)


def _list_warnings(benchmark: Benchmark, tested: Sequence[Split], fsood: bool) -> Iterator[str]:
    if benchmark.name not in FULL_SIZES:
        yield f"{benchmark.name} is not an OpenOOD benchmark and has no leaderboard."
        return
    if fsood and benchmark.name not in _FILES:
        yield f"OpenOOD has no full-spectrum leaderboard for {benchmark.name}."
    sized = [(s.imagelist.stem, s.images, s.full) for s in tested if s.images and s.full]
    if other := [f"{name} {here} of {full}" for name, here, full in sized if here != full]:
        yield (
            "results on subsets do not belong on the leaderboard, and these image lists differ in "
            f"length from OpenOOD's: {', '.join(other)} images."
        )
    if missing := [s.imagelist.name for s in tested if s.images is None]:
        yield (
            f"the image lists {', '.join(missing)} cannot be read under the data root, so it is "
            "unknown whether the results are on OpenOOD's full lists."
        )


def _run_warnings(
    table: pd.DataFrame, results: Path, runs: Collection[Run], training: str, trainer: str | None
) -> Iterator[str]:
    for run in runs:
        if run.is_unfinished:
            yield f"training run {_short(run.checkpoint)} is not finished."
    written, csv_file = results.stat().st_mtime, _short(results)
    folder, trials = results.resolve().parent.parent, f"aps/{results.name}"
    if any((*folder.glob(trials), *folder.glob(f"*/{trials}"))):
        yield (
            f"settings were searched beside {csv_file}: if it holds results with them, "
            "say so in the row."
        )
    paths = [run.checkpoint for run in runs]
    if newer := [_short(path) for path in paths if path.stat().st_mtime > written]:
        yield (
            f"{', '.join(newer)} {'are' if len(newer) > 1 else 'is'} newer than {csv_file}, whose "
            "results may belong to an earlier checkpoint: evaluate again."
        )
    stds = [match[1] for cell in table.to_numpy().flat if (match := _CELL.fullmatch(cell))]
    varies = any(std is not None and float(std) > 0 for std in stds)
    if varies != (len(runs) > 1):
        yield (
            f"{csv_file} holds results of {'several runs' if varies else 'a single run'}, but the "
            f"root has {len(runs)} training run{'s' * (len(runs) > 1)}: evaluate again."
        )
    if trainer not in (None, *_TRAININGS):
        yield (
            f"the trainer {trainer} is unknown to this package: fill in by hand whether it uses "
            "outlier data."
        )
    elif trainer and _TRAININGS[trainer] != training:
        yield (
            f"the folder is named after {_TRAININGS[trainer]} training, but the keys of its "
            f"checkpoints are those of {training} training."
        )


def _short(path: Path) -> str:
    """The last three parts of a path, which do not depend on the machine."""
    return "/".join(["\u2026", *path.resolve().parts[1:][-3:]])


def _csv(*rows: Sequence[object]) -> str:
    """Rows as a Markdown block of CSV."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return f"```csv\n{text.getvalue()}```"


def markdown(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table in Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)
