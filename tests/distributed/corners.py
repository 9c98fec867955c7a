"""Further trainings: processes without anything to learn, data that does not divide, checkpoints that others load, rounds."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from accelerate.utils import merge_fsdp_weights
from datasets import Dataset, load_from_disk
from safetensors.torch import load_file

from tests import stateful
from tests.conftest import preference_rows
from tests.distributed.cases import EVERY, PLACED, ROWS, SGD, STRATEGY, WORLD, outcome, short, trainer
from tests.online.runs import Scripted, online
from tests.test_rounds import TRAINING
from trl_ext.rounds import IterativeDPO, RoundsConfig
from trl_ext.trainers.reward import RewardConfig, RewardTrainer


ORDER = {"train_sampling_strategy": "sequential"}  # so that the first processes have the first rows
HALF = ROWS // 2
OF_TRL = [
    prefix + name
    for prefix in ("", "eval_")
    for name in ("entropy", "logits/chosen", "logits/rejected", "mean_token_accuracy", "num_tokens")
]


def idle(model_dir: Path, folder: Path, **options) -> dict[str, Any]:
    """Half of the processes have rows of weight 0 alone, and learn nothing."""
    rows = [{**row, "weight": 0.0 if index < HALF else 1.5} for index, row in enumerate(preference_rows(ROWS))]
    trained = trainer(model_dir, folder, rows=rows, **{"learning_rate": 1e-3, **ORDER, **options})
    trained.train()
    trained.evaluate()
    return outcome(trained)


def one_sided(model_dir: Path, folder: Path, **options) -> dict[str, Any]:
    """Half of the processes have no empty-trace pair, the others no pair with traces."""
    rows = preference_rows(ROWS)
    for index, row in enumerate(rows):
        side = ("chosen_empty_trace", "rejected_empty_trace") if index < HALF else ("chosen", "rejected")
        row |= dict.fromkeys(side)
    trained = trainer(model_dir, folder, rows=rows, loss_type="bias_variance", **{**ORDER, **options})
    trained.train()
    trained.evaluate()
    return outcome(trained)


def tied(model_dir: Path, folder: Path, **options) -> dict[str, Any]:
    """All completions of half of the processes are worth the same, so those have no pair. One loss has a state."""
    first = set(EVERY["prompt"][:HALF])

    def rewards(prompts, completions, **kwargs) -> list[float]:
        return [float(len(text)) * (prompt not in first) for prompt, text in zip(prompts, completions, strict=True)]

    with stateful.registered():
        trained = online(
            model_dir, folder, cls=Scripted, per_device_train_batch_size=ROWS // WORLD,
            trainer_kwargs={"reward_funcs": rewards, "train_dataset": EVERY, "model": str(model_dir)},
            **{**SGD, **PLACED, **ORDER, "loss_type": ["centred", "sigmoid"], **options},
        )  # fmt: skip
        trained.train()
    assert trained._terms.state["centred"]["batches"] == 2
    return outcome(trained)


def repeated(rows: list[dict]) -> list[dict]:
    """In one process the rows that accelerate repeats where several processes cannot share the last batch evenly."""
    return rows if WORLD > 1 else rows + rows[: -len(rows) % ROWS]


def uneven(
    model_dir: Path, folder: Path, rows: int, evaluated: int = 5, drop: bool = False, **options
) -> dict[str, Any]:
    """
    Of the last batch some processes have no row of their own, and are given the first ones again, which count in losses and in
    our metrics. In what TRL makes of the outputs they do not, and `eval_loss`, which transformers takes, is a mean over processes.
    """
    held_out = repeated(preference_rows(evaluated, seed=5))
    given = {"eval_dataset": Dataset.from_list(held_out)}
    rows = preference_rows(rows)
    trained = trainer(
        model_dir, folder, rows=rows if drop else repeated(rows), given=given, dataloader_drop_last=drop,
        **{"max_steps": -1, "num_train_epochs": 2, "learning_rate": 1e-3, **ORDER, **options},
    )  # fmt: skip
    trained.train()
    if not drop:
        trained.evaluate()
    result = outcome(trained)
    assert trained.state.global_step == (2 if drop else 4)
    for entry in result["history"]:
        for name in () if drop else ("eval_loss", *OF_TRL):
            entry.pop(name, None)
    return result


def measured(model_dir: Path, folder: Path) -> dict[str, Any]:
    """A run whose `alpha` is measured before its first step."""
    trained = trainer(model_dir, folder, loss_type="bias_variance", loss_kwargs={"alpha": "auto"})
    trained.train()
    assert 0 < trained.state.log_history[0]["mixing/alpha"] < 1
    return outcome(trained)


def checkpoints(model_dir: Path, folder: Path, sharded: bool = False, **options) -> dict[str, Any]:
    """
    A run, its second half resumed from its checkpoint, and the last checkpoint as plain transformers loads it. `sharded`: each
    process writes its part, and the tools of accelerate and DeepSpeed put the parts together.
    """
    options = {
        "max_steps": 4, "save_strategy": "steps", "save_steps": 2, "optim": "adamw_torch", "learning_rate": 1e-4, **options,
        "loss_type": "offset",
    }  # fmt: skip
    runs = []
    for name, resume in (("whole", None), ("resumed", folder / "whole" / "checkpoint-2")):
        trained = trainer(model_dir, folder / name, **options)
        if sharded and STRATEGY == "fsdp":
            plugin = trained.accelerator.state.fsdp_plugin
            plugin.state_dict_config = plugin.optim_state_dict_config = None  # of whole ones
            plugin.set_state_dict_type("SHARDED_STATE_DICT")
        trained.train(resume_from_checkpoint=resume and str(resume))
        trained.accelerator.wait_for_everyone()  # the first process writes
        runs.append(outcome(trained))
    last = folder / "whole" / "checkpoint-4"
    loads = merged(last, model_dir, folder / "merged") if sharded and STRATEGY in ("fsdp", "zero2", "zero3") else last
    return {"whole": runs[0], "resumed": runs[1], "loads": loads}


def merged(checkpoint: Path, model_dir: Path, folder: Path) -> Path:
    """A folder with what the processes have written, put together by the tools of those who have written it."""
    if STRATEGY == "fsdp":
        assert not (checkpoint / "model.safetensors").exists()
        merge_fsdp_weights(str(checkpoint / "pytorch_model_fsdp_0"), str(folder))
    else:
        from deepspeed.utils.zero_to_fp32 import convert_zero_checkpoint_to_fp32_state_dict

        convert_zero_checkpoint_to_fp32_state_dict(str(checkpoint), str(folder), safe_serialization=True)
    shutil.copy(model_dir / "config.json", folder / "config.json")
    return folder


def rounds(model_dir: Path, folder: Path, **training) -> dict[str, Any]:
    """Two rounds, whose first samples, scores and pairs are those of one process, and whose weights are too."""
    prompts = folder.parent / f"{folder.name}.json"
    if not prompts.exists():
        prompts.write_text(json.dumps([{"prompt": row["prompt"]} for row in preference_rows(3 * HALF)]))
    run = IterativeDPO(
        RoundsConfig(
            model=str(model_dir), prompts=str(prompts), reward_funcs="tests.test_rounds:length", rounds=2,
            num_generations=3, output_dir=str(folder), sampling={"max_new_tokens": 5, "batch_size": 1, "temperature": 0.7},
            training={**TRAINING, **SGD, **PLACED, "per_device_train_batch_size": ROWS // WORLD, "max_steps": 1,
                      "learning_rate": 1e-4, "loss_type": "inpo", "loss_kwargs": {"eta": 0.5, "tau": 0.25}, **training},
        )
    )  # fmt: skip
    run.run()
    run.state.wait_for_everyone()
    pairs = load_from_disk(folder / "round-1" / "pairs")
    weights = load_file(folder / "round-1" / "model" / "model.safetensors")
    return {"pairs": [dict(row) for row in pairs], "weights": weights, "loads": folder / "round-2" / "model"}


def judge(model_dir: Path, folder: Path, **options) -> dict[str, Any]:
    """A reward model, with Eurus' absolute terms, or a general preference model."""
    pairs = Dataset.from_list([{k: row[k] for k in ("prompt", "chosen", "rejected")} for row in preference_rows(ROWS)])
    args = RewardConfig(
        **short(
            folder, per_device_train_batch_size=ROWS // WORLD, **{**SGD, **PLACED, "learning_rate": 1e-3, **options}
        )
    )
    trained = RewardTrainer(str(model_dir), args, train_dataset=pairs)
    trained.train()
    return outcome(trained)


def refused_dispatch(model_dir: Path, folder: Path) -> dict[str, Any]:
    """One process that cuts batches for the others."""
    with pytest.raises(ValueError, match="`dispatch_batches=True` has one process cut batches for the others"):
        trainer(model_dir, folder, loss_type="offset", stream=True, accelerator_config={"dispatch_batches": True})
    return {}


def refused_online(model_dir: Path, folder: Path) -> dict[str, Any]:
    with pytest.raises(ValueError, match="is measured on a dataset of pairs: offline training alone has one"):
        online(model_dir, folder, **PLACED, loss_type="bias_variance", loss_kwargs={"alpha": "auto"})
    return {}
