"""
AlignDistil end to end, in one command: train a DPO model and one on swapped pairs, then distil the two into the policy.

    python examples/aligndistil.py --output_dir out
    python examples/aligndistil.py --model_name_or_path path/to/model --dataset_name pairs.jsonl --output_dir out --max_steps 100

Every field of `DPOConfig` is a flag. The two models go to `OUTPUT_DIR/teacher` and `OUTPUT_DIR/reverse`; to use ones that are trained
already, name them: `--teacher_model_name_or_path out/teacher`, `--reverse_model_name_or_path out/reverse`. On what the policy itself samples, with no
rewards, `OnlineDPOTrainer(..., teacher_model=..., reverse_model=...)` learns with `loss_type="aligndistil"`,
`loss_kwargs={"beta2": 15.0}` and `pairing="group"`.
"""

from dataclasses import dataclass, field
from pathlib import Path

from trl import TrlParser

from trl_ext import DPOConfig, DPOTrainer
from trl_ext.data import load_preferences


@dataclass
class Script:
    model_name_or_path: str = field(
        default="Qwen/Qwen3-0.6B", metadata={"help": "Hub name or folder of the model that all three begin as."}
    )
    dataset_name: str = field(
        default="trl-lib/ultrafeedback_binarized",
        metadata={"help": "Hub name, folder or file (JSON Lines, CSV, Parquet) of the preference data."},
    )
    teacher_max_steps: int = field(
        default=-1, metadata={"help": "Training steps of each of the two models; one epoch by default."}
    )
    teacher_learning_rate: float = field(default=1e-6, metadata={"help": "Learning rate of the two models."})


def trained(pairs, folder: Path, script: Script, args: DPOConfig) -> str:
    """The folder of a model that was trained by DPO on the pairs."""
    config = DPOConfig(
        output_dir=str(folder),
        max_steps=script.teacher_max_steps,
        num_train_epochs=1,
        learning_rate=script.teacher_learning_rate,
        beta=args.beta,
        per_device_train_batch_size=args.per_device_train_batch_size,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        max_length=args.max_length,
        bf16=args.bf16,
        use_cpu=args.use_cpu,
        seed=args.seed,
        report_to=args.report_to,
        save_strategy="no",
    )
    trainer = DPOTrainer(model=script.model_name_or_path, args=config, train_dataset=pairs)
    trainer.train()
    trainer.save_model()
    return str(folder)


if __name__ == "__main__":
    parser = TrlParser([Script, DPOConfig])
    parser.set_defaults(loss_type=["aligndistil"], loss_kwargs={"beta2": 10.0}, learning_rate=1e-6)
    script, args = parser.parse_args_and_config()

    pairs = load_preferences(script.dataset_name)
    swapped = pairs.rename_columns({"chosen": "rejected", "rejected": "chosen"})
    options = {"teacher": "teacher_model_name_or_path", "reverse": "reverse_model_name_or_path"}
    to_train = {name: Path(args.output_dir, name) for name, option in options.items() if getattr(args, option) is None}
    for name, folder in to_train.items():
        # It may have been trained from another model or on other pairs
        if folder.exists():
            parser.error(f"{folder} is there already. Use it with `--{options[name]} {folder}`, or remove it.")
    for name, folder in to_train.items():
        setattr(args, options[name], trained(pairs if name == "teacher" else swapped, folder, script, args))

    trainer = DPOTrainer(model=script.model_name_or_path, args=args, train_dataset=pairs)
    trainer.train()
    trainer.save_model()
