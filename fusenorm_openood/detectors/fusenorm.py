"""The FuseNorm detector, for any torch network; it does not need OpenOOD."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fusenorm_openood.data.preprocessing import Preprocessing
from fusenorm_openood.detectors import saving
from fusenorm_openood.detectors.base import Detector
from fusenorm_openood.detectors.calibrating import check_apart, data_of
from fusenorm_openood.detectors.early import Exit, judge_early
from fusenorm_openood.detectors.fitting import enough_for
from fusenorm_openood.detectors.scorer import atomic
from fusenorm_openood.detectors.statistics import DetectorStatistics, Explanation
from fusenorm_openood.errors import ConfigError, NotFittedError, warn
from fusenorm_openood.export.judge import Dtype
from fusenorm_openood.export.program import Exported, export_detector
from fusenorm_openood.forward.experts import Experts, Fitted
from fusenorm_openood.forward.given import Given, Images
from fusenorm_openood.forward.passes import forward_pass
from fusenorm_openood.forward.taps import NO_LAYERS, check_taps, names_of, strong_names
from fusenorm_openood.kernels.devices import find_device, moved
from fusenorm_openood.method.atf import atf_map
from fusenorm_openood.method.scores import OUTPUTS
from fusenorm_openood.method.scores.base import LogitScore
from fusenorm_openood.method.settings import FUSION_SETTINGS, Settings
from fusenorm_openood.network.fingerprint import Fingerprint, is_network
from fusenorm_openood.network.named import build_network
from fusenorm_openood.network.running import eval_mode, unwrapped
from fusenorm_openood.network.structure import Structure

NO_TRUST = 0.005  # shown as 0.00
F = TypeVar("F", bound="FuseNorm")


class FuseNorm(Detector):
    """OOD detector that fuses the feature norms of all blocks with strong experts.

    The structure of the network is read from its own graph at the first images that it is fitted
    on. It may be wrapped in DataParallel or compiled: the network inside is what runs, on one
    device and as it was before compilation.

    Args:
        net: any network that returns logits `[B, K]`, also in a tuple, a mapping or a dataclass;
            it is left unchanged.
        settings: all settings at once, for example `Settings.published()`;
            None = the default method, `fusenorm`.
        structure: how the network is built, if that is known already.
        preprocessing: how image files become tensors; it can be set later, and is saved.
        changes: individual settings by name; see `Settings`.

    Attributes:
        experts: names of the experts: the tapped layers in order, and the strong experts that are
            no layers. Before `fit` there are none, unless the structure, or layers and strong
            experts are given.
        strong: names of the strong experts; the other layers are weak.
        id_statistics_: what `fit` finds, None before.
        calibration_: what `calibrate` keeps, None before.
        network_source: how the command line builds the network.

    Raises:
        ConfigError: settings that do not fit the network.
        TapError: taps that do not fit the network.

    Examples:
        >>> from torchvision.models import resnet18
        >>> net = resnet18(num_classes=4)
        >>> detector = FuseNorm(net, cap=5)
        >>> detector
        FuseNorm(ResNet, cap=5; not fitted)
        >>> images = torch.rand(40, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        >>> detector.fit([images[:20]]).calibrate([images[20:]])  # doctest: +ELLIPSIS
        FuseNorm(ResNet, cap=5; 8 layers, strong: output...; fitted on 20 ID images, ...)
        >>> detector.is_ood(images[:2], acceptance=0.9).shape
        torch.Size([2])
    """

    def __init__(
        self,
        net: nn.Module,
        settings: Settings | None = None,
        structure: Structure | None = None,
        preprocessing: Preprocessing | None = None,
        **changes: Any,
    ) -> None:
        self.settings = (settings or Settings()).replace(**changes)
        super().__init__(net, structure, self.settings.random)
        self.preprocessing = preprocessing
        self.id_statistics_: DetectorStatistics | None = None
        self.companions: tuple[LogitScore, ...] = ()
        self._class_names: tuple[str, ...] | None = None
        self.network_source: dict[str, str] = {}
        self.taps = check_taps(net, self.settings.taps)
        if names := names_of(net, self.settings, self.known_structure):
            self._name(*names)

    taps: tuple[str, ...]
    strong: tuple[str, ...] = ()
    exits: tuple[tuple[Any, ...], tuple[list[Exit], float]] | None = None  # see `exits_of`
    stage_ends: Any = None  # those of a structure, found by a trial

    def __repr__(self) -> str:
        default, text = Settings(), [type(unwrapped(self.net)).__name__]
        text += [f"{n}={v!r}" for n, v in vars(self.settings).items() if v != getattr(default, n)]
        state, fitted = [], self.id_statistics_
        if self.experts:
            strong = [*self.strong] if fitted is None else fitted.weighted
            state.append(f"{len(self.taps)} layers, strong: {', '.join(strong)}")
        images = None if fitted is None else fitted.id_scores.shape[1]
        if images is None:
            state.append("not fitted")
        else:
            state.append(f"fitted on {images:,} ID images, {self._calibrated}")
        return f"{type(self).__name__}({', '.join(text)}; {'; '.join(state)})"

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """Names of the classes, None if they are not set.

        Raises:
            ConfigError: on setting them, or else on `fit`: not one name per class.
        """
        return self._class_names

    @class_names.setter
    def class_names(self, names: Sequence[str] | None) -> None:
        names = None if names is None else tuple(names)
        if self.known_structure is not None:
            _check_names(names, self.known_structure)
        self._class_names = names

    def to(self: F, device: str | torch.device) -> F:
        """Move the network, in place; what the detector has fitted follows it.

        Raises:
            ConfigError: a device that cannot be used.
        """
        self.net.to(find_device(str(device)))
        return self

    @property
    def row_names(self) -> tuple[str, ...]:
        return (*self.experts, *(score.label for score in self.companions))

    @classmethod
    def from_pretrained(
        cls,
        network: str,
        settings: Settings | None = None,
        preprocessing: Preprocessing | None = None,
        **changes: Any,
    ) -> "FuseNorm":
        """A detector for `torchvision:NAME` or `timm:NAME` with default weights, not yet fitted.

        The weights are downloaded once; `preprocessing` is what they declare by default.

        Raises:
            ConfigError: another network, or one that cannot be built or loaded.
        """
        net = build_network(network, pretrained=True)
        return cls(net, settings, preprocessing=preprocessing or Preprocessing.of(net), **changes)

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """The arguments of the constructor by name, as scikit-learn's `clone` needs them."""
        return {"net": self.net, "preprocessing": self.preprocessing, **vars(self.settings)}

    def set_params(self, **params: Any) -> "FuseNorm":
        """Change the network or settings, after which the detector has to be fitted anew.

        Raises:
            ConfigError, TapError: as the constructor.
        """
        given = {**self.get_params(), **params}
        fresh = type(self)(given.pop("net"), **given)
        fresh = fresh.with_companions() if self.companions else fresh
        kept = {name: getattr(self, name) for name in ("network_source", "_class_names")}
        self.__dict__ = {**vars(fresh), **kept}
        return self

    def with_companions(self: F) -> F:
        """Also score the other output experts without an extra pass, outside the fusion."""
        percentiles = dict.fromkeys((None, self.settings.react_percentile))
        names = ("msp", "mls", "energy")
        scores = (OUTPUTS[n](react_percentile=q, fused=True) for q in percentiles for n in names)
        self.companions = tuple(s for s in scores if s != self.settings.score("output"))
        if self.experts:
            self._name(self.taps, self.strong)
        return self

    @atomic
    def fit(
        self,
        loader: Iterable[Any],
        progress: bool = False,
        calibration: Iterable[Any] | None = None,
    ) -> "FuseNorm":
        """Fit the ID statistics, preferably on ID images used neither for training nor for testing.

        The loader is read once, and once more if ReAct needs a threshold. If a strong expert keeps
        features, an even sample of at most 10,000 images is used. If the fit or the calibration
        fails, the detector stays as it was. Fewer images than the experts need are a warning.

        Args:
            loader: ID images.
            progress: whether to show progress bars.
            calibration: other ID images, for `calibrate`, which is then called.

        Raises:
            CalibrationError: calibration images that were fitted on.
            ZeroRangeError: an expert gives all ID images the same score.
            DataError, NonFiniteError, TapError: images or a network without usable scores.
        """
        if calibration is not None:
            check_apart(data_of(loader), data_of(calibration))
        self.id_statistics_ = None
        network, batch = self.fit_on(loader, progress)
        id_scores = batch.matrix(self.rows[: len(self.experts)]).numpy()
        self.id_statistics_ = self.learn(id_scores, self.fitted, network)
        if none := [n for n, weight in self.id_statistics_.trust.items() if weight < NO_TRUST]:
            warn(
                f"strong experts cannot be trusted after a fit on {id_scores.shape[1]} ID images: "
                f"{', '.join(none)}; fit on more, or leave them out of strong"
            )
        return self if calibration is None else self.calibrate(calibration, progress)

    def learn(
        self, id_scores: NDArray[np.float64], fitted: Fitted, network: Fingerprint | None = None
    ) -> DetectorStatistics:
        """The ID statistics from scores `[L, N]` of the experts on ID images; they are not kept."""
        structure = self.known_structure
        largest = 0.0 if structure is None else structure.largest_logit
        return DetectorStatistics(
            self.experts, fitted, id_scores, self.settings, self.strong, network, largest
        )

    def with_statistics(self: F, statistics: DetectorStatistics) -> F:
        """Use the ID statistics of an earlier fit on the same network instead of fitting.

        Settings of the normalisation and of the fusion may differ from those of the fit.

        Raises:
            ConfigError: the fit had another network or other weights, other experts, or a setting
                that changes their scores; of a network whose structure is not known yet, the
                experts are compared at the first images.
        """
        network = statistics.network
        if network is not None and not is_network(self.net, network):
            raise ConfigError(
                f"the ID statistics must be of this network, got those of {network.kind} with "
                "other weights or another forward: fit again"
            )
        return self.adopt(statistics)

    def adopt(self: F, statistics: DetectorStatistics) -> F:
        """As `with_statistics`, of a fit that is known to have had this network."""
        then, now = vars(statistics.settings), vars(self.settings)
        for name in (n for n in now if n not in FUSION_SETTINGS and now[n] != then[n]):
            raise ConfigError(
                f"the ID statistics must have the detector's {name} = {now[name]!r}, got "
                f"{then[name]!r}: fit again"
            )
        self.name_as(statistics)
        _check_experts(statistics, self.experts)
        self._name(self.taps, self.strong, statistics.experts)  # perhaps in an older order
        self.fitted, self.calibration_, self.other_network = statistics.fitted, None, None
        if then != now:
            statistics = replace(statistics, settings=self.settings, strong=self.strong)
        self.id_statistics_ = statistics
        return self

    def name_as(self, statistics: DetectorStatistics) -> None:
        """Name the experts as those of an earlier fit, if they are not known yet."""
        if self.experts:
            return
        layers, settings = check_taps(self.net, statistics.layers), self.settings
        if settings.strong == statistics.settings.strong:
            self._name(layers, statistics.strong)
        elif isinstance(settings.strong, str):
            raise ConfigError("strong='auto' needs the network's stages: fit again")
        else:
            self._name(layers, strong_names(settings, settings.strong, layers))

    def confidence(self, experts: NDArray[Any]) -> NDArray[np.float64]:
        statistics = self.check_fitted()
        return statistics.confidence(experts[: len(self.experts)])

    def is_ood(
        self,
        images: Images,
        acceptance: float = 0.95,
        groups: Any = None,
        early: bool | str = False,
    ) -> Tensor:
        """Verdicts `[B]`, True = OOD; see `Detector.is_ood`.

        With `early`, images leave the batch at the ends of stages, as soon as they are rejected:

        - `True` or `"certain"`: where the confidence can no longer reach the threshold. The
          verdicts are those of the whole pass.
        - `"spending"`: where the joint distance of the layers so far is larger than that of nearly
          all calibration images. The error 1 - acceptance is divided among the confidence at the
          end, with as much as an exit on average, and the exits, in proportion to the stages that
          an image skips. By the union bound, at least `acceptance` of ID images are accepted on
          average. More images leave, and some verdicts are others.

        Raises:
            TapError: `early` for a network in which images cannot leave a batch.
            ConfigError, CalibrationError: also settings with which none ever would, or too few
                calibration images for so many exits.
        """
        if not early:
            return super().is_ood(images, acceptance, groups)
        given = Given.of(images, self.known_preprocessing)
        mode = "certain" if early is True else early
        return given.results(judge_early(self, given.batch, acceptance, mode, groups).ood)

    def explain(self, images: Images, with_maps: bool = True, groups: Any = None) -> Explanation:
        """What the confidences of images `[B, C, H, W]` are made of, and where: see `Explanation`.

        Of one image `[C, H, W]` as of a batch of one. Heat maps take one more pass. `groups` as in
        `p_values`.
        """
        self.check_fitted()
        batch = Given.of(images, self.known_preprocessing).batch
        experts, pred = self.expert_scores(batch)
        maps, norm = dict[str, Tensor](), self.settings.feature_norm
        if with_maps:
            on_device = moved(self.net, batch)
            how = on_device, self.structure(on_device), self.taps
            with eval_mode(unwrapped(self.net)), torch.no_grad():
                maps = forward_pass(self.net, *how, lambda x: atf_map(x, *norm).cpu()).maps
        return self.explain_scores(experts, pred, maps, groups, batch)

    def explain_scores(
        self,
        experts: NDArray[np.float64],
        pred: NDArray[np.int64],
        maps: dict[str, Tensor] | None = None,
        groups: Any = None,
        images: Tensor | None = None,
    ) -> Explanation:
        """As `explain`, of images with these scores `[L, B]` of the experts."""
        statistics, known = self.check_fitted(), self.calibration_
        why = statistics.explanation(experts[: len(self.experts)], pred, maps or {})
        if known is None:
            return why
        return replace(why, p_values=known.p_values(why.conf, known.numbers(pred, groups, images)))

    def save(self, path: str | Path) -> None:
        """Write the fitted detector to a file: safetensors and JSON, no pickle, not the network.

        Raises:
            NotFittedError: before `fit`.
            DetectorFileError: the file cannot be written.
        """
        saving.save(self, Path(path))

    @classmethod
    def load(cls, path: str | Path, net: nn.Module, strict: bool = True) -> "FuseNorm":
        """The detector in a file, for the network that it was fitted with.

        Args:
            path: a file that `save` wrote.
            net: the network, on any device; it is left unchanged.
            strict: whether other weights are an error, not a warning.

        Raises:
            DetectorFileError: the file is missing, damaged, of a newer format, or of another
                network.
        """
        return saving.load(cls, Path(path), net, strict)

    def export(
        self,
        path: str | Path,
        dtype: Dtype | None = None,
        acceptance: float = 0.95,
        shape: Sequence[int] | None = None,
        target: str | None = None,
        resize_from: tuple[int, int] | None = None,
    ) -> Exported:
        """Write the network and the detector as one program for a runtime.

        It runs without this package and computes in float32 what this detector computes on the
        CPU. Its input `image` is `[N, C, H, W]` as `preprocessing` resizes and crops, with values
        from 0 to 255 or within its range; without `preprocessing`, what the network takes, in
        float32. Outputs:

        - `logits` `[N, K]` and `confidence` `[N]`.
        - `rank` `[N]`, integers, if the detector is calibrated: 1 + the number of calibration
          scores that are not larger than the confidence. An image is OOD at an acceptance if its
          rank is at most `max_rank(acceptance, n)`; p = rank / (n + 1).

        An image with a score that is not finite has the confidence NaN and rank 1. The program is
        run on a few images if its runtime is installed, and is not written if its confidences
        differ.

        Args:
            path: a file that ends in `.onnx`, `.pt2`, `.xml`, `.pte`, `.tflite` or `.mlpackage`.
            dtype: of `image`, that of `preprocessing` (None) or `"float32"`.
            acceptance: that of `max_rank` in the file's metadata.
            shape: of one image, `[C, H, W]`, without `preprocessing`.
            target: what the program is for: `onnx`, `pt2` (`torch.export`), `aoti` (AOTInductor),
                `openvino`, `executorch`, `litert` or `coreml`; None = by the suffix.
            resize_from: height and width of images in uint8 that the program resizes and crops
                itself, to the same pixels; None = it is given what is resized and cropped.

        Raises:
            NotFittedError: before `fit`.
            CalibrationError: too few calibration images for the acceptance.
            ConfigError: settings that need a gradient, another suffix, no shape.
            ExportError: a network that cannot be traced, a package that is missing, other
                confidences, or a file that cannot be written.
        """
        return export_detector(self, Path(path), dtype, acceptance, shape, target, resize_from)

    @property
    def least(self) -> int:
        layers = len(self.taps) + 1 if self.settings.penalty == "joint" else 0
        return max(enough_for(self.settings.percentile_low), layers)

    def _check_structure(self, structure: Structure) -> None:
        if self.id_statistics_ is not None:  # the fit came before the structure was read
            _check_experts(
                self.id_statistics_, FuseNorm(self.net, self.settings, structure).experts
            )

    def _resolve(self, structure: Structure) -> tuple[Any, ...]:
        _check_names(self._class_names, structure)
        if names := names_of(self.net, self.settings, structure):
            self._name(*names)
        return (self.settings.taps,)

    def _name(
        self, taps: tuple[str, ...], strong: tuple[str, ...], order: Sequence[str] = NO_LAYERS
    ) -> None:
        others = [name for name in order if name in strong and name in NO_LAYERS]
        self.taps, self.strong, self.experts = taps, strong, (*taps, *others)
        norm, scores = self.settings.feature_norm, tuple(map(self.settings.score, others))
        self.rows = [*((tap, norm) for tap in taps), *scores, *self.companions]
        self.all_experts = Experts(taps, (norm,), tuple(dict.fromkeys((*scores, *self.companions))))

    def check_fitted(self) -> DetectorStatistics:
        if self.id_statistics_ is None:
            raise NotFittedError("this FuseNorm is not fitted: call fit(loader) first")
        return self.id_statistics_


def _check_names(names: tuple[str, ...] | None, structure: Structure) -> None:
    if names is not None and len(names) != structure.classes:
        raise ConfigError(
            f"class_names must be the names of {structure.classes} classes, got {len(names)}"
        )


def _check_experts(statistics: DetectorStatistics, experts: Sequence[str]) -> None:
    """Raise ConfigError unless these are the experts of a fit."""
    if set(statistics.experts) != set(experts):
        raise ConfigError(
            f"the ID statistics must have the detector's experts {', '.join(experts)}, got "
            f"{', '.join(statistics.experts)}: fit again"
        )
