"""
beta-DPO: beta follows the log-ratio gaps of the micro-batch, and pairs with unusual gaps are filtered out.

Needs nothing but pairs. The micro-batch is what it looks at: keep `per_device_train_batch_size` at 4 or more.

    python examples/beta_dpo.py --output_dir out
    python examples/beta_dpo.py --model_name_or_path path/to/model --dataset_name pairs.jsonl --output_dir out --max_steps 100

Every field of `DPOConfig` is a flag, `--loss_kwargs '{"rho": 0.1}'` among them.
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
    parser.set_defaults(loss_type=["beta_dpo"], loss_kwargs={"a": 0.6, "rho": 0.2})
    script, args = parser.parse_args_and_config()

    dataset = load_preferences(script.dataset_name)
    trainer = DPOTrainer(model=script.model_name_or_path, args=args, train_dataset=dataset)
    trainer.train()
    trainer.save_model()
