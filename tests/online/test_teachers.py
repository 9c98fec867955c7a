"""A loss that reads teachers, on what the policy samples: with rewards or without."""

import pytest
import torch
from transformers import AutoModelForCausalLM

import trl_ext
from tests.helpers import history
from tests.online.runs import Scripted, batch, learn, length_reward, online, scripted
from tests.plain import assert_equals_plain
from tests.test_teachers import changed, doubles, expected_of


@pytest.fixture
def teachers(tiny_model_dir):
    return {"teacher_model": changed(tiny_model_dir, 1), "reverse_model": changed(tiny_model_dir, 2)}


def trainer(model_dir, tmp_path, teachers, cls=Scripted, reward_funcs=None, trainer_kwargs=None, **options):
    options = {"loss_type": "aligndistil", "pairing": "group", "num_generations": 3, "beta": 0.5, **options}
    kwargs = {"reward_funcs": reward_funcs, **teachers, **(trainer_kwargs or {})}
    return online(model_dir, tmp_path, cls=cls, trainer_kwargs=kwargs, **options)


def completions(ours, inputs, numbers):
    """Tokens of the scripted completions `numbers` of each prompt."""
    tokenizer, rows = ours.processing_class, []
    for prompt in inputs["prompt"]:
        ids = tokenizer(prompt)["input_ids"]
        rows += [(ids, [*tokenizer(scripted(prompt, k))["input_ids"], ours.eos_token_ids[0]]) for k in numbers]
    return rows


@pytest.mark.parametrize(
    ("options", "numbers"),
    [
        ({}, (0, 1, 2)),
        ({"share_prefix": False}, (0, 1, 2)),
        # The same with rewards, whatever they are; under `best_worst` the longest completion alone
        ({"reward_funcs": lambda completions, **kwargs: [1.0] * len(completions)}, (0, 1, 2)),
        ({"reward_funcs": length_reward, "pairing": "best_worst"}, (2,)),
    ],
    ids=["all", "plain rows", "equal rewards", "best"],
)
def test_loss_and_gradients_equal_the_plain_way(options, numbers, tiny_model_dir, tmp_path, teachers):
    ours = trainer(tiny_model_dir, tmp_path, teachers, **options)
    inputs = batch(ours)
    loss, gradients = learn(ours, inputs)
    policy = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float64)
    expected = expected_of(completions(ours, inputs, numbers), policy, doubles(*teachers.values()))
    assert_equals_plain(loss, gradients, expected, policy)
    assert ours.ref_model is None


def test_a_run_without_rewards(tiny_model_dir, tmp_path, teachers):
    """Trained, evaluated, resumed; what compares completions is not logged."""
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "num_generations": 2, "temperature": 0.5}
    evaluation = {"trainer_kwargs": {"eval_dataset": None}}
    ours = trainer(tiny_model_dir, tmp_path, teachers, trl_ext.OnlineDPOTrainer, **options, **evaluation)
    ours.train()
    logged = history(ours)[0]
    assert logged["pairs/dropped_prompts"] == 0 and logged["divergence/per_token"] > 0
    assert {"objective/entropy", "completions/mean_length"} <= logged.keys()
    assert not [name for name in logged if "rewards" in name or "score" in name or "chosen" in name]
    assert ours.evaluate(ours.train_dataset)["eval_divergence/per_token"] > 0
    files = {path.name for path in (tmp_path / "checkpoint-2").iterdir()}
    assert "model.safetensors" in files and not [name for name in files if "teacher" in name or "reverse" in name]
    resumed = trainer(tiny_model_dir, tmp_path / "again", teachers, trl_ext.OnlineDPOTrainer, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert history(resumed)[-2]["loss"] == pytest.approx(history(ours)[3]["loss"], rel=1e-6)


def test_beside_a_loss_that_compares(tiny_model_dir, tmp_path, teachers):
    """Groups whose completions tie are dropped then, as `anchored` learns nothing from them; metrics are all there."""
    ours = trainer(
        tiny_model_dir, tmp_path, teachers, loss_type=["aligndistil", "anchored"], reward_funcs=length_reward,
        loss_weights=[1.0, 0.5], max_steps=1,
    )  # fmt: skip
    assert ours.ref_model is not None
    ours.train()
    logged = history(ours)[0]
    assert logged["loss"] == pytest.approx(logged["loss/aligndistil"] + 0.5 * logged["loss/anchored"], rel=1e-5)
    assert {"rewards/margins", "objective/scores", "logps/chosen"} <= logged.keys()


def test_what_is_refused(tiny_model_dir, tmp_path, teachers):
    policy = changed(tiny_model_dir, 3)
    for options, message in [
        (
            {"pairing": "best_worst"},
            r"no `reward_funcs` and no `judge`. Set `pairing=\"group\"`: \['aligndistil'\] then",
        ),
        ({"loss_type": ["aligndistil", "anchored"]}, "got neither"),
        ({"missing_eos_penalty": 1.0}, r"\['missing_eos_penalty'\] take something off a reward, and there are no"),
        ({"teachers": {}}, r"missing: \['teacher_model', 'reverse_model'\]"),
        ({"loss_type": "anchored", "reward_funcs": length_reward}, "None of the losses .*reads teachers"),
        ({"trainer_kwargs": {"ref_model": policy}}, "reads a reference model.*What AlignDistil's own code calls"),
        ({"logprob_backend": "trl"}, "TRL's forward gives log-probs of tokens alone"),
        ({"mixture_coef": 0.5}, "needs a reference model"),
    ]:
        with pytest.raises(ValueError, match=message):
            trainer(tiny_model_dir, tmp_path, **{"teachers": teachers, **options})


def test_data_parallel_is_refused(tiny_model_dir, tmp_path, teachers, monkeypatch):
    monkeypatch.setattr(trl_ext.OnlineDPOConfig, "n_gpu", 2, raising=False)
    with pytest.raises(ValueError, match="not run under `DataParallel`"):
        trainer(tiny_model_dir, tmp_path, teachers)
