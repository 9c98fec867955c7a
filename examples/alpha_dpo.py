"""
AlphaDPO: SimPO with a margin of each pair's own, from how far the policy has moved from its reference.

Needs nothing but pairs. Log-probabilities are per token, so `beta` is of the order of 2 to 10.

    python examples/alpha_dpo.py --output_dir out
    python examples/alpha_dpo.py --model_name_or_path path/to/model --dataset_name pairs.jsonl --output_dir out --max_steps 100

Every field of `DPOConfig` is a flag, `--loss_kwargs '{"alpha": 0.05}'` among them.
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
    parser.set_defaults(loss_type=["alpha_dpo"], loss_kwargs={"alpha": 0.2, "gamma_beta_ratio": 0.6}, beta=2.5)
    script, args = parser.parse_args_and_config()

    dataset = load_preferences(script.dataset_name)
    trainer = DPOTrainer(model=script.model_name_or_path, args=args, train_dataset=dataset)
    trainer.train()
    trainer.save_model()
