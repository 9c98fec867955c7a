"""
Reward model distillation (d-DPO, e-DPO): the policy's reward gap is drawn to that of one or several reward models.

The data may have scores, each a number or a list with one per reward model. Those of the default dataset are ratings from 1 to 10:
the script runs on them, the method wants Bradley-Terry logits.

    python examples/reward_distillation.py --dataset_name pairs.jsonl --output_dir out

Else give reward models, by hub name or folder; they score the pairs once, each in the unit that fits the labels best:

    python examples/reward_distillation.py --reward_funcs path/to/one path/to/another --dataset_name pairs.jsonl --output_dir out

Every field of `DPOConfig` is a flag, `--loss_kwargs '{"combine": "min"}'` among them.
"""

from dataclasses import dataclass, field

from trl import TrlParser

from trl_ext import DPOConfig, DPOTrainer
from trl_ext.data import Ensemble, load_preferences, score_preferences


@dataclass
class Script:
    model_name_or_path: str = field(default="Qwen/Qwen3-0.6B", metadata={"help": "Hub name or folder of the model."})
    dataset_name: str = field(
        default="trl-lib/ultrafeedback_binarized",
        metadata={"help": "Hub name, folder or file (JSON Lines, CSV, Parquet) of the preference data."},
    )
    reward_funcs: list[str] | None = field(
        default=None, metadata={"help": "Hub names or folders of reward models, which score the pairs."}
    )


if __name__ == "__main__":
    parser = TrlParser([Script, DPOConfig])
    parser.set_defaults(loss_type=["reward_distillation"], loss_kwargs={"combine": "mean"})
    script, args = parser.parse_args_and_config()

    dataset = load_preferences(script.dataset_name)
    if script.reward_funcs:
        dataset = score_preferences(dataset, Ensemble(script.reward_funcs, "list"), temperature="fit")
    trainer = DPOTrainer(model=script.model_name_or_path, args=args, train_dataset=dataset)
    trainer.train()
    trainer.save_model()
