"""Write a report; check first that it can be written."""

from importlib.util import find_spec
from pathlib import Path

from fusenorm_openood.errors import ConfigError, DataError
from fusenorm_openood.files import check_writable, write_whole
from fusenorm_openood.report.content import Report
from fusenorm_openood.report.page import render


def check_report(path: str | Path, option: str = "--report") -> None:
    """Raise ConfigError unless a report can be made and written; call it before any long work."""
    missing = [package for package in ("jinja2", "matplotlib") if find_spec(package) is None]
    if missing:
        raise ConfigError(
            f"{option} needs {' and '.join(missing)}: pip install 'fusenorm-openood[report]'"
        )
    if Path(path).is_dir():
        raise ConfigError(f"{path} is a folder: give a file to {option}")
    check_writable(Path(path).absolute().parent, option)


def write_report(report: Report, path: str | Path) -> None:
    """Render a report and write it, completely or not at all.

    Raises:
        DataError: the file cannot be written.
    """
    page = render(report)
    try:
        write_whole(
            Path(path), lambda file: file.write_bytes(page.encode("utf-8", "backslashreplace"))
        )
    except OSError as error:
        raise DataError(
            f"report {path} cannot be written ({error.strerror}): make room, or give another file"
        ) from None
