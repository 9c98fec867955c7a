"""The reference's log-probabilities are computed once per row, and never used for another reference."""

import copy
import logging

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl.trainer.callbacks import SyncRefModelCallback
from trl.trainer.dpo_trainer import DataCollatorForPreference

import trl_ext
from tests.conftest import build_tokenizer, preference_rows
from tests.conversations import rows as conversations
from tests.helpers import assert_same_parameters, build, first_batch, history, options, parameters
from tests.plain import pair_logps, token_logps
from tests.test_groups import groups
from tests.test_workers import half_missing
from trl_ext.data.cache import tensor_key
from trl_ext.data.collator import RowsCollator, content_keys
from trl_ext.rows import from_batch
from trl_ext.trainers.reference_memory import ROW_BYTES, Store


# Three steps per epoch; rows of an epoch in the same batches as those of the one before
TWO_EPOCHS = {"max_steps": -1, "num_train_epochs": 2, "learning_rate": 1e-2, "train_sampling_strategy": "sequential"}
LORA = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)


def count_forwards(trainer) -> list[int]:
    """The number of rows of each forward of the reference from here on."""
    counts, forward = [], trainer._reference_token_logps

    def counted(model, rows):
        counts.append(len(rows.completion_mask))
        return forward(model, rows)

    trainer._reference_token_logps = counted
    return counts


def make(model_dir, folder, **overrides):
    torch.manual_seed(0)  # of an adapter's weights
    trainer = build(trl_ext.DPOTrainer, trl_ext.DPOConfig, model_dir, folder, **{**TWO_EPOCHS, **overrides})
    return trainer, count_forwards(trainer)


# What is scored: options, the data, and the forwards of an epoch
KINDS = {
    "pairs": ({"loss_type": ["sigmoid", "length_regularized"]}, lambda: Dataset.from_list(preference_rows(12)), 3),
    "lengths of both": ({"ld_alpha": 0.5}, lambda: Dataset.from_list(preference_rows(12)), 3),
    "empty traces": ({"loss_type": "bias_variance"}, half_missing, 3),
    "groups": ({"loss_type": "anchored"}, lambda: groups((3, 4, 2, 5)), 1),
    "turns": ({"loss_type": "dmpo"}, lambda: Dataset.from_list(conversations()), 1),
    "plain rows": ({"share_prefix": False}, lambda: Dataset.from_list(preference_rows(12)), 3),
    "adapter": ({"trainer_kwargs": {"peft_config": LORA}}, lambda: Dataset.from_list(preference_rows(12)), 3),
    "TRL's head": (
        {"loss_type": "offset", "logprob_backend": "trl"},
        lambda: Dataset.from_list(preference_rows(12)),
        3,
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_second_epoch_runs_no_reference(kind, tiny_model_dir, tmp_path):
    """To the bit, in metrics too: rows of a batch are the same in both epochs."""
    kwargs, data, per_epoch = KINDS[kind]
    runs = []
    for memory in (1024, 0):
        trainer, forwards = make(
            tiny_model_dir, tmp_path / str(memory), dataset=data(), ref_logps_memory_mb=memory, **copy.deepcopy(kwargs)
        )
        trainer.train()
        assert len(forwards) == per_epoch * (1 if memory else 2)
        runs.append(trainer)
    assert history(runs[0]) == history(runs[1])
    assert_same_parameters(parameters(runs[0]), parameters(runs[1]))
    assert history(runs[0])[per_epoch]["rewards/margins"] != 0  # the second epoch is away from its reference


def test_in_other_batches_only_rounding_differs(tiny_model_dir, tmp_path):
    runs = []
    for memory in (1, 0):
        trainer, forwards = make(
            tiny_model_dir,
            tmp_path / str(memory),
            ref_logps_memory_mb=memory,
            train_sampling_strategy="random",
            seed=5,
        )
        trainer.train()
        assert len(forwards) == (3 if memory else 6)
        runs.append(trainer)
    assert_same_parameters(parameters(runs[0]), parameters(runs[1]), rtol=1e-4, atol=2e-5)
    for one, other in zip(*map(history, runs), strict=True):
        assert one == pytest.approx(other, rel=1e-4, abs=1e-5)


def test_a_mixture_of_experts(tmp_path):
    """Its auxiliary loss is the policy's own."""
    from tests.logprobs.families import EXACT, tiny

    runs = []
    for memory in (1024, 0):
        model = tiny("qwen3_moe", {**EXACT["qwen3_moe"], "vocab_size": 600})
        args = trl_ext.DPOConfig(
            **options(tmp_path, **{**TWO_EPOCHS, "router_aux_loss_coef": 0.1, "ref_logps_memory_mb": memory})
        )
        data = Dataset.from_list(preference_rows(4))
        trainer = trl_ext.DPOTrainer(
            model, copy.deepcopy(model), args, train_dataset=data, processing_class=build_tokenizer()
        )
        forwards = count_forwards(trainer)
        trainer.train()
        assert trainer.aux_loss_enabled and len(forwards) == (1 if memory else 2)
        runs.append(trainer)
    assert history(runs[0]) == history(runs[1]) and "aux_loss" in history(runs[0])[1]
    assert_same_parameters(parameters(runs[0]), parameters(runs[1]))


@pytest.mark.parametrize("ld_alpha", [None, 0.25])
def test_sums_are_those_of_each_row_alone(ld_alpha, tiny_model_dir, tmp_path):
    trainer, _ = make(tiny_model_dir, tmp_path, rows=4, num_train_epochs=1, ld_alpha=ld_alpha)
    trainer.train()
    reference = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float64)
    with torch.no_grad():
        expected = [pair_logps(reference, example, ld_alpha) for example in trainer.train_dataset]
    rows, _ = from_batch(first_batch(trainer))
    found = trainer._memory.store.recall(rows.keys).double()
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64).T.flatten(), rtol=1e-5, atol=1e-4)


def test_tokens_are_those_of_each_row_alone(tiny_model_dir, tmp_path):
    """Kept without padding, in whatever batch they come again."""
    trainer, forwards = make(tiny_model_dir, tmp_path, rows=4, num_train_epochs=1, loss_type="dmpo")
    trainer.train()
    reference = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float64)
    for example in trainer.train_dataset:
        rows, _ = from_batch(trainer.data_collator([example]))
        _, known = trainer._memory.logps(trainer.ref_model, rows, None)
        for row, side in enumerate(("chosen", "rejected")):
            with torch.no_grad():
                expected = token_logps(reference, example["prompt_ids"], example[f"{side}_ids"])
            scored = rows.completion_mask[row, 1:] != 0
            torch.testing.assert_close(known[row][scored].double(), expected, rtol=1e-5, atol=1e-4)
            assert not known[row][~scored].any()
    assert len(forwards) == 1


def test_evaluations_and_further_trainings(tiny_model_dir, tmp_path):
    trainer, forwards = make(
        tiny_model_dir, tmp_path, num_train_epochs=1,
        trainer_kwargs={"eval_dataset": Dataset.from_list(preference_rows(8, seed=9))},
    )  # fmt: skip
    memory, readings = trainer._memory, []
    fingerprint = memory._fingerprint
    memory._fingerprint = lambda *given: readings.append(len(forwards)) or fingerprint(*given)
    without, _ = make(tiny_model_dir, tmp_path / "without", ref_logps_memory_mb=0,
                      trainer_kwargs={"eval_dataset": trainer.eval_dataset})  # fmt: skip
    metrics = [{name: value for name, value in each.evaluate().items() if "per_second" not in name and "time" not in name}
               for each in (trainer, trainer, without)]  # fmt: skip
    assert metrics[0] == metrics[1] == metrics[2] and forwards == [8, 8]
    trainer.train()
    assert len(forwards) == 5
    trainer.evaluate()
    trainer.train()
    assert len(forwards) == 5
    assert readings == [0, 2, 2, 5, 5]  # the weights, once per evaluation and training


def test_a_stream_and_workers(tiny_model_dir, tmp_path):
    stream = Dataset.from_list(preference_rows(12)).to_iterable_dataset(num_shards=2)
    trainer, forwards = make(
        tiny_model_dir, tmp_path, dataset=stream, dataloader_num_workers=2, per_device_train_batch_size=3, max_steps=9
    )
    trainer.train()
    assert len(forwards) == 4


# Resumed


@pytest.mark.parametrize(("loss_type", "step"), [("sigmoid", 2), ("sigmoid", 4), ("dmpo", 4)])
def test_a_resumed_run_is_the_whole_one(loss_type, step, tiny_model_dir, tmp_path):
    """To the bit, resumed in the first or the second of three epochs, though rows are in other batches in each."""
    saved = {"loss_type": loss_type, "train_sampling_strategy": "random", "save_strategy": "steps", "save_steps": step,
             "num_train_epochs": 3}  # fmt: skip
    whole, _ = make(tiny_model_dir, tmp_path / "whole", **saved)
    whole.train()
    resumed, forwards = make(tiny_model_dir, tmp_path / "resumed", **saved)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
    assert forwards == [8] * max(0, 3 - step)
    logs = [[{**entry, "num_tokens": 0} for entry in history(run)] for run in (resumed, whole)]  # TRL counts anew
    assert logs[0][:-1] == logs[1][:-1]  # the last has the mean loss since the start
    assert_same_parameters(parameters(resumed), parameters(whole))


def saved_run(model_dir, folder, **overrides):
    """A run with a checkpoint after its first epoch, in which the reference has run three times."""
    options = {"save_strategy": "steps", "save_steps": 3, **overrides}
    trainer, forwards = make(model_dir, folder, **options)
    trainer.train()
    assert len(forwards) == 3
    return folder / "checkpoint-3", options


def test_what_a_checkpoint_holds(tiny_model_dir, tmp_path):
    """Twelve pairs: no pickle, 16 bytes per key, and a number per completion."""
    checkpoint, _ = saved_run(tiny_model_dir, tmp_path)
    tensors = load_file(checkpoint / "reference_memory_0.safetensors")
    assert tensors["keys"].shape == (24, 16) and tensors["keys"].dtype == torch.uint8
    assert tensors["lengths"].tolist() == [1] * 24 and tensors["values"].shape == (24,)


@pytest.mark.parametrize("harm", ["missing", "cut", "other file", "other lengths"])
def test_a_checkpoint_that_remembers_nothing(harm, tiny_model_dir, tmp_path, caplog):
    from safetensors.torch import save_file

    checkpoint, options = saved_run(tiny_model_dir, tmp_path / "run")
    path = checkpoint / "reference_memory_0.safetensors"
    if harm == "missing":
        path.unlink()
    elif harm == "cut":
        path.write_bytes(path.read_bytes()[:-7])
    elif harm == "other file":
        save_file({"weight": torch.ones(2)}, path)
    else:
        tensors = load_file(path)
        save_file({**tensors, "lengths": tensors["lengths"][1:]}, path, {"reference": "of another"})
    resumed, forwards = make(tiny_model_dir, tmp_path / "resumed", **options)
    with caplog.at_level(logging.WARNING):
        resumed.train(resume_from_checkpoint=str(checkpoint))
    assert len(forwards) == 3
    assert ("reference_memory_0.safetensors cannot be read" in caplog.text) is (harm != "missing")


@pytest.mark.parametrize("other", ["reference", "ld_alpha", "tokenisation"])
def test_a_checkpoint_of_another_reference(other, tiny_model_dir, tmp_path):
    checkpoint, options = saved_run(tiny_model_dir, tmp_path / "run", ld_alpha=0.25)
    options |= {"ld_alpha": 0.5} if other == "ld_alpha" else {}
    options |= {"max_length": 10} if other == "tokenisation" else {}
    resumed, forwards = make(tiny_model_dir, tmp_path / "resumed", **options)
    if other == "reference":
        resumed.ref_model.lm_head.weight.data[0, 0] += 1e-3
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert len(forwards) == 3


def test_the_last_checkpoint(tiny_model_dir, tmp_path):
    _, options = saved_run(tiny_model_dir, tmp_path, num_train_epochs=1)
    resumed, forwards = make(tiny_model_dir, tmp_path, **{**options, "num_train_epochs": 2})
    resumed.train(resume_from_checkpoint=True)
    assert forwards == [] and resumed.state.global_step == 6


# Another reference


@pytest.mark.parametrize("change", ["swapped", "written to", "its data", "its configuration"])
def test_a_reference_that_was_changed_between_two_runs(change, tiny_model_dir, tmp_path):
    """The third evaluation is measured against the new reference, as that of a trainer which never knew another."""
    trainer, forwards = make(tiny_model_dir, tmp_path, rows=4)
    trainer.evaluate()
    trainer.evaluate()
    assert len(forwards) == 1
    if change == "swapped":
        trainer.ref_model = copy.deepcopy(trainer.ref_model)
        trainer.ref_model.lm_head.weight.data.mul_(0.5)
    elif change == "written to":
        with torch.no_grad():
            trainer.ref_model.lm_head.weight.mul_(0.5)
    elif change == "its data":
        trainer.ref_model.lm_head.weight.data.mul_(0.5)
    else:
        trainer.ref_model.config.rms_norm_eps = 0.1
    before = trainer.evaluate()
    assert len(forwards) == 2
    trainer._memory.on = False
    assert before["eval_loss"] == trainer.evaluate()["eval_loss"]


def test_a_reference_that_is_written_to_in_a_run(tiny_model_dir, tmp_path):
    """By a callback of the user, which nothing announces."""

    class Writes(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 4:
                with torch.no_grad():
                    trainer.ref_model.lm_head.weight.mul_(0.9)

    trainer, forwards = make(tiny_model_dir, tmp_path, trainer_kwargs={"callbacks": [Writes()]})
    trainer.train()
    assert len(forwards) == 3 + 2


def test_the_trained_adapter_is_no_part_of_the_reference(tiny_model_dir, tmp_path):
    """Weights of the policy that change all the time are not looked at; those that the reference runs with are."""
    trainer, forwards = make(tiny_model_dir, tmp_path, rows=4, trainer_kwargs={"peft_config": LORA})
    trainer.train()
    trainer.train()
    assert len(forwards) == 1
    with torch.no_grad():
        trainer.model.get_base_model().lm_head.weight.mul_(0.5)
    trainer.evaluate()
    assert len(forwards) == 2


def test_tensor_key_sees_every_bit():
    value = torch.randn(3, 5, generator=torch.Generator().manual_seed(1))
    key = tensor_key(value)
    assert tensor_key(value.clone()) == key == tensor_key(value.T.contiguous().T)
    for other in (
        value * 2,
        -value,
        value.flip(0),
        value.T.contiguous(),
        value.double(),
        torch.nextafter(value, value + 1),
    ):
        assert tensor_key(other) != key
    half = value.bfloat16()
    assert tensor_key(half) != tensor_key(value.half()) != key
    assert tensor_key(torch.empty(0)) and tensor_key(torch.tensor(True)) != tensor_key(torch.tensor(False))


def test_weights_that_cannot_be_read(tiny_model_dir, tmp_path, caplog):
    """Such as those that lie elsewhere: the run goes on as without."""
    trainer, forwards = make(tiny_model_dir, tmp_path, rows=4)
    trainer.ref_model.register_parameter("away", torch.nn.Parameter(torch.empty(2, device="meta")))
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert len(forwards) == 2 and "weights of the reference cannot be read" in caplog.text


# Where it is off

OFF = {
    "none": {"ref_logps_memory_mb": 0},
    "moves": {"sync_ref_model": True, "ref_model_sync_steps": 1},
    "precomputed": {"precompute_ref_log_probs": True},
    "no reference": {"loss_type": "cpo"},
    "TRL's own": {"logprob_backend": "trl"},
}


@pytest.mark.parametrize("kind", OFF)
def test_off(kind, tiny_model_dir, tmp_path):
    trainer, forwards = make(tiny_model_dir, tmp_path, rows=4, **OFF[kind])
    trainer.train()
    assert not trainer._memory.on and not trainer._memory.store.rows
    assert len(forwards) == {"none": 2, "moves": 2}.get(kind, 0)
    if kind != "TRL's own":
        rows, _ = from_batch(first_batch(trainer))
        assert rows.keys is None


def test_log_probs_that_the_dataset_has(tiny_model_dir, tmp_path):
    data = Dataset.from_list(
        [{**row, "ref_chosen_logps": -20.0, "ref_rejected_logps": -21.0} for row in preference_rows(4)]
    )
    trainer, forwards = make(tiny_model_dir, tmp_path, dataset=data, precompute_ref_log_probs=True)
    trainer.train()
    assert forwards == [] and not trainer._memory.store.rows


@pytest.mark.parametrize("why", ["callback", "trained", "dropout"])
def test_a_reference_that_does_not_stand_still(why, tiny_model_dir, tmp_path):
    """A callback of TRL's that a script has added; base weights that are trained beside an adapter; dropout in the policy."""
    peft = None if why == "callback" else LORA
    trainer, forwards = make(
        tiny_model_dir, tmp_path, rows=4, trainer_kwargs={"peft_config": peft}, disable_dropout=False,
        ref_model_sync_steps=1, share_prefix=False,
    )  # fmt: skip
    if why == "callback":
        trainer.add_callback(SyncRefModelCallback(trainer.ref_model, trainer.accelerator))
    elif why == "trained":
        trainer.model.get_base_model().model.norm.weight.requires_grad_(True)
    else:
        trainer.model.get_base_model().model.layers[0].self_attn.attention_dropout = 0.1
    trainer.train()
    assert len(forwards) == 2 and not trainer._memory.store.rows


@pytest.mark.parametrize("given", [False, True])
def test_dropout_of_an_adapter(given, tiny_model_dir, tmp_path):
    """That of an adapter which is trained is none of the reference's, unless the reference is a copy of it as it was given."""
    peft = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM", lora_dropout=0.5)
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
    trainer = trl_ext.DPOTrainer(
        get_peft_model(model, peft) if given else model,
        args=trl_ext.DPOConfig(**options(tmp_path, **TWO_EPOCHS, disable_dropout=False)),
        peft_config=None if given else peft,
        processing_class=AutoTokenizer.from_pretrained(tiny_model_dir),
        train_dataset=Dataset.from_list(preference_rows(4)),
    )
    forwards = count_forwards(trainer)
    trainer.train()
    assert len(forwards) == 1 + given


# Room


def test_what_finds_no_room_is_computed(tiny_model_dir, tmp_path, caplog):
    """Room for the first micro-batch of eight completions, and for two of the next one."""
    room = 10.5 * (ROW_BYTES + 5) / 2**20
    trainer, forwards = make(tiny_model_dir, tmp_path, ref_logps_memory_mb=room, num_train_epochs=3)
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert len(forwards) == 3 + 2 + 2 and len(trainer._memory.store.rows) == 10
    assert caplog.text.count("Reference log-probabilities of 10 completions are kept") == 1
    without, _ = make(tiny_model_dir, tmp_path / "without", ref_logps_memory_mb=0, num_train_epochs=3)
    without.train()
    assert_same_parameters(parameters(trainer), parameters(without))


def test_a_store():
    """The buffer has at most a quarter more than what is in it, and grows without losing anything."""
    a, b, c, d = (bytes([number]) * 16 for number in range(4))
    store = Store(4 * ROW_BYTES + 5 * 10, torch.device("cpu"))
    assert store.recall([a]) is None
    store.take(store.since(0))  # of nothing
    store.keep([a, b, a], [1, 3, 1], torch.tensor([1.0, 2, 3, 4, 5]))
    store.keep([b, c], [3, 2], torch.tensor([6.0, 7, 8, 9, 10]))
    assert store.recall([c, a, b]).tolist() == [9, 10, 1, 2, 3, 4] and store.recall([a, d]) is None
    assert store.bytes == 3 * ROW_BYTES + 5 * 6 and len(store.values) <= 1.25 * 6 and not store.full
    other = Store(1e6, torch.device("cpu"))
    other.keep([d, c], [1, 2], torch.tensor([0.0, -1, -2]))
    other.take(store.since(1))
    assert other.recall([c, b, d]).tolist() == [-1, -2, 2, 3, 4, 0] and other.recall([a]) is None
    store.keep([d], [5], torch.zeros(5))
    assert store.full and store.recall([d]) is None
    with pytest.raises(ValueError, match="3 keys, 2 lengths and 6 values do not belong together"):
        other.take({**store.since(0), "lengths": torch.tensor([1, 5])})


# Keys


def pair(prompt, chosen, rejected):
    return {"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected}


def keys(*pairs, **kwargs):
    return RowsCollator(DataCollatorForPreference(pad_token_id=0), keys=True, **kwargs)(list(pairs))["table"]["keys"]


def test_keys_are_of_content():
    """Of tokens and of which are scored; neither width nor place in the batch, nor the partner unless its length matters."""
    first = keys(pair([1], [2, 3], [4]))
    assert all(len(key) == 16 for key in first) and len(set(first)) == 2
    wide = keys(pair([9] * 5, [9], [9]), pair([1], [2, 3], [4]))
    assert [wide[1], wide[3]] == first
    assert keys(pair([1], [2, 3], [5]))[0] == first[0] == keys(pair([1], [4], [2, 3]))[1]
    assert keys(pair([1, 2], [3], [4]))[0] != first[0]  # the same tokens, one of them the prompt's
    assert keys(pair([1], [2, 3, 0], [4]))[0] != first[0]  # a token that is the padding's too
    weighed = keys(pair([1], [2, 3], [4]), ld_alpha=0.5)
    assert weighed[0] != keys(pair([1], [2, 3], [4, 5]), ld_alpha=0.5)[0]
    assert weighed[0] == keys(pair([1], [2, 3], [5]), ld_alpha=0.5)[0]
    assert "keys" not in RowsCollator(DataCollatorForPreference(pad_token_id=0))([pair([1], [2], [3])])["table"]


def test_batches_without_keys():
    """Further inputs, of which the key knows nothing, and padding in front, which moves positions."""
    ids = torch.tensor([[1, 2, 3], [1, 2, 0]])
    attention, scored = (ids != 0).long(), torch.tensor([[0, 1, 1], [0, 1, 0]])
    inputs = {"input_ids": ids, "attention_mask": attention}
    assert len(content_keys(inputs, scored)) == 2
    assert content_keys({**inputs, "pixel_values": torch.zeros(2, 3)}, scored) is None
    assert content_keys({"input_ids": ids.flip(1), "attention_mask": attention.flip(1)}, scored.flip(1)) is None


def test_a_batch_without_keys_is_computed(tiny_model_dir, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)

    class Left(DataCollatorForPreference):
        def torch_call(self, examples):
            return {name: value.flip(1) for name, value in super().torch_call(examples).items()}

    trainer, forwards = make(
        tiny_model_dir, tmp_path, rows=4, share_prefix=False,
        trainer_kwargs={"data_collator": Left(pad_token_id=tokenizer.pad_token_id)},
    )  # fmt: skip
    trainer.train()
    assert len(forwards) == 2 and not trainer._memory.store.rows
