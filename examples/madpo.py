"""
Margin-adaptive DPO end to end, in one command: train a reward model on the preferences, score them, train the policy.

    python examples/madpo.py --output_dir out
    python examples/madpo.py --model_name_or_path path/to/model --dataset_name pairs.jsonl --output_dir out --max_steps 100

Every field of `DPOConfig` is a flag. The reward model goes to `OUTPUT_DIR/reward_model`; a folder that is there is used again.
With the reward model you have: `DPOTrainer(..., reward_funcs=...)`.
"""

from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from trl import TrlParser

from trl_ext import DPOConfig, DPOTrainer
from trl_ext.data import calibrate, load_preferences, score_preferences
from trl_ext.trainers.reward import RewardConfig, RewardTrainer


@dataclass
class Script:
    model_name_or_path: str = field(default="Qwen/Qwen3-0.6B", metadata={"help": "Hub name or folder of the policy."})
    reward_base: str | None = field(
        default=None, metadata={"help": "What the reward model starts from; the policy's model by default."}
    )
    dataset_name: str = field(
        default="trl-lib/ultrafeedback_binarized",
        metadata={"help": "Hub name, folder or file (JSON Lines, CSV, Parquet) of the preference data."},
    )
    reward_max_steps: int = field(
        default=-1, metadata={"help": "Training steps of the reward model; one epoch by default."}
    )
    reward_learning_rate: float = field(default=1e-5, metadata={"help": "Learning rate of the reward model."})
    absolute_weight: float = field(default=0.0, metadata={"help": "Weight of Eurus' absolute terms."})
    held_out: float = field(default=0.1, metadata={"help": "Share of the pairs that calibration is measured on."})


if __name__ == "__main__":
    parser = TrlParser([Script, DPOConfig])
    parser.set_defaults(loss_type=["margin_adaptive"])
    script, args = parser.parse_args_and_config()

    split = load_preferences(script.dataset_name).train_test_split(test_size=script.held_out, seed=args.seed)
    columns = ["prompt", "chosen", "rejected"]
    folder = Path(args.output_dir) / "reward_model"
    if not (folder / "config.json").exists():
        reward_args = RewardConfig(
            output_dir=str(folder),
            max_steps=script.reward_max_steps,
            num_train_epochs=1,
            learning_rate=script.reward_learning_rate,
            absolute_weight=script.absolute_weight,
            per_device_train_batch_size=args.per_device_train_batch_size,
            max_length=args.max_length,
            bf16=args.bf16,
            use_cpu=args.use_cpu,
            seed=args.seed,
            report_to=args.report_to,
            save_strategy="no",
        )
        trainer = RewardTrainer(
            model=script.reward_base or script.model_name_or_path,
            args=reward_args,
            train_dataset=split["train"].select_columns(columns),
        )
        trainer.train()
        trainer.save_model()

    scored = {name: score_preferences(part, str(folder)) for name, part in split.items()}
    calibration = calibrate(scored["test"])
    Console().print(calibration.table())
    if calibration.temperature is not None:
        # Held-out pairs say in which unit the scores are Bradley-Terry logits
        scored["train"] = score_preferences(split["train"], str(folder), temperature=calibration.temperature)

    trainer = DPOTrainer(model=script.model_name_or_path, args=args, train_dataset=scored["train"])
    trainer.train()
    trainer.save_model()
