"""Read a loader more than once, and look at its first images before the first reading."""

from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any

from torch import Tensor

from fusenorm_openood.errors import DataError
from fusenorm_openood.listening.batches import batches, without_traceback


class Readings:
    """A loader whose first reading has begun, so that its first images are known.

    Args:
        loader: any loader that `batches` takes.

    Attributes:
        first: the images `[B, C, H, W]` of the first batch.

    Raises:
        DataError: an iterator, which can be read only once; a loader without images, or, at the
            end of a later reading, with another number of batches than before.
    """

    def __init__(self, loader: Iterable[Any]) -> None:
        of_python = type(loader).__module__ in ("builtins", "itertools")
        if of_python and iter(loader) is loader:
            raise _only_once(loader)
        self.loader = loader
        self._counts: list[int] = []
        iterator = without_traceback(loader)
        begun = []
        for batch in iterator:
            begun.append(batch)
            images = next((images for images, _ in batches([batch])), None)
            if images is not None:
                self.first: Tensor = images
                break
        else:
            raise DataError("loader must give at least one image, got none")
        self._begun: Iterator[Any] | None = chain(begun, iterator)

    def __len__(self) -> int:
        return len(self.loader)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[Any]:
        source, self._begun = self._begun, None
        count = 0
        for batch in source if source is not None else self.loader:
            count += 1
            yield batch
        self._counts.append(count)
        if len(set(self._counts)) > 1:
            raise _only_once(
                self.loader, f" with {' and then '.join(map(str, self._counts))} batches"
            )


def _only_once(loader: Any, found: str = "") -> DataError:
    return DataError(
        f"loader must be readable more than once, got a {type(loader).__name__}{found}: fit on a "
        "DataLoader or a list of batches"
    )
