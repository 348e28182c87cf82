"""Networks with the same modules and weights whose forward differs, told by what they compute."""

from collections.abc import Callable, Mapping
from hashlib import sha256
from itertools import count
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fusenorm_openood.errors import StoreError
from fusenorm_openood.store.loading import OWNER_TIME
from fusenorm_openood.store.shards import ShardSet
from fusenorm_openood.torchrun import this_process, wait_until
from fusenorm_openood.urls import Place

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
