"""Which backend is used, and what happens where one fails; what they compute is in test_atf.py."""

import multiprocessing
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from fusenorm_openood import atf, kernels
from fusenorm_openood.errors import ConfigError
from tests.conftest import forced_backend


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


def test_without_numba_the_reason_says_how_to_get_it(untried, monkeypatch):
    monkeypatch.setitem(sys.modules, "numba", None)
    assert kernels.backend() == (
        "torch", "numba is not installed: pip install 'fusenorm-openood[fast]'"
    )  # fmt: skip
    assert torch.isfinite(atf(torch.randn(2, 3, 5, 5))).all()


@pytest.fixture
def failing(cpu, monkeypatch):
    """Numba's kernel fails, for a reason of two lines."""

    def fail(*_):
        raise ValueError("a reason\nand more")

    monkeypatch.setattr(cpu, "norms", fail)


def test_a_kernel_that_fails_is_warned_of_once_and_torch_takes_over(failing):
    x = torch.randn(2, 3, 5, 5)
    with pytest.warns(RuntimeWarning, match="numba kernel failed, so torch computes") as caught:
        norms = [atf(x), atf(x)]
    assert len(caught) == 1
    torch.testing.assert_close(norms, [atf(x.double()).float()] * 2)
    assert kernels.backend() == ("torch", "numba failed: ValueError: a reason")


def test_a_kernel_that_fails_where_it_is_forced_is_an_error(failing):
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


@pytest.fixture
def compiled(monkeypatch):
    """Compile and run a function in place of numba's kernel that writes the number of samples."""
    numba = pytest.importorskip("numba")
    from fusenorm_openood.kernels import cpu

    @numba.njit
    def write_samples(job):
        numba.carray(cpu.pointer_to(job.out), 1, np.float64)[0] = job.B

    def run(sources):
        out, job, work = np.zeros(1), np.zeros(1, cpu.JOB), cpu._compiled(sources)
        job["out"], job["B"] = out.ctypes.data, 5
        work.ctypes(job.ctypes.data)
        assert out[0] == 5
        return work

    monkeypatch.setattr(cpu, "_do", write_samples)
    return run


def test_compiled_code_is_kept_until_a_source_changes(compiled, monkeypatch, tmp_path):
    monkeypatch.setattr("numba.core.config.CACHE_DIR", str(tmp_path))
    assert [compiled(sources)._cache_hits for sources in (1, 1, 2)] == [0, 1, 0]


def test_every_source_of_a_kernel_counts(tmp_path):
    pytest.importorskip("numba")
    from fusenorm_openood.kernels import cpu

    for source in Path(cpu.__file__).parent.glob("*.py"):
        shutil.copy(source, tmp_path)
    states = {cpu._sources(tmp_path)}
    for source in tmp_path.iterdir():
        source.write_text(source.read_text() + "# changed\n")
        states.add(cpu._sources(tmp_path))
    assert len(states) == 1 + len(list(tmp_path.iterdir())) > 4


def test_without_a_folder_for_compiled_code_the_kernel_is_compiled(compiled, monkeypatch):
    monkeypatch.setattr("numba.core.caching.CacheImpl._locator_classes", [])
    with pytest.warns(RuntimeWarning, match="cannot be saved .*: set NUMBA_CACHE_DIR"):
        compiled(1)


@pytest.mark.skipif(sys.platform == "win32", reason="no fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_process_scores_too():
    x = torch.randn(4, 3, 6, 6)
    with forced_backend("numba"):
        norms = atf(x)  # starts the threads that a fork does not take along
        fork = multiprocessing.get_context("fork")
        child = fork.Process(target=lambda: sys.exit(not torch.equal(atf(x), norms)))
        child.start()
        child.join(60)
    assert child.exitcode == 0


def test_threads_may_score_at_once():
    maps = [torch.randn(3, 4, n, n) for n in range(3, 19)]
    with ThreadPoolExecutor(4) as pool:
        for x, norms in zip(maps, pool.map(atf, maps), strict=True):
            torch.testing.assert_close(norms, atf(x))


COMPILES = """
import sys
sys.path.insert(0, "tests/kernels")
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from fusenorm_openood.kernels import cuda
from triton_k import store_k

def compiled(function, signature, constants, **options):
    source = ASTSource(function, signature, constants)
    return compile(source, GPUTarget("cuda", 90, 32), dict(enable_fp_fusion=True, **options)).asm

types = dict.fromkeys(["C", "N", "stride_b", "stride_c", "stride_n"], "i32")
types |= dict.fromkeys(["k_min", "k_max", "alpha", "eps"], "fp64")
types |= dict(spreads="*fp32", out="*fp64", CHANNELS="constexpr", PIXELS="constexpr")
for dtype, channels, pixels in ("fp32", 256, 16), *((d, 1, 4096) for d in ("fp32", "fp16", "bf16")):
    signature = {name: (types | {"x": f"*{dtype}"})[name] for name in cuda._norm.arg_names}
    constants = dict(CHANNELS=channels, PIXELS=pixels)
    print(len(compiled(cuda._norm, signature, constants, num_warps=8)["cubin"]))
types = dict(h="*fp64", k_min="*fp64", k_max="*fp64", pixels="*i32", k="*i32")
k = compiled(store_k, types, {})["ptx"]
print([line.split()[0] for line in k.splitlines() if "f32" in line])
"""


@pytest.mark.slow
def test_triton_compiles_for_a_gpu_and_rounds_product_and_sum_of_k(monkeypatch):
    """What the interpreter takes, the compiler may refuse: compile for real, no device needed.

    A fused multiply-add would round once; the interpreter has none, so look at the code.
    """
    pytest.importorskip("triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    command = [sys.executable, "-c", COMPILES]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    *sizes, rule = done.stdout.splitlines()
    assert len(sizes) == 4
    assert all(int(size) > 0 for size in sizes)
    assert "mul" in rule
    assert "add" in rule
    assert "fma" not in rule
