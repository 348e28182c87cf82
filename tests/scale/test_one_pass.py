"""One recorded pass serves every postprocessor that needs no more of the network."""

import pytest
import torch

from fusenorm_openood import FuseNorm, Settings
from fusenorm_openood.detectors.single import SingleScore
from fusenorm_openood.forward.recorded import RecordedLoader
from fusenorm_openood.storage.shards import Key
from tests.conftest import make_net
from tests.forward.test_recorded import Images
from tests.scale.commands import log_of, run
from tests.scale.test_reuse import without_network_and_images

ID, IMAGES = Images(40), Images(15)
MAKERS = {
    "default": lambda net: FuseNorm(net),
    "other taps": lambda net: FuseNorm(net, taps=["layer2.1", "layer1.0"]),
    "stages": lambda net: FuseNorm(net, taps="stages", strong=["knn"], neighbours=3),
    "clipped": lambda net: FuseNorm(net, react_percentile=90.0),
    "published": lambda net: FuseNorm(net, Settings.published()),
    "odin": lambda net: SingleScore(net, "odin", temperature=1000.0, noise=0.0014),
    "msp": lambda net: SingleScore(net, "msp"),
    "mls": lambda net: SingleScore(net, "mls"),
    "ebo": lambda net: SingleScore(net, "ebo", temperature=2.0),
    "react": lambda net: SingleScore(net, "react", percentile=90.0),
    "gen": lambda net: SingleScore(net, "gen"),
    "vim": lambda net: SingleScore(net, "vim"),
}


def recorded(store, make, batch_size=4):
    """A detector's scores from recorded passes, and how many images were read for them."""
    ID.read = IMAGES.read = 0
    known, unknown = (
        RecordedLoader(images, store, {}, name, batch_size)
        for images, name in ((ID, "id"), (IMAGES, "images"))
    )
    scored = make(make_net()).fit(known).infer(unknown)
    return scored, ID.read + IMAGES.read - 2  # by which the network is understood


@pytest.mark.parametrize(
    ("before", "names"),
    [
        ("default", ["other taps", "clipped", "msp", "mls", "ebo", "react", "gen", "vim"]),
        ("react", ["msp", "mls", "ebo", "gen", "vim"]),
        ("vim", ["msp", "react", "gen"]),
    ],
)
def test_a_pass_serves_whatever_it_contains(before, names, tmp_path):
    recorded(tmp_path, MAKERS[before])
    for name in names:
        scored, read = recorded(tmp_path, MAKERS[name])
        live = MAKERS[name](make_net()).fit(list(ID.images.split(40))).infer([IMAGES.images])
        assert read == 0, name
        torch.testing.assert_close(*(torch.from_numpy(s.conf) for s in (scored, live)))
        assert (scored.pred == live.pred).all()


@pytest.mark.parametrize(
    ("before", "name"),
    [
        ("msp", "react"),  # no features
        ("msp", "default"),
        ("vim", "default"),  # no norms
        ("other taps", "default"),
        ("published", "msp"),  # in other parts, for the sake of the gradient
        ("default", "published"),
        ("default", "odin"),
    ],
)
def test_what_a_pass_does_not_contain_is_computed(before, name, tmp_path):
    recorded(tmp_path, MAKERS[before])
    scored, read = recorded(tmp_path, MAKERS[name])
    alone, all_of_it = recorded(tmp_path / "alone", MAKERS[name])
    assert 0 < read <= all_of_it
    assert (scored.conf == alone.conf).all()


def test_a_pass_serves_only_when_it_is_complete_and_undamaged(tmp_path):
    expected, _ = recorded(tmp_path, MAKERS["default"])
    msp, _ = recorded(tmp_path / "alone", MAKERS["msp"])
    (folder,) = (f for f in tmp_path.glob("images-*") if Key.read(f).record["content"]["norms"])
    (shard,) = folder.glob("*.safetensors")
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-100] + bytes(100))
    scored, read = recorded(tmp_path, MAKERS["msp"])
    assert read >= len(IMAGES)
    assert (scored.conf == msp.conf).all()
    assert (recorded(tmp_path, MAKERS["default"])[0].conf == expected.conf).all()


def test_features_are_recorded_once_for_the_threshold_and_the_scores(tmp_path):
    _, read = recorded(tmp_path, MAKERS["clipped"])
    assert read == len(ID) + len(IMAGES)


@pytest.fixture(scope="module")
def store(short, tmp_path_factory):
    """A store with all that the default method needs."""
    home = tmp_path_factory.mktemp("one_pass")
    (done,) = run(home, short.argv("eval", home / "store"))
    assert done.status == 0, done.err
    return home / "store"


@pytest.mark.parametrize("postprocessor", ["react", "ash"])
def test_a_command_takes_its_scores_from_the_pass_of_another(short, store, tmp_path, postprocessor):
    live, again = (
        short.argv("eval", kept, "--postprocessor", postprocessor) for kept in ("none", store)
    )
    (expected,) = run(tmp_path / "live", live)
    (done,) = run(tmp_path, again, first=without_network_and_images)
    assert (done.status, done.out) == (0, expected.out), done
    assert log_of(tmp_path) == []
