import inspect

import pytest
import yaml

from fusenorm_openood import Settings, atf, compute_id_statistics, fuse
from fusenorm_openood.detectors.configuration import read_fusenorm
from fusenorm_openood.detectors.search import candidates
from fusenorm_openood.errors import ConfigError
from fusenorm_openood.method.fusion import penalty
from fusenorm_openood.method.settings import BEFORE, METHODS, SETTINGS
from fusenorm_openood.storage.configs import config_root, read_config

YAML = yaml.safe_load((config_root() / "postprocessors" / "fusenorm.yml").read_text())
ARGS = YAML["postprocessor"]["postprocessor_args"]


def test_defaults_of_the_functions_are_the_published_settings():
    for function in (atf, fuse, penalty, compute_id_statistics):
        for name, parameter in inspect.signature(function).parameters.items():
            if name in SETTINGS and parameter.default is not inspect.Parameter.empty:
                assert getattr(Settings.published(), name) == parameter.default


def test_the_temperature_defaults_to_that_of_the_expert():
    assert Settings.published().score("output").temperature == 1000
    assert Settings(output="energy").score("output").temperature == 1
    assert Settings(output="energy", temperature=5).score("output").temperature == 5


@pytest.mark.parametrize("method", METHODS)
def test_each_method_has_its_configuration(method):
    section = read_config(config_root() / "postprocessors" / f"{method}.yml")["postprocessor"]
    assert section["name"] == method
    assert list(section["postprocessor_args"]) == list(SETTINGS)
    assert read_fusenorm({"postprocessor": section}).settings == METHODS[method]()
    assert candidates(METHODS[method](), section["postprocessor_sweep"])


CHANGED = ("output", "react_percentile", "strong", "clip", "base", "percentile_low")
CHANGED += ("percentile_high",)


def test_the_published_settings_are_those_of_the_published_experiments():
    s = Settings.published()
    assert (s.output, s.react_percentile, s.noise, s.base, s.cap) == ("odin", 90, 0.01, 20, 1)
    assert (s.percentile_low, s.percentile_high) == (1, 99.9)
    assert (s.strong, s.weights, s.clip, s.penalty) == ("auto", None, False, "deviation")
    assert Settings.published(alpha=0.5) == s.replace(alpha=0.5)
    before = Settings.deviation()
    assert (before.strong, before.base, before.cap) == (("output", "fdbd", "mds++"), 2, 1)
    assert s == before.replace(**{n: getattr(s, n) for n in CHANGED})


def test_errors_for_missing_and_misspelt_settings_list_the_valid_ones():
    for name in (name for name in SETTINGS if name not in BEFORE):
        missing = {key: value for key, value in ARGS.items() if key != name}
        with pytest.raises(ConfigError, match=f"'{name}' is missing: .* taps, k_min"):
            Settings.from_mapping(missing)
        with pytest.raises(
            ConfigError, match=f"unknown setting '{name}x' .*: choose from taps, k_min"
        ):
            Settings.from_mapping({**ARGS, f"{name}x": 1})


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"k_min": 0.3}, "k_min must be <= k_max, got 0.3 > 0.25"),
        ({"alpha": "much"}, "alpha must be .* got 'much'"),
        ({"k_min": True}, "k_min must be .* got True"),
        ({"output": "softmax"}, "output must be one of .*energy.* got 'softmax'"),
        ({"output": 3}, "output must be .* got 3"),
        ({"temperature": 0}, "temperature must be .* > 0 or None, got 0"),
        ({"temperature": float("inf")}, "temperature must be .* or None, got inf"),
        ({"noise": -1}, "noise must be .* >= 0, got -1"),
        ({"input_std": [0.0, 1.0]}, "input_std must be .* > 0"),
        ({"input_std": 1}, "input_std must be a list of numbers .* or None, got 1"),
        ({"react_percentile": 100}, "react_percentile must be .* > 0 and < 100.* got 100"),
        ({"strong": "all"}, "strong must be 'auto' or a list .* got 'all'"),
        ({"strong": []}, "strong must be .* at least one expert"),
        ({"strong": [6, 6]}, "each once"),
        ({"strong": [0.5]}, "strong must be .* list .* got"),
        ({"weights": [1, 2]}, "each of the 4 strong experts"),
        ({"strong": "auto", "weights": [1, 2, 3]}, "each of the 2 strong experts"),
        ({"strong": ["output"], "weights": [1, 2]}, "each of the 1 strong experts"),
        ({"clip": 1}, "clip must be true or false, got 1"),
        ({"penalty": "soft"}, "penalty must be one of joint, deviation, got 'soft'"),
        ({"penalty": None}, "penalty must be .* got None"),
        ({"joint_margin": float("inf")}, "joint_margin must be a finite number, got inf"),
        ({"trust": 1}, "trust must be true or false, got 1"),
        ({"normalisation": "z"}, "normalisation must be one of standardised, percentiles, got 'z'"),
        ({"neighbours": 0}, "neighbours must be .* >= 1, got 0"),
        ({"neighbours": 2.5}, "neighbours must be a whole number .* got 2.5"),
        ({"percentile_low": 99.95}, "percentile_low must be < percentile_high, got 99.95"),
        ({"random": "perhaps"}, "random must be one of refuse, allow, got 'perhaps'"),
        ({"taps": 4}, "taps must be .* list of names, got 4"),
        ({"nothing": 4}, "unknown setting 'nothing'"),
    ],
    ids=str,
)
def test_invalid_values_are_refused(change, named):
    with pytest.raises(ConfigError, match=named):
        Settings().replace(**change)


def test_lists_in_a_configuration_become_tuples():
    given = {**ARGS, "strong": [6, "output"], "weights": [1, 2], "taps": ["layer1"]}
    s = Settings.from_mapping(given)
    assert (s.strong, s.weights, s.taps) == ((6, "output"), (1, 2), ("layer1",))
    assert hash(s) == hash(s.replace())


@pytest.mark.parametrize("key", ["postprocessor_args", "postprocessor_sweep"])
def test_sections_that_are_not_mappings_are_refused(key):
    section = {"name": "fusenorm", "APS_mode": False, "postprocessor_args": None}
    config = {"postprocessor": {**section, "postprocessor_sweep": None, key: ["base"]}}
    with pytest.raises(ConfigError, match=rf"{key} must be a mapping .* got \['base'\]"):
        read_fusenorm(config)


def test_text_from_a_configuration_is_read_as_what_it_means():
    given = {"temperature": "None", "react_percentile": "none", "weights": "none"}
    assert Settings(eps="1e-3", base="20", **given) == Settings(eps=1e-3, base=20.0)
    assert Settings(temperature="1e3").temperature == 1000.0
    for change in ({"eps": "none"}, {"eps": "small"}, {"temperature": "hot"}, {"clip": "none"}):
        with pytest.raises(ConfigError, match=f"{next(iter(change))} must be"):
            Settings(**change)
