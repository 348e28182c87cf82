"""Which images a detector learns from: those of the ID validation list, and no others."""

from collections import Counter

import numpy as np
import pytest

from fusenorm_openood import FuseNorm, Settings
from fusenorm_openood.cli.engines import Job, evaluate_run, read_postprocessor
from fusenorm_openood.data.benchmarks import image_loader
from fusenorm_openood.data.lists import ImageList
from fusenorm_openood.detectors.single import SingleScore
from fusenorm_openood.evaluation.evaluation import evaluate
from fusenorm_openood.evaluation.runs import Run
from fusenorm_openood.method.scores import make_score
from tests import document
from tests.conftest import drawn_benchmark, make_net
from tests.preprocessing import PREPROCESSING

IMAGES = 6
VAL, VAL_OOD = ["val_cifar10.txt"] * IMAGES, ["val_tin.txt"] * IMAGES


@pytest.fixture
def benchmark(tmp_path):
    return drawn_benchmark("cifar10", tmp_path, IMAGES)


@pytest.fixture
def read(monkeypatch):
    """The name of the list of every image that is read."""
    names, get = [], ImageList.__getitem__

    def watched(self, index):
        names.append(self.path.name)
        return get(self, index)

    monkeypatch.setattr(ImageList, "__getitem__", watched)
    return names


def each_tested_list_once(benchmark):
    names = [s.imagelist.name for s in benchmark.tested(fsood=True)]
    return Counter(dict.fromkeys(names, IMAGES)) - Counter(VAL)


def test_fusenorm_reads_the_validation_list_for_react_and_for_the_statistics(benchmark, read):
    detector = FuseNorm(make_net(classes=10), Settings.published(temperature=1.0))
    evaluate(detector, benchmark, fsood=True, progress=False)
    assert read[: 2 * IMAGES] == VAL + VAL
    assert Counter(read[2 * IMAGES :]) == each_tested_list_once(benchmark)
    known = detector.infer(image_loader(benchmark.id["val"])).experts
    s = detector.id_statistics_.statistics
    expected = document.compute_id_statistics(known, 1, 99.9)
    np.testing.assert_allclose([s.mean, s.std, s.lower, s.upper], expected, rtol=1e-6)


def test_a_search_reads_the_validation_pair_before_the_test(benchmark, read):
    config = read_postprocessor("fusenorm", None, [], [], True)
    config["postprocessor"]["postprocessor_sweep"] = {"base": [2, 20]}
    job = Job(config=config, benchmark=benchmark, fsood=True)
    evaluate_run(job, "native", Run(make_net(classes=10)))
    assert read[: 2 * IMAGES] == VAL + VAL_OOD
    assert Counter(read[2 * IMAGES :]) == each_tested_list_once(benchmark)


def test_a_search_on_pseudo_ood_images_reads_no_ood_image_before_the_test(benchmark, read):
    config = read_postprocessor("fusenorm", None, [], [], "pseudo")
    config["postprocessor"]["postprocessor_sweep"] = {"base": [2, 20]}
    job = Job(config=config, benchmark=benchmark, fsood=True)
    evaluate_run(job, "native", Run(make_net(classes=10)))
    before = len(read) - sum(each_tested_list_once(benchmark).values())
    assert set(read[:before]) == set(VAL)
    assert Counter(read[before:]) == each_tested_list_once(benchmark)


@pytest.mark.parametrize("name", ["knn", "fdbd", "mds++"])
def test_experts_that_openood_fits_on_training_images_read_the_training_list(benchmark, read, name):
    config = read_postprocessor(name)
    job = Job(config=config, benchmark=benchmark)
    assert benchmark.id["train"] in list(job.image_sets())
    evaluate_run(job, "native", Run(make_net(classes=10)))
    assert read[:IMAGES] == [benchmark.id["train"].imagelist.name] * IMAGES


def test_a_table_of_odin_counts_the_step_in_pixels_before_normalisation(benchmark):
    net = make_net(classes=10)
    job = Job(config=read_postprocessor("odin", None, ["noise=0.05"]), benchmark=benchmark)
    _, conf, _ = evaluate_run(job, "native", Run(net)).scores["id"]["test"]
    score = make_score("odin", {"noise": 0.05}, input_std=PREPROCESSING["cifar10"].std)
    expected = SingleScore(net, score).infer(image_loader(benchmark.id["test"])).conf
    np.testing.assert_allclose(conf, expected, rtol=1e-6)
