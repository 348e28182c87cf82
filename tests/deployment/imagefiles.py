"""Image files and a detector of them, which actors can load as well."""

import os
import signal
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from torch import nn

from fusenorm_openood import FuseNorm
from fusenorm_openood.data.preprocessing import Preprocessing
from fusenorm_openood.errors import CheckpointError
from fusenorm_openood.storage.shards import ShardSet
from tests.conftest import make_loader, make_net
from tests.deployment.actors import Ended

NETWORK = "tests.deployment.imagefiles:network"


def network() -> nn.Module:
    return make_net()


def write_detector(path: Path, seed: int = 1) -> FuseNorm:
    """A fitted and calibrated detector, and its file."""
    detector = FuseNorm(network()).fit(make_loader(seed=seed))
    detector.preprocessing = Preprocessing(16, (16, 16), "bilinear", (0.5,) * 3, (0.25,) * 3)
    detector.network_source = {"network": NETWORK}
    detector.calibrate(make_loader(seed=2))
    detector.save(path)
    return detector


def write_images(folder: Path, count: int) -> list[Path]:
    """Images, the third of which is unreadable."""
    folder.mkdir()
    random = np.random.default_rng(0)
    paths = [folder / f"{number:03d}.png" for number in range(count)]
    for path in paths:
        Image.fromarray(random.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(path)
    paths[2].write_bytes(b"no image")
    return paths


IN_THIS_PROCESS = False  # whether actors are, as those of `tests.deployment.actors`


def end() -> None:
    """End the actor that calls it."""
    if IN_THIS_PROCESS:
        raise Ended
    os.kill(os.getpid(), signal.SIGKILL)


@dataclass
class Loading:
    """Loads a detector in an actor, which logs the shards that it begins and writes.

    Args:
        file: the detector's file.
        log: a line `begins N` or `written N` for each shard.
        killed: the line after which the actor ends, if none has ended before; `""` = never.
    """

    file: Path
    log: Path
    killed: str = ""

    def __call__(self) -> FuseNorm:
        write = getattr(ShardSet.write, "plain", ShardSet.write)

        def logged(shards, number, columns):
            self.say(f"begins {number}")
            found = write(shards, number, columns)
            self.say(f"written {number}")
            return found

        logged.plain = write
        ShardSet.write = logged
        return FuseNorm.load(self.file, network())

    def say(self, line: str) -> None:
        with self.log.open("a") as file:
            file.write(f"{line}\n")
        mark = self.log.with_suffix(".killed")
        if line == self.killed and not mark.exists():
            mark.touch()
            end()

    def lines(self, kind: str) -> list[str]:
        return sorted(line for line in self.log.read_text().splitlines() if line.startswith(kind))


def ends() -> FuseNorm:
    end()
    raise AssertionError


def fails() -> FuseNorm:
    raise CheckpointError("checkpoint a.ckpt is damaged: download it again")
