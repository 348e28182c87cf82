"""Methods that change their object as a whole or, if they fail, not at all."""

from collections.abc import Callable
from functools import wraps
from typing import Concatenate, ParamSpec, TypeVar

Owner = TypeVar("Owner")
Result = TypeVar("Result")
P = ParamSpec("P")


def atomic(
    method: Callable[Concatenate[Owner, P], Result],
) -> Callable[Concatenate[Owner, P], Result]:
    """A method that works on a shallow copy, whose attributes the object takes over at the end.

    Until then, and after an exception, the object is what it was. The method must assign
    attributes, and not change what they hold. What it returns is returned, the object for the copy.
    """

    @wraps(method)
    def run(self: Owner, /, *args: P.args, **kwargs: P.kwargs) -> Result:
        new = object.__new__(type(self))
        vars(new).update(vars(self))
        result = method(new, *args, **kwargs)
        vars(self).update(vars(new))
        return self if result is new else result  # type: ignore[return-value]

    return run
