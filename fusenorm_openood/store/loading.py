"""Load the rows of shards in batches, none of which has rows of two shards."""

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any

from fusenorm_openood.store.shards import ShardSet


def shard_batches(
    shards: ShardSet,
    numbers: Sequence[int],
    load: Callable[[list[list[int]]], Iterator[Any]],
    batch_size: int,
) -> Iterator[tuple[int, Iterator[Any]]]:
    """Each shard's number, and the batches of its rows.

    Args:
        shards: the set.
        numbers: shards, in the order in which they are loaded; each must be read to its end.
        load: loads batches of rows, given by their numbers, in order.
        batch_size: most rows in a batch.
    """
    batches = {
        number: [
            list(span[at : at + batch_size])
            for span in [shards.span(number)]
            for at in range(0, len(span), batch_size)
        ]
        for number in numbers
    }
    loaded = load([batch for number in numbers for batch in batches[number]])
    for number in numbers:
        yield number, islice(loaded, len(batches[number]))
