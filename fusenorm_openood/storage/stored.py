"""Read rows that a store has, compute and store the others."""

import logging
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cached_property, partial
from hashlib import sha256
from itertools import count, islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fusenorm_openood.errors import DamagedShardError, StoreError
from fusenorm_openood.storage.shards import DIGITS, Columns, Key, ShardSet, digest
from fusenorm_openood.storage.torchrun import this_process, wait_until
from fusenorm_openood.storage.urls import Place

log = logging.getLogger(__name__)

Batches = Sequence[Any]  # ranges or lists of rows; torch's annotations have lists only
Take = Callable[[Columns], Columns]
OWNER_TIME = 60.0  # seconds that a process has to compute a damaged shard of its own again
WORD = 20.0  # seconds of silence after which a process says that it waits
SILENCE = 600.0  # seconds without a new shard after which one does not wait for others any longer


class StoredScores:
    """The rows of a set of shards: iterating reads those in the store, and computes the others.

    Shards are dealt out by number among the processes of `torchrun`: each computes its own, then
    waits for those of the others, or computes them too if none is written for `SILENCE` seconds.
    One process computes a shard when it is needed. A damaged shard is computed again.

    Args:
        store, key: where the rows are, StoreError if it cannot be written; what they are made from.
        compute: yields the columns of shards, given by their numbers, in that order.
        start: shards of other sets that are dealt out before.
        shared: whether all processes read the rows; then a damaged shard is left to the process
            that computed it, for `OWNER_TIME` seconds.
        taken: given the entry `content` of the record of another set that otherwise has this key,
            how the columns of that set contain those of this one; None = they do not. A complete
            set that contains this one is read instead of computing.
    """

    def __init__(
        self,
        store: Place,
        key: Key,
        compute: Callable[[Sequence[int]], Iterator[Columns]],
        *,
        start: int = 0,
        shared: bool = True,
        taken: Callable[[Mapping[str, Any]], Take | None] = lambda content: None,
    ) -> None:
        self.store, self.key, self.compute = store, key, compute
        self._start, self._shared, self._taken = start, shared, taken
        self._container: tuple[ShardSet, Take] | None = None

    @cached_property
    def shards(self) -> ShardSet:
        """The shards, whose folder is created if it does not exist."""
        return ShardSet(self.store, self.key)

    def __iter__(self) -> Iterator[Columns]:
        return self.after(self._written(self.missing()))

    def after(self, written: Iterator[int]) -> Iterator[Columns]:
        """The columns of all shards, in order, while others write those that are missing.

        `written` yields the numbers of the missing shards as they are written.
        """
        missing = set(self.missing())
        for number in range(self.key.shard_count):
            while number in missing:
                missing.discard(next(written))
            yield self._read(number)
        deque(written, maxlen=0)  # has no more numbers, but ends its progress bar

    def compute_share(self) -> None:
        """Compute and store this process's missing shards, without waiting for others."""
        share = this_process().share(self.missing(), self._start)
        deque(self.computed(share), maxlen=0)

    def missing(self) -> list[int]:
        """The shards that have to be computed, as the store is now."""
        exists = isinstance(self.store, Path) and (self.store / self.key.folder_name).is_dir()
        missing = self.shards.missing() if exists else range(self.key.shard_count)
        return [] if missing and self._contained() else self.shards.missing()

    def _contained(self) -> bool:
        """Whether the store has a complete set that contains this one."""
        if self._container is None and isinstance(self.store, Path):
            pattern = f"{self.key.folder_name[:-DIGITS]}{'[0-9a-f]' * DIGITS}"
            wanted = _but_content(self.key)
            for folder in sorted(self.store.glob(pattern)):
                with suppress(FileNotFoundError, StoreError):
                    key = Key.read(folder)
                    is_like = "content" in key.record and _but_content(key) == wanted
                    take = self._taken(key.record["content"]) if is_like else None
                    if take and not (container := ShardSet(self.store, key)).missing():
                        self._container = container, take
                        break
        return self._container is not None

    def computed(self, numbers: Sequence[int]) -> Iterator[int]:
        """Compute and store shards; yields the number of each as soon as it is written."""
        for number, columns in zip(numbers, self.compute(numbers), strict=True):
            self.shards.write(number, columns)
            yield number

    def _written(self, missing: Sequence[int]) -> Iterator[int]:
        """Compute this process's share of missing shards, then wait for the others."""
        process = this_process()
        mine, world = process.share(missing, self._start), process.world
        yield from self.computed(mine) if world == 1 else list(self.computed(mine))
        left, is_waiting_said = set(missing) - set(mine), False

        def arrived() -> set[int]:
            return left - set(self.missing())

        while left:
            found = wait_until(arrived, WORD)
            if not (found or is_waiting_said):
                is_waiting_said = True
                log.warning(
                    f"waiting for other processes of WORLD_SIZE={world}: unset it unless torchrun "
                    "started this one"
                )
            # The others may have ended, or work on another list of images.
            found = found or wait_until(arrived, SILENCE) or set(self.computed(sorted(left)))
            yield from found
            left -= found

    def _read(self, number: int) -> Columns:
        """The columns of a shard; one that is damaged is computed again."""
        if self._container is not None:
            container, take = self._container
            try:
                return take(container.read(number))
            except StoreError as error:  # the rows that are missing there are computed here
                _say_damaged(error)
        try:
            return self.shards.read(number)
        except StoreError as error:
            is_mine = not self._shared or this_process().share([number], self._start)

            def intact() -> Columns | None:
                with suppress(StoreError):  # damaged, or about to be replaced
                    return self.shards.read(number)
                return None

            if not is_mine and (columns := wait_until(intact, OWNER_TIME)):
                return columns
            if isinstance(error, DamagedShardError):
                _say_damaged(error)
            deque(self.computed([number]), maxlen=0)
        return self.shards.read(number)


def _but_content(key: Key) -> str:
    return digest({**vars(key), "record": {**key.record, "content": None}})


def _say_damaged(error: StoreError) -> None:
    log.warning(f"{str(error).removesuffix(': delete it')}: it is computed again")


def shard_batches(
    shards: ShardSet,
    numbers: Sequence[int],
    load: Callable[[Batches], Iterator[Any]],
    batch_size: int,
) -> Iterator[tuple[int, Iterator[Any]]]:
    """Each shard's number, and the batches of its rows, none of which has rows of two shards.

    The batches of a shard must be read to their end; `load` loads rows, given by their numbers.
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


def stored_row(
    store: Place, record: Mapping[str, Any], name: str, compute: Callable[[], Columns | None]
) -> Columns | None:
    """The columns of a set of one row; what `compute` gives is stored if there are none.

    StoreError if the store cannot be written.
    """
    shards = ShardSet(store, Key(record, name, rows=1))
    try:
        return shards.read(0)
    except StoreError:  # missing or damaged
        columns = compute()
    if columns is not None:
        shards.write(0, columns)
    return columns


Logits = NDArray[np.float64]


def forward_digest(
    store: Place, record: Mapping[str, Any], logits: Logits, agrees: Callable[[Logits], bool]
) -> str:
    """A digest of a network's logits `[2, K]` of fixed images, as the store first had them.

    Another machine rounds them otherwise, so that their own digest could be part of no key: they
    are stored, and compared by `agrees`, which says whether other logits are the same up to
    rounding. The record has all that they depend on but the forward pass: modules, weights, images.
    """
    for number in count():
        key = {**record, "content": "forward", "number": number}
        row = partial(stored_row, store, key, "network")
        if not this_process().leads:  # all processes must find the same
            wait_until(partial(row, lambda: None), OWNER_TIME)
        row(lambda: {"logits": logits.reshape(1, -1)})
        # Read what is there now: of two processes that wrote at once, one has written it.
        columns = row(lambda: None) or {"logits": logits.reshape(1, -1)}
        first = columns["logits"][0]
        if first.size == logits.size and agrees(first.reshape(logits.shape)):
            return sha256(first.tobytes()).hexdigest()
    raise AssertionError
