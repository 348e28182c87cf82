"""Writing files that are whole or not there."""

import os
from collections.abc import Callable
from pathlib import Path

from fusenorm_openood.errors import ConfigError


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` make a file under a temporary name, then rename it to ``path``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        write(unfinished)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def check_writable(folder: Path, option: str) -> None:
    """ConfigError unless files can be written into a folder, which is made where it is missing."""
    try:
        write_whole(folder / ".writable", Path.touch)
        (folder / ".writable").unlink(missing_ok=True)  # several processes may try at once
    except OSError as error:
        raise ConfigError(
            f"nothing can be written to {folder} ({error.strerror}): give {option} another folder"
        ) from None
