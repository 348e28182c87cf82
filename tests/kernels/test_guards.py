"""What a kernel leaves to torch, and that neither this nor a lack of memory turns it off."""

from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

from fusenorm_openood import atf, kernels
from fusenorm_openood.kernels import may_read
from tests.conftest import forced_backend


class Calls(list):
    """The shapes of the maps that numba's kernel is given, and what it raises, if anything."""

    error = None


@pytest.fixture
def kernel_calls(cpu, monkeypatch):
    """Calls of numba's kernel after its trial; afterwards it is still in use."""
    kernel, calls = cpu.norms, Calls()

    def recorded(x, settings):
        calls.append(x.shape)
        if calls.error is not None:
            raise calls.error
        return kernel(x, settings)

    monkeypatch.setattr(cpu, "norms", recorded)
    atf(maps())
    calls.clear()
    yield calls
    calls.clear()
    calls.error = None
    assert kernels.backend() == ("numba", "numba is installed")
    atf(maps())
    assert calls == [(3, 4, 36)]


def maps(seed: int = 0) -> Tensor:
    return torch.randn(3, 4, 6, 6, generator=torch.Generator().manual_seed(seed))


class Atf(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return atf(x)


def dual(x: Tensor) -> Tensor:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(atf(forward_ad.make_dual(x, x))).tangent


def counted(x: Tensor) -> Tensor:
    with FlopCounterMode(display=False):
        return atf(x)


# Ways to compute the norms of x that record a computation or wrap its tensors. What is recorded is
# recorded from other maps, so that a kernel's result would stand out as a constant.
WAYS = {
    "vmap": torch.vmap(lambda one: atf(one[None])[0]),
    "vmap over batches": lambda x: torch.vmap(atf)(torch.stack([maps(1), x]))[1],
    "functionalize": lambda x: torch.func.functionalize(atf)(x),
    "vjp": lambda x: torch.func.vjp(atf, x)[0],
    "jvp": lambda x: torch.func.jvp(atf, (x,), (x,))[1],  # a norm is its own derivative along x
    "forward AD": dual,
    "jit.trace": lambda x: torch.jit.trace(atf, maps(1), check_trace=False)(x),
    "make_fx": lambda x: make_fx(lambda y: atf(y))(maps(1))(x),
    "make_fx, fake": lambda x: make_fx(lambda y: atf(y), tracing_mode="fake")(maps(1))(x),
    "compile": torch.compile(atf, backend="eager", fullgraph=True),
    "export": lambda x: torch.export.export(Atf(), (maps(1),)).module()(x),
    "a dispatch mode": counted,
}


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("way", WAYS)
def test_torch_computes_what_it_records_or_wraps(way, kernel_calls):
    x = maps()
    expected = atf(x.double()).float()
    torch.testing.assert_close(WAYS[way](x), expected, rtol=1e-5, atol=0)
    assert kernel_calls == []


def test_the_norm_of_a_fake_tensor_is_one(kernel_calls):
    mode = FakeTensorMode()
    fake = mode.from_tensor(maps())
    outside = atf(fake)
    with mode:
        inside = atf(fake)
    for norms in (outside, inside):
        assert type(norms) is type(fake)
        assert norms.shape == (3,)
    assert kernel_calls == []


def test_the_norm_of_a_meta_tensor_is_one(kernel_calls):
    norms = atf(maps().to("meta"))
    assert norms.is_meta
    assert norms.shape == (3,)
    assert kernel_calls == []


def test_a_subclass_of_tensor_is_computed_by_torch(kernel_calls):
    class Tagged(Tensor):
        pass

    norms = atf(maps().as_subclass(Tagged))
    assert type(norms) is Tagged
    torch.testing.assert_close(norms.as_subclass(Tensor), atf(maps().double()).float())
    assert kernel_calls == []


@pytest.mark.parametrize("bytes_left", [0, 4, 3 * 4 * 36 * 4 - 1])
def test_a_kernel_reads_no_memory_that_a_tensor_has_not(bytes_left):
    for x in (maps().flatten(2), maps().flatten(2).mT.contiguous().mT):
        assert may_read(x)
        x.untyped_storage().resize_(bytes_left)
        assert not may_read(x)
        del x  # to read it would be an error


def test_views_of_all_kinds_may_be_read():
    x = maps().flatten(2)
    last = x[2:, 3:, 35:]
    for view in (x[1:], x[:, ::2], x.mT, x[:1].expand(5, 4, 36), x[..., 1:], last):
        assert may_read(view)


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("no memory"),
        torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
    ],
)
@pytest.mark.parametrize("forced", [False, True])
def test_an_error_of_memory_is_passed_on_and_the_kernel_stays(error, forced, kernel_calls):
    kernel_calls.error = error
    how = forced_backend("numba") if forced else nullcontext()
    with how, pytest.raises(type(error), match=str(error)[:10]):
        atf(maps())


def test_memory_that_the_kernel_lacks_is_an_error_of_memory(kernel_calls, cpu):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "CHANNEL_BYTES", 2**50)
        with pytest.raises(MemoryError):
            atf(maps())
