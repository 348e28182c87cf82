"""Which backend is used, and what happens where one fails; what they compute is in test_atf.py."""

import subprocess
import sys

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
        ("cython", "cpu", "FUSENORM_KERNEL=cython unknown: set it to torch, numba, triton"),
        (
            "numba",
            "cuda",
            r"=numba cannot be had \(there is no numba kernel for cuda\): set it to torch",
        ),
    ],
)
def test_a_backend_that_cannot_be_had_is_named(forced, device, named, monkeypatch):
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


def test_a_kernel_that_fails_where_it_is_forced_is_an_error(monkeypatch, tmp_path):
    pytest.importorskip("numba")
    broken = {"NUMBA_DISABLE_JIT": "1", "NUMBA_CACHE_DIR": str(tmp_path)}
    said = run(SCORE, monkeypatch, FUSENORM_KERNEL="numba", **broken)
    assert said.returncode == 1
    assert "ConfigError: FUSENORM_KERNEL=numba cannot be had (" in said.stderr


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


def test_compiled_code_is_kept_until_a_source_changes(monkeypatch, tmp_path):
    pytest.importorskip("numba")
    script = "from fusenorm_openood.kernels import cpu; print(cpu._work._cache_hits)"
    changed = "import zlib; f = zlib.crc32; zlib.crc32 = lambda *a: f(*a) + 1\n"
    kept = {"NUMBA_CACHE_DIR": str(tmp_path)}
    hits = [
        run(code, monkeypatch, **kept).stdout.strip() for code in (script, script, changed + script)
    ]
    assert hits == ["0", "1", "0"]


def test_without_a_folder_for_compiled_code_the_kernel_works(monkeypatch):
    pytest.importorskip("numba")
    nowhere = "from numba.core import caching; caching.CacheImpl._locator_classes = []\n"
    said = run(nowhere + SCORE, monkeypatch, FUSENORM_KERNEL="numba")
    assert said.returncode == 0, said.stderr
    assert said.stdout.splitlines()[0] == "0"


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


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_triton_compiles_the_kernel_for_a_gpu(dtype, monkeypatch):
    """What the interpreter takes, the compiler may refuse: compile for real, no device needed."""
    pytest.importorskip("triton")
    said = run(
        f"""
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from fusenorm_openood.kernels import cuda

types = dict.fromkeys(["C", "N", "stride_b", "stride_c", "stride_n"], "i32")
types |= dict.fromkeys(["k_min", "k_max", "alpha", "eps"], "fp64")
types |= dict(x="*{dtype}", spreads="*fp32", out="*fp64", CHANNELS="constexpr", PIXELS="constexpr")
signature = {{name: types[name] for name in cuda._norm.arg_names}}
for channels, pixels in (256, 16), (1, 4096):
    source = ASTSource(cuda._norm, signature, dict(CHANNELS=channels, PIXELS=pixels))
    compiled = compile(source, GPUTarget("cuda", 90, 32), dict(num_warps=8, enable_fp_fusion=True))
    print(len(compiled.asm["cubin"]))
""",
        monkeypatch,
    )
    assert said.returncode == 0, said.stderr
    assert all(int(size) > 0 for size in said.stdout.split())
