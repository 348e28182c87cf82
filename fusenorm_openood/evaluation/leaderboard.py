"""An entry for OpenOOD's leaderboard, filled in from saved results and their checkpoints.

Since March 2025 entries are pull requests with rows of CSV files; see OpenOOD's issue 285 and the
README of the branch named in `WHERE`.
"""

import csv
import io
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import pandas as pd
from torch import nn

from fusenorm_openood.data.benchmarks import Benchmark, ImageSet
from fusenorm_openood.data.lists import read_imagelist
from fusenorm_openood.errors import DataError
from fusenorm_openood.evaluation.evaluation import COLUMNS
from fusenorm_openood.evaluation.runs import RootName, parse_root_name, unfinished
from fusenorm_openood.network.checkpoints import NetworkKind, network_kind
from fusenorm_openood.network.resnet import T2FNormNet
from fusenorm_openood.storage.files import file_digest

_LARGE = {
    "test_ssb_hard": 49000,
    "test_ninco": 5879,
    "test_inaturalist": 10000,
    "test_textures": 5160,
    "test_openimage_o": 15869,
}
_SMALL = {"test_mnist": 70000, "test_svhn": 26032, "test_texture": 5640}
# Number of images in each list of OpenOOD v1.5, counted in the copies in the public repositories
# glhr/COOkeD, glhr/ood-labelnoise and moxime/ooddict; OpenOOD's issue 259 confirms test_tin. The
# list of ImageNet-ES was not available.
FULL_SIZES: dict[str, dict[str, int]] = {
    "cifar10": {
        **_SMALL,
        "val_cifar10": 1000,
        "test_cifar10": 9000,
        "test_cifar100": 9000,
        "test_tin": 7793,
        "test_places365": 35195,
        "test_cifar10c": 10000,
    },
    "cifar100": {
        **_SMALL,
        "val_cifar100": 1000,
        "test_cifar100": 9000,
        "test_cifar10": 10000,
        "test_tin": 6526,
        "test_places365": 33773,
    },
    "imagenet200": {
        **_LARGE,
        "val_imagenet200": 1000,
        "test_imagenet200": 9000,
        "test_imagenet200_c": 2000,
        "test_imagenet200_r": 30000,
        "test_imagenet200_v2": 2000,
    },
    "imagenet": {
        **_LARGE,
        "val_imagenet": 5000,
        "test_imagenet": 45000,
        "test_imagenet_c": 10000,
        "test_imagenet_r": 30000,
        "test_imagenet_v2": 10000,
    },
}
WHERE = "the branch leaderboard of https://github.com/zjysteven/OpenOOD"
FIELDS = ("Training", "Postprocessor", "Near-OOD_AUROC", "Far-OOD_AUROC", "ID_Accuracy",
          "Outlier_Data", "Arch", "Additional_Description")  # fmt: skip
_FILES = {"imagenet200": "imagenet200_{}", "imagenet": "imagenet1k_{}"}  # ood or fsood
_LINK = "https://github.com/sunshine8641/FuseNorm"
_OURS = {
    "fusenorm": "FuseNorm",
    "fusenorm_published": "FuseNorm (published settings)",
    "fusenorm_joint": "FuseNorm (joint)",
}
# Names in `utils/papers.csv` of the leaderboard; any other name is used as it is.
_LISTED = {
    "t2fnorm": "T2FNorm",
    "ebo": "EBO",
    "react": "ReAct",
    "fdbd": "fDBD",
    "mds": "MDS++",
    **{n: n.upper() for n in ("msp", "mls", "odin", "knn", "nci", "gen", "scale", "ash", "vim")},
    "she": "SHE",
}
_UNKNOWN = "(to be filled in)"
# OpenOOD's trainers that use only ID images, and their names on the leaderboard.
_TRAININGS = {"base": "CrossEntropy", "t2fnorm": "T2FNorm"}
_CELL = re.compile(r"\d+\.\d+(?: \u00b1 (\d+\.\d+))?")


class Split(NamedTuple):
    """A tested image list, with its number of images here and in OpenOOD (None = unknown)."""

    role: str
    imagelist: Path
    images: int | None
    full: int | None


def read_results(path: Path, benchmark: Benchmark) -> pd.DataFrame:
    """A results CSV of OpenOOD or of `fusenorm eval`, with its cells as text.

    Raises:
        DataError: not a table of the benchmark, or a cell that is not a percentage.
    """
    try:
        table: pd.DataFrame = pd.read_csv(path, index_col=0, dtype=str, keep_default_na=False)
    except (OSError, ValueError) as error:
        raise DataError(
            f"results {path} cannot be read ({error}): evaluate again with --save-csv"
        ) from None
    rows = [*benchmark.near, "nearood", *benchmark.far, "farood"]
    if list(table.columns) != COLUMNS or list(table.index) != rows:
        raise DataError(
            f"{path} must have the rows {', '.join(rows)} and the columns {', '.join(COLUMNS)}, as "
            f"results on {benchmark.name} do, got the rows {', '.join(map(str, table.index))} and "
            f"the columns {', '.join(map(str, table.columns))}: evaluate again with --save-csv"
        )
    for name, row in table.iterrows():
        for column, cell in row.items():
            if not _CELL.fullmatch(str(cell)):
                raise DataError(
                    f"{column} of {name} in {path} must be a percentage or mean \u00b1 std, got "
                    f"{cell!r}: evaluate again with --save-csv"
                )
    return table


def splits(benchmark: Benchmark, fsood: bool = False) -> list[Split]:
    """The image lists behind a table, with their sizes here and in OpenOOD."""
    full = FULL_SIZES.get(benchmark.name, {})
    groups: dict[str, Iterable[ImageSet]] = {
        "ID validation": [benchmark.id["val"]],
        "ID test": [benchmark.id["test"]],
        "near-OOD": benchmark.near.values(),
        "far-OOD": benchmark.far.values(),
        "covariate-shifted ID": benchmark.csid.values() if fsood else [],
    }
    return [
        Split(role, path, _size(path), full.get(path.stem))
        for role, image_sets in groups.items()
        for path in (image_set.imagelist for image_set in image_sets)
    ]


def leaderboard_entry(
    postprocessor: str,
    benchmark: Benchmark,
    fsood: bool,
    checkpoints: Mapping[str, Path],
    networks: Mapping[str, nn.Module],
    results: Path,
) -> str:
    """The entry in Markdown: rows for two files, warnings, results, checkpoints and lists.

    Args:
        postprocessor: name of the postprocessor, as in OpenOOD.
        benchmark: the benchmark of the results.
        fsood: whether the results are full-spectrum.
        checkpoints, networks: by training run, all of one kind.
        results: CSV file with the results; see `read_results`.

    Raises:
        DataError: the CSV file holds no results on the benchmark.
    """
    table, net = read_results(results, benchmark), next(iter(networks.values()))
    run, path = next(iter(checkpoints.items()))
    name = parse_root_name(path.parents[1] if run else path.parent)
    trainer = name.trainer if name and name.trainer not in _TRAININGS else None
    kind, tested = network_kind(net), splits(benchmark, fsood)
    alias = {**_OURS, **_LISTED}.get(postprocessor, postprocessor)
    row = (
        trainer or kind.training,
        alias,
        table.loc["nearood", "AUROC"],
        table.loc["farood", "AUROC"],
        table.loc["nearood", "ACC"],
        _UNKNOWN if trainer else "No",
        re.sub(r"_\d+x\d+", "", kind.architecture),
        f"{name.epochs} epochs" if name else _UNKNOWN,
    )
    file = _FILES.get(benchmark.name, benchmark.name).format("fsood" if fsood else "ood")
    rows = [f"Row for `results/{file}.csv`:", _csv(FIELDS, row)]
    if postprocessor not in _LISTED:
        link = _LINK if postprocessor in _OURS else _UNKNOWN
        rows += ["Row for `utils/papers.csv`:", _csv(("Alias", "Link"), (alias, link))]
    warnings = [
        *_list_warnings(benchmark, tested, fsood),
        *_run_warnings(table, results, checkpoints),
        *_training_warnings(kind, name),
    ]
    runs = [(f"`{_short(p)}`", f"`{file_digest(p)}`") for p in checkpoints.values()]
    lists = [(s.role, f"`{s.imagelist.name}`", _or(s.images), _or(s.full)) for s in tested]
    parts = [
        f"A pull request to {WHERE} adds these rows.",
        *rows,
        f"About them: {_description(net, name, benchmark, fsood, list(checkpoints))}.",
        *(f"**Warning:** {warning}" for warning in warnings),
        f"Results, from `{_short(results)}`:",
        _markdown(["data set", *COLUMNS], [(str(i), *row) for i, row in table.iterrows()]),
        _markdown(["checkpoint", "SHA-256"], runs),
        _markdown(["split", "list", "images", "images in OpenOOD v1.5"], lists),
    ]
    return "\n\n".join(parts)


def _description(
    net: nn.Module, name: RootName | None, benchmark: Benchmark, fsood: bool, runs: Sequence[str]
) -> str:
    trained = [f"{name.epochs} epochs", f"learning rate {name.lr}"] if name else []
    tau = [f"tau {net.tau.item():.3g}"] if isinstance(net, T2FNormNet) else []
    count = "1 training run"
    if len(runs) > 1:
        count = f"mean \u00b1 std over {len(runs)} training runs ({', '.join(runs)})"
    regime = "full-spectrum: covariate-shifted ID images count as ID" if fsood else "OOD"
    return ", ".join([*trained, *tau, count, f"{benchmark.name} benchmark", regime])


def _list_warnings(benchmark: Benchmark, tested: Sequence[Split], fsood: bool) -> list[str]:
    if benchmark.name not in FULL_SIZES:
        return [f"{benchmark.name} is not an OpenOOD benchmark and has no leaderboard."]
    missing = [s.imagelist.name for s in tested if s.images is None]
    other = [
        f"{s.imagelist.stem} {s.images} of {s.full}"
        for s in tested
        if None not in (s.images, s.full) and s.images != s.full
    ]
    warnings = []
    if fsood and benchmark.name not in _FILES:
        warnings.append(f"OpenOOD has no full-spectrum leaderboard for {benchmark.name}.")
    if other:
        warnings.append(
            "results on subsets do not belong on the leaderboard, and these image lists differ in "
            f"length from OpenOOD's: {', '.join(other)} images."
        )
    if missing:
        warnings.append(
            f"the image lists {', '.join(missing)} cannot be read under the data root, so it is "
            "unknown whether the results are on OpenOOD's full lists."
        )
    return warnings


def _run_warnings(table: pd.DataFrame, results: Path, checkpoints: Mapping[str, Path]) -> list[str]:
    written = results.stat().st_mtime
    newer = [_short(path) for path in checkpoints.values() if path.stat().st_mtime > written]
    stds = [m[1] for row in table.to_numpy() for c in row if (m := _CELL.fullmatch(c))]
    varies = any(std is not None and float(std) > 0 for std in stds)
    warnings = [
        f"training run {_short(p)} is not finished." for p in checkpoints.values() if unfinished(p)
    ]
    if newer:
        warnings.append(
            f"{', '.join(newer)} {'are' if len(newer) > 1 else 'is'} newer than {_short(results)}, "
            "whose results may belong to an earlier checkpoint: evaluate again."
        )
    if varies != (len(checkpoints) > 1):
        found = "several runs" if varies else "a single run"
        warnings.append(
            f"{_short(results)} holds results of {found}, but the root has {len(checkpoints)} "
            f"training run{'s' if len(checkpoints) > 1 else ''}: evaluate again."
        )
    return warnings


def _training_warnings(kind: NetworkKind, name: RootName | None) -> list[str]:
    if name is None or _TRAININGS.get(name.trainer) == kind.training:
        return []
    if name.trainer in _TRAININGS:
        return [
            f"the folder is named after {_TRAININGS[name.trainer]} training, but the keys of its "
            f"checkpoints are those of {kind.training} training."
        ]
    return [
        f"the trainer {name.trainer} is unknown to this package: fill in by hand whether it uses "
        "outlier data."
    ]


def _size(path: Path) -> int | None:
    try:
        return len(read_imagelist(path))
    except DataError:
        return None


def _short(path: Path) -> str:
    """The last three parts of a path, which do not depend on the machine."""
    return "/".join(path.resolve().parts[-3:])


def _or(size: int | None) -> str:
    return "unknown" if size is None else str(size)


def _csv(header: Sequence[str], row: Sequence[object]) -> str:
    """A header and a row as a Markdown block of CSV."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([header, row])
    return f"```csv\n{text.getvalue()}```"


def _markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)
