"""The FuseNorm detector, for any torch network; it does not need OpenOOD."""

from collections.abc import Iterable, Sequence
from copy import copy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from typing_extensions import Self

from fusenorm_openood.data.preprocessing import Preprocessing
from fusenorm_openood.detectors.atomic import atomic
from fusenorm_openood.detectors.base import Images, check_energy, fit_panel
from fusenorm_openood.detectors.calibration import Calibration as Calibration
from fusenorm_openood.detectors.decisions import (
    DecidingDetector,
    check_apart,
    data_of,
    repeated_columns,
)
from fusenorm_openood.detectors.enough import enough_for
from fusenorm_openood.detectors.explanation import Explanation, explanation
from fusenorm_openood.detectors.saving import Kept, nonsense, read_kept, write_kept
from fusenorm_openood.errors import (
    ConfigError,
    DataError,
    FuseNormError,
    NonFiniteError,
    NotFittedError,
    TapError,
)
from fusenorm_openood.export.fusion import Fusion, Roles
from fusenorm_openood.export.judge import Dtype, Inputs, Judge, check_exportable, float32_copy
from fusenorm_openood.export.program import Exported, export_judge
from fusenorm_openood.forward.batches import checked_images
from fusenorm_openood.forward.hooks import (
    check_taps,
    first_of_last_stage,
    resolve_taps,
    warn_of_left_out,
)
from fusenorm_openood.forward.observed import Listener, Observed
from fusenorm_openood.forward.panel import Fitted, Panel
from fusenorm_openood.forward.passes import tapped_maps
from fusenorm_openood.kernels.devices import find_device
from fusenorm_openood.method.atf import atf_map
from fusenorm_openood.method.conformal import check_enough
from fusenorm_openood.method.experts import DEFAULT_TEMPERATURE, OUTPUT_EXPERTS, Output
from fusenorm_openood.method.fusion import fuse, mean_of_strong
from fusenorm_openood.method.joint import far_off, joint_penalty, joint_statistics
from fusenorm_openood.method.posthoc import POSTHOC, Posthoc
from fusenorm_openood.method.settings import FUSION_SETTINGS, Settings
from fusenorm_openood.method.statistics import (
    compute_id_statistics,
    normalise,
    standardise,
)
from fusenorm_openood.network.fingerprint import Fingerprint, fixed_images, is_network
from fusenorm_openood.network.running import eval_mode, unwrapped
from fusenorm_openood.network.structure import Structure
from fusenorm_openood.network.understanding import understand
from fusenorm_openood.version import __version__

_NO_TAPS = ("output", *POSTHOC)


class FuseNorm(DecidingDetector):
    """OOD detector that fuses the feature norms of all blocks with strong experts.

    The network is understood from its own graph at the first images that it is fitted on; see
    `fusenorm_openood.network.structure`. It may be wrapped in DataParallel or compiled: the
    network inside is what runs, on one device and as it was before compilation.

    Args:
        net: any network that returns logits `[B, K]`, also in a tuple, a mapping or a dataclass;
            it is left unchanged.
        settings: all settings at once, for example `Settings.published()` or `Settings.joint()`;
            None = the default method, `fusenorm`.
        structure: how the network is built, if that is known already.
        changes: individual settings by name; see `Settings`.

    Attributes:
        experts: names of the experts: the taps in order, and the strong experts that are no taps.
            Before `fit` there are none, unless the structure, or taps and strong experts are given.
        strong: names of the strong experts; the other taps are weak.
        calibration_: ID statistics, after `fit`.
        preprocessing: how image files become tensors, if it is set; it is saved with the detector.
        network_source: how the command line builds the network.

    Raises:
        ConfigError: settings that do not fit the network.
        TapError: taps that do not fit the network.
    """

    def __init__(
        self,
        net: nn.Module,
        settings: Settings | None = None,
        structure: Structure | None = None,
        **changes: Any,
    ) -> None:
        super().__init__(net)
        self.settings = (settings or Settings()).replace(**changes)
        self._random = self.settings.random
        core = unwrapped(net) if self._structure is None else net  # a known one need not be loaded
        named = check_taps(net, self.settings.taps)
        self.calibration_: Calibration | None = None
        self.taps, self.strong, self.experts = named, (), ()
        self._free: list[Output] = []
        self._fitted = Fitted()
        self.preprocessing: Preprocessing | None = None
        self._class_names: tuple[str, ...] | None = None
        self.network_source: dict[str, str] = {}
        self._structure = structure or self._structure
        if self._structure is not None:
            self._resolve(self._structure)
        elif named and not isinstance(self.settings.strong, str):
            self._name(named, self._named_strong(self.settings.strong, named))
        elif not isinstance(self.settings.strong, str):  # any module may turn out to be a tap
            names = [name for name in self.settings.strong if isinstance(name, str)]
            modules = dict(core.named_modules())
            self._named_strong([name for name in names if name not in modules], ())

    taps: tuple[str, ...]
    strong: tuple[str, ...]
    experts: tuple[str, ...]

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
        if self._structure is not None:
            _check_names(names, self._structure)
        self._class_names = names

    def to(self, device: str | torch.device) -> Self:
        """Move the network, in place; what the detector has fitted follows it.

        Raises:
            ConfigError: a device that cannot be used.
        """
        self.net.to(find_device(str(device)))
        return self

    def structure(self, images: Tensor) -> Structure:
        if self._structure is None and self.calibration_ is not None:
            structure = understand(self.net, images)
            _check_experts(self.calibration_, FuseNorm(self.net, self.settings, structure).experts)
            self._structure = structure
        return super().structure(images)

    def _resolve(self, structure: Structure) -> None:
        """Name the experts of a network that is built like this."""
        taps = resolve_taps(self.net, self.settings.taps, structure)
        if isinstance(self.settings.strong, str):
            self._name(taps, (first_of_last_stage(structure, taps), "output"))
        else:
            self._name(taps, self._named_strong(self.settings.strong, taps))

    def _name(self, taps: tuple[str, ...], strong: tuple[str, ...]) -> None:
        others = [name for name in _NO_TAPS if name in strong]
        self.taps, self.strong, self.experts = taps, strong, (*taps, *others)
        self.panel = self._panel_with(self._free)

    def _try(self, images: Tensor) -> None:
        structure = self.structure(images)
        _check_names(self._class_names, structure)
        self._resolve(structure)
        check_energy(self.net, structure, self._output)
        warn_of_left_out(self.net, self.settings.taps, structure)
        unclipped = Fitted({q: float("inf") for q in self.panel.percentiles})
        self.panel.listen(self.net, structure, images, unclipped)

    @atomic
    def fit(
        self,
        loader: Iterable[Any],
        progress: bool = False,
        calibration: Iterable[Any] | None = None,
    ) -> Self:
        """Fit the ID statistics, preferably on ID images used neither for training nor for testing.

        The loader is read once, and once more if ReAct needs a threshold. If a strong expert keeps
        features, as `knn` does, an even sample of at most 10,000 images is used. If the fit or the
        calibration fails, the detector stays as it was. Fewer images than the experts take are a
        warning.

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
        self.calibration_ = None
        readings, low = self._begin(loader), self.settings.percentile_low
        network = self._identified(readings)  # what cannot be saved fails before the fit
        is_joint = self.settings.penalty == "joint"
        least = max(enough_for(low), len(self.taps) + 1 if is_joint else 0)
        fitted = fit_panel(self, self.panel, readings, progress, "fit", least)
        self._fitted, scores = fitted.fitted, fitted.experts
        self.calibration_ = self.learn(scores[self._rows()], self._fitted, network)
        return self if calibration is None else self.calibrate(calibration, progress)

    def learn(
        self, id_scores: NDArray[np.float64], fitted: Fitted, network: Fingerprint | None = None
    ) -> Calibration:
        """The calibration from scores `[L, N]` of the experts on ID images; it is not kept.

        Raises:
            ZeroRangeError, NonFiniteError: as in `fit`.
        """
        low, high = self.settings.percentile_low, self.settings.percentile_high
        joint, rows = None, list(range(len(self.experts)))
        if self.settings.penalty == "joint":
            rows = [self.experts.index(name) for name in self.strong]
        normalised = [self.experts[row] for row in rows]
        scale = [self._scale if name == "output" else 0.0 for name in normalised]
        statistics = compute_id_statistics(id_scores[rows], low, high, normalised, scale)
        if self.settings.penalty == "joint" or self.settings.clip:
            joint = joint_statistics(id_scores[: len(self.taps)], self.taps)
        return Calibration(
            self.experts, fitted, id_scores, statistics, joint, self.settings, self.strong, network
        )

    @property
    def _scale(self) -> float:
        """The size of the values that the output expert's scores are computed from."""
        output, structure = self.settings.output_expert, self._structure
        largest = 0.0 if structure is None else structure.largest_logit
        return largest / output.temperature if output.output in ("msp", "odin") else largest

    def with_calibration(self, calibration: Calibration) -> Self:
        """Use the ID statistics of an earlier fit on the same network instead of fitting.

        Settings of the normalisation and of the fusion may differ from those of the fit: the
        statistics are then computed anew from the ID scores.

        Raises:
            ConfigError: the fit had another network or other weights, other experts, or a setting
                that changes their scores; of a network that is not understood yet, the experts are
                compared at the first images.
        """
        return self.adopt(calibration, is_known=False)

    def adopt(self, calibration: Calibration, is_known: bool = True) -> Self:
        """As `with_calibration`, of a fit that is known to have had this network."""
        then, now = vars(calibration.settings), vars(self.settings)
        for name in (n for n in now if n not in FUSION_SETTINGS and now[n] != then[n]):
            raise ConfigError(
                f"calibration must have the detector's {name} = {now[name]!r}, got "
                f"{then[name]!r}: fit again"
            )
        self._name_as(calibration)
        _check_experts(calibration, self.experts)
        network = None if is_known else calibration.network
        if network is not None and not is_network(self.net, network):
            raise ConfigError(
                f"calibration must be of this network, got that of a {network.kind} with other "
                "weights or another forward: fit again"
            )
        self._fitted, self.reference_ = calibration.fitted, None
        if then != now:
            calibration = self.learn(calibration.id_scores, calibration.fitted, calibration.network)
        self.calibration_ = calibration
        return self

    def _name_as(self, calibration: Calibration) -> None:
        """Name the experts as those of an earlier fit, if they are not known yet."""
        if self.experts:
            return
        taps = tuple(n for n in calibration.experts if n not in _NO_TAPS)
        check_taps(self.net, taps)
        if self.settings.strong == calibration.settings.strong:
            self._name(taps, calibration.strong)
        elif isinstance(self.settings.strong, str):
            raise ConfigError("strong='auto' needs the network's stages: fit again")
        else:
            self._name(taps, self._named_strong(self.settings.strong, taps))

    def known_preprocessing(self) -> Preprocessing:
        """The preprocessing; DataError if it is not set."""
        if self.preprocessing is None:
            raise DataError(
                "this detector does not know how its network's images are preprocessed: set "
                "detector.preprocessing, or give tensors"
            )
        return self.preprocessing

    def explain(self, images: Images, with_maps: bool = True) -> Explanation:
        """What the confidences of images `[B, C, H, W]` are made of, and where: see `Explanation`.

        Of one image `[C, H, W]` as of a batch of one. Heat maps take one more pass.

        Raises:
            NotFittedError, NonFiniteError: as in `score`.
        """
        self._check_fitted()
        tensor = self._images(images)
        batch = checked_images(tensor.unsqueeze(0) if tensor.ndim == 3 else tensor)
        experts, pred = self.expert_scores(batch)
        maps = dict[str, Tensor]()
        if with_maps:
            norm, moved = self.settings.feature_norm, self._moved(batch)
            with eval_mode(unwrapped(self.net)), torch.no_grad():
                maps = tapped_maps(
                    self.net,
                    moved,
                    self.structure(moved),
                    self.taps,
                    lambda feature_map: atf_map(feature_map, *norm).cpu(),
                )
        return self.explain_scores(experts, pred, maps)

    def expert_scores(self, images: Tensor) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """Scores `[L, B]` of the experts and predicted classes `[B]` of images `[B, C, H, W]`.

        Raises:
            NotFittedError, NonFiniteError: as in `score`.
        """
        self._check_fitted()
        experts, pred = self._heard(images)
        return experts[: len(self.experts)], pred.cpu().numpy()

    def explain_scores(
        self,
        experts: NDArray[np.float64],
        pred: NDArray[np.int64],
        maps: dict[str, Tensor] | None = None,
    ) -> Explanation:
        """As `explain`, of images with these scores `[L, B]` of the experts."""
        calibration, conf = self._check_fitted(), self.confidence(experts)
        return explanation(calibration, experts, conf, pred, maps or {}, self.reference_)

    def _images(self, images: Images) -> Tensor:
        if isinstance(images, str | Path):
            return self.known_preprocessing().read(images)
        if isinstance(images, Image.Image):
            return self.known_preprocessing()(images)
        return super()._images(images)

    def save(self, path: str | Path) -> None:
        """Keep the fitted detector in a file: safetensors and JSON, no pickle, not the network.

        Raises:
            NotFittedError: before `fit`.
            DetectorFileError: the file cannot be written.
        """
        kept = Kept(
            self._check_fitted(),
            self.reference_,
            self._structure,
            self.preprocessing,
            self.class_names,
            self.network_source,
        )
        write_kept(Path(path), kept, self.net)

    @classmethod
    def load(cls, path: str | Path, net: nn.Module, strict: bool = True) -> Self:
        """The detector in a file, for the network that it was fitted with.

        Args:
            path: a file that `save` wrote.
            net: the network, on any device; it is left unchanged.
            strict: whether other weights are an error, not a warning.

        Raises:
            DetectorFileError: the file is missing, damaged, of a newer format, or of another
                network.
        """
        kept = read_kept(Path(path), net, strict)
        try:
            detector = cls(net, kept.calibration.settings, kept.structure)
            if detector.experts and detector.strong != kept.calibration.strong:
                raise ConfigError(f"strong must be {', '.join(detector.strong)}")
            if kept.structure is not None:
                detector._check_structure(kept.structure)
            detector.adopt(kept.calibration)
            detector.class_names = kept.class_names
        except (ConfigError, TapError) as error:
            raise nonsense(Path(path), error) from None
        detector.reference_, detector.preprocessing = kept.reference, kept.preprocessing
        detector.network_source = kept.network_source
        detector._check_scoring(Path(path))
        return detector

    def _check_scoring(self, path: Path) -> None:
        """Raise DetectorFileError unless two images can be scored, of the size of the fit."""
        known = self._check_fitted().network
        if known is None or not known.image:
            return
        try:
            self.expert_scores(fixed_images(known.image))
        except NonFiniteError:  # of these images, which are no photographs
            pass
        except FuseNormError as error:
            raise nonsense(path, error) from None

    def export(
        self,
        path: str | Path,
        dtype: Dtype = "uint8",
        acceptance: float = 0.95,
        shape: Sequence[int] | None = None,
    ) -> Exported:
        """Write the network and the detector as one program, for ONNX or `torch.export`.

        It runs without this package and computes in float32 what this detector computes on the
        CPU. Inputs and outputs:

        - `image`: `[N, 3, H, W]` with values from 0 to 255, resized and cropped as
          `preprocessing` says. Without `preprocessing`, what the network takes, in float32.
        - `acceptance`: float64 scalar, may be left out in ONNX.
        - `logits` `[N, K]`, `confidence` `[N]`, and if the detector is calibrated `p_value` `[N]`
          and the verdict `ood` `[N]`. An image with a score that is not finite has the confidence
          NaN and the smallest p-value.

        The program is run on a few images, and is not written if its confidences differ. ONNX is
        run if ONNX Runtime is installed.

        Args:
            path: a file that ends in `.onnx` or `.pt2`.
            dtype: of `image`, `"uint8"` or `"float32"`.
            acceptance: default of the input of that name.
            shape: of one image, `[C, H, W]`, without `preprocessing`.

        Raises:
            NotFittedError: before `fit`.
            CalibrationError: too few calibration images for the acceptance.
            ConfigError: settings that need a gradient, another suffix, no shape.
            ExportError: a network that cannot be traced, a package that is missing, other
                confidences, or a file that cannot be written.
        """
        calibration = self._check_fitted()
        if self.reference_ is not None:
            check_enough(len(self.reference_), acceptance)
        check_exportable(self.settings, self.strong)
        inputs = Inputs.of(self.preprocessing, dtype, shape)
        twin = copy(self)
        twin.net = float32_copy(self.net)
        images = inputs.examples()
        panel, roles = self._panel_with(()), Roles.of(self.experts, self.taps, self.strong)
        judge = Judge(
            twin.net,
            twin.structure(inputs.normalised(images)),
            panel,
            self.rows_in(panel),
            calibration.fitted,
            Fusion(self.settings, roles, calibration.statistics, calibration.joint),
            inputs,
            self.reference_,
        )
        known = {
            "version": __version__,
            "class_names": self.class_names,
            "experts": self.experts,
            "strong": self.strong,
            "preprocessing": self.preprocessing and self.preprocessing.to_json(),
            "calibration_images": 0 if self.reference_ is None else len(self.reference_),
        }
        expected = twin.score(inputs.normalised(images))
        return export_judge(judge, Path(path), images, expected, acceptance, known)

    def with_companions(self) -> Self:
        """Also score the output experts that need no extra forward pass, for comparison.

        They do not take part in the fusion; their scores follow those of the experts in
        `Scored.experts`, under the names in `companions`.
        """
        percentile = self.settings.react_percentile
        free = [
            Output(name, DEFAULT_TEMPERATURE[name], react_percentile=q)
            for q in dict.fromkeys((None, percentile))
            for name in ("msp", "mls", "energy")
        ]
        self.companions, self._free = tuple(output.label for output in free), free
        if self.experts:
            self.panel = self._panel_with(free)
        return self

    @property
    def _output(self) -> tuple[Output, ...]:
        return (self.settings.output_expert,) if "output" in self.strong else ()

    @property
    def _posthoc(self) -> tuple[Posthoc, ...]:
        return tuple(self.settings.posthoc(n) for n in self.experts if n in POSTHOC)

    def _panel_with(self, companions: Sequence[Output]) -> Panel:
        outputs = tuple(dict.fromkeys((*self._output, *companions)))
        return Panel(self.taps, (self.settings.feature_norm,), outputs, self._posthoc)

    def _rows(self) -> list[int]:
        """The panel's rows of the experts, in order."""
        return self.rows_in(self.panel)

    def rows_in(self, panel: Panel) -> list[int]:
        """The rows of the experts, in order, among the scores of a panel that has them all."""
        return [
            *panel.norm_rows(self.taps, self.settings.feature_norm),
            *(panel.output_row(output) for output in self._output),
            *(panel.posthoc_row(expert) for expert in self._posthoc),
        ]

    def _listener(self, recorded: bool = False) -> Listener:
        return self._listener_of(self.panel, self._fitted, recorded)

    def _expert_scores(self, observed: Observed) -> Tensor:
        assert self._structure is not None
        scores = self.panel.completed(self.net, self._structure, observed, self._fitted)
        if not self.companions:
            return scores
        return scores[[*self._rows(), *map(self.panel.output_row, self._free)]]

    def confidence(self, experts: NDArray[Any]) -> NDArray[np.float64]:
        calibration, s = self._check_fitted(), self.settings
        strong = [self.experts.index(name) for name in self.strong]
        weak = [i for i, tap in enumerate(self.taps) if tap not in self.strong]
        joint, norms = calibration.joint, experts[: len(self.taps)]
        if s.penalty == "joint":
            assert joint is not None
            z = standardise(experts[strong], calibration.statistics, s.clip)
            return mean_of_strong(z, s.weights) - s.joint_weight * joint_penalty(norms, joint)
        z = normalise(experts[: len(self.experts)], calibration.statistics)
        clipped = np.minimum(z[strong], 1) if s.clip else z[strong]
        conf = fuse(clipped, z[weak], s.weights, s.base, s.cap)
        return conf if joint is None else conf - s.cap * far_off(norms, joint)

    def _repeated(self, experts: NDArray[Any]) -> int:
        taps = len(self.taps)  # other experts may score the images of their fit in another way
        return repeated_columns(self._check_fitted().id_scores[:taps], experts[:taps])

    def _check_fitted(self) -> Calibration:
        if self.calibration_ is None:
            raise NotFittedError("this FuseNorm has no ID statistics: call fit(loader) first")
        return self.calibration_

    def _named_strong(self, experts: Sequence[str | int], taps: Sequence[str]) -> tuple[str, ...]:
        """Names of strong experts, of which some may be taps.

        Raises:
            ConfigError: an expert that is unknown, or named twice.
        """
        strong = []
        for expert in experts:
            number = expert if isinstance(expert, int) else None
            if number is not None and not 0 <= number < len(taps):
                raise ConfigError(
                    f"strong expert {number} is out of range: there are {len(taps)} taps, "
                    f"numbered from 0: {', '.join(taps)}"
                )
            name = expert if isinstance(expert, str) else taps[expert]
            name = "output" if name == self.settings.output else name
            if name not in (*taps, *_NO_TAPS):
                way_out = f"choose from {', '.join((*(taps or ['the taps']), *_NO_TAPS))}"
                way_out = f"set output={name!r}" if name in OUTPUT_EXPERTS else way_out
                raise ConfigError(
                    f"unknown strong expert {name!r} with output={self.settings.output!r}: "
                    f"{way_out}"
                )
            strong.append(name)
        if len(set(strong)) != len(strong):
            raise ConfigError(f"strong must name each expert once, got {', '.join(strong)}")
        return tuple(strong)


def _check_experts(calibration: Calibration, experts: tuple[str, ...]) -> None:
    if calibration.experts != experts:
        raise ConfigError(
            f"calibration must have the detector's experts {', '.join(experts)}, got "
            f"{', '.join(calibration.experts)}: fit again"
        )


def _check_names(names: tuple[str, ...] | None, structure: Structure) -> None:
    if names is not None and len(names) != structure.classes:
        raise ConfigError(
            f"class_names must be the names of {structure.classes} classes, got {len(names)}"
        )
