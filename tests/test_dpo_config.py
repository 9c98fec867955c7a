"""What a config refuses, and that it survives the ways configs travel."""

import json
import re

import pytest
import trl

from trl_ext import DPOConfig


def config(**kwargs):
    return DPOConfig(output_dir="out", use_cpu=True, bf16=False, report_to="none", **kwargs)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"loss_type": []}, "names no loss"),
        ({"loss_type": "ofset"}, r"Unknown loss 'ofset'. Did you mean 'offset'"),
        ({"loss_type": "sigmoidd"}, r"Did you mean 'sigmoid'"),
        ({"loss_type": ["offset", "odpo"]}, r"\['offset'\] twice"),
        ({"loss_type": [3]}, "named by a string, got 3"),
        ({"loss_type": "offset", "loss_kwargs": {"alhpa": 1.0}}, r"no hyper-parameter 'alhpa'. Did you mean 'alpha'"),
        ({"loss_type": "offset", "loss_kwargs": {"alpha": float("nan")}}, "alpha=nan.*not finite"),
        ({"loss_type": "offset", "loss_kwargs": {"alpha": float("inf")}}, "alpha=inf.*not finite"),
        ({"loss_type": "offset", "loss_kwargs": {"alpha": "0.5"}}, "alpha='0.5'.*is a str; expected float"),
        ({"loss_type": "offset", "loss_kwargs": '{"alpha": "0.5"}'}, "alpha='0.5'.*is a str; expected float"),
        ({"loss_type": "offset", "loss_kwargs": {"alpha": True}}, "is a bool"),
        ({"loss_type": "offset", "loss_kwargs": {"alpha": -1.0}}, "at least 0"),
        (
            {"loss_type": "offset", "loss_kwargs": {"scaling": "sqrt"}},
            r"choose one of \['log', 'log_ratio', 'linear'\]",
        ),
        ({"loss_type": "offset", "loss_kwargs": [1]}, "is a list; expected a dict"),
        ({"loss_type": "offset", "loss_kwargs": "{alpha: 1}"}, "is not JSON"),
        ({"loss_type": "margin_adaptive", "loss_kwargs": {"c_max": 1.0}}, "c_max=1.0.*above 1"),
        ({"loss_type": "sigmoid", "loss_kwargs": {"alpha": 1.0}}, "TRL's own loss types only"),
        ({"loss_kwargs": {"alpha": 1.0}}, "TRL's own loss types only"),
        ({"loss_type": ["offset", "anchored"], "loss_kwargs": {"alpha": 1.0}}, "is flat, but"),
        ({"loss_type": "offset", "loss_kwargs": {"anchored": {"tau": 1.0}}}, "does not use"),
        ({"loss_type": ["offset", "ipo"], "loss_kwargs": {"ipo": {"tau": 1.0}}}, "does not use"),
        ({"loss_type": "offset", "loss_kwargs": {"offset": {}, "odpo": {}}}, "names 'offset' twice"),
        ({"loss_type": "offset", "loss_weights": [1.0, 2.0]}, "2 weights for 1 losses"),
        ({"loss_type": ["offset", "ipo"], "loss_weights": [1.0, float("nan")]}, "must be finite"),
        ({"loss_weights": [float("nan")]}, "must be finite"),
        ({"loss_type": "offset", "f_divergence_type": "js_divergence"}, "f_divergence_type='js_divergence'"),
        ({"loss_type": "offset", "use_weighting": True}, "use_weighting=True"),
        ({"loss_type": "offset", "label_smoothing": 0.1}, "label_smoothing=0.1.*would be ignored"),
        ({"loss_type": "anchored", "beta": 0.0}, r"no meaning for \['anchored'\]"),
        ({"loss_type": "ipo", "beta": 0}, r"no meaning for \['ipo'\]"),
        (
            {"loss_type": "bias_variance", "loss_kwargs": {"base": "ipo"}, "beta": 0.0},
            r"no meaning for \['bias_variance'\]",
        ),
        ({"loss_type": "bias_variance", "loss_kwargs": {"base": "bvpo"}}, "cannot be"),
        ({"beta": float("nan")}, "beta=nan"),
        ({"beta": -0.1}, "beta=-0.1"),
        ({"beta": "0.1"}, "beta='0.1'"),
        ({"beta": True}, "beta=True"),
        ({"loss_weights": [True, 1.0], "loss_type": ["sigmoid"]}, "2 weights for 1 losses"),
        ({"loss_weights": ["1"]}, "must be finite"),
        ({"logprob_backend": "cuda"}, "logprob_backend='cuda'"),
    ],
    ids=str,
)
def test_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        config(**kwargs)


def test_names_and_hyperparameters():
    assert config(loss_type="odpo").loss_type == ["offset"]
    assert config(loss_type=["ilr_dpo", "sigmoid"]).loss_type == ["length_regularized", "sigmoid"]
    config(loss_type="offset", beta=0.0)  # does not divide by beta
    config(loss_type="anchored", beta=0.0, loss_kwargs={"tau": 2.0})
    config(loss_type=["offset", "anchored"], loss_kwargs={"odpo": {"alpha": 1}, "anchored": {"tau": 2}})
    config(loss_type=["sigmoid", "offset"], loss_kwargs={"alpha": 0.5})
    config(loss_type=["robust", "offset"], label_smoothing=0.1)


def parse(args, tmp_path=None):
    return trl.TrlParser([DPOConfig]).parse_args_and_config([*args, "--use_cpu", "--bf16", "false"])[0]


def test_command_line():
    args = parse(["--output_dir", "out", "--loss_type", "offset", "sigmoid", "--loss_kwargs", '{"alpha": 0.5}'])
    assert (args.loss_type, args.loss_kwargs) == (["offset", "sigmoid"], {"alpha": 0.5})


def test_yaml(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("output_dir: out\nloss_type: anchored\nloss_kwargs: {tau: 2.0, standardize: true}\n")
    args = parse(["--config", str(path)])
    assert (args.loss_type, args.loss_kwargs) == (["anchored"], {"tau": 2.0, "standardize": True})


def test_survives_to_dict_and_json():
    args = config(loss_type=["offset", "ipo"], loss_kwargs={"offset": {"alpha": 0.5}}, loss_weights=[1.0, 0.5])
    travelled = json.loads(args.to_json_string())
    again = DPOConfig(**{key: travelled[key] for key in ("loss_type", "loss_kwargs", "loss_weights", "logprob_backend")},
                      output_dir="out", use_cpu=True, bf16=False)  # fmt: skip
    assert (again.loss_type, again.loss_kwargs) == (args.loss_type, args.loss_kwargs)


def test_has_all_of_trls_fields():
    theirs, ours = trl.DPOConfig.__dataclass_fields__, DPOConfig.__dataclass_fields__
    assert theirs.keys() <= ours.keys()
    assert ours.keys() - theirs.keys() == {
        "loss_kwargs", "logprob_backend", "logprob_memory_mb", "pairing", "share_prefix", "teacher_model_name_or_path",
        "reverse_model_name_or_path", "teacher_model_init_kwargs", "ref_logps_memory_mb",
    }  # fmt: skip
    for name in theirs.keys() - {"loss_type"}:
        assert ours[name].default == theirs[name].default


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("auto", "auto"),
        (True, True),
        ("true", True),
        ("False", False),
        ("no", False),
        (False, False),
        ("AUTO", "auto"),
        ("Yes", True),
        ("1", True),
        ("0", False),
    ],
)
def test_share_prefix_as_a_word(given, meant):
    assert config(share_prefix=given).share_prefix == meant
    travelled = json.loads(config(share_prefix=given).to_json_string())
    assert config(share_prefix=travelled["share_prefix"]).share_prefix == meant


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"share_prefix": "perhaps"}, "none of 'auto', True, False"),
        ({"share_prefix": True, "logprob_backend": "trl"}, "needs our log-probabilities"),
        ({"logprob_backend": "cuda"}, "choose one of"),
        ({"logprob_memory_mb": 0}, "positive number of MiB"),
        ({"logprob_memory_mb": float("nan")}, "positive number of MiB"),
        ({"logprob_memory_mb": float("inf")}, "positive number of MiB"),
        ({"logprob_memory_mb": "8"}, "positive number of MiB"),
        ({"ref_logps_memory_mb": -1}, "ref_logps_memory_mb=-1` must be a number of MiB, 0 to keep nothing"),
        ({"ref_logps_memory_mb": float("nan")}, "must be a number of MiB, 0"),
        ({"ref_logps_memory_mb": float("inf")}, "must be a number of MiB, 0"),
        ({"ref_logps_memory_mb": None}, "must be a number of MiB, 0"),
        ({"ref_logps_memory_mb": True}, "must be a number of MiB, 0"),
    ],
    ids=str,
)
def test_refused_log_probabilities(overrides, message):
    with pytest.raises(ValueError, match=message):
        config(**overrides)


def test_help_names_every_loss():
    from trl_ext import list_losses

    text = DPOConfig.__dataclass_fields__["loss_type"].metadata["help"]
    assert all(re.search(rf"'{name}'", text) for name in list_losses())
