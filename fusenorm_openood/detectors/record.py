"""What a file keeps of a fitted FuseNorm, and whether a fit can have given it."""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusenorm_openood.data.preprocessing import Preprocessing, as_pair
from fusenorm_openood.detectors.statistics import DetectorStatistics, unpacked
from fusenorm_openood.errors import ConfigError, FuseNormError
from fusenorm_openood.forward.taps import NO_LAYERS
from fusenorm_openood.method.calibration import PREDICTED, Calibrated, Calibration
from fusenorm_openood.method.scores import POSTHOC, make_score
from fusenorm_openood.method.scores.base import Score
from fusenorm_openood.method.settings import Settings
from fusenorm_openood.network.fingerprint import Fingerprint
from fusenorm_openood.network.layouts import LAYOUTS
from fusenorm_openood.network.structure import Structure
from fusenorm_openood.storage.configs import typed
from fusenorm_openood.storage.detector_file import Contents


class Source(NamedTuple):
    """How the command line builds the network; see `fusenorm fit`."""

    network: str | None = None
    weights: str | None = None
    image_size: str | None = None


class Groups(NamedTuple):
    """All of a `Calibration` that is no tensor; the names of predicted classes are left out."""

    history: tuple[Calibrated, ...]
    by: str | None
    names: tuple[str, ...]
    least: int


class Record(NamedTuple):
    """All of a detector file that is no tensor; see `DetectorStatistics`."""

    version: str
    settings: dict[str, Any]
    experts: tuple[str, ...]
    strong: tuple[str, ...]
    thresholds: tuple[tuple[float, float], ...]
    posthoc: tuple[tuple[str, dict[str, Any]], ...]
    trust: tuple[float, ...]
    network: Fingerprint
    structure: Structure | None
    preprocessing: Preprocessing | None
    class_names: tuple[str, ...] | None
    source: Source = Source()
    calibration: Groups | None = None


# The states of scores: see `Score.state`.
WHOLE = ("counts", "classes")  # are int64, all else is float32
LARGEST = 2**14  # pixels in a row of an image
OVERFLOWS = 1e15  # what experts square in float32, and would blame the network for


def read_record(
    contents: Contents,
) -> tuple[Record, DetectorStatistics, Calibration | None]:
    """The parts of a detector file; ConfigError that names what no fit can have given."""
    given = {name: value for name, value in contents.record.items() if name in Record._fields}
    structure = given.get("structure")
    if structure is not None:
        structure = Structure.from_json(typed(dict[str, Any], structure, "structure"))
    record: Record = typed(Record, {**given, "structure": None}, "the record")
    record = record._replace(structure=structure)
    with _naming("settings"):
        settings = Settings.from_mapping(record.settings)
    with _naming("posthoc"):
        posthoc = [make_score(name, arguments) for name, arguments in record.posthoc]
    _require(_of_record(record, settings, posthoc))
    _check_tensors(record, contents.tensors)
    with _naming("id_scores"):
        statistics = unpacked(contents.tensors, record._asdict())
    return record, statistics, _calibration(record, contents.tensors)


@contextmanager
def _naming(field: str) -> Iterator[None]:
    """Context in which an error is one of a field."""
    try:
        yield
    except FuseNormError as error:
        raise ConfigError(f"{field}: {error}") from None


Rule = tuple[str, bool, str]  # field, whether it is right, what it must be


def _require(rules: Iterator[Rule]) -> None:
    for field, is_right, what in rules:  # the first that is broken: later ones rely on it
        if not is_right:
            raise ConfigError(f"{field} must be {what}")


def _of_record(r: Record, settings: Settings, posthoc: list[Score]) -> Iterator[Rule]:
    names = [name for name in r.experts if name in NO_LAYERS]
    taps = r.experts[: len(r.experts) - len(names)]
    yield "experts", [*taps, *names] == [*dict.fromkeys(r.experts)], "taps, then others, each once"
    yield "strong", 0 < len(set(r.strong)) == len(r.strong), "experts, each once"
    yield "strong", set(names) <= set(r.strong) <= set(r.experts), "among the experts"
    q, n = settings.react_percentile, r.network
    clips = q is not None and "output" in names
    yield "thresholds", not clips or q in dict(r.thresholds), f"for the percentile {q}"
    needed = [settings.score(name) for name in names if name in POSTHOC]
    yield "posthoc", posthoc == needed, "those of experts and settings"
    yield "trust", len(r.trust) == len(needed), "one for each score that was fitted"
    yield "trust", all(0 <= weight <= 1 for weight in r.trust), "in [0, 1]"
    yield "network.weights", bool(re.fullmatch("[0-9a-f]{64}", n.weights)), "a SHA-256"
    yield "network.image", not n.image or (len(n.image) == 3 and min(n.image) > 0), "a shape"
    yield "network.image", max(n.image, default=0) < LARGEST, f"below {LARGEST}"
    rows = {*map(len, n.logits)}
    yield "network.logits", len(n.logits) == (2 if n.image else 0), "a row for each fixed image"
    yield "network.logits", rows <= {max(rows, default=0)} - {0}, "rows of one length"
    yield "network.rounding", 0 <= n.rounding < 0.1, "a small share"
    size = r.source.image_size or "1"
    yield "source.image_size", bool(re.fullmatch("[1-9][0-9]{0,3}", size)), "a number of pixels"
    if r.preprocessing is not None:
        largest = max(*as_pair(r.preprocessing.resize), *r.preprocessing.crop)
        yield "preprocessing", largest < LARGEST, f"of sizes below {LARGEST}"
        fits = n.image[:1] in ((), (r.preprocessing.channels,))
        yield "preprocessing", fits, f"of the {n.image[:1]} channels of the network"
    if r.structure is not None:
        yield from _of_structure(r.structure)
        known = r.class_names is not None
        named = len(r.class_names or ()) == r.structure.classes
        yield "class_names", named or not known, f"the names of {r.structure.classes} classes"


def _of_structure(s: Structure) -> Iterator[Rule]:
    yield "structure.classes", s.classes >= 2, "at least 2"
    yield "structure.smallest_batch", 1 <= s.smallest_batch <= 2, "1 or 2"
    yield "structure.runs", all(runs > 0 for runs in s.runs.values()), "positive"
    yield "structure.blocks", set(s.blocks) <= s.runs.keys(), "modules that run"
    yield "structure.head.names", set(s.head.names) <= s.runs.keys(), "modules that run"
    yield "structure.head.shares", len(s.head.shares) == len(s.head.names), "one for each layer"
    yield "structure.layouts", s.layouts.keys() == s.pixels.keys(), "of the modules in pixels"
    for name, layout in s.layouts.items():
        shape, pixels = s.shapes.get(name, ()), s.pixels[name]
        is_right = layout in LAYOUTS and len(layout) == len(shape)
        yield f"structure.layouts.{name}", is_right, f"that of {list(shape)}"
        places = prod(n for n, letter in zip(shape, layout, strict=True) if letter in "HWN")
        is_right = pixels == places if "H" in layout else 0 < pixels <= places
        yield f"structure.pixels.{name}", is_right, f"those of {list(shape)}"


def _of_groups(g: Groups, n: int, numbers: Tensor, names: tuple[str, ...]) -> Iterator[Rule]:
    counts = [call.images for call in g.history]
    yield "calibration.history", min(counts, default=0) > 0, "calls that gave images"
    yield "calibration.history", sum(counts) == n, f"the origin of {n} images"
    yield "calibration.history", all(_is_time(call.when) for call in g.history), "of times"
    yield "calibration.least", g.least >= 1, "at least 1"
    yield "calibration.by", g.by != "", "a key"
    yield "calibration.names", (g.by == PREDICTED) == (not g.names), "names of groups"
    yield "calibration.names", g.by is not None or len(g.names) == 1, "one name"
    yield "calibration.names", len(set(names)) == len(names) > 0, "each once"
    yield "reference.group", int(numbers.max()) < len(names), f"of {len(names)} groups"


def _is_time(text: str) -> bool:
    try:
        return bool(datetime.fromisoformat(text))
    except ValueError:
        return False


def _calibration(record: Record, tensors: Mapping[str, Tensor]) -> Calibration | None:
    """The calibration in a file; ConfigError if its parts do not fit each other."""
    groups = record.calibration
    if groups is None:
        return None
    scores, marks, group = (tensors[f"reference{part}"] for part in ("", ".marks", ".group"))
    classes = record.structure.classes if record.structure else 0
    names = tuple(map(str, range(classes))) if groups.by == PREDICTED else groups.names
    _require(_of_groups(groups, len(scores), group, names))
    history, by, _, least = groups
    return Calibration(scores.numpy(), marks.numpy(), history, by, names, group.numpy(), least)


def _check_tensors(record: Record, tensors: Mapping[str, Tensor]) -> None:
    """Require the tensors of these experts, each of the right type and shape, and finite."""
    sizes = {"L": len(record.experts)}
    sizes["marks"] = sizes["L"] + 4 * (sizes["L"] == 1)  # see `projections`
    if record.structure is not None:
        sizes["K"] = record.structure.classes
    needed = {"id_scores": "L I"}
    for number, (expert, _) in enumerate(record.posthoc):
        needed |= {f"state.{number}.{name}": shape for name, shape in POSTHOC[expert].state.items()}
    if record.calibration is not None:
        needed |= {"reference": "n", "reference.marks": "marks n", "reference.group": "n"}
    if unknown := tensors.keys() - needed.keys():
        raise ConfigError(f"{min(unknown)} belongs to no expert")
    for name, letters in needed.items():
        if name not in tensors:
            raise ConfigError(f"{name} is missing")
        tensor, part = tensors[name], name.rpartition(".")[2]
        kind = torch.float32 if name.startswith("state.") else torch.float64
        whole = (name.startswith("state.") and part in WHOLE) or name == "reference.group"
        kind = torch.int64 if whole else kind
        shape = letters.split()
        found = dict(zip(shape, tensor.shape, strict=False))
        expected = [sizes.get(letter, found.get(letter, -1)) for letter in shape]
        if tensor.dtype != kind or list(tensor.shape) != expected or 0 in tensor.shape:
            raise ConfigError(
                f"{name} must be {kind} [{', '.join(map(str, expected))}], got {tensor.dtype} "
                f"{list(tensor.shape)}"
            )
        sizes |= found
        most = OVERFLOWS if name.startswith("state.") else float("inf")
        if not (tensor.abs() < most).all():
            raise ConfigError(f"{name} must be finite, and below {most:g}")
        if kind == torch.int64 and int(tensor.min()) < 0:
            raise ConfigError(f"{name} must be >= 0")
