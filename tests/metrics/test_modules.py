"""The same metrics as modules of `evaluate`, from their files."""

import inspect
import math

import pytest

import trl_ext.metrics
from trl_ext.metrics import module_path


evaluate = pytest.importorskip("evaluate")

GIVEN = {
    "calibration_error": {"margins": [1.0, 2.0, -1.0]},
    "gradient_variance": {"gradients": [[1.0, 2.0], [2.0, 3.0]]},
    "kl_to_reference": {"logps": [-1.0, -2.0], "ref_logps": [-2.0, -2.5], "lengths": [2.0, 3.0]},
    "length_bias": {"chosen_lengths": [1.0, 2.0], "rejected_lengths": [2.0, 1.0], "margins": [0.1, 0.2]},
    "length_controlled_win_rate": {
        "preferences": [1.0, 0.2, 0.4],
        "len_output": [1.0, 2.0, 3.0],
        "len_baseline": [2.0, 2.0, 2.0],
        "instruction_difficulty": [0.1, -0.1, 0.3],
    },
    "preference_accuracy": {"chosen_rewards": [1.0, 2.0], "rejected_rewards": [0.0, 3.0]},
    "win_rate": {"preferences": [1.0, 0.0], "swapped_preferences": [1.0, 1.0]},
}


def test_every_metric_is_a_module():
    assert set(GIVEN) == set(trl_ext.metrics.__all__) - {"module_path", "MetricsCallback"}
    with pytest.raises(ValueError, match="There is no metric 'bleu'"):
        module_path("bleu")
    with pytest.raises(AttributeError, match="no attribute 'bleu'"):
        _ = trl_ext.metrics.bleu


def same(found, expected):
    assert set(found) == set(expected)
    assert all(
        found[name] == expected[name] or (math.isnan(found[name]) and math.isnan(expected[name])) for name in found
    )


@pytest.mark.parametrize("name", GIVEN)
def test_gives_what_the_function_gives(name, tmp_path):
    module, function = evaluate.load(module_path(name), cache_dir=tmp_path), getattr(trl_ext.metrics, name)
    same(module.compute(**GIVEN[name]), function(**GIVEN[name]))
    required = {
        key: values
        for key, values in GIVEN[name].items()
        if inspect.signature(function).parameters[key].default is inspect.Parameter.empty
    }
    # In batches, with the columns that may be left out and without
    for columns in (GIVEN[name], required):
        module = evaluate.load(module_path(name), cache_dir=tmp_path)
        for row in range(len(next(iter(columns.values())))):
            module.add_batch(**{key: values[row : row + 1] for key, values in columns.items()})
        same(module.compute(), function(**columns))
    assert module.inputs_description == inspect.getdoc(function)


def test_options_reach_the_function(tmp_path):
    module = evaluate.load(module_path("calibration_error"), cache_dir=tmp_path)
    same(module.compute(margins=[1.0, -2.0], bins=2), trl_ext.metrics.calibration_error([1.0, -2.0], bins=2))
    with pytest.raises(ValueError, match="must be a whole number"):
        evaluate.load(module_path("calibration_error"), cache_dir=tmp_path).compute(margins=[1.0], bins=0)
