"""
SimPO: log-probabilities per token and a margin, no reference model.

Needs nothing but pairs, and memory for one model. `beta` is larger than in DPO, and the learning rate small.

    python examples/simpo.py --output_dir out
    python examples/simpo.py --model_name_or_path path/to/model --dataset_name pairs.jsonl --output_dir out --max_steps 100

Every field of `DPOConfig` is a flag, `--loss_kwargs '{"gamma_beta_ratio": 0.25}'` among them. Other losses that need nothing but pairs:

    python examples/simpo.py --loss_type cpo --beta 0.1 --learning_rate 1e-6 --output_dir out      # no reference either
    python examples/simpo.py --loss_type asft --learning_rate 5e-6 --output_dir out                # nor here: SFT and preferences in one
    python examples/simpo.py --loss_type eurus --beta 0.1 --learning_rate 1e-6 --output_dir out
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
    parser.set_defaults(loss_type=["simpo"], beta=2.0, learning_rate=5e-7)
    script, args = parser.parse_args_and_config()

    dataset = load_preferences(script.dataset_name)
    trainer = DPOTrainer(model=script.model_name_or_path, args=args, train_dataset=dataset)
    trainer.train()
    trainer.save_model()
