import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from fusenorm_openood.networks import ResNet18_32x32, load_network
from fusenorm_openood.training import threads, train_classifier, train_digits


def toy() -> tuple[DataLoader, DataLoader]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(64, 3, 8, 8, generator=generator)
    labels = (images.mean((1, 2, 3)) > 0).long()
    data = TensorDataset(images, labels)
    return DataLoader(data, 16), DataLoader(data, 64)


def test_training_equals_plain_torch():
    torch.manual_seed(0)
    net, twin = ResNet18_32x32(2, width=4), ResNet18_32x32(2, width=4)
    twin.load_state_dict(net.state_dict())
    train_loader, val_loader = toy()
    train_classifier(net, train_loader, val_loader, epochs=1, lr=0.1, progress=False)

    optimiser = torch.optim.SGD(
        twin.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4
    )
    for step, (images, labels) in enumerate(train_loader):
        optimiser.param_groups[0]["lr"] = (
            0.1 * (1 + torch.cos(torch.tensor(torch.pi * step / 4)).item()) / 2
        )
        optimiser.zero_grad()
        torch.nn.functional.cross_entropy(twin(images), labels).backward()
        optimiser.step()
    for trained, expected in zip(net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(trained, expected)


def test_training_keeps_the_best_epoch_and_learns():
    torch.manual_seed(0)
    net = ResNet18_32x32(2, width=4)
    train_loader, val_loader = toy()
    state = train_classifier(net, train_loader, val_loader, epochs=8, lr=0.05, progress=False)
    net.load_state_dict(state)
    images, labels = next(iter(val_loader))
    with torch.no_grad():
        assert (net.eval()(images).argmax(1) == labels).float().mean() > 0.9


def test_digits_are_trained_once_and_reach_97_percent(digits):
    data_root, checkpoint = digits
    written = checkpoint.stat().st_mtime_ns
    assert train_digits(data_root, checkpoint.parent.parent, progress=False) == checkpoint
    assert checkpoint.stat().st_mtime_ns == written
    assert load_network(checkpoint).fc.out_features == 7
    assert [p.name for p in checkpoint.parent.iterdir()] == ["best.ckpt"]


def test_threads_are_given_back():
    before = torch.get_num_threads()
    with pytest.raises(KeyError), threads(1):
        assert torch.get_num_threads() == 1
        raise KeyError
    assert torch.get_num_threads() == before
