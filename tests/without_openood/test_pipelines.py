"""`python -m fusenorm_openood.main` without OpenOOD; tests/openood covers it with OpenOOD."""

import gc
import io
import sys

import pytest
import torch

from fusenorm_openood.errors import ConfigError
from fusenorm_openood.openood.pipelines import find_config, main, process_restored


def test_without_openood_it_reports_that_openood_is_missing(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "openood", None)
    assert main(["--config", "configs/networks/resnet50.yml", "--device", "cpu"]) == 1
    err = capsys.readouterr().err
    assert err.splitlines() == [
        "fusenorm_openood.main: OpenOOD is not installed: "
        "install it with 'bash scripts/install_openood.sh'"
    ]


def test_configurations_are_found_in_the_working_directory_or_in_the_package(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ours = find_config("./configs/networks/resnet50.yml")
    assert ours.endswith("/configs/networks/resnet50.yml")
    (tmp_path / "configs" / "networks").mkdir(parents=True)
    (tmp_path / "configs" / "networks" / "resnet50.yml").touch()
    assert find_config("configs/networks/resnet50.yml") == "configs/networks/resnet50.yml"
    with pytest.raises(ConfigError, match=r"lenet\.yml is not a file: .*networks contains r"):
        find_config("configs/networks/lenet.yml")
    with pytest.raises(ConfigError, match=r"nets/resnet50\.yml is not a file"):
        find_config("nets/resnet50.yml")


def test_the_process_is_restored_after_a_logger_redirected_its_output(capsys):
    class Logger(io.StringIO):
        console = sys.stdout

        def close(self):  # as OpenOOD's does, also when it is garbage-collected
            self.console.close()

    stdout, benchmark = sys.stdout, torch.backends.cudnn.benchmark
    with pytest.raises(KeyError), process_restored():
        sys.stdout = Logger()
        torch.backends.cudnn.benchmark = not benchmark
        raise KeyError
    gc.collect()
    assert sys.stdout is stdout
    assert not stdout.closed
    assert torch.backends.cudnn.benchmark == benchmark
