"""
Step-APO (CPL): steps of a plan; the better the chosen step by the values of a tree search, the larger the reward gap asked for.

The data is yours: plain text, one step per row, in `prompt` the task and the steps before, in `chosen` and `rejected` the step, in
`q_chosen` and `q_rejected` their values. `alpha` turns values into the unit of the reward.

    python examples/step_apo.py --model_name_or_path path/to/model --dataset_name steps.jsonl --output_dir out --max_steps 100

Every field of `DPOConfig` is a flag, `--loss_kwargs '{"alpha": 0.5}'` among them.
"""

from dataclasses import dataclass, field

from transformers import AutoTokenizer
from trl import TrlParser

from trl_ext import DPOConfig, DPOTrainer
from trl_ext.data import load_preferences
from trl_ext.data.recipes import without_eos


@dataclass
class Script:
    dataset_name: str = field(metadata={"help": "Hub name, folder or file (JSON Lines, CSV, Parquet) of the steps."})
    model_name_or_path: str = field(default="Qwen/Qwen3-0.6B", metadata={"help": "Hub name or folder of the model."})


if __name__ == "__main__":
    parser = TrlParser([Script, DPOConfig])
    parser.set_defaults(loss_type=["step_apo"], loss_kwargs={"alpha": 1.0}, beta=0.3)
    script, args = parser.parse_args_and_config()

    tokenizer = AutoTokenizer.from_pretrained(script.model_name_or_path)
    # A step that does not end the answer has no end-of-sequence token behind it
    dataset = without_eos(load_preferences(script.dataset_name), tokenizer)
    trainer = DPOTrainer(model=script.model_name_or_path, args=args, train_dataset=dataset, processing_class=tokenizer)
    trainer.train()
    trainer.save_model()
