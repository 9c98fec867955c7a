"""Short trainings of the same global batches in one process and in two."""

import os
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.utils import gather_object
from datasets import Dataset
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

import trl_ext
from tests import stateful
from tests.conftest import preference_rows
from tests.helpers import OUR_LOSSES, WITH_STATE, build, history, masked_rows
from tests.helpers import options as short
from tests.online.runs import Scripted, online, prompts
from tests.test_reference_memory import count_forwards
from trl_ext.data import PreferenceModel
from trl_ext.generation import sample_rows
from trl_ext.metrics import MetricsCallback
from trl_ext.metrics.held_out import _to_sample_from
from trl_ext.trainers.mixing import estimate_alpha
from trl_ext.trainers.reference import FILE, _gathered
from trl_ext.trainers.reward import RewardConfig, RewardTrainer


STRATEGY = os.environ.get("TEST_STRATEGY", "")
WORLD = int(os.environ.get("WORLD_SIZE", "1"))
RANK = int(os.environ.get("RANK", "0"))
ROWS = 8  # a step takes them all
SGD = {"max_steps": 2, "optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 0.0}
MOVES = {"sync_ref_model": True, "ref_model_sync_steps": 1, "ref_model_mixup_alpha": 0.5}
STAGES = {
    "zero2": {"stage": 2},
    "zero3": {
        "stage": 3,
        "stage3_param_persistence_threshold": 0,  # tiny parameters are partitioned too
        "stage3_gather_16bit_weights_on_model_save": True,
    },
}
ZERO = {
    "zero_optimization": STAGES.get(STRATEGY),
    "gradient_clipping": 0.0,
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "train_batch_size": "auto",
}
PLACED = {"deepspeed": ZERO, "use_cpu": False, "ddp_backend": "gloo"} if STRATEGY in STAGES else {}
WHOLE = STRATEGY not in ("fsdp", "zero3")  # each process has all parameters


def lora(**options) -> LoraConfig:
    return LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", **options)


def trainer(
    model_dir: Path, folder: Path, *, rows=None, peft=None, steps: int = 1, stream=False, given=None, **options
) -> Any:
    torch.manual_seed(0)  # of an adapter's weights
    dataset = Dataset.from_list(rows or preference_rows(ROWS))
    return build(
        trl_ext.DPOTrainer,
        trl_ext.DPOConfig,
        model_dir,
        folder,
        dataset=dataset.to_iterable_dataset() if stream else dataset,
        per_device_train_batch_size=ROWS // WORLD // steps,
        per_device_eval_batch_size=ROWS // WORLD,
        gradient_accumulation_steps=steps,
        trainer_kwargs={"peft_config": peft, **(given or {})},
        **{**SGD, **PLACED, **options},
    )


def outcome(trained: Any) -> dict[str, Any]:
    """Weights, which the first process has, and what was logged."""
    weights = trained.accelerator.get_state_dict(trained.model_wrapped) or {}
    return {"weights": {name: value.cpu().clone() for name, value in weights.items()}, "history": history(trained)}


def train(model_dir: Path, folder: Path, evaluate: bool = False, **options) -> dict[str, Any]:
    trained = trainer(model_dir, folder, **options)
    trained.train()
    if evaluate:
        trained.evaluate()
    return outcome(trained)


def masked(model_dir: Path, folder: Path, **options) -> dict[str, Any]:
    """Shared rows under a dense mask, as where attention takes no sequences."""
    with masked_rows():
        trained = trainer(model_dir, folder, loss_type="offset", share_prefix=True, **options)
        trained.train()
        trained.evaluate()
    assert not trained._scorer.sharing.unpadded
    return outcome(trained)


def lacking() -> list[dict]:
    """Three rows have no empty-trace pair and one has no traced pair, so that processes have different numbers of pairs."""
    rows = [{**row, "weight": 0.5 + 0.1 * index} for index, row in enumerate(preference_rows(ROWS))]
    for row in rows[:3]:
        row |= {"chosen_empty_trace": None, "rejected_empty_trace": None}
    rows[3] |= {"chosen": None, "rejected": None}
    return rows


def every_loss(model_dir: Path, folder: Path, **options) -> dict[str, Any]:
    losses = ["sigmoid", *(name for name in OUR_LOSSES if name not in WITH_STATE)]
    return train(model_dir, folder, evaluate=True, rows=lacking(), loss_type=losses, learning_rate=1e-3, **options)


def lists(model_dir: Path, folder: Path, **options) -> dict[str, Any]:
    """Scores of three reward models, of which another is nearest from pair to pair."""
    rows = preference_rows(ROWS)
    for index, row in enumerate(rows):
        row |= {
            "score_chosen": [row["score_chosen"], 0.2 * index, 1.0],
            "score_rejected": [row["score_rejected"], 0.7, 0.5],
        }
    kwargs = {"loss_type": "reward_distillation", "loss_kwargs": {"combine": "min"}}
    return train(model_dir, folder, evaluate=True, rows=rows, **kwargs, **options)


def remembering(model_dir: Path, folder: Path, **options) -> dict[str, Any]:
    """The state is the same in both processes, and that of one process which has all the rows."""
    with stateful.registered():
        losses = ["sigmoid", "centred", "centred_before"]
        trained = trainer(model_dir, folder, loss_type=losses, beta=0.5, **{**SGD, "max_steps": 3, **options})
        trained.train()
    state = {name: {key: value.tolist() for key, value in kept.items()} for name, kept in trained._terms.state.items()}
    moves = 3 * options.get("steps", 1)
    assert [kept["batches"] for kept in state.values()] == [moves] * 2 and state["centred"]["mean"] != 0
    return {**outcome(trained), "every process": state}


def statistics(model_dir: Path, folder: Path, **options) -> dict[str, Any]:
    """
    Our losses that remember, with a policy away from its reference: gaps that are rounding alone would differ. `beta_dpo` draws in
    each process from its own pairs, so its statistics are compared, at a beta that stays.
    """
    rows = [{**row, "annotator_id": index % 3} for index, row in enumerate(preference_rows(ROWS))]
    kwargs = {"beta_dpo": {"a": 0.0, "rho": 0.0}, "robust_em": {"annotators": 3}}
    trained = trainer(
        model_dir,
        folder,
        rows=rows,
        loss_type=list(WITH_STATE),
        loss_kwargs=kwargs,
        **{**SGD, "learning_rate": 0.01, **options},
    )
    with torch.no_grad(), _gathered(*trained.model.parameters(), written=True):
        for parameter in trained.model.parameters():
            parameter.mul_(1.05)
    trained.train()
    state = {name: {key: value.tolist() for key, value in kept.items()} for name, kept in trained._terms.state.items()}
    assert sum(state["robust_em"]["pairs"]) == 2 * ROWS and state["beta_dpo"]["std"] > state["alpha_dpo"]["std"] > 0
    return {**outcome(trained), "every process": state}


def selfish(model_dir: Path, folder: Path) -> dict[str, Any]:
    """
    A loss whose `update` leaves `reduce` out: refused in both processes after its first update, or after the second where the
    first, of a policy that is its reference, leaves the same in all.
    """
    for field, steps in (("chosen_logps", 0), ("delta", 1)):
        with stateful.registered():
            loss = {"loss_type": "selfish", "loss_kwargs": {"field": field}}
            trained = trainer(model_dir, folder, **loss, **{**SGD, "max_steps": 3})
            expected = pytest.raises(ValueError, match="'selfish' differs between processes")
            with expected if WORLD > 1 else nullcontext():
                trained.train()
        assert trained.state.global_step == (steps if WORLD > 1 else 3)
    return {}


class Says(TrainerCallback):
    """Logs before each step, in the first process alone. (After a step it would take the log that is due from this process.)"""

    def on_step_begin(self, *args, **kwargs):
        if RANK == 0:
            self.trainer.log({"said": 1.0})


def one_process_logs(model_dir: Path, folder: Path) -> dict[str, Any]:
    """What a script logs in one process waits for no other, and takes nothing from the means over both."""
    trained = trainer(model_dir, folder, rows=lacking(), loss_type="bias_variance", logging_steps=2, max_steps=3)
    says = Says()
    says.trainer = trained
    trained.add_callback(says)
    trained.train()
    result = outcome(trained)
    # The final log holds the third step; its loss is that of the process alone, as transformers has it
    assert "empty_trace/share" in result["history"][-1] and result["history"][-1].pop("train_loss")
    return result


def groups(model_dir: Path, folder: Path, **options) -> dict[str, Any]:
    """Groups of two and of three completions."""
    rows = [
        {
            "prompt": row["prompt"],
            "completions": [row["chosen"], row["rejected"], row["chosen_empty_trace"]][: 2 + index % 2],
            "scores": [row["score_chosen"], row["score_rejected"], 0.4][: 2 + index % 2],
            "behaviour_logps": [-30.0, -20.0 - index, -10.0][: 2 + index % 2],
        }
        for index, row in enumerate(preference_rows(ROWS))
    ]
    return train(model_dir, folder, evaluate=True, rows=rows, **{"loss_type": "anchored", **options})


def teachers(model_dir: Path) -> dict[str, Any]:
    """One by its name, and one that is there."""
    reverse = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    # Where a run before was under ZeRO-3, so may this model be
    with torch.no_grad(), _gathered(*reverse.parameters(), written=True):
        for parameter in reverse.parameters():
            parameter.mul_(0.9)
    return {"teacher_model": str(model_dir), "reverse_model": reverse}


def taught(model_dir: Path, folder: Path, **options) -> dict[str, Any]:
    """The policy begins away from its teacher; some rows lack what is learnt from."""
    trained = trainer(
        model_dir,
        folder,
        rows=lacking(),
        given=teachers(model_dir),
        loss_type=["aligndistil", "bias_variance"],
        **options,
    )
    trained.train()
    trained.evaluate()
    return outcome(trained)


def moved_reference(model_dir: Path, folder: Path) -> dict[str, Any]:
    """A run with a reference that moves, and the second half of it resumed from its checkpoint."""
    options = {
        **MOVES, "max_steps": 4,
        "save_strategy": "steps", "save_steps": 2, "optim": "adamw_torch", "learning_rate": 1e-2,
    }  # fmt: skip
    whole = trainer(model_dir, folder / "run", **options)
    whole.train()
    resumed = trainer(model_dir, folder / "resumed", **options)
    resumed.train(resume_from_checkpoint=str(folder / "run" / "checkpoint-2"))
    resumed.accelerator.wait_for_everyone()  # the first process writes
    references = [load_file(folder / run / "checkpoint-4" / FILE) for run in ("run", "resumed")]
    first = load_file(model_dir / "model.safetensors")
    assert all((references[0][name] - value).abs().max() > 1e-3 for name, value in first.items()), "it has not moved"
    for name, value in references[0].items():
        torch.testing.assert_close(references[1][name], value, rtol=1e-4, atol=1e-5)
    return {"whole": outcome(whole), "resumed": outcome(resumed), "reference": references[0]}


def known_reference(model_dir: Path, folder: Path, **options) -> dict[str, Any]:
    """
    Rows come to the other process in later epochs, and are known there; in a resumed run too. All weights of the reference are read
    once per training and evaluation, however often they are gathered for a forward, and again when they are written to.
    """
    options = {
        "rows": preference_rows(2 * ROWS), "max_steps": -1, "num_train_epochs": 3, "save_strategy": "steps", "save_steps": 3,
        "optim": "adamw_torch", "learning_rate": 1e-3, **options,
    }  # fmt: skip
    whole = trainer(model_dir, folder / "run", **options)
    memory, forwards, readings = whole._memory, count_forwards(whole), []
    fingerprint = memory._fingerprint
    memory._fingerprint = lambda *given: readings.append(whole.state.global_step) or fingerprint(*given)
    whole.train()
    assert len(forwards) == 2, "the reference has run again"
    assert readings == [0]
    resumed = trainer(model_dir, folder / "resumed", **options)
    again = count_forwards(resumed)
    resumed.train(resume_from_checkpoint=str(folder / "run" / "checkpoint-3"))
    assert again == [] and len(resumed._memory.store.rows) == 4 * ROWS
    first, second = outcome(whole), outcome(resumed)
    for name, value in first["weights"].items():
        torch.testing.assert_close(second["weights"][name], value, rtol=1e-4, atol=1e-5)
    if not WHOLE and RANK == 1:
        memory._forget(memory._reference)  # what one process has to ask, all have to
    whole.evaluate()
    known = WHOLE or WORLD == 1
    assert len(forwards) == (2 if known else 4)
    whole.evaluate()
    assert len(forwards) == (2 if known else 4) and len(readings) == 3
    reference = memory._model
    head = whole.accelerator.unwrap_model(reference).get_output_embeddings().weight
    with torch.no_grad(), _gathered(head, written=True):
        head.mul_(0.9)
    for _ in range(2):
        assert memory._stands_still(reference) and len(readings) == 4 and not memory.store.rows
    return first


def measured_alpha(model_dir: Path, folder: Path) -> dict[str, Any]:
    """The second process is given its rows in another order, as a stream may do."""
    ours = trainer(model_dir, folder, loss_type="bias_variance", loss_kwargs={"alpha": "auto"})
    if RANK:
        ours.train_dataset = ours.train_dataset.select(range(ROWS - 1, -1, -1))
    estimate = estimate_alpha(ours, rows=5)
    assert 0 < estimate.alpha < 1
    return {"every process": vars(estimate)}


def refused_alpha(model_dir: Path, folder: Path) -> dict[str, Any]:
    expected = pytest.raises(ValueError, match="measures gradients of single rows before training")
    with expected if WORLD > 1 else nullcontext():
        trainer(model_dir, folder, loss_type="bias_variance", loss_kwargs={"alpha": "auto"})
    return {}


def scripted(model_dir: Path, folder: Path, peft=None, trainer_kwargs=None, resume=None, **options) -> dict[str, Any]:
    """Online, with completions that follow from the prompt."""
    torch.manual_seed(0)
    trained = online(
        model_dir,
        folder,
        cls=Scripted,
        # By its name: under ZeRO-3 a model cannot be copied
        trainer_kwargs={"peft_config": peft, "model": str(model_dir), **(trainer_kwargs or {})},
        **{"per_device_train_batch_size": ROWS // WORLD, **SGD, **PLACED, **options},
    )
    trained.train(resume_from_checkpoint=resume)
    return outcome(trained)


def blocks_online(model_dir: Path, folder: Path, current: list[bool], **options) -> dict[str, Any]:
    """
    Micro-batches of an optimizer step, or of two, are generated for at once and learnt from twice; a run is resumed within a block.
    `current` says at which steps the policy is the one that has sampled.
    """
    given = {"num_generations": 4, "gradient_accumulation_steps": 2, "num_iterations": 2, **options}
    given |= {
        "per_device_train_batch_size": ROWS // WORLD // 2,
        "save_strategy": "steps",
        "save_steps": 1,
        "max_steps": 4,
    }
    whole = scripted(model_dir, folder / "whole", **given)
    kl = [entry["objective/behaviour_kl"] for entry in whole["history"] if "objective/behaviour_kl" in entry]
    assert [abs(value) < 1e-5 for value in kl] == current
    if STRATEGY == "fsdp":  # torch does not load the state of an optimizer that has none
        return whole
    checkpoint = folder / "whole" / "checkpoint-1"
    resumed = scripted(model_dir, folder / "resumed", resume=str(checkpoint), **given)
    for name, value in whole["weights"].items():
        torch.testing.assert_close(resumed["weights"][name], value)
    part = checkpoint / f"block_{RANK}.json"
    assert part.exists()
    if RANK:  # without one process's part all refuse
        part.unlink()
    expected = pytest.raises(ValueError, match=r"is damaged: block_1\.json was cut off, changed or removed")
    with expected if WORLD > 1 else nullcontext():
        scripted(model_dir, folder / "missing", resume=str(checkpoint), **given)
    return whole


def taught_online(model_dir: Path, folder: Path) -> dict[str, Any]:
    given = {"reward_funcs": None, **teachers(model_dir)}
    return scripted(model_dir, folder, trainer_kwargs=given, loss_type="aligndistil", pairing="group")


def remembering_online(model_dir: Path, folder: Path) -> dict[str, Any]:
    """Of two prompts in eight anything is learnt, so a process may have no pair where the other has some."""

    def few(prompts, completions, **kwargs) -> list[float]:
        learnt = sorted(set(EVERY["prompt"]))[:2]
        return [float(len(text)) * (prompt in learnt) for prompt, text in zip(prompts, completions, strict=True)]

    with stateful.registered():
        trained = online(
            model_dir, folder, cls=Scripted, per_device_train_batch_size=ROWS // WORLD, loss_type=["centred", "sigmoid"],
            trainer_kwargs={"reward_funcs": few, "train_dataset": EVERY, "model": str(model_dir)}, **{**SGD, **PLACED, "max_steps": 3},
        )  # fmt: skip
        counts = []
        pair = trained.pair
        trained.pair = lambda *args: counts.append(len((found := pair(*args)).pairs)) or found
        trained.train()
    fewest = min(min(each) for each in gather_object([counts]))
    assert WORLD == 1 or fewest == 0, "no process was without a pair"
    state = {name: value.tolist() for name, value in trained._terms.state["centred"].items()}
    assert state["batches"] == 3 and state["mean"] != 0
    return {**outcome(trained), "every process": state}


class Longest(trl_ext.OnlineDPOTrainer):
    """Remembers how many tokens the longest completions had that this process sampled."""

    longest: tuple[int, ...] = ()

    def generate(self, *args, **kwargs):
        completions = super().generate(*args, **kwargs)
        self.longest += (max(map(len, completions.ids)),)
        return completions


def by_text(completions, **kwargs) -> list[float]:
    return [float(sum(map(ord, text)) % 89) for text in completions]


def sampling(model_dir: Path, folder: Path, every: int = 3, **options) -> Longest:
    """A trainer that samples a mixture of two models; every so many tokens there is one that ends a completion."""
    models = [AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32) for _ in range(2)]
    models[0].generation_config.eos_token_id = list(range(1, 512, every))
    # Another reference, whose words are others
    with torch.no_grad(), _gathered(models[1].lm_head.weight, written=True):
        models[1].lm_head.weight.mul_(-1.0)
    return Longest(
        model=models[0],
        ref_model=models[1],
        reward_funcs=by_text,
        args=trl_ext.OnlineDPOConfig(
            **short(
                folder,
                per_device_train_batch_size=ROWS // WORLD,
                mixture_coef=0.7,
                mixture_samples="half",
                max_new_tokens=24,
                max_length=64,
                **{**SGD, **PLACED, **options},
            )
        ),
        processing_class=AutoTokenizer.from_pretrained(model_dir),
        train_dataset=prompts(ROWS),
    )


def generated(model_dir: Path, folder: Path, **options) -> dict[str, Any]:
    """Online, with completions of the model that end after different numbers of tokens in the two processes."""
    trained = sampling(model_dir, folder, **options)
    trained.train()
    assert trained.state.log_history[0]["rewards/margins"] != 0, "nothing was learnt"
    assert len(set(gather_object([trained.longest]))) == WORLD, "the processes have stopped together"
    return outcome(trained)


def in_parts(model_dir: Path, folder: Path, **options) -> dict[str, Any]:
    """Of seven prompts, one process has five and the other two: they need five parts and two."""
    trained = sampling(model_dir, folder, **{"every": 12, "learning_rate": 0.0, "max_steps": 1, **options})
    trained.train()
    trained.model.eval()
    trained.args.ds3_gather_for_generation = False
    every = [(place, torch.arange(10 + 7 * place, 11 + 7 * place + place % 4)) for place in range(7)]
    mine = (every[:5], every[5:])[RANK] if WORLD > 1 else every
    found = []
    for mixture in (None, trained._mixture(2)):
        with torch.no_grad(), _to_sample_from(trained, False) as policy:
            device = trained.accelerator.device
            rows = sample_rows(policy, [row for _, row in mine], trained._sampling, 2, device, 3, mixture)
        answers = [
            (place, [each.tolist() for each in rows[number :: len(mine)]]) for number, (place, _) in enumerate(mine)
        ]
        found.append(dict(gather_object(answers)))
    lengths = [len(row) for answers in found for rows in answers.values() for row in rows]
    assert found[0] != found[1] and min(lengths) < 4 and max(lengths) > 12
    return {"every process": found}


def held_out(model_dir: Path, folder: Path, **options) -> dict[str, Any]:
    """
    Metrics of prompts and pairs that the processes cannot share evenly. Policy and reference leave no choice of the next token, so
    that samples are the same in however many processes; completions end after different numbers of tokens.
    """
    trained = trainer(model_dir, folder, **{**SGD, "learning_rate": 0.0, "gradient_checkpointing": True, **options})
    for model, factor in ((trained.model, 1e4), (trained.accelerator.unwrap_model(trained.ref_model), -1e4)):
        with torch.no_grad(), _gathered(model.lm_head.weight, written=True):
            model.lm_head.weight.mul_(factor)
        model.generation_config.eos_token_id = list(range(1, 512, 3))
    names = [
        "kl_to_reference",
        "mean_reward",
        "mean_length",
        "ended_share",
        "win_rate",
        "preference_accuracy",
        "length_bias",
    ]
    callback = MetricsCallback(
        trained,
        names,
        prompts(7),
        Dataset.from_list(preference_rows(5)),
        reward_funcs=by_text,
        batch_size=2,
        max_new_tokens=24,
        eval_steps=1,
        eval_on_start=True,
    )
    trained.add_callback(callback)
    trained.train()
    logged = [entry for entry in history(trained) if "eval_samples/win_rate" in entry]
    assert [entry["step"] for entry in logged] == [0, 1, 2] and logged[0]["eval_samples/kl_to_reference"] > 100
    assert logged[0]["eval_samples/mean_length_low"] < logged[0]["eval_samples/mean_length"] < 24
    return {"every process": logged}


def preferring(model_dir: Path, folder: Path) -> dict[str, Any]:
    """A general preference model is trained, and judges online: each process has a copy, and compares its own completions."""
    pairs = Dataset.from_list([{k: row[k] for k in ("prompt", "chosen", "rejected")} for row in preference_rows(ROWS)])
    args = RewardConfig(
        **short(
            folder,
            preference_dim=4,
            per_device_train_batch_size=ROWS // WORLD,
            **{**SGD, **PLACED, "learning_rate": 1e-3},
        )
    )
    judge = RewardTrainer(str(model_dir), args, train_dataset=pairs)
    judge.train()
    online = scripted(
        model_dir, folder, num_generations=3, loss_type="anchored",
        trainer_kwargs={"reward_funcs": None, "judge": PreferenceModel(judge.model, judge.processing_class)},
    )  # fmt: skip
    return {"judge": outcome(judge), "online": online}


def fine_tuned(model_dir: Path, folder: Path, steps: int = 1, **options) -> dict[str, Any]:
    """Weighted rows, of which the two processes have different sums of weights and numbers of tokens."""
    rows = [
        {"prompt": row["prompt"], "completion": row["chosen"], "condition": "AB"[index % 2], "weight": 0.01 * index**2}
        for index, row in enumerate(preference_rows(ROWS))
    ]
    trained = build(
        trl_ext.SFTTrainer, trl_ext.SFTConfig, model_dir, folder, dataset=Dataset.from_list(rows),
        per_device_train_batch_size=ROWS // WORLD // steps, gradient_accumulation_steps=steps, **{**SGD, **PLACED, **options},
    )  # fmt: skip
    trained.train()
    return outcome(trained)


EVERY = prompts(ROWS)
