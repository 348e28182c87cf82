"""Scores on disk: sets of shards, written whole, checked when read, never computed twice."""

from fusenorm_openood.store.forwards import forward_digest
from fusenorm_openood.store.keys import Key, digest, file_digest, keys_like
from fusenorm_openood.store.shards import ShardSet

__all__ = ["Key", "ShardSet", "digest", "file_digest", "forward_digest", "keys_like"]
