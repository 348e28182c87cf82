"""However many processes share the work, tables, scores and shards are the same."""

import io
import pickle

import numpy as np
import pandas as pd
import pytest
import torch

from fusenorm_openood.storage.detector_file import read_contents
from tests.scale.commands import run

PUBLISHED = ["--postprocessor", "fusenorm_published"]
HALF = ["--amp", "bf16", "--set", "react_percentile=90"]


def shards_of(store):
    return {p.relative_to(store): p.read_bytes() for p in store.rglob("*.safetensors")}


def agree(one: str, other: str) -> bool:
    """Whether two CSV files are the same up to the rounding of their confidences."""
    tables = [pd.read_csv(io.StringIO(text)) for text in (one, other)]
    pd.testing.assert_frame_equal(*tables, rtol=1e-5, atol=1e-5)
    return True


def arrays(value):
    if isinstance(value, dict):
        return {name: arrays(item) for name, item in value.items()}
    if isinstance(value, list):
        return [arrays(item) for item in value]
    return value if value is None else np.asarray(value).tobytes()


def evaluated(short, home, store, options, world=1, **how):
    """What is printed, and the bits of all scores."""
    argv = short.argv("eval", store, "--output-dir", home, "--save-score", *options)
    done = run(home, argv, world, **how)
    assert [d.status for d in done] == [0] * world, done
    assert [d.out for d in done[1:]] == [""] * (world - 1)
    (path,) = home.rglob("*.pkl")
    return done[0].out, arrays(pickle.loads(path.read_bytes()))


@pytest.mark.parametrize("options", [PUBLISHED, pytest.param(HALF, marks=pytest.mark.slow)])
def test_recording_in_two_processes_changes_no_bit(short, tmp_path, options):
    two = evaluated(short, tmp_path / "two", tmp_path / "store", options, 2, shard=8)
    if "--amp" in options:  # in half precision the size of a batch changes what it rounds to
        one = evaluated(short, tmp_path / "one", tmp_path / "other", options, shard=8)
        assert two == one
    else:
        assert two == evaluated(short, tmp_path / "live", "none", options)


def test_the_number_of_processes_changes_no_bit(short, tmp_path):
    found = []
    for world, shard in ((1, 8), (2, 8), (3, 20)):
        home, store = tmp_path / f"{world}", tmp_path / f"store{world}"
        scores = evaluated(short, home, store, PUBLISHED, world, shard=shard)
        found.append((scores, shards_of(store)))
    assert found[0] == found[1]
    assert found[0][0] == found[2][0]


def test_processes_and_recording_change_no_figure_of_a_comparison(short, tmp_path):
    (live,) = run(tmp_path / "live", short.argv("compare", "none"))
    stores = []
    for world in (1, 2):
        store = tmp_path / f"store{world}"
        done = run(tmp_path / str(world), short.argv("compare", store), world, shard=8)
        assert [(d.status, d.out) for d in done] == [(0, live.out), (0, "")][:world]
        stores.append(shards_of(store))
    assert stores[0] == stores[1]


def test_processes_and_recording_change_no_row_of_files(short, detector, tmp_path):
    argv = ["score", "--detector", detector, short.data / "images_digits" / "test_digit8"]
    argv += ["--num-workers", 0, "--no-progress", "--device", "cpu", "--batch-size", 16]
    (live,) = run(tmp_path / "live", argv)
    assert (live.status, live.out.count("\n")) == (0, 175)
    stores, outs = [], []
    for world, shard in ((1, 70), (2, 70), (3, 100)):
        store = tmp_path / f"store{world}"
        done = run(tmp_path / str(world), [*argv, "--store", store], world, shard=shard)
        assert [d.status for d in done] == [0] * world
        assert [d.out for d in done[1:]] == [""] * (world - 1)
        assert agree(live.out, done[0].out)
        stores.append(shards_of(store))
        outs.append(done[0].out)
    assert stores[0] == stores[1]
    assert outs[0] == outs[1]
    assert [len(store) for store in stores] == [4, 4, 3]  # one is of the network


def test_processes_and_recording_fit_the_same_detector(short, tmp_path):
    images = short.data / "images_digits"
    argv = ["fit", "--weights", short.checkpoint, "--id-dir", images / "val_digits"]
    argv += ["--calibration-dir", images / "test_digits", "--image-size", 24]
    argv += ["--normalization", "digits", "--no-progress", "--num-workers", 0, "--device", "cpu"]
    (live,) = run(tmp_path / "live", [*argv, "--output", tmp_path / "live.st"])
    again = [*argv, "--store", tmp_path / "store", "--output", tmp_path / "two.st"]
    done = run(tmp_path / "two", again, 2)
    assert [live.status, *(d.status for d in done)] == [0, 0, 0], done
    one, other = (read_contents(tmp_path / f"{name}.st") for name in ("live", "two"))
    for contents in (one, other):  # the time of the calibration, and so the checksum, may differ
        del contents.record["checksum"], contents.record["calibration"]["history"]
    assert one.record == other.record
    assert one.tensors.keys() == other.tensors.keys()
    assert all(torch.equal(other.tensors[name], tensor) for name, tensor in one.tensors.items())
