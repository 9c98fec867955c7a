"""Short trainings, the same global batch in one process and in two."""

import functools
import os
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from safetensors.torch import load_file

import trl_ext
from tests.conftest import preference_rows
from tests.helpers import build, history
from trl_ext.trainers.reference import FILE


WORLD = int(os.environ.get("WORLD_SIZE", "1"))
ZERO3 = os.environ.get("TEST_STRATEGY") == "zero"
ZERO = {
    "zero_optimization": {
        "stage": 3,
        "stage3_param_persistence_threshold": 0,  # tiny parameters are partitioned too
        "stage3_gather_16bit_weights_on_model_save": True,
    },
    "gradient_clipping": 0.0,
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "train_batch_size": "auto",
}
ROWS = 8  # a step takes them all


def lora(**options) -> LoraConfig:
    return LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", **options)


def trainer(model_dir: Path, folder: Path, *, rows=None, peft=None, steps: int = 1, **options) -> Any:
    torch.manual_seed(0)  # of an adapter's weights
    if ZERO3:
        options = {**options, "deepspeed": ZERO, "use_cpu": False, "ddp_backend": "gloo"}
    defaults = {"max_steps": 2, "optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 0.0}
    return build(
        trl_ext.DPOTrainer,
        trl_ext.DPOConfig,
        model_dir,
        folder,
        dataset=Dataset.from_list(rows or preference_rows(ROWS)),
        per_device_train_batch_size=ROWS // WORLD // steps,
        per_device_eval_batch_size=ROWS // WORLD,
        gradient_accumulation_steps=steps,
        trainer_kwargs={"peft_config": peft() if peft else None},
        **{**defaults, **options},
    )


def outcome(trained: Any) -> dict[str, Any]:
    weights = trained.accelerator.get_state_dict(trained.model_wrapped) or {}  # in the first process
    return {"weights": {name: value.cpu() for name, value in weights.items()}, "history": history(trained)}


def train(model_dir: Path, folder: Path, **options) -> dict[str, Any]:
    trained = trainer(model_dir, folder, **options)
    trained.train()
    return outcome(trained)


def moved_reference(model_dir: Path, folder: Path) -> dict[str, Any]:
    """A run that is resumed from its checkpoint, with a reference that has moved."""
    moving = {"sync_ref_model": True, "ref_model_sync_steps": 1, "ref_model_mixup_alpha": 0.5}
    options = {
        **moving,
        "max_steps": 4,
        "save_strategy": "steps",
        "save_steps": 2,
        "optim": "adamw_torch",
        "learning_rate": 1e-2,
    }
    whole = trainer(model_dir, folder / "run", **options)
    whole.train()
    resumed = trainer(model_dir, folder / "again", **options)
    resumed.train(resume_from_checkpoint=str(folder / "run" / "checkpoint-2"))
    whole.accelerator.wait_for_everyone()  # the first process writes
    files = [load_file(path / "checkpoint-4" / FILE) for path in (folder / "run", folder / "again")]
    first = load_file(model_dir / "model.safetensors")
    return {"whole": outcome(whole), "resumed": outcome(resumed), "files": files, "first": first}


CASES = {
    "ddp": {"ref": moved_reference},
    "fsdp": {
        "head": functools.partial(train, peft=functools.partial(lora, modules_to_save=["lm_head"])),
        "ref": moved_reference,
    },
    "zero": {
        "full": train,
        "head": functools.partial(train, peft=functools.partial(lora, modules_to_save=["lm_head"])),
        "ref": moved_reference,
    },
}
