"""A compiled network is listened to as it was before compilation, and stays compiled."""

import shutil
import threading
from collections.abc import Iterator

import pytest
import torch
from fusenorm_openood.detectors.baselines import Baseline
from torch import nn

from fusenorm_openood import FuseNorm, tap_candidates
from tests.nets import BLOCKS, Net, some_images

IMAGES = some_images(16)
SETTINGS = {"strong": ["output", "fdbd", "b.0"], "output": "odin", "react_percentile": 90.0}


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


class Counting:
    """A backend of torch.compile that counts what it compiles and what then runs."""

    def __init__(self) -> None:
        self.compiled = self.runs = 0

    def __call__(self, graph, inputs):
        self.compiled += 1

        def run(*args):
            self.runs += 1
            return graph.forward(*args)

        return run


def compiled(kind: str, backend) -> nn.Module:
    net = Net()
    if kind == "net":
        return torch.compile(net, backend=backend)
    if kind == "fullgraph":
        return torch.compile(net, backend=backend, fullgraph=True)
    if kind == "dynamic":
        return torch.compile(net, backend=backend, dynamic=True)
    if kind == "net.compile":
        net.compile(backend=backend)
    if kind == "submodule":
        net.a = torch.compile(net.a, backend=backend)
    if kind == "block.compile":
        net.b[0].compile(backend=backend)
    if kind == "inside DataParallel":
        return nn.DataParallel(torch.compile(net, backend=backend))
    if kind == "forward":

        class Decorated(Net):
            forward = torch.compile(Net.forward, backend=backend)

        return Decorated()
    return net


KINDS = [
    *("net", "fullgraph", "dynamic", "net.compile", "submodule", "block.compile"),
    *("inside DataParallel", "forward"),
]


@pytest.mark.parametrize("ran", [False, True], ids=["new", "ran before"])
@pytest.mark.parametrize("kind", KINDS)
def test_scores_are_those_of_the_network_before_compilation(kind, ran):
    backend = Counting()
    net = compiled(kind, backend)
    if ran:
        with torch.no_grad():
            net(IMAGES)
        assert backend.runs > 0
    before = backend.runs
    expected = FuseNorm(Net(), **SETTINGS).fit([IMAGES]).infer([IMAGES])
    scored = FuseNorm(net, **SETTINGS).fit([IMAGES]).infer([IMAGES])
    torch.testing.assert_close(scored.experts, expected.experts)
    torch.testing.assert_close(scored.conf, expected.conf)
    assert scored.pred.tolist() == expected.pred.tolist()
    assert backend.runs == before


@pytest.mark.parametrize("kind", KINDS)
def test_the_network_still_runs_compiled_afterwards(kind):
    backend = Counting()
    net = compiled(kind, backend)
    detector = FuseNorm(net, strong=["output"]).fit([IMAGES])
    with torch.no_grad():
        torch.testing.assert_close(net(IMAGES), Net()(IMAGES))
    assert backend.runs > 0
    runs, graphs = backend.runs, backend.compiled
    detector.score(IMAGES)
    assert backend.runs == runs
    with torch.no_grad():
        net(IMAGES)
    assert backend.runs > runs
    assert backend.compiled == graphs  # not compiled anew after every score


@pytest.mark.parametrize("name", ["msp", "odin", "react"])
def test_baselines_score_a_compiled_network(name):
    args = {"odin": {"temperature": 10.0, "noise": 0.01}, "react": {"percentile": 90.0}}
    net = compiled("fullgraph", Counting())
    expected = Baseline(Net(), name, **args.get(name, {})).fit([IMAGES]).score(IMAGES)
    got = Baseline(net, name, **args.get(name, {})).fit([IMAGES]).score(IMAGES)
    torch.testing.assert_close(got, expected)


def test_names_are_those_without_the_compilers_prefix():
    net = compiled("net", "eager")
    assert FuseNorm(net).fit([IMAGES]).taps == BLOCKS
    assert "a.1" in [candidate.name for candidate in tap_candidates(net, IMAGES)]
    assert FuseNorm(net, taps=["_orig_mod.a.1", "b.1"]).fit([IMAGES]).taps == ("a.1", "b.1")
    inner = compiled("submodule", "eager")
    detector = FuseNorm(inner, strong=["output"]).fit([IMAGES])
    assert len(detector.taps) == 4


def test_images_of_another_size():
    net = compiled("net", Counting())
    detector = FuseNorm(net, strong=["output"]).fit([IMAGES])
    other = some_images(5, (8, 20))
    expected = FuseNorm(Net(), strong=["output"]).fit([IMAGES]).score(other)
    torch.testing.assert_close(detector.score(other), expected)


def test_the_stance_of_the_compiler_is_restored_after_an_error():
    backend = Counting()
    net = compiled("net", backend)
    detector = FuseNorm(net, strong=["output"]).fit([IMAGES])
    with pytest.raises(RuntimeError):
        detector.score(torch.randn(4, 7, 12, 12))
    with torch.no_grad():
        net(IMAGES)
    assert backend.runs == 1


def test_the_users_own_stance_is_restored():
    backend = Counting()
    net = compiled("net", backend)
    detector = FuseNorm(net, strong=["output"]).fit([IMAGES])
    with torch.compiler.set_stance("fail_on_recompile"):
        detector.score(IMAGES)
        with pytest.raises(RuntimeError), torch.no_grad():
            net(IMAGES)
    with torch.no_grad():
        net(IMAGES)
    assert backend.runs == 1


def test_overlapping_threads_restore_the_stance():
    backend = Counting()
    net = compiled("net", backend)
    with torch.no_grad():
        net(IMAGES)
    runs = backend.runs
    detector = FuseNorm(net, strong=["output"]).fit([IMAGES])
    expected, errors = detector.score(IMAGES), []

    def score():
        try:
            for _ in range(20):
                torch.testing.assert_close(detector.score(IMAGES), expected)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=score) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert backend.runs == runs
    with torch.no_grad():
        net(IMAGES)
    assert backend.runs == runs + 1


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_what_inductor_compiled_scores_the_same():
    net = torch.compile(Net(), fullgraph=True)
    with torch.no_grad():
        logits = net(IMAGES)
        torch.testing.assert_close(logits, Net()(IMAGES), rtol=1e-4, atol=1e-4)
    settings = {"strong": ["output"], "output": "odin"}
    expected = FuseNorm(Net(), **settings).fit([IMAGES]).score(IMAGES)
    torch.testing.assert_close(FuseNorm(net, **settings).fit([IMAGES]).score(IMAGES), expected)
    with torch.no_grad():
        assert torch.equal(net(IMAGES), logits)
