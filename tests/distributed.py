"""Trains a step in several processes on gloo; run as a module, or through `run`."""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch


def run(processes: int, model_dir: Path, output_dir: Path, **options) -> dict[str, torch.Tensor]:
    """Parameters after two steps of SGD on the same eight pairs."""
    output_dir.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command += ["-m", "tests.distributed", str(model_dir), str(output_dir)]
    result = subprocess.run(
        [*command, json.dumps(options)], capture_output=True, text=True, cwd=Path(__file__).parents[1], check=False
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return torch.load(output_dir / "parameters.pt")


def main(model_dir: str, output_dir: str, options: str) -> None:
    from datasets import Dataset
    from peft import LoraConfig

    import trl_ext
    from tests.conftest import preference_rows
    from tests.helpers import build

    options = json.loads(options)
    peft = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM") if options.pop("lora", False) else None
    if options.pop("online", False):
        from tests.online.runs import Scripted, online

        trainer = online(
            model_dir,
            output_dir,
            cls=Scripted,
            per_device_train_batch_size=options.pop("batch_size"),
            max_steps=2,
            optim="sgd",
            learning_rate=0.1,
            max_grad_norm=0.0,
            **options,
        )
        return train(trainer, output_dir)
    # A step takes all eight pairs, in whatever order they are dealt out
    trainer = build(
        trl_ext.DPOTrainer,
        trl_ext.DPOConfig,
        model_dir,
        output_dir,
        dataset=Dataset.from_list(preference_rows(8)),
        per_device_train_batch_size=options.pop("batch_size"),
        max_steps=2,
        optim="sgd",
        learning_rate=0.1,
        max_grad_norm=0.0,
        trainer_kwargs={"peft_config": peft},
        **options,
    )
    train(trainer, output_dir)


def train(trainer, output_dir: str) -> None:
    from tests.helpers import parameters

    assert trainer.args.world_size == int(os.environ["WORLD_SIZE"])
    trainer.train()
    if trainer.is_world_process_zero():
        torch.save(parameters(trainer), f"{output_dir}/parameters.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])
