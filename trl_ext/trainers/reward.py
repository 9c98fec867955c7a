"""Reward models: TRL's trainer, with Eurus' absolute terms; and general preference models in their place."""

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import trl
from accelerate.utils import is_peft_model
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    set_seed,
)
from transformers.modeling_outputs import SequenceClassifierOutput
from trl.trainer.reward_trainer import suppress_seqcls_warning
from trl.trainer.utils import create_model_from_path

from trl_ext.data.checks import check_count
from trl_ext.data.classifier import ADAPTER_CONFIG, refuse_preference_model
from trl_ext.data.paths import refuse_missing_path
from trl_ext.data.preference_model import preference_score
from trl_ext.trainers.checkpoints import WholeCheckpoints
from trl_ext.trainers.options import refuse_dropped_data
from trl_ext.trainers.trl_seam import REWARD_TRAINER, require_names


require_names(REWARD_TRAINER)

PAPER = {
    "title": "Beyond Bradley-Terry Models: A General Preference Model for Language Model Alignment",
    "id": "2410.02197",
    "citation": """\
@article{zhang2024gpm,
    title        = {{Beyond Bradley-Terry Models: A General Preference Model for Language Model Alignment}},
    author       = {Yifan Zhang and Ge Zhang and Yue Wu and Kangping Xu and Quanquan Gu},
    year         = 2024,
    eprint       = {arXiv:2410.02197},
}""",
}


@dataclass
class RewardConfig(trl.RewardConfig):
    """
    Configuration of [`RewardTrainer`]: all of [`trl.RewardConfig`], and three options more.

    Parameters:
        absolute_weight (`float`, *optional*, defaults to `0.0`):
            Weight of `-log sigmoid(r_chosen) - log sigmoid(-r_rejected)` beside Bradley-Terry: rewards of chosen completions are
            pushed above 0, those of rejected ones below (Eurus, https://huggingface.co/papers/2404.02078; 1.0 there).
        preference_dim (`int`, *optional*):
            Numbers in the embedding of a completion, an even number: trains a general preference model in place of a reward
            model, which can learn preferences that go in circles (GPM, https://huggingface.co/papers/2410.02197; 4, 6 or 8 there).
            [`~trl_ext.data.PreferenceModel`] makes a judge of it.
        preference_temperature (`float`, *optional*, defaults to `0.1`):
            Temperature of a general preference model: its loss is `-log sigmoid(s / preference_temperature)`. Kept in the
            configuration of the model.
    """

    absolute_weight: float = field(
        default=0.0,
        metadata={
            "help": "Weight of Eurus' absolute terms, which push chosen rewards above 0 and rejected ones below."
        },
    )
    preference_dim: int | None = field(
        default=None,
        metadata={
            "help": "Numbers in the embedding of a completion, an even number: trains a general preference model."
        },
    )
    preference_temperature: float = field(
        default=0.1, metadata={"help": "Temperature of a general preference model, which its configuration keeps."}
    )

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.absolute_weight < math.inf:
            raise ValueError(f"`absolute_weight={self.absolute_weight!r}` must be finite and at least 0.")
        if not 0 < self.preference_temperature < math.inf:
            raise ValueError(f"`preference_temperature={self.preference_temperature!r}` must be finite and above 0.")
        if self.preference_dim is None:
            if self.preference_temperature != 0.1:
                raise ValueError(
                    f"`preference_temperature={self.preference_temperature!r}` is of general preference models: give "
                    "`preference_dim` too, or leave it out."
                )
            return
        check_count("preference_dim", self.preference_dim, 2)
        if self.preference_dim % 2:
            raise ValueError(
                f"`preference_dim={self.preference_dim!r}` must be an even number: embeddings are made of pairs."
            )
        for name in ("absolute_weight", "center_rewards_coefficient"):
            if getattr(self, name):
                raise ValueError(
                    f"`{name}={getattr(self, name)!r}` is of rewards, and a general preference model "
                    f"(`preference_dim={self.preference_dim!r}`) gives none: it compares two completions. Leave one of the two out."
                )


class RewardTrainer(WholeCheckpoints, trl.RewardTrainer):
    """
    [`trl.RewardTrainer`] with the options of [`RewardConfig`].

    With `preference_dim` the model is a sequence classifier with that many outputs, the embedding of a completion; a model that
    is given by name gets them. A column `margin` is taken off the logit `s / preference_temperature`. Logged are `accuracy`, the
    share of pairs whose chosen completion is preferred, and `margin`, the mean logit; there are no rewards.

    Raises:
        `ValueError`: For a model with another number of outputs or another temperature than the config has, and for a general
            preference model without `preference_dim`.
    """

    def __init__(
        self,
        model: "str | PreTrainedModel | Any",
        args: trl.RewardConfig | None = None,
        data_collator: Any | None = None,
        train_dataset: Any | None = None,
        eval_dataset: Any | None = None,
        processing_class: Any | None = None,
        compute_metrics: Callable | None = None,
        callbacks: list | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        optimizer_cls_and_kwargs: tuple[Any, Any] | None = None,
        preprocess_logits_for_metrics: Callable | None = None,
        quantization_config: Any | None = None,
        peft_config: Any | None = None,
    ):
        refuse_missing_path(model, "model")
        context: Any = contextlib.nullcontext()
        if getattr(args, "preference_dim", None) is None:
            refuse_preference_model(model)
        else:
            if isinstance(model, str):
                model, tokenizer = _load(model, args, quantization_config, processing_class is None)
                processing_class, quantization_config = processing_class or tokenizer, None
            _check_model(model, args)
            context = _as_trl_takes_it(model.config, args)
            self._name, self._paper = "General Preference Model", PAPER
            self._tag_names = [*self._tag_names, "trl-ext", "general-preference-model"]
        with context:
            super().__init__(
                model=model,
                args=args,
                data_collator=data_collator,
                train_dataset=train_dataset,
                eval_dataset=eval_dataset,
                processing_class=processing_class,
                compute_metrics=compute_metrics,
                callbacks=callbacks,
                optimizers=optimizers,
                optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
                preprocess_logits_for_metrics=preprocess_logits_for_metrics,
                quantization_config=quantization_config,
                peft_config=peft_config,
            )
        refuse_dropped_data(self)
        if self._embeds:
            self.model.config.preference_temperature = args.preference_temperature

    @property
    def _embeds(self) -> bool:
        """Whether the model is a general preference model."""
        return getattr(self.args, "preference_dim", None) is not None

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if self._embeds:
            loss, outputs = self._preference_loss(model, inputs, num_items_in_batch)
            return (loss, outputs) if return_outputs else loss
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        weight = getattr(self.args, "absolute_weight", 0.0)
        if weight:
            chosen, rejected = outputs.logits.squeeze(-1).chunk(2)
            loss = loss - weight * (F.logsigmoid(chosen) + F.logsigmoid(-rejected)).mean()
        return (loss, outputs) if return_outputs else loss

    def _preference_loss(self, model, inputs, num_items_in_batch):
        """TRL's loss of two rewards whose difference is s / tau; loss, and the model's own outputs."""
        kept = []

        def halves(**given) -> SequenceClassifierOutput:
            kept.append(model(**given))
            chosen, rejected = kept[0].logits.float().chunk(2)
            half = preference_score(chosen, rejected) / (2 * self.args.preference_temperature)
            return SequenceClassifierOutput(logits=torch.cat([half, -half]).unsqueeze(-1))

        loss, _ = super().compute_loss(halves, inputs, True, num_items_in_batch)
        for name in ("min_reward", "mean_reward", "max_reward"):  # of the halves, which are no rewards
            del self._metrics["train" if self.model.training else "eval"][name]
        return loss, kept[0]

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False):
        super().save_model(output_dir, _internal_call)
        if self._embeds and is_peft_model(self.model) and self.args.should_save:
            # An adapter is saved without a configuration: size of the embedding and temperature would be lost
            self.model.config.save_pretrained(Path(output_dir or self.args.output_dir) / ADAPTER_CONFIG)


def _load(
    name: str, args: RewardConfig, quantization_config: Any, with_tokenizer: bool
) -> tuple[PreTrainedModel, Any]:
    """The model by its name as TRL loads it, with an output for each number of the embedding, and its tokenizer."""
    options = {"trust_remote_code": args.trust_remote_code, **(args.model_init_kwargs or {})}
    if quantization_config is not None:
        if "quantization_config" in options:
            raise ValueError(
                "`quantization_config` is given twice: as an argument, and in `args.model_init_kwargs`. Give it once."
            )
        options["quantization_config"] = quantization_config
    if args.distributed_state.distributed_type in ("MULTI_GPU", "DEEPSPEED"):
        options["device_map"] = None
    source = {key: options[key] for key in ("revision", "trust_remote_code") if key in options}
    config = AutoConfig.from_pretrained(name, **source)
    if any("SequenceClassification" in each for each in config.architectures or ()):
        _check_outputs(name, config, args.preference_dim)
    set_seed(args.seed)  # of the new head
    with suppress_seqcls_warning():
        model = create_model_from_path(
            name, AutoModelForSequenceClassification, **{**options, "num_labels": args.preference_dim}
        )
    return model, AutoTokenizer.from_pretrained(name, **source) if with_tokenizer else None


def _check_outputs(name: str, config: PreTrainedConfig, expected: int) -> None:
    if config.num_labels != expected:
        raise ValueError(
            f"The model {name!r} has {config.num_labels} outputs, and `preference_dim={expected}` asks for {expected}. Give the model "
            f"with `num_labels={expected}`, or the name of one without a head, which gets a new one."
        )


def _check_model(model: Any, args: RewardConfig) -> None:
    name = getattr(model.config, "name_or_path", "")
    _check_outputs(name, model.config, args.preference_dim)
    before = getattr(model.config, "preference_temperature", args.preference_temperature)
    if before != args.preference_temperature:
        raise ValueError(
            f"The model {name!r} was trained with `preference_temperature={before!r}`, and the config has "
            f"{args.preference_temperature!r}: its probabilities would be others. Give the same."
        )


@contextlib.contextmanager
def _as_trl_takes_it(config: PreTrainedConfig, args: RewardConfig) -> Iterator[None]:
    """While TRL builds its trainer: it refuses a model whose configuration has more than one label, and reads nothing else of it."""
    labels, options = (config.id2label, config.label2id), args.model_init_kwargs
    config.num_labels, args.model_init_kwargs = 1, None
    try:
        yield
    finally:
        (config.id2label, config.label2id), args.model_init_kwargs = labels, options
