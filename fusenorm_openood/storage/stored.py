"""Load what shards are computed from, and compute what is missing."""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from hashlib import sha256
from itertools import count, islice, pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from fusenorm_openood.errors import StoreError
from fusenorm_openood.storage.shards import Columns, ShardSet
from fusenorm_openood.storage.torchrun import this_process, wait_until
from fusenorm_openood.storage.urls import Place

Batches = Sequence[Any]  # ranges or lists of rows; torch's annotations have lists only
OWNER_TIME = 60.0  # seconds that a process has to compute a damaged shard of its own again
WORD = 20.0  # seconds of silence after which a process says that it waits
SILENCE = 600.0  # seconds without a new shard after which one does not wait for others any longer


def shard_batches(
    shards: ShardSet,
    numbers: Sequence[int],
    load: Callable[[Batches], Iterator[Any]],
    batch_size: int,
) -> Iterator[tuple[int, Iterator[Any]]]:
    """Each shard's number, and the batches of its rows, none of which has rows of two shards.

    Args:
        shards: the set.
        numbers: shards, in the order in which they are loaded; each must be read to its end.
        load: loads batches of rows, given by their numbers, in order.
        batch_size: most rows in a batch.
    """
    if not numbers:  # no worker processes for nothing
        return
    batches = {number: row_batches(shards.span(number), batch_size) for number in numbers}
    loaded = load([batch for number in numbers for batch in batches[number]])
    for number in numbers:
        yield number, islice(loaded, len(batches[number]))


def row_batches(rows: range, batch_size: int) -> list[range]:
    """Consecutive rows in as few batches as possible, equally large: tiny ones round otherwise."""
    count = -(-len(rows) // batch_size)
    ends = [len(rows) * number // count for number in range(count + 1)]
    return [rows[start:end] for start, end in pairwise(ends)]


def wait_for_shards(missing: Callable[[], list[int]], compute: Callable[[], object]) -> None:
    """Wait until other processes have written the shards that are missing.

    Args:
        missing: the numbers of these shards, as they are now.
        compute: computes and writes them, which is done if the others are silent for too long:
            they may have ended, or work on another list of images.
    """
    world, is_said = this_process().world, False
    while left := missing():
        is_other = partial(_is_other, missing, left)
        found = wait_until(is_other, WORD)
        if not (found or is_said):
            is_said = True
            tqdm.write(
                f"fusenorm: waiting for other processes of WORLD_SIZE={world}: unset it unless "
                "torchrun started this one",
                file=sys.stderr,
            )
        if not (found or wait_until(is_other, SILENCE)):
            compute()


def _is_other(missing: Callable[[], list[int]], left: list[int]) -> bool:
    return missing() != left


def intact(
    shards: ShardSet, number: int, compute: Callable[[], object], own: bool = True
) -> Columns:
    """A shard of a complete set; one that is damaged is computed again.

    Args:
        shards: the set.
        number: the shard.
        compute: computes and writes it.
        own: whether it is this process's share; others give the owner a minute to do it.
    """

    def found() -> Columns | None:
        try:
            return shards.read(number)
        except StoreError:  # damaged, or about to be replaced
            return None

    try:
        return shards.read(number)
    except StoreError as error:
        if not own and (columns := wait_until(found, OWNER_TIME)) is not None:
            return columns
        say_damaged(error)
        compute()
        shards.discard_damaged(number)  # not before: others would find the shard missing
    return shards.read(number)


def say_damaged(error: StoreError) -> None:
    """Say on standard error that a shard is computed again, and why."""
    reason = str(error).removesuffix(": delete it")
    tqdm.write(f"fusenorm: {reason}: it is computed again", file=sys.stderr)


Logits = NDArray[np.float64]


def forward_digest(
    store: Place, record: Mapping[str, Any], logits: Logits, agrees: Callable[[Logits], bool]
) -> str:
    """A digest of a network's logits of fixed images, as the store first had them.

    Another machine rounds them otherwise, so that their own digest could be part of no key: they
    are kept, and compared.

    Args:
        store: folder or URL of the store.
        record: all that the logits depend on but the forward: modules, weights, images.
        logits: the logits `[2, K]`.
        agrees: whether other logits are the same up to rounding.

    Raises:
        StoreError: the store cannot be written.
    """
    for number in count():
        kept = ShardSet(store, {**record, "heard": "forward", "number": number}, "network", rows=1)
        found = _read(kept)
        if not (found or this_process().leads):  # all processes must find the same
            found = wait_until(lambda kept=kept: _read(kept), OWNER_TIME)  # type: ignore[misc]
        if not found:
            kept.write(0, {"logits": logits.reshape(1, -1)})
            kept.discard_damaged(0)
            found = _read(kept)
        known = found[0]
        if known.size == logits.size and agrees(known.reshape(logits.shape)):
            return sha256(known.tobytes()).hexdigest()
    raise AssertionError


def _read(kept: ShardSet) -> list[Logits]:
    try:
        return [kept.read(0)["logits"]]
    except StoreError:  # missing or damaged
        return []
