"""
Supervised fine-tuning on answers of mixed quality: C-RLFT of OpenChat (https://huggingface.co/papers/2309.11235).

    L = sum over trained tokens t of  w_t * -log pi(y_t | tag, x, y_<t)  /  sum of w_t

The tag names the class that a row is of (column `condition`), w_t is the row's `weight`, or with `per_sequence_loss` that weight divided by
the number of trained tokens of the row. Both sums go over all micro-batches of a step and over all processes. The formula,
`per_sequence_loss` and that the tag stands in each role's prefix are the authors' code.
"""

import textwrap
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import torch
import torch.nn.functional as F
import trl
from accelerate.logging import get_logger
from datasets import Dataset, IterableDataset
from transformers import DataCollator, PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin, TrainerCallback
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling
from trl.trainer.utils import pad

from trl_ext.data.columns import WEIGHT, over_splits
from trl_ext.data.conditions import CONDITION, PLACES, class_columns, require_reading_template, with_classes
from trl_ext.data.paths import refuse_missing_path
from trl_ext.trainers.checkpoints import WholeCheckpoints
from trl_ext.trainers.options import refuse_dropped_data
from trl_ext.trainers.trl_seam import SFT_TRAINER, base_model, require_names, unbind_forward


require_names(SFT_TRAINER)
logger = get_logger(__name__)

TOKEN_WEIGHTS = "token_weights"  # of a batch, one for each label
PAPER = {
    "title": "OpenChat: Advancing Open-source Language Models with Mixed-Quality Data",
    "id": "2309.11235",
    "citation": textwrap.dedent("""\
        @inproceedings{wang2024openchat,
            title        = {{OpenChat: Advancing Open-source Language Models with Mixed-Quality Data}},
            author       = {Guan Wang and Sijie Cheng and Xianyuan Zhan and Xiangang Li and Sen Song and Yang Liu},
            year         = 2024,
            booktitle    = {The Twelfth International Conference on Learning Representations, ICLR 2024},
            url          = {https://openreview.net/forum?id=AOJyfhWYHf},
        }"""),
}


@dataclass
class SFTConfig(trl.SFTConfig):
    """
    Configuration of [`SFTTrainer`]: all of [`trl.SFTConfig`], and two options more.

    Parameters:
        condition_in (`str`, *optional*, defaults to `"template"`):
            Where the tag of the column `condition` goes in a conversation: `"template"`, to the chat template as the variable
            `condition`, which has to read it; `"user"`, before the text of each message of the user. Of plain text it goes before
            the prompt.
        per_sequence_loss (`bool`, *optional*, defaults to `False`):
            Whether each row counts as its `weight` (1 where there is none) however long it is, and not each of its trained tokens.
    """

    condition_in: str = field(
        default="template",
        metadata={
            "help": "Where the tag of the column `condition` goes in a conversation: 'template', to the chat template as the variable "
            "`condition`; 'user', before the text of each message of the user.",
            "choices": list(PLACES),
        },
    )
    per_sequence_loss: bool = field(
        default=False,
        metadata={"help": "Each row counts as its `weight` however long it is, and not each of its trained tokens."},
    )

    def __post_init__(self):
        super().__post_init__()
        if self.condition_in not in PLACES:
            raise ValueError(f"`condition_in={self.condition_in!r}` is none of {list(PLACES)}.")


@dataclass
class WeightedCollator(DataCollatorForLanguageModeling):
    """TRL's collator, which adds the weight of each label, `token_weights`, in the shape of `labels`."""

    per_sequence: bool = False

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch = super().torch_call(examples)
        labels = batch["labels"]
        weights = [torch.full((len(each["input_ids"]),), self._of_tokens(each)) for each in examples]
        if self.padding_free:
            weights = [torch.cat(weights)]
        weights = pad(weights, padding_value=0.0, pad_to_multiple_of=self.pad_to_multiple_of)
        return {**batch, TOKEN_WEIGHTS: weights.masked_fill(labels == -100, 0.0)}

    def _of_tokens(self, example: dict[str, Any]) -> float:
        weight = float(example.get(WEIGHT, 1.0))
        if not self.per_sequence:
            return weight
        labels = example.get("labels", example["input_ids"])[1:]  # nothing predicts the first
        return weight / max(sum(label != -100 for label in labels), 1)


class SFTTrainer(WholeCheckpoints, trl.SFTTrainer):
    """
    [`trl.SFTTrainer`] for rows of classes that are worth different amounts.

    Reads two columns of the dataset beside TRL's, each of which works without the other: `condition`, the tag of the row's class
    as text, and `weight`, a number of at least 0 that each of the row's trained tokens counts. Which tokens are trained is TRL's
    `completion_only_loss` and `assistant_only_loss`. Without both columns it is TRL's trainer.

    At inference the tag of the best class is given as in training: `tokenizer.apply_chat_template(messages, condition="GPT4 Correct",
    add_generation_prompt=True)`, or by a template that takes it where no other is given.

    Args:
        args ([`SFTConfig`] or [`trl.SFTConfig`], *optional*):
            Configuration.
        kwargs:
            All arguments of [`trl.SFTTrainer`], with their meaning there.

    Raises:
        `ValueError`: For columns that cannot be used, a chat template that does not read the tag, and options that `weight` or
            `per_sequence_loss` exclude: packing, other losses than `"nll"`, a `data_collator` or `compute_loss_func`, images,
            context and sequence parallelism.

    Example:

    ```python
    >>> from trl_ext import SFTConfig, SFTTrainer

    >>> trainer = SFTTrainer("Qwen/Qwen3-0.6B", SFTConfig(condition_in="user"), train_dataset=dataset)
    ```
    """

    def __init__(
        self,
        model: "str | PreTrainedModel | Any",
        args: trl.SFTConfig | None = None,
        data_collator: DataCollator | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset | IterableDataset | Mapping[str, Dataset | IterableDataset] | None = None,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin | None = None,
        compute_loss_func: Callable | None = None,
        compute_metrics: Callable | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        optimizer_cls_and_kwargs: tuple[Any, dict[str, Any]] | None = None,
        preprocess_logits_for_metrics: Callable | None = None,
        quantization_config: Any | None = None,
        peft_config: Any | None = None,
        formatting_func: Callable[[dict], str] | None = None,
    ):
        self._place = getattr(args, "condition_in", "template")
        self._text_field = getattr(args, "dataset_text_field", "text")
        per_sequence = getattr(args, "per_sequence_loss", False)
        given = isinstance(train_dataset, (Dataset, IterableDataset))  # TRL says what else is wrong with it
        self._columns = class_columns(train_dataset) if given else []
        self._weighted = WEIGHT in self._columns or per_sequence
        if self._weighted and given:
            _check_weighted(train_dataset, args, data_collator, compute_loss_func)
        if CONDITION in self._columns and formatting_func is not None:
            raise ValueError(
                f"`formatting_func` writes the whole text, so nothing would put the column {CONDITION!r} into it. Have the "
                "function write the tag and remove the column, or leave the function out."
            )
        if CONDITION not in self._columns and self._place != "template":
            raise ValueError(
                f"`condition_in={self._place!r}` places the tags of the column {CONDITION!r}, which the train dataset does not have."
            )
        refuse_missing_path(model, "model")
        if given:
            train_dataset = self._with_classes(train_dataset, "train")
        eval_dataset = over_splits(eval_dataset, self._with_classes)
        if isinstance(model, torch.nn.Module):
            unbind_forward(base_model(model))  # of an earlier trainer
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            compute_loss_func=compute_loss_func,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
            optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
            preprocess_logits_for_metrics=preprocess_logits_for_metrics,
            quantization_config=quantization_config,
            peft_config=peft_config,
            formatting_func=formatting_func,
        )
        refuse_dropped_data(self)
        if self._columns:
            self._name, self._paper = "C-RLFT", PAPER
        if self._weighted:
            refuse_sharded_sequences(self.accelerator.parallelism_config)
            theirs = {each.name: getattr(self.data_collator, each.name) for each in fields(self.data_collator)}
            self.data_collator = WeightedCollator(**theirs, per_sequence=per_sequence)

    # Dataset

    def _with_classes(self, dataset: Dataset | IterableDataset, split: str) -> Dataset | IterableDataset:
        return with_classes(dataset, self._columns, split, self._place, self._text_field)

    def _prepare_dataset(self, dataset, processing_class, *args, **kwargs):
        first = next(iter(dataset))
        if CONDITION in (first.get("chat_template_kwargs") or {}) and "input_ids" not in first:
            require_reading_template(first, processing_class, self.chat_template)
        return super()._prepare_dataset(dataset, processing_class, *args, **kwargs)

    def _set_signature_columns_if_needed(self):
        super()._set_signature_columns_if_needed()
        if WEIGHT in self._columns and WEIGHT not in self._signature_columns:
            self._signature_columns.append(WEIGHT)

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        if not isinstance(eval_dataset, str):  # the name of one that was given when the trainer was built
            eval_dataset = over_splits(eval_dataset, self._with_classes)
        return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)

    # Loss

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """TRL's, with weights whose mean over all trained tokens of the step is 1, so that TRL's count of them is their sum."""
        batches, num_items_in_batch = super().get_batch_samples(epoch_iterator, num_batches, device)
        if not self._weighted or num_items_in_batch is None:
            return batches, num_items_in_batch
        sums = sum(_count_and_weight(batch).to(device) for batch in batches)
        if self.args.average_tokens_across_devices and self.args.world_size > 1:
            sums = self.accelerator.gather(sums[None]).sum(dim=0)
        count, total = sums.tolist()
        if not total:
            logger.warning_once(
                "All trained tokens of a step have the weight 0: its loss is 0, and it teaches nothing. Larger batches mix rows more."
            )
        for batch in batches:
            batch[TOKEN_WEIGHTS] = batch[TOKEN_WEIGHTS] * (count / (total or 1.0))
        return batches, num_items_in_batch

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if TOKEN_WEIGHTS not in inputs:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        weights = inputs[TOKEN_WEIGHTS][:, 1:]
        if num_items_in_batch is None:  # as in evaluation: a batch is a mean of its own
            count, total = _count_and_weight(inputs)
            weights = weights * torch.where(total > 0, count / total, 0.0)

        def weighted(**kwargs):
            outputs = model(**kwargs)
            log_probs = getattr(outputs, "log_probs", None)
            if log_probs is not None:  # TRL's fused forward; virtual tokens of an adapter come first
                padded = F.pad(weights.to(log_probs), (log_probs.size(1) - weights.size(1), 0))
                outputs.log_probs = log_probs * padded
            return outputs

        inputs = {name: value for name, value in inputs.items() if name != TOKEN_WEIGHTS}
        return super().compute_loss(weighted, inputs, return_outputs, num_items_in_batch)


def _count_and_weight(batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Number of trained tokens of a batch, and the sum of their weights."""
    count = (batch["labels"][:, 1:] != -100).sum()
    return torch.stack([count.float(), batch[TOKEN_WEIGHTS][:, 1:].sum()])


def _check_weighted(dataset: Any, args: Any, data_collator: Any, compute_loss_func: Any) -> None:
    """Raise a `ValueError` for what token weights exclude."""
    first = next(iter(dataset))
    refused = {
        "`packing`, whose rows are of several examples": getattr(args, "packing", False)
        or getattr(args, "eval_packing", False),
        "`loss_type='dft'`, which weighs tokens itself": getattr(args, "loss_type", "nll") == "dft",
        "`label_smoothing_factor`": getattr(args, "label_smoothing_factor", 0),
        "a `compute_loss_func`": compute_loss_func is not None,
        "a `data_collator`, which would not carry the weights": data_collator is not None,
        "images": {"image", "images"} & first.keys(),
    }
    for what, given in refused.items():
        if given:
            by = f"The column {WEIGHT!r}" if WEIGHT in first else "`per_sequence_loss`"
            raise ValueError(
                f"{by} weighs the tokens of TRL's plain loss, which excludes {what}. Leave one of the two out."
            )


def refuse_sharded_sequences(parallelism: Any) -> None:
    """Raise a `ValueError` where accelerate cuts sequences among devices: it would not cut the weights of their tokens."""
    if parallelism is not None and (parallelism.cp_enabled or parallelism.sp_enabled):
        raise ValueError(
            "Weights of tokens are not cut with the sequence under context or sequence parallelism: leave `weight` and "
            "`per_sequence_loss` out, or the parallelism."
        )
