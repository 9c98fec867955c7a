"""
Anchored DPO (ADPO): soft targets instead of hard labels.

Reads `preference_prob` where it is there, else the target is sigmoid((score_chosen - score_rejected) / beta_r), else 1.
`beta_r` is in the unit of the scores: ratings from 1 to 10 differ by a point or two, rewards in [0, 1] by much less.

    python examples/anchored.py --output_dir out
    python examples/anchored.py --model_name_or_path path/to/model --dataset_name pairs.jsonl --output_dir out --max_steps 100

Every field of `DPOConfig` is a flag, `--loss_kwargs '{"beta_r": 2.0}'` among them.
"""

from dataclasses import dataclass, field

from trl import TrlParser

from trl_ext import DPOConfig, DPOTrainer
from trl_ext.data import load_preferences


@dataclass
class Script:
    model_name_or_path: str = field(default="Qwen/Qwen3-0.6B", metadata={"help": "Hub name or folder of the model."})
    dataset_name: str = field(
        default="trl-lib/ultrafeedback_binarized",
        metadata={"help": "Hub name, folder or file (JSON Lines, CSV, Parquet) of the preference data."},
    )


if __name__ == "__main__":
    parser = TrlParser([Script, DPOConfig])
    parser.set_defaults(loss_type=["anchored"], loss_kwargs={"beta_r": 1.0})
    script, args = parser.parse_args_and_config()

    dataset = load_preferences(script.dataset_name)
    trainer = DPOTrainer(model=script.model_name_or_path, args=args, train_dataset=dataset)
    trainer.train()
    trainer.save_model()
