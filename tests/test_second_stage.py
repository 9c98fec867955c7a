"""The reference of a run that begins with a model object: the model as it stands, offline as online."""

import copy

import pytest
import torch
import trl
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import trl_ext
from tests.conftest import preference_rows
from tests.helpers import assert_same_parameters, build, first_batch, options, parameters
from tests.online.runs import length_reward, prompts
from trl_ext.trainers.policy_copy import differs_from_source, frozen_copy


def moved(model_dir, by=0.05):
    """A model that was trained since it was loaded, as far as its weights tell."""
    torch.manual_seed(5)
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    for parameter in model.parameters():
        parameter.data += by * torch.randn_like(parameter)
    return model


def second_stage(model, model_dir, tmp_path, **overrides):
    return trl_ext.DPOTrainer(
        model=model,
        args=trl_ext.DPOConfig(**options(tmp_path, **overrides)),
        processing_class=AutoTokenizer.from_pretrained(model_dir),
        train_dataset=Dataset.from_list(preference_rows(8)),
    )


@pytest.mark.parametrize("loss_type", ["sigmoid", "offset"])
def test_the_reference_is_what_the_first_stage_trained(loss_type, tiny_model_dir, tmp_path, caplog):
    model = moved(tiny_model_dir)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trainer = second_stage(model, tiny_model_dir, tmp_path, loss_type=loss_type, max_steps=1)
    assert "the reference is a copy of the model as it stands" in caplog.text
    trainer.train()
    assert trainer.state.log_history[0]["rewards/margins"] == pytest.approx(0, abs=1e-6)
    for name, value in trainer.ref_model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert not any(parameter.requires_grad for parameter in trainer.ref_model.parameters())
    assert not trainer.ref_model.training
    assert any(not torch.equal(value, before[name]) for name, value in trainer.model.state_dict().items())


def test_two_stages_on_one_object(tiny_model_dir, tmp_path, caplog):
    first = build(trl_ext.DPOTrainer, trl_ext.DPOConfig, tiny_model_dir, tmp_path / "first", learning_rate=1e-2)
    assert "as it stands" not in caplog.text  # just loaded: TRL's reference and ours are the same
    first.train()
    trained = parameters(first)
    stage = second_stage(first.model, tiny_model_dir, tmp_path / "second", max_steps=1)
    assert_same_parameters(dict(stage.ref_model.named_parameters()), trained)
    stage.train()
    assert stage.state.log_history[0]["rewards/margins"] == pytest.approx(0, abs=1e-6)


def test_both_trainers_agree(tiny_model_dir, tmp_path):
    model = moved(tiny_model_dir)
    theirs = trl_ext.OnlineDPOTrainer(
        model=copy.deepcopy(model),
        reward_funcs=length_reward,
        args=trl_ext.OnlineDPOConfig(**options(tmp_path)),
        processing_class=AutoTokenizer.from_pretrained(tiny_model_dir),
        train_dataset=prompts(),
    )
    ours = second_stage(model, tiny_model_dir, tmp_path)
    for name, value in ours.ref_model.state_dict().items():
        assert torch.equal(value, theirs.ref_model.state_dict()[name]), name


def test_a_name_and_a_given_reference_are_what_they_say(tiny_model_dir, tmp_path, caplog):
    given = moved(tiny_model_dir)
    kwargs = {"trainer_kwargs": {"ref_model": given}}
    trainer = build(trl_ext.DPOTrainer, trl_ext.DPOConfig, tiny_model_dir, tmp_path, **kwargs)
    assert trainer.ref_model is given
    named = second_stage(str(tiny_model_dir), tiny_model_dir, tmp_path)
    original = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
    for name, value in named.ref_model.named_parameters():
        torch.testing.assert_close(value.float(), original.get_parameter(name))
    assert "as it stands" not in caplog.text


def test_adapters_have_no_copy(tiny_model_dir, tmp_path):
    lora = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    trainer = build(
        trl_ext.DPOTrainer, trl_ext.DPOConfig, tiny_model_dir, tmp_path, trainer_kwargs={"peft_config": lora}
    )
    assert trainer.ref_model is None
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32), lora)
    assert second_stage(model, tiny_model_dir, tmp_path).ref_model is None


def test_precomputed_references_are_the_policys(tiny_model_dir, tmp_path):
    model = moved(tiny_model_dir)
    trainer = second_stage(model, tiny_model_dir, tmp_path, precompute_ref_log_probs=True, max_steps=1)
    assert trainer.ref_model is None
    trainer.train()
    assert trainer.state.log_history[0]["rewards/margins"] == pytest.approx(0, abs=1e-6)


def test_what_differs_from_its_folder(tiny_model_dir, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
    assert not differs_from_source(model)
    assert not differs_from_source(AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.bfloat16))
    assert not differs_from_source(frozen_copy(model))
    assert differs_from_source(moved(tiny_model_dir))
    model.config._name_or_path = "owner/model"
    assert not differs_from_source(model)
    model.config._name_or_path = ""
    assert not differs_from_source(model)
    # Several files: the one that differs may be any
    moved(tiny_model_dir).save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    model.config._name_or_path = str(tmp_path / "sharded")
    assert differs_from_source(model)


def test_trl_itself_loads_the_reference_anew(tiny_model_dir, tmp_path):
    """What the documentation says of TRL, and what this package does otherwise."""
    trainer = trl.DPOTrainer(
        model=moved(tiny_model_dir),
        args=trl.DPOConfig(**options(tmp_path)),
        processing_class=AutoTokenizer.from_pretrained(tiny_model_dir),
        train_dataset=Dataset.from_list(preference_rows(8)),
    )
    original = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
    assert_same_parameters(dict(trainer.ref_model.named_parameters()), dict(original.named_parameters()))


def test_a_wrong_path_is_refused_at_once(tmp_path):
    with pytest.raises(ValueError, match=r"There is no model '/no/such/model'"):
        trl_ext.DPOTrainer(model="/no/such/model", train_dataset=Dataset.from_list(preference_rows(4)))


def test_a_wrong_path_is_refused_before_pairs_are_scored(tmp_path):
    def judge(prompts, completions):
        raise AssertionError("the pairs were scored first")

    with pytest.raises(ValueError, match=r"There is no model '/no/such/model'"):
        trl_ext.DPOTrainer(
            model="/no/such/model",
            args=trl_ext.DPOConfig(output_dir=str(tmp_path), bf16=False, loss_type="offset"),
            train_dataset=Dataset.from_list(preference_rows(4)).select_columns(["prompt", "chosen", "rejected"]),
            reward_funcs=judge,
        )


def test_first_batch_is_scored_by_the_copy(tiny_model_dir, tmp_path):
    """Log-ratios of a policy that moves after the trainer was built are those to where it stood."""
    trainer = second_stage(moved(tiny_model_dir), tiny_model_dir, tmp_path, loss_type="length_regularized")
    for parameter in trainer.model.parameters():
        parameter.data += 0.05
    trainer.compute_loss(trainer.model.train(), first_batch(trainer))
    assert abs(trainer._means["train"].over_processes()["logratios/chosen"]) > 0.1
