"""Tables from the code and from benchmarks/results, put between a page's markers."""

import inspect
import json
import re
import sys
from collections.abc import Callable, Iterable
from dataclasses import fields
from importlib import import_module
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from docs.gen import figures
from fusenorm_openood.detectors.configuration import FuseNormConfig, read_fusenorm
from fusenorm_openood.forward.taps import resolve_taps
from fusenorm_openood.method.atf import atf
from fusenorm_openood.method.fusion import penalty
from fusenorm_openood.method.settings import METHODS, Settings
from fusenorm_openood.storage.configs import config_root, read_config
from tests.zoo.catalogue import CATALOGUE, Architecture

DOCS = Path(__file__).resolve().parent.parent
RESULTS = DOCS.parent / "benchmarks" / "results"
CASES = {
    "resnet18-32x32-b64": "ResNet-18, 64 images of 32x32",
    "resnet18-32x32-b200": "ResNet-18, 200 images of 32x32",
    "resnet50-224x224-b16": "ResNet-50, 16 images of 224x224",
}
MAPS = {
    "resnet18-32x32": "ResNet-18, 64 images of 32x32",
    "resnet18-224x224": "ResNet-18, 16 images of 224x224",
    "resnet50-224x224": "ResNet-50, 16 images of 224x224",
}


def generated() -> dict[Path, str]:
    """Every file that is generated in whole or in part, as it should be."""
    files = {DOCS / "figures" / f"{name}.svg": draw() for name, draw in figures.FIGURES.items()}
    pages = [DOCS.parent / "README.md", *DOCS.glob("*.md"), *DOCS.glob("measured/*.md")]
    for page in pages:
        text = page.read_text(encoding="utf-8")
        filled = MARKED.sub(lambda match: fill(match[1]), text)
        if filled != text or MARKED.search(text):
            files[page] = filled
    return files


# What stands between a page's markers is generated.
MARKED = re.compile(r"<!-- generated: (\S+) -->\n.*?<!-- end -->", re.DOTALL)


def fill(name: str) -> str:
    """A marked part of a page, its table made anew."""
    kind, _, network = name.partition(":")
    made = MEASURED_TABLES[kind](network) if network else TABLES[name]()
    return f"<!-- generated: {name} -->\n\n{made}\n\n<!-- end -->"


def settings() -> str:
    """Every setting with its default and its meaning, from the dataclass."""
    meanings = documented(Settings, "Attributes")
    rows = []
    for field in fields(Settings):
        values = [getattr(settings(), field.name) for settings in METHODS.values()]
        shown = code(values[0])
        for name, value in zip(METHODS, values, strict=True):
            if value != values[0]:
                shown += f"; `{name}`: {code(value)}"
        rows.append((code(field.name), shown, in_detail(field.name, meanings[field.name])))
    return table(("setting", "default", "meaning"), rows)


def sweep() -> str:
    """The values that a search tries by default, from `fusenorm.yml`."""
    values = shipped_config().sweep
    lines = ["postprocessor_sweep:", *(f"  {name}: {tried}" for name, tried in values.items())]
    return "\n".join(["```yaml", *lines, "```"])


def speed_of_atf() -> str:
    rows = [
        (
            MAPS[row["network"]],
            times(1 / row["eager_vs_loop"]),
            times(1 / row["kernel_vs_loop"]),
            times(1 / row["kernel_vs_loop_one_thread"]),
            f"{row['one_thread_vs_all']:.2f}",
        )
        for row in measured("atf")
        if row["shape"] == "all blocks"
    ]
    head = ("feature maps", "torch", "kernel", "kernel, one thread", "two threads over one")
    return table(head, rows)


def speed_of_postprocess() -> str:
    columns = {
        "fusenorm": "`fusenorm`",
        "fusenorm_deviation": "`fusenorm_deviation`",
        "fusenorm_knn": "with KNN",
        "odin_react": "`fusenorm_published`",
        "published": "published implementation",
    }
    found = by_case("vs_forward")
    columns = {c: title for c, title in columns.items() if all(c in of for of in found.values())}
    ratios = measurements("postprocess")["ratios"]
    rows = [
        (
            label,
            *(f"{found[case][output]:.2f}" for output in columns),
            f"{ratios[f'postprocess/{case}/odin_react_vs_published']:.2f}",
        )
        for case, label in CASES.items()
    ]
    return table(("network, batch", *columns.values(), "published settings over it"), rows)


def memory_of_postprocess() -> str:
    columns = {
        "forward": "forward pass",
        "fusenorm": "`fusenorm`",
        "fusenorm_deviation": "`fusenorm_deviation`",
        "fusenorm_knn": "with KNN",
        "odin_react": "`fusenorm_published`",
        "published": "published implementation",
    }
    found = by_case("peak_mebibytes")
    columns = {c: title for c, title in columns.items() if all(c in of for of in found.values())}
    rows = [(CASES[case], *(f"{found[case][c]:.0f}" for c in columns)) for case in CASES]
    return table(("network, batch", *columns.values()), rows)


def speed_of_peers() -> str:
    rows = [
        (
            {"forward": "forward pass alone"}.get(row["method"], row["method"]),
            {"last": "last", "all": "several"}[row["layers"]],
            f"{row['fit_s']:.1f}" if row["fit_s"] else "0",
            f"{row['ms_per_image']:.2f}",
            f"{row['vs_forward']:.2f}",
            f"{row['peak_mebibytes']:.0f}",
        )
        for row in measured("peers")
    ]
    head = ("detector", "layers", "fit, s", "ms per image", "over the forward pass", "memory, MiB")
    return table(head, rows)


def comparison(network: str) -> str:
    """Near- and far-OOD figures of every method on one network, the best far-OOD first."""
    found = pd.read_csv(RESULTS / "compare" / f"{network}.csv", index_col=0)
    found = found.sort_values("far AUROC", ascending=False, kind="stable")
    figures = ["near AUROC", "near FPR@95", "far AUROC", "far FPR@95", "rank"]
    highest = {f"{group} AUROC": found[f"{group} AUROC"].max() for group in ("near", "far")}
    rows = []
    for method, row in found.iterrows():
        cells = [
            f"**{row[name]:.2f}**" if row[name] == highest.get(name) else f"{row[name]:.2f}"
            for name in figures
        ]
        gains = ["" if isinstance(row[g], float) else row[g] for g in ("near gain", "far gain")]
        rows.append((str(method), *cells, *gains))
    near, far = found["best single"].iloc[0].split(" / ")
    return table(("method", *figures, f"near over {near}", f"far over {far}"), rows)


def short_comparison(methods: Iterable[str], folder: str = "compare") -> str:
    """Near / far AUROC of some methods, and of the best single experts, on all networks."""
    paths = sorted((RESULTS / folder).glob("*.csv"))
    found = {TITLES.get(p.stem, p.stem): pd.read_csv(p, index_col=0) for p in paths}
    best, rows = [], []
    for t in found.values():
        single = t.drop(index=[m for m in t.index if m.startswith("FuseNorm") or " alone" in m])
        best.append(f"{single['near AUROC'].max():.1f} / {single['far AUROC'].max():.1f}")
    for name in methods:
        if name == "FuseNorm (default)":
            rows.append(("best single expert of each column", *best))
        cells = [
            f"{t.loc[name, 'near AUROC']:.1f} / {t.loc[name, 'far AUROC']:.1f}"
            if name in t.index
            else ""  # of a run without gradients
            for t in found.values()
        ]
        rows.append((name, *cells))
    return table(("near / far AUROC", *found), rows)


def fit_sizes() -> str:
    """Near / far AUROC of FuseNorm's methods by the number of ID images of the fit."""
    rows = []
    for network in (p.stem for p in sorted((RESULTS / "sizes").glob("*.csv"))):
        found = pd.read_csv(RESULTS / "sizes" / f"{network}.csv", index_col=[0, 1])
        counts, methods = (list(dict.fromkeys(found.index.get_level_values(i))) for i in (0, 1))
        for method in methods:
            near_far = (found.loc[(n, method), ["near", "far"]] for n in counts)
            cells = (f"{near:.2f} / {far:.2f}" for near, far in near_far)
            rows.append((network, method, *cells))
    return table(("network", "method", *(f"{count} images" for count in counts)), rows)


def pseudo_ood() -> str:
    """AUROC of the settings that a search finds on each kind of pseudo-OOD image."""
    found = {
        path.stem: pd.read_csv(path, index_col=0)["AUROC"]
        for path in sorted((RESULTS / "pseudo").glob("*.csv"))
    }
    joined = pd.DataFrame(found)
    rows = [
        (str(name), *(f"{v:.2f}" for v in (*row, row.mean()))) for name, row in joined.iterrows()
    ]
    return table(("searched on", *joined.columns, "mean"), rows)


def large_runs(name: str) -> str:
    """A table of benchmarks/extrapolate.py, about what large runs cost."""
    if str(RESULTS.parent) not in sys.path:
        sys.path.append(str(RESULTS.parent))
    extrapolate = import_module("extrapolate")
    made: str = extrapolate.tables(extrapolate.read_measured(), extrapolate.Assumed())[name]
    return made


def catalogue() -> str:
    """The layers used in each network of the catalogue, a table per group."""
    stages = "stages: layers of height x width + prefix tokens"
    head = ("network", "images", "layers", "layout", stages, "head")
    groups: dict[str, list[Architecture]] = {}
    for entry in CATALOGUE:
        groups.setdefault(entry.group, []).append(entry)
    return "\n\n".join(
        f"## {group}\n\n{table(head, map(catalogue_row, entries))}"
        for group, entries in groups.items()
    )


def catalogue_row(entry: Architecture) -> tuple[str, ...]:
    names = list(dict.fromkeys((entry.taps[0].name, entry.taps[-1].name))) if entry.taps else []
    ends = " to ".join(f"`{name}`" for name in names)
    stages = (
        f"{len(list(taps))} of {height}x{width}" + (f" + {prefix}" if prefix else "")
        for (height, width, prefix), taps in groupby(entry.taps, key=lambda tap: tap[2:])
    )
    return (
        code(entry.network),
        "{}x{}".format(*entry.image),
        f"{len(entry.taps)}: {ends}" if entry.taps else "to be named",
        ", ".join(dict.fromkeys(f"`{tap.layout}`" for tap in entry.taps)),
        ", ".join(stages),
        ", ".join(f"`{layer}`" for layer in entry.head),
    )


def protocol() -> str:
    """The candidates of the protocol that reject what is far off, the best worst margin first."""
    found, networks = candidates()
    rows = [
        (
            name,
            *(
                f"{row[n, 'near']:.1f} / {row[n, 'far']:.1f} / {row[n, 'far-off']:.1f}"
                for n in networks
            ),
            f"{row['worst', 'margin']:.2f}",
            f"{row['worst', 'far-off']:.1f}",
        )
        for name, row in found.iterrows()
    ]
    return table(("candidate", *networks, "worst margin", "far-off, %"), rows)


def candidates() -> tuple[pd.DataFrame, list[str]]:
    """The candidates of the protocol, the best worst margin first, and the networks."""
    found = pd.read_csv(RESULTS / "protocol.csv", header=[0, 1], index_col=0)
    networks = [n for n in dict.fromkeys(found.columns.get_level_values(0)) if n != "worst"]
    return found.sort_values(("worst", "margin"), ascending=False, kind="stable"), networks


def far_off() -> str:
    """What each digits network accepts of what is far off, by method."""
    found = pd.read_csv(RESULTS / "far_off.csv", keep_default_na=False)
    rows = [
        (
            row["network"],
            f"`{row['method']}`",
            f"{row['accepted']:.0f} {row['most']}".strip(),
            f"{row['above 1 %']:.0f}",
            f"{row['near']:.2f} / {row['far']:.2f}",
        )
        for _, row in found.iterrows()
    ]
    return table(("network", "method", "accepted, %", "kinds above 1 %", "near / far"), rows)


def alarm() -> str:
    """False alarms and delays of the alarm for drift, and of other tests."""
    found = pd.read_csv(RESULTS / "alarm.csv", dtype=str)
    shifts = (f"{name} sd" if name[0] in "+-" else name for name in found.columns)
    return table(shifts, found.to_numpy().tolist())


def packages() -> str:
    """Near / far AUROC of each method in each package; packages with equal figures share a row."""
    found = pd.read_csv(RESULTS / "peers_agree.csv", keep_default_na=False)
    networks = list(dict.fromkeys(found["network"]))
    merged: dict[tuple[str, ...], list[tuple[str, str]]] = {}
    for (method, package), of in found.groupby(["method", "package"], sort=False):
        by_network, first = of.set_index("network"), of.iloc[0]
        cells = [near_far(by_network.loc[n], "AUROC") for n in networks if n in by_network.index]
        cells += [""] * (len(networks) - len(cells))
        here = f"`{first['setting']}`" if first["setting"] else "none"
        key = (method, *cells, near_far(first, "FPR@95"), here, first["reason"])
        merged.setdefault(key, []).append((package, first["score"]))
    rows = []
    for (method, *cells), which in merged.items():
        names, scores = (", ".join(dict.fromkeys(each)) for each in zip(*which, strict=True))
        rows.append((method, names, scores, *cells))
    fpr = f"{networks[0]}, FPR@95"
    return table(("method", "package", "score", *networks, fpr, "setting here", "default"), rows)


def near_far(row: Any, figure: str) -> str:
    """The two figures of a network, or what came of them."""
    if row["error"]:
        return "NaN" if row["error"].startswith("NonFinite") else "error"
    return f"{float(row[f'near {figure}']):.2f}/{float(row[f'far {figure}']):.2f}"


def package_metrics() -> str:
    """The figures of packages for the same scores."""
    found = pd.read_csv(RESULTS / "peers_metrics.csv", index_col=[0, 1])
    columns = {
        "1 to 20, twice: FPR@95": ("1 to 20 twice", "FPR@95"),
        "constant: FPR@95": ("constant", "FPR@95"),
        "constant: AUROC": ("constant", "AUROC"),
        "constant: AUPR": ("constant", "AUPR"),
        "20 to 39, 100 to 119: AUROC": ("20 to 39, 100 to 119", "AUROC"),
        "MSP, far: FPR@95": ("MSP, far", "FPR@95"),
        "ID positive": ("MSP, far", "ID positive"),
    }
    rows = []
    for name in dict.fromkeys(found.index.get_level_values(0)):
        cells = [found.loc[(name, case), figure] for case, figure in columns.values()]
        rows.append((f"`{name}`", *("" if np.isnan(c) else f"{c:.2f}" for c in cells)))
    return table(("convention", *columns), rows)


COMPARED = ("FuseNorm (default)", "FuseNorm (deviation)", "FuseNorm (published)")
IMAGENET = "EfficientNet-Lite0"
TITLES = {IMAGENET: "ImageNet-1k"}

MEASURED_TABLES: dict[str, Callable[[str], str]] = {
    "compare": comparison,
    "large": large_runs,
}
TABLES: dict[str, Callable[[], str]] = {
    "results": lambda: short_comparison(
        ("Energy", "GEN", "NCI", "KNN (K = 5)", "fDBD", "MDS", "MDS++", *COMPARED)
    ),
    "results-short": lambda: short_comparison(("Energy", "GEN", *COMPARED)),
    "unseen": lambda: short_comparison(("Energy", "GEN", "NCI", *COMPARED), "unseen"),
    "sizes": fit_sizes,
    "catalogue": catalogue,
    "protocol": protocol,
    "far-off": far_off,
    "alarm": alarm,
    "pseudo": pseudo_ood,
    "packages": packages,
    "package-metrics": package_metrics,
    "settings": settings,
    "sweep": sweep,
    "atf": speed_of_atf,
    "postprocess": speed_of_postprocess,
    "memory": memory_of_postprocess,
    "peers": speed_of_peers,
}


def shipped_config() -> FuseNormConfig:
    """What `fusenorm.yml` says."""
    return read_fusenorm(read_config(config_root() / "postprocessors" / "fusenorm.yml"))


def measured(section: str) -> list[dict[str, Any]]:
    """The rows of one section of benchmarks/run.py's results."""
    rows = measurements(section)["rows"]
    return [row for row in rows if row["section"] == section]


def measurements(section: str) -> dict[str, Any]:
    """The results of the run that measured a section."""
    later = section in ("postprocess", "peers")
    path = RESULTS / ("cpu-methods.json" if later else "cpu.json")
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def by_case(figure: str) -> dict[str, dict[str, float]]:
    """One figure of the postprocess section, by case and output expert."""
    found: dict[str, dict[str, float]] = {}
    for row in measured("postprocess"):
        found.setdefault(row["case"], {})[row["output"]] = row[figure]
    return found


def in_detail(name: str, meaning: str) -> str:
    """What a setting means, from the function that its description refers to, if it has it."""
    for function in (atf, penalty, resolve_taps):
        if re.search(rf"see `{function.__name__}`", meaning):
            return documented(function, "Args").get(name, meaning)
    return meaning


def documented(thing: Any, section: str) -> dict[str, str]:
    """The names of one section of a Google-style docstring, and what it says of each."""
    doc = inspect.getdoc(thing) or ""
    match = re.search(rf"^{section}:\n((?:    .*\n|\n)+)", doc + "\n", re.MULTILINE)
    entries = re.split(r"^    (?=\S)", match[1] if match else "", flags=re.MULTILINE)[1:]
    found: dict[str, str] = {}
    for entry in entries:
        names, _, meaning = " ".join(entry.split()).partition(": ")
        found |= {name: plain(meaning) for name in names.split(", ")}
    return found


def plain(text: str) -> str:
    """A docstring's or a help's text as Markdown of one line."""
    text = re.sub(r":\w+:`~?([^`]+)`", r"`\1`", text).replace("``", "`")
    return escaped(" ".join(text.split()))


def escaped(text: str) -> str:
    """Text for a cell of a table."""
    return text.replace("|", "\\|")


def code(value: object) -> str:
    """A value as it is written in Python; tuples as the lists that YAML has."""
    shown = list(value) if isinstance(value, tuple) else value
    return f"`{shown}`"


def times(ratio: float) -> str:
    return f"{ratio:.1f}"


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    lines = [list(head), *map(list, rows)]
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
