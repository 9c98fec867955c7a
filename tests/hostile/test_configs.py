"""Options of trainers and rounds of the wrong type or out of range, refused when the config is built."""

from typing import Any

import pytest

from tests.helpers import options
from tests.hostile.refusal import refused
from trl_ext import DPOConfig, OnlineDPOConfig
from trl_ext.data.generators import check_dtype
from trl_ext.rounds import RoundsConfig


NAN, INF, HUGE = float("nan"), float("inf"), 10**400

# Option, values; whatever stands beside them is in BESIDE
BOTH: dict[str, list[Any]] = {
    "learning_rate": [NAN, INF, -1.0, "1e-6", None],
    "num_train_epochs": [NAN, -1, "3", None],
    "max_steps": [NAN, "100", -2],
    "per_device_train_batch_size": [0, -1, 1.5, NAN, "4", True, None],
    "gradient_accumulation_steps": [0, -1, 1.5, "2", None],
    "max_grad_norm": [NAN, "1"],
    "weight_decay": [NAN, -0.1, "0"],
    "warmup_steps": [NAN, -1, "10"],
    "seed": [-1, 1.5, NAN, "0", None, 2**32],
    "max_length": [0, -1, NAN, 1.5, "512", True],
    "gradient_checkpointing": ["false"],
    "sync_ref_model": ["no"],
    "model_init_kwargs": ["{", '{"a": 1, "a": 2}', "float32", 3, []],
    "teacher_model_init_kwargs": ["{", "[]", 3, [1]],
    "teacher_model_name_or_path": [3, "", ["a"]],
    "reverse_model_name_or_path": [0.5],
    "logprob_memory_mb": [True, HUGE],
    "beta": [HUGE, "0.1", [NAN]],
    "loss_weights": [[HUGE], [True], 1, {"a": 1}, "1"],
    "loss_kwargs": [[], "[]", False, '{"alpha": 0.1, "alpha": 0.2}', "[" * 5000],
}  # fmt: skip
OFFLINE = BOTH | {
    "beta": [*BOTH["beta"], [0.1]],
    "label_smoothing": [NAN, -0.1, 1.5, "0.1", None],
    "ld_alpha": [NAN, -0.1, 2, "0.5"],
    "discopop_tau": [NAN, 0, "1"],
    "f_alpha_divergence_coef": [NAN, "1"],
    "precompute_ref_log_probs": ["false"],
    "dataset_num_proc": [-1, 1.5, "2"],
    "ref_logps_memory_mb": [HUGE, [1]],
    "ref_model_sync_steps": [0, -1, 1.5, NAN],
    "ref_model_mixup_alpha": [NAN, 2, "0.5"],
}
ONLINE = BOTH | {
    "max_length": [0, -1, "512", None],
    "max_new_tokens": [0, -1, NAN, 1.5, "64", None],
    "temperature": [NAN, INF, -1, "1", None],
    "top_p": [NAN, 0, 2, -1, "1"],
    "min_p": [NAN, 2, "0.1"],
    "repetition_penalty": [NAN, 0, "1"],
    "missing_eos_penalty": [INF, True],
    "length_penalty": [True],
    "mixture_coef": [True],
    "reward_weights": [[True], {}, ["1"], "1"],
    "generation_kwargs": ["{", 3, "sample", "[]"],
}
BESIDE = {
    "loss_kwargs": {"loss_type": "offset"},
    "ref_model_sync_steps": {"sync_ref_model": True},
    "ref_model_mixup_alpha": {"sync_ref_model": True},
}


def table(values: dict[str, list[Any]]) -> list[tuple[str, Any]]:
    return [(name, value) for name, given in values.items() for value in given]


def shown(value: Any) -> str:
    return repr(value)[:20]


@pytest.mark.parametrize(("name", "value"), table(OFFLINE), ids=shown)
def test_offline(name, value, tmp_path):
    refused(lambda: DPOConfig(**{**options(tmp_path / "out"), **BESIDE.get(name, {}), name: value}), name, tmp_path)


@pytest.mark.parametrize(("name", "value"), table(ONLINE), ids=shown)
def test_online(name, value, tmp_path):
    refused(
        lambda: OnlineDPOConfig(**{**options(tmp_path / "out"), **BESIDE.get(name, {}), name: value}), name, tmp_path
    )


def test_smoothing_that_divides_by_zero(tmp_path):
    given = options(tmp_path / "out", loss_type="robust", label_smoothing=0.5)
    refused(lambda: DPOConfig(**given), "label_smoothing=0.5", tmp_path)


@pytest.mark.parametrize(
    "given",
    [
        {"learning_rate": 0},
        {"learning_rate": 0.0, "max_grad_norm": INF},
        {"max_grad_norm": None, "max_length": None, "ld_alpha": 0},
        {"ld_alpha": 1.0, "label_smoothing": 0},
        {"loss_type": "robust", "label_smoothing": 0.49},
        {"loss_weights": [-1.0]},
        {"model_init_kwargs": {"dtype": "float32"}, "gradient_checkpointing": False},
        {"loss_type": "offset", "loss_kwargs": '{"alpha": 0.5}'},
        {"loss_type": "offset", "loss_kwargs": {}},
        {"seed": 2**32 - 1, "warmup_steps": 0.1},
    ],
)
def test_what_is_right_is_taken(given, tmp_path):
    DPOConfig(**{**options(tmp_path / "out"), **given})


ROUNDS: dict[str, list[Any]] = {
    "replay": [3, [], ""],
    "implicit_reference": [3, ""],
    "reward_funcs": ["", [""], {"mean": [""]}, "..:f", ".:f", "a b:f", "trl_ext.no_such:f", "os:no_such"],
    "seed": [-1],
    "temperature": [{"sampling": {"temperature": value}} for value in (NAN, -1, INF)],
    "top_p": [{"sampling": {"top_p": value}} for value in (0, 2, NAN)],
    "max_new_tokens": [{"sampling": {"max_new_tokens": 0}}],
    "sampling.batch_size": [{"sampling": {"batch_size": 0}}],
    "scoring.batch_size": [{"scoring": {"batch_size": 0}}],
    "scoring.cache_dir": [{"scoring": {"cache_dir": value}} for value in (3, "", "a\0b", __file__)],
    "dtype": [{"sampling": {"dtype": value}} for value in ("nope", "nn", 3)],
    "processing_class": [{"sampling": {"processing_class": "gpt2"}}],
    "[3, 'x']": [{"training": {3: 1, "x": 2}}],
    "output_dir": [{"output_dir": "a\0b"}, {"output_dir": " "}],
}
SAID = {"replay": "replay", "implicit_reference": "implicit"}


@pytest.mark.parametrize(("name", "value"), table(ROUNDS), ids=shown)
def test_rounds(name, value, tmp_path):
    given = {"model": "a/model", "prompts": "a/data", "output_dir": str(tmp_path / "out"), "reward_funcs": "a/reward"}
    given |= value if isinstance(value, dict) and name != "reward_funcs" else {name: value}
    said = (
        "cannot be imported"
        if name == "reward_funcs" and isinstance(value, str) and value
        else SAID.get(name, name.rpartition(".")[2])
    )
    refused(lambda: RoundsConfig(**given), said, tmp_path)


def test_dtypes_by_name():
    import torch

    for dtype in ("auto", "bfloat16", torch.float32):
        check_dtype(dtype)
