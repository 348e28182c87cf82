import inspect

import pytest
import yaml

from fusenorm_openood import Settings, atf, fuse
from fusenorm_openood.configs import config_root
from fusenorm_openood.detectors.configuration import read_fusenorm
from fusenorm_openood.errors import ConfigError
from fusenorm_openood.method.settings import SETTINGS

YAML = yaml.safe_load((config_root() / "postprocessors" / "fusenorm.yml").read_text())
ARGS = YAML["postprocessor"]["postprocessor_args"]


def test_defaults_are_those_of_the_functions():
    for function in (atf, fuse):
        for name, parameter in inspect.signature(function).parameters.items():
            if parameter.default is not inspect.Parameter.empty:
                assert getattr(Settings(), name) == parameter.default


def test_temperature_defaults_to_the_experts_own():
    assert Settings().output_expert.temperature == 1000
    assert Settings(output="energy").output_expert.temperature == 1
    assert Settings(output="energy", temperature=5).output_expert.temperature == 5


def test_the_configuration_names_every_setting():
    assert list(ARGS) == list(SETTINGS)
    Settings.from_mapping(ARGS)


@pytest.mark.parametrize("name", SETTINGS)
def test_a_missing_or_misspelt_setting_is_named_with_the_valid_ones(name):
    missing = {key: value for key, value in ARGS.items() if key != name}
    with pytest.raises(
        ConfigError, match=f"setting '{name}' is missing: the settings are taps, k_min"
    ):
        Settings.from_mapping(missing)
    with pytest.raises(
        ConfigError, match=f"setting '{name}x' unknown: the settings are taps, k_min"
    ):
        Settings.from_mapping({**ARGS, f"{name}x": 1})


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"k_min": 0.3}, "k_min = 0.3 and k_max = 0.25"),
        ({"k_max": 0}, "k_max = 0"),
        ({"alpha": 2}, "alpha = 2"),
        ({"alpha": "much"}, "alpha = 'much' is of the wrong type"),
        ({"k_min": True}, "k_min = True is of the wrong type"),
        ({"output": "softmax"}, "'softmax' unknown"),
        ({"output": 3}, "output = 3 is of the wrong type"),
        ({"temperature": 0}, "temperature = 0"),
        ({"noise": -1}, "noise = -1"),
        ({"input_std": [0.0, 1.0]}, "input_std"),
        ({"input_std": 1}, "input_std = 1 is of the wrong type"),
        ({"react_percentile": 100}, "react_percentile = 100"),
        ({"strong": "all"}, "strong = 'all'"),
        ({"strong": []}, "name one expert or more"),
        ({"strong": [6, 6]}, "each once"),
        ({"strong": [0.5]}, "wrong type"),
        ({"weights": [1, 2, 3]}, "do not weigh 2 strong experts"),
        ({"strong": ["output"], "weights": [1, 2]}, "do not weigh 1 strong experts"),
        ({"base": 0.5}, "base = 0.5"),
        ({"cap": -1}, "cap = -1"),
        ({"percentile_low": 99.95}, "percentile_low = 99.95"),
        ({"taps": 4}, "taps = 4 is of the wrong type"),
        ({"nothing": 4}, "setting 'nothing' unknown"),
    ],
)
def test_values_out_of_range_are_named(change, named):
    with pytest.raises(ConfigError, match=named):
        Settings().replace(**change)


def test_lists_of_a_configuration_become_tuples():
    s = Settings.from_mapping(
        {**ARGS, "strong": [6, "output"], "weights": [1, 2], "taps": ["layer1"]}
    )
    assert (s.strong, s.weights, s.taps) == ((6, "output"), (1, 2), ("layer1",))
    assert hash(s) == hash(s.replace())


@pytest.mark.parametrize("key", ["postprocessor_args", "postprocessor_sweep"])
def test_sections_that_are_no_mappings_are_refused(key):
    section = {"name": "fusenorm", "APS_mode": False, "postprocessor_args": None}
    config = {"postprocessor": {**section, "postprocessor_sweep": None, key: ["base"]}}
    with pytest.raises(ConfigError, match=rf"{key} = \['base'\] found: give a mapping"):
        read_fusenorm(config)
