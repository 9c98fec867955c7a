"""Says which private name of TRL has moved, when one has."""

import ast
import inspect
import re
from pathlib import Path

import pytest
import torch
import trl
from datasets import Dataset
from transformers import AutoModelForCausalLM, GenerationMixin, PreTrainedModel, Trainer
from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer
from trl.trainer import utils

import trl_ext
from tests.conftest import preference_rows
from tests.helpers import build, first_batch, options
from tests.online.runs import online
from trl_ext.trainers import trl_seam
from trl_ext.trainers.reward import RewardTrainer


def test_methods_are_there():
    for name in trl_seam.DPO_METHODS:
        assert callable(getattr(trl.DPOTrainer, name)), name


def test_attributes_are_there(tiny_model_dir, tmp_path):
    trainer = build(trl.DPOTrainer, trl.DPOConfig, tiny_model_dir, tmp_path)
    for name in trl_seam.DPO_ATTRIBUTES:
        assert hasattr(trainer, name), name


def test_online_names():
    for name in trl_seam.ONLINE_METHODS:
        assert callable(getattr(OnlineDPOTrainer, name)), name
    names = list(inspect.signature(OnlineDPOTrainer._generate).parameters)
    assert names == ["self", "model", "prompts", "images"]
    assert list(inspect.signature(OnlineDPOTrainer._generate_vllm).parameters) == ["self", "prompts", "images"]


def test_online_attributes(tiny_model_dir, tmp_path):
    trainer = online(tiny_model_dir, tmp_path, cls=OnlineDPOTrainer, config=OnlineDPOConfig)
    for name in trl_seam.ONLINE_ATTRIBUTES:
        assert hasattr(trainer, name), name


def test_names_of_the_reward_trainer(tiny_model_dir, tmp_path):
    for name in trl_seam.REWARD_METHODS:
        assert callable(getattr(trl.RewardTrainer, name)), name
    rows = [{key: row[key] for key in ("prompt", "chosen", "rejected")} for row in preference_rows(4)]
    trainer = trl.RewardTrainer(
        str(tiny_model_dir), trl.RewardConfig(**options(tmp_path)), train_dataset=Dataset.from_list(rows)
    )
    for name in trl_seam.REWARD_ATTRIBUTES:
        assert hasattr(trainer, name), name
    # What a general preference model relies on: the metrics that it takes out again, and the one that it hides
    trainer.compute_loss(trainer.model, first_batch(trainer))
    assert {"min_reward", "mean_reward", "max_reward", "accuracy", "margin"} <= trainer._metrics["eval"].keys()
    trainer.model.config.num_labels = 2
    with pytest.raises(ValueError, match="num_labels=2"):
        trl.RewardTrainer(trainer.model, trl.RewardConfig(**options(tmp_path)), train_dataset=Dataset.from_list(rows))


def test_names_of_fine_tuning(tiny_model_dir, tmp_path):
    trl_seam.require_names(trl_seam.SFT_TRAINER)
    data = Dataset.from_list([{"text": row["prompt"]} for row in preference_rows(4)])
    trainer = build(trl.SFTTrainer, trl.SFTConfig, tiny_model_dir, tmp_path, dataset=data)
    for name in trl_seam.SFT_ATTRIBUTES:
        assert hasattr(trainer, name), name


def test_names_of_vllm():
    source = inspect.getsource(OnlineDPOTrainer)
    for name in trl_seam.VLLM_ATTRIBUTES:
        assert f"self.{name}" in source, name


def test_names_of_other_libraries(tiny_model_dir):
    trl_seam.require_names(trl_seam.LIBRARY_NAMES)
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    examples = {
        "transformers.PreTrainedConfig": model.config,
        "datasets.Dataset": Dataset.from_list(preference_rows(1)),
        "torch.compile": torch.compile(model, backend="eager"),
        "torch.Tensor": torch.ones(1),
    }
    assert examples.keys() == trl_seam.OBJECT_NAMES.keys()
    for origin, names in trl_seam.OBJECT_NAMES.items():
        for name in names:
            assert hasattr(examples[origin], name), f"{origin}.{name}"


def test_what_ours_replaces_in_a_trainer_is_listed():
    """An override of a method that TRL has renamed would never be called."""
    for ours, names in (
        (trl_ext.DPOTrainer, trl_seam.DPO_METHODS),
        (trl_ext.OnlineDPOTrainer, trl_seam.ONLINE_METHODS),
        (RewardTrainer, trl_seam.REWARD_METHODS),
        (trl_ext.SFTTrainer, trl_seam.SFT_METHODS),
    ):
        own = [cls for cls in ours.__mro__ if cls.__module__.startswith("trl_ext.")]
        theirs = {name for cls in ours.__mro__[:-1] if cls not in own for name in vars(cls)}
        replaced = {name for cls in own for name in vars(cls)} & theirs
        methods = {name for name in replaced if callable(getattr(ours, name)) and not name.startswith("__")}
        assert methods and methods <= {*names}, methods - {*names}


def test_a_custom_loop_is_called_with_what_ours_takes():
    """`generate` hands a custom loop the model, the ids, and the processors and config that ours looks at."""
    source = inspect.getsource(GenerationMixin.generate)
    assert "custom_generate" in source and "synced_gpus" in source
    for name in ("input_ids", "logits_processor", "stopping_criteria", "generation_config"):
        assert name in inspect.signature(GenerationMixin._sample).parameters, name
    for name, first in {
        "_prefill": ["self", "input_ids", "generation_config", "model_kwargs"],
        "_has_unfinished_sequences": ["self", "this_peer_finished", "synced_gpus", "device"],
        "_update_model_kwargs_for_generation": ["self", "outputs", "model_kwargs"],
    }.items():
        assert [*inspect.signature(getattr(GenerationMixin, name)).parameters][: len(first)] == first, name


def names_in_the_package() -> tuple[dict[str, str], set[str], set[str]]:
    """Where each name is used; those that the package defines; and all of its strings."""
    used, own, strings = {}, set(), set()
    for path in Path(trl_ext.__file__).parent.rglob("*.py"):
        if path == Path(trl_seam.names.__file__):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            found = ()
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                own.add(node.name)
            elif isinstance(node, ast.Attribute):
                found = (node.attr,)
                if isinstance(node.ctx, ast.Store) and isinstance(node.value, ast.Name) and node.value.id == "self":
                    own.add(node.attr)
            elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("getattr", "hasattr", "setattr"):
                found = [part.value for part in node.args[1:2] if isinstance(part, ast.Constant)]
            elif isinstance(node, ast.ImportFrom) and node.level == 0 and not node.module.startswith("trl_ext"):
                found = (*node.module.split("."), *(alias.name for alias in node.names))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                strings.add(node.value)
            used |= dict.fromkeys(found, path.name)
    return used, own, strings


def test_every_private_name_stands_in_the_seam():
    """A name with an underscore that the package uses is its own, or listed; and what is listed is used."""
    used, own, strings = names_in_the_package()
    owners = (trl.DPOTrainer, OnlineDPOTrainer, Trainer, PreTrainedModel)
    upstream = {name for owner in owners for name in dir(owner)}
    for owner in owners:
        upstream |= set(re.findall(r"self\.(_\w+) = ", inspect.getsource(owner)))
    used |= dict.fromkeys(strings & upstream - used.keys(), "a string")
    private = {name: path for name, path in used.items() if re.fullmatch(r"_[A-Za-z]\w*", name)}
    assert {"_metrics", "_tokenizer", "_is_stateful", "_total_train_tokens"} <= private.keys()
    listed = trl_seam.PRIVATE_NAMES | {"_replace", "_exit"}  # of named tuples; `os._exit`
    missing = {
        name: path for name, path in private.items() if (name not in own or name in upstream) and name not in listed
    }
    assert not missing
    unused = trl_seam.PRIVATE_NAMES - used.keys() - own
    assert not unused


def test_online_arguments_are_trls():
    theirs, ours = (inspect.signature(cls.__init__).parameters for cls in (OnlineDPOTrainer, trl_ext.OnlineDPOTrainer))
    assert list(ours) == [*theirs, "judge", "teacher_model", "reverse_model"]
    assert all(ours[name].default == theirs[name].default for name in theirs)


def test_signatures():
    def names(method):
        return list(inspect.signature(method).parameters)

    trainer = trl.DPOTrainer
    assert names(trainer.compute_loss) == ["self", "model", "inputs", "return_outputs", "num_items_in_batch"]
    assert names(trainer.compute_ref_log_probs) == ["self", "model", "inputs"]
    assert names(trainer._prepare_dataset) == ["self", "dataset", "processing_class", "args", "dataset_name"]
    assert names(trainer._precompute_ref_logps) == ["self", "dataset", "name", "batch_size"]
    assert names(trainer.evaluate) == ["self", "eval_dataset", "ignore_keys", "metric_key_prefix"]


def test_arguments_of_the_trainer_are_trls():
    theirs, ours = (inspect.signature(cls.__init__).parameters for cls in (trl.DPOTrainer, trl_ext.DPOTrainer))
    assert list(ours) == [*theirs, "reward_funcs", "judge", "teacher_model", "reverse_model"]
    assert all(ours[name].default == theirs[name].default for name in theirs)


def test_arguments_of_fine_tuning_are_trls():
    theirs, ours = (inspect.signature(cls.__init__).parameters for cls in (trl.SFTTrainer, trl_ext.SFTTrainer))
    assert list(ours) == list(theirs)
    assert all(ours[name].default == theirs[name].default for name in theirs)


def test_keys_that_the_model_is_not_called_with():
    keys = "{" + ", ".join(f'"{key}"' for key in trl_seam.NON_MODEL_KEYS) + "}"
    for method in (trl.DPOTrainer._compute_loss, trl.DPOTrainer.compute_ref_log_probs):
        assert f"_non_model_keys = {keys}" in inspect.getsource(method)


def test_batch_keys_of_trls_collator(tiny_model_dir, tmp_path):
    trainer = build(trl.DPOTrainer, trl.DPOConfig, tiny_model_dir, tmp_path, precompute_ref_log_probs=True)
    expected = {"input_ids", "attention_mask", "completion_mask", "ref_chosen_logps", "ref_rejected_logps"}
    assert set(first_batch(trainer)) == expected


def test_fused_output(tiny_model_dir, tmp_path):
    trainer = build(trl.DPOTrainer, trl.DPOConfig, tiny_model_dir, tmp_path, use_weighting=True)
    batch = first_batch(trainer)
    output = trl_seam.fused_forward(trainer.model, batch, router_logits=False)
    rows, width = batch["input_ids"].shape
    for name in trl_seam.ROW_FIELDS:
        assert output[name].shape == (rows, width - 1), name
    assert set(output.keys()) == {"loss", *trl_seam.ROW_FIELDS}


def test_fused_forward_has_the_parts_that_are_replaced():
    """`head_in_place` substitutes the head, `bind_forward` the closure's own forward."""
    names = list(inspect.signature(utils._ChunkedLogProbFunction.forward).parameters)
    assert names == [
        "ctx", "hidden", "weight", "bias", "targets", "temperature", "chunk_size", "final_logit_softcapping",
        "logit_scale", "outputs",
    ]  # fmt: skip
    source = inspect.getsource(utils.add_fused_lm_head)
    assert "_ChunkedLogProbFunction.apply(" in source
    assert "compact = _use_triton(hidden_states.device)" in source
    assert "log_probs, entropy, log_sum_sq_probs, mean_logits, is_top1 = per_token" in source
    assert callable(utils.maybe_gather_lm_head_ctx)


def test_fused_forward_keeps_the_forward_it_replaced(tiny_model_dir):
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    before = model.forward
    utils.add_fused_lm_head(model)
    function = model.forward.__func__
    assert function.__code__.co_name == "_fused_forward"
    assert inspect.getclosurevars(function).nonlocals["original_forward"] == before
    trl_seam.unbind_forward(model)
    assert model.forward == before


def test_metrics_of_each_statistic(tiny_model_dir, tmp_path):
    trainer = build(trl.DPOTrainer, trl.DPOConfig, tiny_model_dir, tmp_path)
    trainer.model.train()
    trainer.compute_loss(trainer.model, first_batch(trainer))
    for names in trl_seam.METRICS_OF.values():
        for name in names:
            assert len(trainer._metrics["train"][name]) == 1, name
