"""A compiled network is scored as it was before compilation, and stays compiled."""

import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from fusenorm_openood import FuseNorm, tap_candidates
from fusenorm_openood.detectors.single import SingleScore
from tests.nets import BLOCKS, Net, some_images

IMAGES = some_images(16)


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


def run(net: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return net(IMAGES)


def compiled(kind: str, backend) -> nn.Module:
    net = Net()
    if kind == "net":
        return torch.compile(net, backend=backend)
    if kind == "fullgraph":
        return torch.compile(net, backend=backend, fullgraph=True)
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


KINDS = ["net", "fullgraph", "net.compile", "submodule", "block.compile", "forward"]
KINDS += ["inside DataParallel"]


@pytest.fixture(scope="module")
def expected():
    """Scores of the network before compilation, of all kinds of experts."""
    return FuseNorm(Net(), **SETTINGS).fit([IMAGES]).infer([IMAGES])


SETTINGS = {"strong": ["output", "fdbd", "b.0"], "output": "odin", "react_percentile": 90.0}


@pytest.mark.parametrize("kind", KINDS)
def test_scores_are_those_before_compilation_and_the_network_still_runs_compiled(kind, expected):
    backend = Counting()
    net = compiled(kind, backend)
    ran_before = kind in ("net", "submodule")
    if ran_before:
        run(net)
        assert backend.runs > 0
    before = backend.runs
    detector = FuseNorm(net, **SETTINGS).fit([IMAGES])
    scored = detector.infer([IMAGES])
    torch.testing.assert_close(scored.experts, expected.experts)
    torch.testing.assert_close(scored.conf, expected.conf)
    assert scored.pred.tolist() == expected.pred.tolist()
    assert backend.runs == before
    torch.testing.assert_close(run(net), run(Net()))
    assert backend.runs > before
    runs, graphs = backend.runs, backend.compiled
    detector.score(IMAGES)
    assert backend.runs == runs
    run(net)
    assert backend.runs > runs
    assert backend.compiled == graphs  # not compiled anew after every score


@pytest.mark.parametrize("name", ["msp", "odin", "react"])
def test_single_scores_of_a_compiled_network(name):
    net = compiled("fullgraph", Counting())
    expected = SingleScore(Net(), name).fit([IMAGES]).score(IMAGES)
    torch.testing.assert_close(SingleScore(net, name).fit([IMAGES]).score(IMAGES), expected)


def test_names_are_those_without_the_compilers_prefix():
    net = compiled("net", "eager")
    assert FuseNorm(net).fit([IMAGES]).taps == BLOCKS
    assert "a.1" in [candidate.name for candidate in tap_candidates(net, IMAGES)]
    assert FuseNorm(net, taps=["_orig_mod.a.1", "b.1"]).fit([IMAGES]).taps == ("a.1", "b.1")
    detector = FuseNorm(compiled("submodule", "eager"), strong=["output"]).fit([IMAGES])
    assert len(detector.taps) == 4


def test_images_of_another_size():
    net = torch.compile(Net(), backend=Counting(), dynamic=True)
    other = some_images(5, (8, 20))
    found, expected = (
        FuseNorm(n, strong=["output"]).fit([IMAGES]).score(other) for n in (net, Net())
    )
    torch.testing.assert_close(found, expected)


def test_the_stance_of_the_compiler_is_restored():
    backend = Counting()
    net = compiled("net", backend)
    detector = FuseNorm(net, strong=["output"]).fit([IMAGES])
    with torch.compiler.set_stance("fail_on_recompile"):  # the user's own
        detector.score(IMAGES)
        with pytest.raises(RuntimeError):
            run(net)
    with pytest.raises(RuntimeError):
        detector.score(torch.randn(4, 7, 12, 12))
    run(net)
    assert backend.runs == 1
    expected = detector.score(IMAGES)
    with ThreadPoolExecutor(4) as pool:
        for conf in pool.map(detector.score, [IMAGES] * 40):
            torch.testing.assert_close(conf, expected)
    assert backend.runs == 1
    run(net)
    assert backend.runs == 2


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_what_inductor_compiled_scores_the_same():
    net = torch.compile(Net(), fullgraph=True)
    logits = run(net)
    torch.testing.assert_close(logits, run(Net()), rtol=1e-4, atol=1e-4)
    settings = {"strong": ["output"], "output": "odin"}
    expected = FuseNorm(Net(), **settings).fit([IMAGES]).score(IMAGES)
    torch.testing.assert_close(FuseNorm(net, **settings).fit([IMAGES]).score(IMAGES), expected)
    assert torch.equal(run(net), logits)
