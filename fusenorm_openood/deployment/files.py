"""Judge image files one by one, or shard by shard into a store."""

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from hashlib import sha256
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import Dataset
from tqdm import tqdm

from fusenorm_openood.data.lists import CpuLoader
from fusenorm_openood.data.preprocessing import Preprocessing
from fusenorm_openood.detectors.early import exits_of, judge_early
from fusenorm_openood.detectors.fusenorm import FuseNorm
from fusenorm_openood.detectors.statistics import packed
from fusenorm_openood.errors import ConfigError, DataError, NonFiniteError
from fusenorm_openood.forward.batches import Throughput
from fusenorm_openood.kernels.devices import moved
from fusenorm_openood.method import calibration, conformal
from fusenorm_openood.network.fingerprint import fixed_images, identify
from fusenorm_openood.storage.files import manifest
from fusenorm_openood.storage.shards import Columns, Key, ShardSet
from fusenorm_openood.storage.stored import Batches, StoredScores, forward_digest, shard_batches
from fusenorm_openood.storage.torchrun import this_process
from fusenorm_openood.storage.urls import Place
from fusenorm_openood.version import __version__

SHARD = 1000  # images


class Judged(NamedTuple):
    """The row of one image file; all but `path` and `error` are None if it is unreadable."""

    path: str
    predicted: str | None = None  # the class, by name if the detector has names
    confidence: float | None = None  # larger = more in-distribution
    p_value: float | None = None  # conformal, perhaps by class; None without calibration images
    ood: bool | None = None  # the verdict, None without calibration images
    objected: str | None = None  # the expert of the lowest contribution; see `Explanation`
    error: str | None = None  # why the file could not be judged
    bound: float | None = None  # of an image that has left early, what its confidence is at most


class ImageFiles(Dataset[Any]):
    """Tensors `[C, H, W]` of image files, or a string: why a file cannot be read."""

    def __init__(self, paths: Sequence[Place], preprocessing: Preprocessing) -> None:
        self.paths, self.preprocessing = paths, preprocessing

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, number: int) -> Any:
        try:
            return self.preprocessing.read(self.paths[number])
        except DataError as error:
            # Stores hold no bytes that are not UTF-8, as in some names.
            return str(error).encode("utf-8", "backslashreplace").decode()


class ReadableFiles(ImageFiles):
    """Image files without labels, `{"data": [C, H, W], "label": -1}`; DataError if unreadable."""

    def __getitem__(self, number: int) -> dict[str, Any]:
        return {"data": self.preprocessing.read(self.paths[number]), "label": -1}


def judge_files(
    detector: FuseNorm,
    paths: Sequence[Place],
    acceptance: float = 0.95,
    batch_size: int = 64,
    num_workers: int = 0,
    throughput: Throughput | None = None,
    early: str | None = None,
) -> Iterator[list[Judged]]:
    """The rows of image files, in order, batch by batch.

    For `acceptance` and `early` see `FuseNorm.is_ood`; a detector without calibration images gives
    confidences alone. With `early`, an image that is rejected before the network has finished has
    no class, confidence and p-value; `objected` is the layer after which it was, and its confidence
    is at most `bound`, which is None if `early` is `"spending"`.

    Raises:
        DataError: the detector has no preprocessing.
        TapError: `early`, and images cannot leave a batch of the network.
        ConfigError: its calibration images are grouped by what files do not give.
    """
    first, files = 0, _image_files(detector, paths)
    loader = CpuLoader(files, batch_size, num_workers=num_workers, collate_fn=list)
    counted = throughput or Throughput()
    for batch in counted.timed(loader):
        counted.images += len(batch)
        some = paths[first : first + len(batch)]
        first += len(batch)
        yield judged(detector, some, score(detector, batch, acceptance, early), acceptance)


def check_judging(detector: FuseNorm, acceptance: float, early: str | None = None) -> None:
    """Raise what `judge_files` would, but before a file is read or written."""
    _image_files(detector, ())
    if early is not None:
        how = detector.known_preprocessing()
        images = moved(detector.net, fixed_images((how.channels, *how.crop)))
        exits_of(detector, images, acceptance, early)


def _image_files(detector: FuseNorm, paths: Sequence[Place]) -> ImageFiles:
    """The files, to be judged; errors as in `judge_files`."""
    by = None if detector.calibration_ is None else detector.calibration_.by
    if by not in (None, calibration.PREDICTED):
        raise ConfigError(
            f"the calibration images are grouped by {by}, which image files do not give: calibrate "
            "by predicted class, or without groups"
        )
    return ImageFiles(paths, detector.known_preprocessing())


def score(
    detector: FuseNorm,
    batch: Sequence[Tensor | str],
    acceptance: float = 0.95,
    early: str | None = None,
) -> Columns:
    """What a store has of `B` items of `ImageFiles`; with `early`, what rows need besides.

    Returns:
        `scores` of the experts `[B, L]`, NaN for images that cannot be scored; `pred`, the
        predicted classes `[B]`, -1 for these; `error`, why they cannot be scored `[B]`, else empty.
        With `early`: the verdicts `ood` `[B]`, and of images that have left, which have no scores,
        the layer `left` after which, and the `bound` of the confidence, NaN if none is known.
    """
    scores = np.full((len(batch), len(detector.experts)), np.nan)
    pred = np.full(len(batch), -1, np.int64)
    error = np.array([item if isinstance(item, str) else "" for item in batch], dtype=object)
    columns = {"scores": scores, "pred": pred, "error": error}
    if early is not None:
        columns |= {"ood": np.zeros(len(batch), bool), "left": error.copy()}
        columns["bound"] = np.full(len(batch), np.nan)

    def fill(rows: NDArray[np.int64]) -> None:
        images = torch.stack([batch[row] for row in rows])
        if early is None:
            experts, pred[rows] = detector.expert_scores(images)
            scores[rows] = experts.T
        else:
            found = judge_early(detector, images, acceptance, early)
            scores[rows[found.kept]], pred[rows[found.kept]] = found.experts.T, found.pred
            columns["ood"][rows], columns["left"][rows] = found.ood, found.exits
            columns["bound"][rows] = found.bounds

    rows = np.flatnonzero(error == "")
    try:
        if len(rows):
            fill(rows)
    except NonFiniteError:  # find the images that it is about
        for row in rows:
            try:
                fill(np.array([row]))
            except NonFiniteError as failure:
                error[row] = str(failure)
    return columns


def judged(
    detector: FuseNorm, paths: Sequence[Place], columns: Columns, acceptance: float
) -> list[Judged]:
    """The rows of files with these columns; see `score`."""
    whole = columns["pred"] >= 0
    why = detector.explain_scores(columns["scores"][whole].T, columns["pred"][whole])
    pred, conf = why.pred.tolist(), why.conf.tolist()
    names = [str(k) if detector.class_names is None else detector.class_names[k] for k in pred]
    p = ood = [None] * len(pred)
    if why.p_values is not None:
        p, ood = why.p_values.tolist(), conformal.rejects(why.p_values, acceptance).tolist()
    if "ood" in columns:  # at an acceptance of its own
        ood = columns["ood"][whole].tolist()
    known = zip(names, conf, p, ood, why.objected, strict=True)
    rows = []
    for number, (path, error) in enumerate(zip(map(str, paths), columns["error"], strict=True)):
        if whole[number]:
            rows.append(Judged(path, *next(known)))
        elif error:
            rows.append(Judged(path, error=error))
        else:
            bound = float(columns["bound"][number])
            known_bound = None if math.isnan(bound) else bound
            rows.append(Judged(path, ood=True, objected=columns["left"][number], bound=known_bound))
    return rows


class FileShards:
    """Image files whose expert scores are in a store.

    Each shard is `SHARD` files, scored whole by one process, whichever that is. For arguments and
    errors see `judge_files`; also StoreError if the store, a folder or URL, cannot be written.
    """

    def __init__(
        self,
        detector: FuseNorm,
        paths: Sequence[Place],
        store: Place,
        batch_size: int = 64,
        num_workers: int = 0,
        throughput: Throughput | None = None,
        progress: bool = False,
    ) -> None:
        self.detector, self.paths, self.throughput = detector, paths, throughput
        self.progress = progress and this_process().leads
        self.batch_size, self.num_workers = batch_size, num_workers
        self._files = _image_files(detector, paths)
        about = {**experts_key(detector, store), "images": manifest(paths)}
        if (structure := detector.known_structure) and structure.batch_dependent:
            about["batch_size"] = batch_size  # the images of a batch influence each other
        key = Key(about, "files", len(paths), SHARD)
        self.stored = StoredScores(store, key, self._compute, shared=False)

    @property
    def shards(self) -> ShardSet:
        return self.stored.shards

    def judged(
        self, acceptance: float, written: Iterator[int] | None = None
    ) -> Iterator[list[Judged]]:
        """Score this process's share of the missing shards, then judge all, in order.

        A process that does not lead judges none. A damaged shard is scored again. `written` are the
        missing shards, in the order in which others write them; None = none do.
        """
        if written is None and not this_process().leads:
            self.stored.compute_share()
            return
        stored = iter(self.stored) if written is None else self.stored.after(written)
        for number, columns in enumerate(stored):
            span = self.shards.span(number)
            for at in np.flatnonzero(columns["error"] != ""):  # unreadable, perhaps for a moment
                for name, value in score(self.detector, [self._files[span[at]]]).items():
                    columns[name][[at]] = value
            yield judged(self.detector, self.paths_of(number), columns, acceptance)

    def paths_of(self, number: int) -> Sequence[Place]:
        """The files of a shard."""
        span = self.shards.span(number)
        return self.paths[span.start : span.stop]

    def _compute(self, numbers: Sequence[int]) -> Iterator[Columns]:
        total = sum(len(self.shards.span(number)) for number in numbers)
        hidden = not (self.progress and numbers)
        with tqdm(total=total, unit=" images", disable=hidden, leave=False) as bar:

            def counted(batches: Iterable[Any]) -> Iterator[Any]:
                for batch in batches:
                    yield batch
                    bar.update(len(batch))

            for _, batches in shard_batches(self.shards, numbers, self._load, self.batch_size):
                yield scored(self.detector, counted(batches), self.throughput)

    def _load(self, batches: Batches) -> Iterator[Any]:
        how: dict[str, Any] = {"num_workers": self.num_workers, "collate_fn": list}
        return iter(CpuLoader(self._files, batch_sampler=batches, **how))


def scored(
    detector: FuseNorm,
    batches: Iterable[Sequence[Tensor | str]],
    throughput: Throughput | None = None,
) -> Columns:
    """The columns of a shard, from the items of `ImageFiles`; `throughput` counts the images."""
    counted, parts = throughput or Throughput(), list[Columns]()
    for batch in counted.timed(batches):
        counted.images += len(batch)
        parts.append(score(detector, batch))
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def experts_key(detector: FuseNorm, store: Place) -> dict[str, Any]:
    """All that the expert scores of image files depend on besides these, in terms of JSON."""
    statistics, preprocessing = detector.check_fitted(), detector.known_preprocessing()
    tensors, facts = packed(statistics)
    hashed = sha256(json.dumps([facts["posthoc"], facts["thresholds"]]).encode())
    for name in sorted(name for name in tensors if name.startswith("state.")):
        hashed.update(name.encode() + tensors[name].contiguous().numpy().tobytes())
    return {
        **network_key(detector.net, preprocessing, store),
        "experts": detector.experts,
        "norm": detector.settings.feature_norm,
        "output": detector.settings.score("output").to_json(),
        "fitted": hashed.hexdigest(),
        "preprocessing": preprocessing.to_json(),
    }


def network_key(net: nn.Module, preprocessing: Preprocessing, store: Place) -> dict[str, Any]:
    """What a store tells a network by: its modules and weights, and what it computes."""
    found = identify(net, (preprocessing.channels, *preprocessing.crop))
    key = {"version": __version__, "network": found.digest}
    if not found.logits:
        return {**key, "forward": None}

    def agrees(logits: NDArray[np.float64]) -> bool:
        return found.agrees(found._replace(logits=logits.tolist()))

    logits, image = np.array(found.logits, np.float64), {"image": found.image}
    return {**key, "forward": forward_digest(store, {**key, **image}, logits, agrees)}
