"""Numbers that users give, as Python's own: those of NumPy and of torch are numbers, too."""

import sys
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any

import numpy as np
from torch import Tensor

LARGEST = sys.float_info.max  # a larger integer is no float


def number(value: Any) -> int | float | None:
    """A finite number as Python's int or float; None for anything else.

    Arrays and tensors without a dimension are numbers; a bool is not one.

    >>> import numpy as np
    >>> number(np.int64(5)), number(np.float32(0.5)), number(True), number(float("nan"))
    (5, 0.5, None, None)
    """
    if type(value) in (int, float):  # all that torch.compile is to see
        return value if abs(value) <= LARGEST else None
    if isinstance(value, np.generic | np.ndarray | Tensor) and value.ndim == 0:
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, Real):
        return None
    value = int(value) if isinstance(value, Integral) else float(value)
    return value if abs(value) <= LARGEST else None


def whole(value: Any) -> int | None:
    """As `number`, None for what is no integer."""
    found = number(value)
    return found if isinstance(found, int) else None


def numbers(values: Any) -> tuple[int | float, ...] | None:
    """A sequence of numbers, perhaps an array or a tensor `[N]`; None if an item is no number."""
    values = values.tolist() if isinstance(values, np.ndarray | Tensor) else values
    if not isinstance(values, Sequence):
        return None
    found = tuple(n for n in map(number, values) if n is not None)
    return found if len(found) == len(values) else None
