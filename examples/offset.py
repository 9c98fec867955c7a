"""
DPO with an offset (ODPO): the better the winner, the larger the reward gap asked for.

Needs `score_chosen` and `score_rejected`. The default `scaling="log"` refuses pairs whose winner does not score
higher; they are dropped here.

    python examples/offset.py --output_dir out
    python examples/offset.py --model_name_or_path path/to/model --dataset_name pairs.jsonl --output_dir out --max_steps 100

Every field of `DPOConfig` is a flag, `--loss_kwargs '{"alpha": 1.0}'` among them.
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
    parser.set_defaults(loss_type=["offset"], loss_kwargs={"alpha": 0.5})
    script, args = parser.parse_args_and_config()

    dataset = load_preferences(script.dataset_name)
    dataset = dataset.filter(lambda row: row["score_chosen"] > row["score_rejected"])
    trainer = DPOTrainer(model=script.model_name_or_path, args=args, train_dataset=dataset)
    trainer.train()
    trainer.save_model()
