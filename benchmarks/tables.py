"""The tables of docs/measured, as CSV files in benchmarks/results.

    python benchmarks/tables.py TABLE NAME:ID_DATA:DATA_ROOT:CHECKPOINT[:NORMALIZATION] ...
        [--limit N] [--forward-only]

compare: `fusenorm compare` on each network. unseen: the same, for networks that took no part in any
choice. sizes: FuseNorm fitted on 100 to 1000 ID images.
pseudo: which settings a search finds on each kind of pseudo-OOD image, and how good they are.
--limit takes the first N lines of each test list, --forward-only leaves out what needs gradients.
"""

import argparse
import dataclasses
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from torch import nn
from torch.utils.data import DataLoader, Subset

from fusenorm_openood import FuseNorm, load_network
from fusenorm_openood.data.benchmarks import Benchmark, ImageSet, image_loader, load_benchmark
from fusenorm_openood.data.preprocessing import NORMALIZATIONS
from fusenorm_openood.detectors.bank import ScoreBank
from fusenorm_openood.detectors.configuration import read_fusenorm
from fusenorm_openood.detectors.search import choose, pseudo_ood, swept
from fusenorm_openood.detectors.single import SingleScore
from fusenorm_openood.evaluation.comparison import FUSENORM, compare
from fusenorm_openood.evaluation.evaluation import evaluate
from fusenorm_openood.method.metrics import ood_metrics
from fusenorm_openood.method.settings import Settings
from fusenorm_openood.storage.configs import config_root, read_config

RESULTS = Path(__file__).parent / "results"


class Network(NamedTuple):
    """A network and its benchmark, under the name that tables show."""

    name: str
    net: nn.Module
    benchmark: Benchmark


def read_network(text: str) -> Network:
    name, id_data, data_root, checkpoint, *rest = text.split(":")
    normalization = NORMALIZATIONS[rest[0]] if rest else None
    benchmark = load_benchmark(id_data, data_root, normalization)
    return Network(name, load_network(checkpoint), benchmark)


def shortened(benchmark: Benchmark, lines: slice, folder: Path) -> Benchmark:
    """A benchmark with some lines of each test list, in lists that are written to a folder."""

    def part(image_set: ImageSet) -> ImageSet:
        kept = image_set.imagelist.read_text().splitlines(keepends=True)[lines]
        path = folder / image_set.imagelist.name
        path.write_text("".join(kept))
        return dataclasses.replace(image_set, imagelist=path)

    near, far = ({n: part(s) for n, s in sets.items()} for sets in (benchmark.near, benchmark.far))
    of_id = {**benchmark.id, "test": part(benchmark.id["test"])}
    return dataclasses.replace(benchmark, id=of_id, near=near, far=far)


def compared(network: Network, gradients: bool = True) -> pd.DataFrame:
    """AUROC, FPR@95, mean ranks and intervals of every method."""
    result = compare(network.net, network.benchmark, progress=False, gradients=gradients)
    best = [name.split(" over ")[1] for name in result.summary.columns if " over " in name]
    names = (
        "near AUROC",
        "near FPR@95",
        "far AUROC",
        "far FPR@95",
        "rank",
        "near gain",
        "far gain",
    )
    table = result.summary.set_axis(names, axis=1)
    table["best single"] = " / ".join(best)
    return table.join(result.auroc.drop(columns=["nearood", "farood"]))


def sizes(network: Network) -> pd.DataFrame:
    """AUROC of FuseNorm's methods fitted on the first ID validation images of a random order."""
    val = network.benchmark.id["val"]
    lines = [line for line in val.imagelist.read_text().splitlines() if line.strip()]
    order = np.random.default_rng(0).permutation(len(lines))
    rows = {}
    for count in (100, 200, 400, 1000):
        if count > len(lines):
            continue
        with tempfile.TemporaryDirectory() as folder:
            shorter = Path(folder, val.imagelist.name)
            shorter.write_text("\n".join(lines[i] for i in sorted(order[:count])) + "\n")
            part = dataclasses.replace(val, imagelist=shorter)
            benchmark = dataclasses.replace(
                network.benchmark, id={**network.benchmark.id, "val": part}
            )
            detectors = {n: FuseNorm(network.net, settings) for n, settings in FUSENORM.items()}
            for name, detector in {"Energy": SingleScore(network.net, "ebo"), **detectors}.items():
                if name == "FuseNorm (published)":  # which needs gradients
                    continue
                auroc = evaluate(detector, benchmark, progress=False).table["AUROC"]
                rows[count, name] = {"near": auroc["nearood"], "far": auroc["farood"]}
    table = pd.DataFrame(rows).T
    table.index.names = ["images", "method"]
    return table


def pseudo(network: Network) -> pd.DataFrame:
    """AUROC on one half of the OOD validation images of the settings found on other images."""
    sweep = read_fusenorm(read_config(config_root() / "postprocessors" / "fusenorm.yml")).sweep
    id_val = image_loader(network.benchmark.id["val"])
    images = network.benchmark.val_ood.images()
    halves = [DataLoader(Subset(images, range(i, len(images), 2)), 200) for i in (0, 1)]
    kinds = {loader.kind: [loader] for loader in pseudo_ood(id_val)}
    bank = ScoreBank(network.net, [Settings(), *swept(Settings(), sweep)]).fit(id_val)
    for loader in [*halves, *(loaders[0] for loaders in kinds.values())]:
        bank.add(loader)
    every = [loader for loaders in kinds.values() for loader in loaders]
    sources = {
        **kinds,
        **{f"all but {kind}": [x for x in every if x.kind != kind] for kind in kinds},
        "all": every,
        "OOD validation images": [halves[0]],
        "best in hindsight": [halves[1]],
    }
    rows = {}
    for name, loaders in sources.items():
        found = choose(bank, Settings(), sweep, loaders)
        rows[name] = (_auroc(bank, found.settings, halves[1]), *_values(found.settings, sweep))
    rows["default"] = (_auroc(bank, Settings(), halves[1]), *_values(Settings(), sweep))
    return pd.DataFrame(rows, ["AUROC", *sweep]).T


def _auroc(bank: ScoreBank, settings: Settings, loader: DataLoader[object]) -> float:
    known, unknown = (bank.scored(settings, x).conf for x in (bank.id_loader, loader))
    return 100 * ood_metrics(known, unknown).auroc


def _values(settings: Settings, sweep: Sequence[str]) -> list[str]:
    return [str(getattr(settings, name)) for name in sweep]


TABLES: dict[str, Callable[..., pd.DataFrame]] = {
    "compare": compared,
    "unseen": compared,
    "sizes": sizes,
    "pseudo": pseudo,
}


def write(name: str, network: Network, **changes: bool) -> None:
    """Make the table of a network, print it, and write it to its file."""
    path = RESULTS / name / f"{network.name}.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    table = TABLES[name](network, **changes)
    table.to_csv(path, float_format="%.2f")
    print(f"\n{network.name}:\n{table.to_string(float_format='{:.2f}'.format)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("table", choices=TABLES)
    parser.add_argument("networks", nargs="+")
    parser.add_argument("--limit", type=int, help="images of each test list")
    parser.add_argument("--forward-only", action="store_true", help="for the table compare")
    args = parser.parse_args()
    for text in args.networks:
        network = read_network(text)
        with tempfile.TemporaryDirectory() as folder:
            tested = shortened(network.benchmark, slice(args.limit), Path(folder))
            changes = {"gradients": False} if args.forward_only else {}
            write(args.table, network._replace(benchmark=tested), **changes)


if __name__ == "__main__":
    main()
