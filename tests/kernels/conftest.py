"""Kernels as in a new process."""

from importlib import reload

import pytest

from fusenorm_openood import kernels


@pytest.fixture
def untried(monkeypatch):
    """Numba's kernel may be used, and has been neither tried nor given up."""
    pytest.importorskip("numba")
    monkeypatch.delenv(kernels.VARIABLE, raising=False)
    reload(kernels)
    yield
    monkeypatch.undo()
    reload(kernels)


@pytest.fixture
def cpu(untried):
    """The module of numba's kernel."""
    from fusenorm_openood.kernels import cpu

    return cpu
