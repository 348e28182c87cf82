from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from fusenorm_openood.network.running import hooked, own_pass

X = torch.ones(1, 2)


def elsewhere(work):
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(work).result()


def test_hooks_act_in_their_own_pass_only():
    net, called = nn.ReLU(), []

    def other_pass():
        with own_pass():
            net(X)

    def hooks(name):
        before = [(net, lambda *given: called.append(f"before {name}"))]
        return hooked(before, [(net, lambda *given: called.append(f"after {name}"))])

    with own_pass(), hooks("outer"):
        elsewhere(lambda: net(X))  # a thread without a pass
        elsewhere(other_pass)
        other_pass()  # a pass inside the pass
        assert not called
        with own_pass(), hooks("inner"):
            net(X)
        net(X)
    net(X)
    assert called == ["before inner", "after inner", "before outer", "after outer"]


def test_hooks_change_what_a_module_is_given_and_are_removed_after_an_error():
    net = nn.Sequential(nn.Identity(), nn.Identity())
    doubled = hooked(before=[(net[0], lambda module, args, kwargs: ((2 * args[0],), kwargs))])
    with own_pass(), doubled:
        assert torch.equal(net(X), 2 * X)
        assert torch.equal(elsewhere(lambda: net(X)), X)
    with pytest.raises(KeyError), own_pass(), hooked(after=[(net[1], {}.__getitem__)]):
        raise KeyError
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())
