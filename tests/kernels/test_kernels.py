"""Which backend is used, and what happens where one fails; what they compute is in test_atf.py."""

import subprocess
import sys
from pathlib import Path
from shutil import copy

import numpy as np
import pytest
import torch

from fusenorm_openood import atf, kernels
from fusenorm_openood.errors import ConfigError
from tests.conftest import forced_backend

SCORE = """
import warnings
import torch
from fusenorm_openood import atf, kernels

x = torch.randn(2, 3, 5, 5, generator=torch.Generator().manual_seed(0))
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    norms = [atf(x), atf(x)]
print(len([w for w in said if "kernel failed" in str(w.message)]))
print(*[w.message for w in said][:1])
print(kernels.backend())
torch.testing.assert_close(norms[0], norms[1])
torch.testing.assert_close(norms[0], atf(x.double()).float())
"""


def run(
    script: str, monkeypatch: pytest.MonkeyPatch, **variables: str
) -> subprocess.CompletedProcess:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)


def test_numba_is_used_on_a_cpu_where_it_is_installed():
    pytest.importorskip("numba")
    assert kernels.backend() == ("numba", "numba is installed")


def test_a_device_without_a_kernel_is_served_by_torch():
    assert kernels.backend("mps") == ("torch", "there is no kernel for mps")


@pytest.mark.parametrize("name", ["torch", "numba", "triton"])
def test_the_variable_forces_a_backend(name):
    with forced_backend(name):
        assert kernels.backend("cuda" if torch.cuda.is_available() else "cpu").name == name


@pytest.mark.parametrize(
    ("forced", "device", "named"),
    [
        ("cython", "cpu", "FUSENORM_KERNEL=cython is unknown: set it to torch, numba, triton"),
        (
            "numba",
            "cuda",
            r"=numba is not available \(there is no numba kernel for cuda\): set it to torch",
        ),
    ],
)
def test_a_backend_that_is_not_available_is_named(forced, device, named, monkeypatch):
    monkeypatch.setenv("FUSENORM_KERNEL", forced)
    with pytest.raises(ConfigError, match=named):
        kernels.backend(device)


def test_without_numba_the_reason_says_how_to_get_it(monkeypatch):
    missing = "import sys; sys.modules['numba'] = None\n"
    said = run(missing + SCORE, monkeypatch)
    assert said.returncode == 0, said.stderr
    assert "numba is not installed: pip install 'fusenorm-openood[fast]'" in said.stdout


def test_a_kernel_that_fails_is_warned_of_once_and_torch_takes_over(monkeypatch, tmp_path):
    pytest.importorskip("numba")
    said = run(SCORE, monkeypatch, NUMBA_DISABLE_JIT="1", NUMBA_CACHE_DIR=str(tmp_path))
    assert said.returncode == 0, said.stderr
    count, warning, chosen = said.stdout.splitlines()
    assert count == "1"
    assert warning.startswith("the numba kernel failed, so torch computes the feature norms")
    assert chosen.startswith("Backend(name='torch', reason=")
    assert "numba failed: " in chosen


def test_a_kernel_that_fails_where_it_is_forced_is_an_error(monkeypatch):
    pytest.importorskip("numba")

    def fail(*_):
        raise ValueError("a reason\nand more")

    monkeypatch.setattr(kernels, "_kernel", lambda *key: fail)
    monkeypatch.setattr(kernels, "_failed", {})
    named = r"^FUSENORM_KERNEL=numba is not available \(ValueError: a reason\): set it to torch"
    with forced_backend("numba"):
        for _ in range(2):
            with pytest.raises(ConfigError, match=named):
                atf(torch.randn(2, 3, 5, 5))


@pytest.mark.parametrize("threads", [1, 2])
def test_numba_computes_the_same_on_any_number_of_threads(threads):
    numba = pytest.importorskip("numba")
    x = torch.randn(5, 3, 6, 6)
    norms = atf(x)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        with forced_backend("numba"):
            assert torch.equal(atf(x), norms)
        assert numba.get_num_threads() == numba.config.NUMBA_NUM_THREADS  # left as it was
    finally:
        torch.set_num_threads(before)


def test_numba_has_threads_of_its_own_where_torch_has_none_of_openmp(monkeypatch):
    pytest.importorskip("numba")
    from fusenorm_openood.kernels import cpu

    x = torch.randn(7, 40, 5, 5)
    with forced_backend("numba"):
        norms = atf(x)
        monkeypatch.setattr(cpu, "_openmp", lambda: None)
        assert torch.equal(atf(x), norms)


@pytest.fixture
def small(monkeypatch):
    """The module of numba's kernel, with little to compile: it writes the number of samples."""
    numba = pytest.importorskip("numba")
    from fusenorm_openood.kernels import cpu

    @numba.njit
    def write_samples(job):
        numba.carray(cpu.pointer_to(job.out), 1, np.float64)[0] = job.B

    monkeypatch.setattr(cpu, "_do", write_samples)
    return cpu


def samples_by(work, cpu) -> float:
    out, job = np.zeros(1), np.zeros(1, cpu.JOB)
    job["out"], job["B"] = out.ctypes.data, 5
    work.ctypes(job.ctypes.data)
    return out[0]


def test_compiled_code_is_kept_until_a_source_changes(small, monkeypatch, tmp_path):
    monkeypatch.setattr("numba.core.config.CACHE_DIR", str(tmp_path))
    works = [small._compiled(sources) for sources in (1, 1, 2)]
    assert [work._cache_hits for work in works] == [0, 1, 0]
    assert [samples_by(work, small) for work in works] == [5, 5, 5]


def test_every_source_of_a_kernel_counts(tmp_path):
    pytest.importorskip("numba")
    from fusenorm_openood.kernels import cpu

    for source in Path(cpu.__file__).parent.glob("*.py"):
        copy(source, tmp_path)
    states = {cpu._sources(tmp_path)}
    for source in tmp_path.iterdir():
        source.write_text(source.read_text() + "# changed\n")
        states.add(cpu._sources(tmp_path))
    assert len(states) == 1 + len(list(tmp_path.iterdir())) > 4


def test_without_a_folder_for_compiled_code_the_kernel_is_compiled(small, monkeypatch):
    monkeypatch.setattr("numba.core.caching.CacheImpl._locator_classes", [])
    assert samples_by(small._compiled(1), small) == 5


def test_a_forked_process_scores_too(monkeypatch):
    pytest.importorskip("numba")
    script = """
import multiprocessing, sys, torch
from fusenorm_openood import atf
x = torch.randn(4, 3, 6, 6)
norms = atf(x)  # starts the threads that a fork does not take along
fork = multiprocessing.get_context("fork")
child = fork.Process(target=lambda: sys.exit(not torch.equal(atf(x), norms)))
child.start()
child.join()
print(child.exitcode)
"""
    said = run(script, monkeypatch, FUSENORM_KERNEL="numba")
    assert said.stdout.strip() == "0", said.stdout + said.stderr


def test_threads_may_score_at_once():
    from concurrent.futures import ThreadPoolExecutor

    maps = [torch.randn(3, 4, n, n) for n in range(3, 19)]
    with ThreadPoolExecutor(4) as pool:
        for x, norms in zip(maps, pool.map(atf, maps), strict=True):
            torch.testing.assert_close(norms, atf(x))


def test_triton_compiles_the_kernel_for_a_gpu(monkeypatch):
    """What the interpreter takes, the compiler may refuse: compile for real, no device needed."""
    pytest.importorskip("triton")
    said = run(
        """
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from fusenorm_openood.kernels import cuda

types = dict.fromkeys(["C", "N", "stride_b", "stride_c", "stride_n"], "i32")
types |= dict.fromkeys(["k_min", "k_max", "alpha", "eps"], "fp64")
types |= dict(spreads="*fp32", out="*fp64", CHANNELS="constexpr", PIXELS="constexpr")
for dtype, channels, pixels in ("fp32", 256, 16), *((d, 1, 4096) for d in ("fp32", "fp16", "bf16")):
    signature = {name: (types | {"x": f"*{dtype}"})[name] for name in cuda._norm.arg_names}
    source = ASTSource(cuda._norm, signature, dict(CHANNELS=channels, PIXELS=pixels))
    compiled = compile(source, GPUTarget("cuda", 90, 32), dict(num_warps=8, enable_fp_fusion=True))
    print(len(compiled.asm["cubin"]))
""",
        monkeypatch,
    )
    assert said.returncode == 0, said.stderr
    sizes = said.stdout.split()
    assert len(sizes) == 4
    assert all(int(size) > 0 for size in sizes)
