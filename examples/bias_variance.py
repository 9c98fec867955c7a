"""
BVPO: for models that reason, mix in the pair with an empty reasoning trace.

Needs `chosen_empty_trace` and `rejected_empty_trace`: completions of the same prompts with reasoning disabled. Where they
are missing they are derived by cutting the traces off the completions, an approximation of the paper.

    python examples/bias_variance.py --output_dir out
    python examples/bias_variance.py --model_name_or_path path/to/model --dataset_name pairs.jsonl --output_dir out --max_steps 100

Every field of `DPOConfig` is a flag, `--loss_kwargs '{"alpha": 0.5}'` among them.
"""

from dataclasses import dataclass, field

from trl import TrlParser

from trl_ext import DPOConfig, DPOTrainer
from trl_ext.data import load_preferences, strip_reasoning_traces


@dataclass
class Script:
    model_name_or_path: str = field(default="Qwen/Qwen3-0.6B", metadata={"help": "Hub name or folder of the model."})
    dataset_name: str = field(
        default="path/to/your/traced_pairs.jsonl",
        metadata={"help": "Hub name, folder or file (JSON Lines, CSV, Parquet) of the preference data."},
    )


if __name__ == "__main__":
    parser = TrlParser([Script, DPOConfig])
    parser.set_defaults(loss_type=["bias_variance"], loss_kwargs={"alpha": 0.5})
    script, args = parser.parse_args_and_config()

    dataset = load_preferences(script.dataset_name)
    if "chosen_empty_trace" not in dataset.column_names:
        dataset = strip_reasoning_traces(dataset)
    trainer = DPOTrainer(model=script.model_name_or_path, args=args, train_dataset=dataset)
    trainer.train()
    trainer.save_model()
