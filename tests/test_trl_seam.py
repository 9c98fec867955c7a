"""Says which private name of TRL has moved, when one has."""

import ast
import inspect
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import trl
from datasets import Dataset
from torch.distributed.tensor import Partial
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationMixin, configuration_utils
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer
from trl.trainer import utils

from tests.conftest import preference_rows
from tests.helpers import build, first_batch
from tests.online.runs import online
from trl_ext.logprobs import Head
from trl_ext.trainers import trl_seam


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


def test_names_of_vllm():
    source = inspect.getsource(OnlineDPOTrainer)
    for name in trl_seam.VLLM_ATTRIBUTES:
        assert f"self.{name}" in source, name


def test_names_of_other_libraries(tiny_model_dir):
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    examples = {
        "transformers.GenerationMixin": model,
        "transformers.PreTrainedConfig": model.config,
        "transformers.PreTrainedModel": model,
        "transformers.TrainingArguments": trl.DPOConfig,
        "transformers.masking_utils.AttentionMaskInterface": ALL_MASK_ATTENTION_FUNCTIONS,
        "datasets.Dataset": Dataset.from_list(preference_rows(1)),
        "torch.compile": torch.compile(model, backend="eager"),
    }
    assert examples.keys() == trl_seam.LIBRARY_NAMES.keys()
    for origin, names in trl_seam.LIBRARY_NAMES.items():
        for name in names:
            # A model from a folder has no commit
            there = hasattr(examples[origin], name) or f'"{name}"' in inspect.getsource(configuration_utils)
            assert there, f"{origin}.{name}"


def test_a_custom_loop_is_called_with_what_ours_takes():
    """`generate` hands a custom loop the model, the ids, and the processors and config that ours looks at."""
    source = inspect.getsource(GenerationMixin.generate)
    assert "custom_generate" in source and "synced_gpus" in source
    for name in ("input_ids", "logits_processor", "generation_config"):
        assert name in inspect.signature(GenerationMixin._sample).parameters, name


def test_every_private_name_stands_in_the_seam():
    """A name with an underscore that the package uses is its own, or listed."""
    package = Path(trl_seam.__file__).parents[1]
    used, own = {}, set()
    for path in package.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                own.add(node.name)
            elif isinstance(node, ast.Attribute):
                used.setdefault(node.attr, path)
                if isinstance(node.ctx, ast.Store) and isinstance(node.value, ast.Name) and node.value.id == "self":
                    own.add(node.attr)
            elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("getattr", "hasattr", "setattr"):
                name = node.args[1]
                if isinstance(name, ast.Constant):
                    used.setdefault(name.value, path)
            elif isinstance(node, ast.ImportFrom) and node.level == 0 and not node.module.startswith("trl_ext"):
                for alias in node.names:
                    used.setdefault(alias.name, path)
    upstream = {name for owner in (trl.DPOTrainer, OnlineDPOTrainer) for name in dir(owner)}
    sources = "".join(inspect.getsource(owner) for owner in (trl.DPOTrainer, OnlineDPOTrainer))
    upstream |= set(re.findall(r"self\.(_\w+) = ", sources))
    private = {name: path for name, path in used.items() if name.startswith("_") and not name.startswith("__")}
    assert {"_metrics", "_tokenizer", "_is_stateful"} <= private.keys()
    missing = {
        name: path.name
        for name, path in private.items()
        if (name not in own or name in upstream) and name not in trl_seam.PRIVATE_NAMES and name != "_replace"
    }
    assert not missing


def test_online_arguments_are_trls():
    import trl_ext

    theirs, ours = (inspect.signature(cls.__init__).parameters for cls in (OnlineDPOTrainer, trl_ext.OnlineDPOTrainer))
    assert list(ours) == [*theirs, "preference_fn"]
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
    import trl_ext

    theirs, ours = (inspect.signature(cls.__init__).parameters for cls in (trl.DPOTrainer, trl_ext.DPOTrainer))
    assert list(ours) == [*theirs, "reward_model"]
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


def test_head_in_place_is_what_runs(tiny_model_dir, tmp_path, monkeypatch):
    trainer = build(trl.DPOTrainer, trl.DPOConfig, tiny_model_dir, tmp_path)
    batch, seen = first_batch(trainer), []
    monkeypatch.setattr(
        Head, "__call__", lambda *args, real=Head.__call__, **kwargs: seen.append(1) or real(*args, **kwargs)
    )
    with trl_seam.head_in_place(Head("torch"), ()):
        ours = trl_seam.fused_forward(trainer.model, batch, router_logits=False)
    assert seen == [1]
    theirs = trl_seam.fused_forward(trainer.model, batch, router_logits=False)
    assert seen == [1]
    torch.testing.assert_close(ours.log_probs, theirs.log_probs)
    assert not ours.entropy.any() and theirs.entropy.any()


def test_metrics_of_each_statistic(tiny_model_dir, tmp_path):
    trainer = build(trl.DPOTrainer, trl.DPOConfig, tiny_model_dir, tmp_path)
    trainer.model.train()
    trainer.compute_loss(trainer.model, first_batch(trainer))
    for names in trl_seam.METRICS_OF.values():
        for name in names:
            assert len(trainer._metrics["train"][name]) == 1, name


def test_reference_cache_key():
    dataset = Dataset.from_list(preference_rows(4))
    keyed = trl_seam.with_cache_key(dataset, 1024, None)
    assert keyed._fingerprint != dataset._fingerprint
    assert keyed._fingerprint == trl_seam.with_cache_key(dataset, 1024, None)._fingerprint
    assert keyed._fingerprint != trl_seam.with_cache_key(dataset, 512, None)._fingerprint
    assert keyed.to_list() == dataset.to_list()


# What is wrapped here, by hand


def test_tokens_of_pairs_are_those_of_the_trainer(tiny_model_dir):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    rows = preference_rows(3)
    rows[1]["prompt"] = " what" * 50
    data = Dataset.from_list([{name: row[name] for name in ("prompt", "chosen", "rejected")} for row in rows])
    args = trl.DPOConfig(output_dir="out", use_cpu=True, bf16=False, max_length=8)
    found = trl_seam.tokenize_pairs(data, tokenizer, args)
    assert len(found) == 3  # also what is longer than `max_length`
    for row, given in zip(found, rows, strict=True):
        assert row["prompt_ids"] == tokenizer(given["prompt"])["input_ids"]
        for side in ("chosen", "rejected"):
            assert row[f"{side}_ids"] == [*tokenizer(given[side])["input_ids"], tokenizer.eos_token_id]


def test_gradients_of_a_sharded_head_are_averaged():
    sharded = SimpleNamespace(grad_fn=SimpleNamespace(dtensor_spec=SimpleNamespace(mesh=SimpleNamespace(ndim=2))))
    plain = SimpleNamespace(grad_fn=SimpleNamespace())
    trl_seam._average_gradients(torch.nn.Parameter(torch.ones(1)), None, plain, sharded)
    assert sharded.grad_fn.grad_placements == [Partial("avg"), Partial("avg")] and not vars(plain.grad_fn)


def test_the_cache_of_references_is_one_for_all_processes(monkeypatch, tmp_path):
    data = Dataset.from_list(preference_rows(2))
    own = trl_seam.with_cache_key(data, 1)
    assert "_get_cache_file_path" not in vars(own)
    monkeypatch.setattr(trl_seam, "PartialState", lambda: SimpleNamespace(num_processes=2))
    first = str(tmp_path / "cache-of-the-first.arrow")
    asked = []
    monkeypatch.setattr(Dataset, "_get_cache_file_path", lambda self, fingerprint: asked.append(fingerprint) or "own")
    monkeypatch.setattr(trl_seam, "broadcast_object_list", lambda paths: [first] if paths == ["own"] else paths)
    seen = []
    monkeypatch.setattr(trl_seam, "gather_object", lambda found: seen.append(found) or [True, *found])
    shared = trl_seam.with_cache_key(data, 1)
    assert shared._get_cache_file_path("abc") == first and asked == ["abc"] and seen == [[True]]
    monkeypatch.setattr(trl_seam, "gather_object", lambda found: [*found, False])
    with pytest.raises(
        ValueError, match=f"keeps the reference log-probs in {tmp_path}, which not every process can read"
    ):
        shared._get_cache_file_path("abc")


def test_a_model_is_called_as_trl_calls_it():
    """Labels where the completion is; nothing is kept for generation; router logits where they are asked for."""
    calls = []
    inputs = {
        "input_ids": torch.tensor([[5, 6, 7]]), "attention_mask": torch.tensor([[1, 1, 1]]),
        "completion_mask": torch.tensor([[0, 1, 0]]), "ref_chosen_logps": torch.zeros(1),
        "ref_rejected_logps": torch.zeros(1), "pixel_values": "image",
    }  # fmt: skip
    for router in (False, True):
        assert trl_seam.fused_forward(lambda **kwargs: calls.append(kwargs) or "output", inputs, router) == "output"
    for kwargs, router in zip(calls, (False, True), strict=True):
        assert kwargs.pop("labels").tolist() == [[-100, 6, -100]]
        assert torch.equal(kwargs.pop("input_ids"), inputs["input_ids"])
        assert torch.equal(kwargs.pop("attention_mask"), inputs["attention_mask"])
        extra = {"output_router_logits": True} if router else {}
        assert kwargs == {"use_cache": False, "fused_lm_head": True, "pixel_values": "image", **extra}


def test_metrics_that_are_taken_back():
    metrics = {"train": {"a": [1.0, 2.0], "b": [3.0], "entropy": [4.0]}, "eval": {"a": [5.0]}}
    trainer = SimpleNamespace(_metrics=metrics, model=SimpleNamespace(training=True))
    trl_seam.forget_metrics(trainer, ["a", "b"])
    assert metrics == {"train": {"a": [1.0], "entropy": [4.0]}, "eval": {"a": [5.0]}}
    trl_seam.forget_statistics(trainer, ("mean_logits", "is_top1"))
    assert metrics == {"train": {"a": [1.0]}, "eval": {"a": [5.0]}}
    trainer.model.training = False
    trl_seam.forget_metrics(trainer, ["a"])
    assert metrics == {"train": {"a": [1.0]}, "eval": {}}


def test_what_is_set_for_a_while_is_as_it_was_even_after_an_error():
    logged = {"train": {"a": [1.0]}, "eval": {}}
    trainer = SimpleNamespace(
        loss_types=["a", "b"], loss_weights=[2.0, 3.0], aux_loss_enabled=True, _metrics=logged, _total_train_tokens=7,
        precompute_ref_logps=False,
    )  # fmt: skip
    before = dict(vars(trainer))
    for record in (True, False):
        with pytest.raises(RuntimeError, match="stop"), trl_seam.only_term(trainer, "b", record):
            assert (trainer.loss_types, trainer.loss_weights, trainer.aux_loss_enabled) == (["b"], [1.0], record)
            assert (trainer._metrics is logged) == record and trainer._metrics.keys() == {"train", "eval"}
            if not record:
                trainer._metrics["train"]["new"].append(1.0)
                trainer._total_train_tokens = 9
            raise RuntimeError("stop")
        assert vars(trainer) == before and logged == {"train": {"a": [1.0]}, "eval": {}}
    with pytest.raises(RuntimeError, match="stop"), trl_seam.reference_in_inputs(trainer):
        assert trainer.precompute_ref_logps is True
        raise RuntimeError("stop")
    assert trainer.precompute_ref_logps is False
    args = SimpleNamespace(precompute_ref_log_probs=False)
    with pytest.raises(RuntimeError, match="stop"), trl_seam.no_reference(args):
        assert args.precompute_ref_log_probs is True
        raise RuntimeError("stop")
    assert args.precompute_ref_log_probs is False


def test_outputs_that_are_there_stand_in_for_the_model():
    model = lambda *args, **kwargs: (args, kwargs)  # noqa: E731
    replay = trl_seam.Replay(model, "outputs")
    assert replay(input_ids=1, fused_lm_head=True) == "outputs"
    assert replay(2, input_ids=1) == ((2,), {"input_ids": 1})
