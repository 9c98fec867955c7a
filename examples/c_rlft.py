"""
C-RLFT (OpenChat): fine-tuning on answers of mixed quality, whose class stands in the prompt and has a weight.

Reads conversations or plain text with the columns `condition` (name of the class) and `weight`. Pairs of preference data, as the
dataset below, become two rows: the chosen completion of the class "Good" with weight 1, the rejected one of "Poor" with weight 0.1.

    python examples/c_rlft.py --output_dir out
    python examples/c_rlft.py --model_name_or_path path/to/model --dataset_name answers.jsonl --output_dir out --max_steps 100

Every field of `SFTConfig` is a flag, `--per_sequence_loss` and `--condition_in user` among them. The chat template is theirs: the
tag stands before each role. Later it writes the best class where no other is given, so that nobody has to ask for it:
`tokenizer.apply_chat_template(messages, add_generation_prompt=True)`.
"""

from dataclasses import dataclass, field

from datasets import Dataset, concatenate_datasets
from transformers import AutoTokenizer
from trl import TrlParser

from trl_ext import SFTConfig, SFTTrainer
from trl_ext.data import load_preferences


CLASSES = {"chosen": ("Good", 1.0), "rejected": ("Poor", 0.1)}
CHAT_TEMPLATE = """\
{%- set tag = condition if condition is defined else '__BEST__' -%}
{%- for message in messages -%}
{{- (tag + ' ' if message.role != 'system' else '') + message.role.title() + ':' -}}
{%- if message.role == 'assistant' -%}
{%- generation -%}{{- ' ' + message.content + eos_token -}}{%- endgeneration -%}
{%- else -%}{{- ' ' + message.content + eos_token -}}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- tag + ' Assistant:' -}}{%- endif -%}"""


@dataclass
class Script:
    model_name_or_path: str = field(default="Qwen/Qwen3-0.6B", metadata={"help": "Hub name or folder of the model."})
    dataset_name: str = field(
        default="trl-lib/ultrafeedback_binarized",
        metadata={"help": "Hub name, folder or file (JSON Lines, CSV, Parquet) of answers with classes, or of pairs."},
    )
    best: str = field(default="Good", metadata={"help": "The class whose tag is written where no other is given."})


def classes(pairs: Dataset) -> Dataset:
    """Each completion of preference pairs as a row of its class."""
    parts = []
    for side, (condition, weight) in CLASSES.items():
        part = pairs.rename_column(side, "completion")
        part = part.select_columns(["prompt", "completion"] if "prompt" in part.column_names else ["completion"])
        part = part.add_column("condition", [condition] * len(part))
        parts.append(part.add_column("weight", [weight] * len(part)))
    data = concatenate_datasets(parts)
    # Conversations that are whole on both sides
    return data if "prompt" in data.column_names else data.rename_column("completion", "messages")


if __name__ == "__main__":
    parser = TrlParser([Script, SFTConfig])
    script, args = parser.parse_args_and_config()

    dataset = load_preferences(script.dataset_name)
    if "chosen" in dataset.column_names:
        dataset = classes(dataset)
    if "messages" in dataset.column_names:
        args.assistant_only_loss = True  # what users say has no weight
    tokenizer = AutoTokenizer.from_pretrained(script.model_name_or_path)
    tokenizer.chat_template = CHAT_TEMPLATE.replace("__BEST__", script.best)
    trainer = SFTTrainer(model=script.model_name_or_path, args=args, train_dataset=dataset, processing_class=tokenizer)
    trainer.train()
    trainer.save_model()
