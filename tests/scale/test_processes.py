"""However many processes share the work, tables, scores and shards are the same."""

import pickle

import numpy as np
import pytest

from tests.scale.commands import run

EVAL = {
    "default": [],
    "published": ["--postprocessor", "fusenorm_published"],
    "knn": ["--postprocessor", "knn", "--set", "K=5"],
    "vim": ["--postprocessor", "vim", "--set", "dim=4"],
    "react": ["--postprocessor", "react"],
    "msp": ["--postprocessor", "msp"],
}


def shards_of(store):
    return {p.relative_to(store): p.read_bytes() for p in store.rglob("*.parquet")}


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


@pytest.mark.parametrize("options", EVAL.values(), ids=EVAL)
def test_processes_and_recording_change_no_bit(short, tmp_path, options):
    live = evaluated(short, tmp_path / "live", "none", options)
    stores = {}
    for world, shard in ((1, 8), (2, 8), (3, 20)):
        home, store = tmp_path / f"{world}", tmp_path / f"store{world}"
        assert evaluated(short, home, store, options, world, shard=shard) == live
        stores[world] = shards_of(store)
    assert stores[1] == stores[2]
