"""`trl.DPOTrainer` with the losses of this package."""

import contextlib
import copy
import dataclasses
import functools
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import trl
from accelerate.logging import get_logger
from datasets import Dataset, IterableDataset, concatenate_datasets
from transformers import DataCollator, PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin, TrainerCallback
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.trainer_utils import get_last_checkpoint
from trl.data_utils import is_conversational
from trl.trainer.utils import pad

from trl_ext.data.checks import (
    TOKENIZED,
    check_tokenized,
    say_what_was_dropped,
    warn_of_empty_completions,
)
from trl_ext.data.collator import PreferenceCollator
from trl_ext.data.columns import TEXT_COLUMNS, WEIGHT, checked, columns_of, used_columns
from trl_ext.data.groups import OTHER_FIELDS, OTHERS, flatten_others, from_groups, gather_others, is_grouped
from trl_ext.data.paths import refuse_missing_path
from trl_ext.data.reasoning import (
    EMPTY_TRACE_FIELDS,
    EMPTY_TRACE_PREFIX,
    HAS_TRACES,
    check_pairs,
    tokenize_empty_trace,
)
from trl_ext.data.scores import score_preferences
from trl_ext.data.tokens import require_chat_template
from trl_ext.logprobs import completion_lengths, sum_completions
from trl_ext.losses import GroupBatch, PreferenceBatch
from trl_ext.losses.base import SigmoidLoss
from trl_ext.losses.bias_variance import present
from trl_ext.trainers.checkpoint import refuse_other_losses, save_losses
from trl_ext.trainers.dpo_config import DPOConfig
from trl_ext.trainers.loss_terms import build_losses, check_combination, resolve_loss_types
from trl_ext.trainers.metrics import means_over_processes
from trl_ext.trainers.mixing import MixingEstimate, check_measurable, estimate_alpha
from trl_ext.trainers.model_card import complete_model_card, describe_losses
from trl_ext.trainers.policy_copy import frozen_copy
from trl_ext.trainers.reference import load_reference, save_reference
from trl_ext.trainers.scoring import ReferenceModel, Scorer, build_scorer
from trl_ext.trainers.trl_seam import (
    PAIR_METRICS,
    Replay,
    base_model,
    bind_forward,
    forget_metrics,
    forget_statistics,
    fused_forward,
    map_rows,
    no_reference,
    only_term,
    reference_in_inputs,
    unbind_forward,
    with_cache_key,
)


logger = get_logger(__name__)

# In a checkpoint: the measured `alpha`
MIXING_FILE = "bias_variance_mixing.json"
# Keys of a batch that holds whole groups
GROUP_KEYS = ("others", "other_scores", "other_mask", "other_ref_logps")


def _scored(dataset: Any, reward: Any, losses: Mapping[str, Any]) -> Any:
    """The dataset, or each of several, with scores where a loss reads them and there are none."""
    if isinstance(dataset, Mapping):
        return type(dataset)({name: _scored(split, reward, losses) for name, split in dataset.items()})
    read = {name for loss in losses.values() for name in (*loss.required_columns, *loss.optional_columns)}
    if not read & {"score_chosen", "score_rejected", "preference_prob"}:
        raise ValueError(
            f"`reward_model` would not be used: none of the losses {sorted(losses) or 'of TRL'} reads scores. Leave it out."
        )
    if dataset is None:
        return None
    if not isinstance(dataset, Dataset):
        raise ValueError("`reward_model` scores map-style datasets; load the data without `streaming=True`.")
    there = {"score_chosen", "preference_prob", "scores"} & set(dataset.column_names)
    return dataset if there else score_preferences(dataset, reward)


class DPOTrainer(trl.DPOTrainer):
    """
    Drop-in for [`trl.DPOTrainer`] that knows more loss types.

    With TRL's loss types it is TRL's trainer. With ours, the dataset columns that a loss reads reach it, and each loss
    is computed on the same log-probabilities and in the same forward as TRL's own, with which it can be mixed.

    Example:

    ```python
    >>> from datasets import load_dataset
    >>> from trl_ext import DPOConfig, DPOTrainer

    >>> dataset = load_dataset("trl-lib/ultrafeedback_binarized", split="train")  # score_chosen, score_rejected

    >>> trainer = DPOTrainer(
    ...     model="Qwen/Qwen3-0.6B",
    ...     args=DPOConfig(loss_type="offset", loss_kwargs={"alpha": 0.5}, output_dir="out"),
    ...     train_dataset=dataset,
    ... )
    >>> trainer.train()
    ```

    Args:
        ref_model ([`~transformers.PreTrainedModel`], *optional*):
            Reference. Where none is given, and `model` is a model and not a name, it is a frozen copy of that model with the
            weights it has when the trainer is built: the reference of a second stage is what the first has trained, as in
            [`OnlineDPOTrainer`]. (TRL loads it anew from the folder or hub name that the model came from; a warning says
            where that would differ. Under ZeRO-3, where a model cannot be copied, it is loaded here too.) Losses that state
            `needs_reference = False` have none, unless they are mixed with one that needs it.
        args ([`DPOConfig`] or [`trl.DPOConfig`], *optional*):
            Configuration. With TRL's class, losses of ours have their default hyper-parameters.
        train_dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            Preference data in any form that TRL takes, with the columns that the losses require (`trl-ext losses NAME`
            says which). A numeric column `weight`, at least 0, scales the loss of each pair.
        reward_model (*optional*):
            What [`~trl_ext.data.score_preferences`] takes as `reward`. Scores the pairs (or groups) where a loss reads scores
            and the dataset has none.
        kwargs:
            All other arguments of [`trl.DPOTrainer`], with their meaning there.

    Raises:
        `ValueError`: For columns that are absent or cannot be used, an empty dataset, and options that exclude each
            other; before the model is loaded.
    """

    def __init__(
        self,
        model: "str | PreTrainedModel | Any",
        ref_model: PreTrainedModel | None = None,
        args: trl.DPOConfig | None = None,
        data_collator: DataCollator | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset | IterableDataset | Mapping[str, Dataset | IterableDataset] | None = None,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin | None = None,
        compute_metrics: Callable | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        quantization_config: Any | None = None,
        peft_config: Any | None = None,
        reward_model: Any | None = None,
    ):
        names, losses = ["sigmoid"], {}
        if args is not None:
            names = resolve_loss_types(args.loss_type)
            losses = build_losses(names, args.loss_kwargs if isinstance(args, DPOConfig) else None)
            check_combination(args, names, losses)
        if reward_model is not None:
            self._check_paths(model, ref_model)  # before the scoring, which may take long
            train_dataset, eval_dataset = (
                _scored(data, reward_model, losses) for data in (train_dataset, eval_dataset)
            )
        # What the losses of ours read from the dataset; `_losses` are the terms that TRL does not compute
        self._losses: dict[str, Any] = losses
        self._weights: dict[str, float] = {}
        self._columns: list[str] = []
        self._pairing = self._groups = None
        self._mixing: MixingEstimate | None = None
        if isinstance(train_dataset, (Dataset, IterableDataset)):
            available = columns_of(train_dataset, "train")
            if is_grouped(available):
                takes = any(loss.takes_groups for loss in losses.values())
                self._pairing = getattr(args, "pairing", None) or ("group" if takes else "best_worst")
                self._groups = self._pairing == "group"
                train_dataset = from_groups(train_dataset, self._pairing, "train")
                available = columns_of(train_dataset, "train")
            if WEIGHT in available:
                self._losses = losses = self._weighted_losses(names, losses, args)
            self._columns = used_columns(available, losses, "train")
            if self._groups:
                self._columns = list(dict.fromkeys([*self._columns, "score_chosen", "score_rejected"]))
                if self._empty_trace or getattr(args, "ld_alpha", None) is not None:
                    raise ValueError(
                        "Whole groups cannot be combined with `bias_variance` or `ld_alpha`, which are defined on pairs. "
                        'Set `pairing="best_worst"`.'
                    )
            self._refuse_vision(available, losses)
            train_dataset = checked(train_dataset, self._columns, losses, "train")
            for remark in filter(None, (loss.remark(self._columns) for loss in losses.values())):
                logger.warning(remark)
        if eval_dataset is not None:
            eval_dataset = self._checked_eval(eval_dataset)
        self._check_paths(model, ref_model)
        for given in (model, ref_model):
            if isinstance(given, torch.nn.Module):
                unbind_forward(base_model(given))  # of an earlier trainer, or of the model this one is a copy of
        self._needs_reference = not losses or any(name not in losses or losses[name].needs_reference for name in names)
        if not self._needs_reference:
            self._refuse_reference(names, ref_model, args)
        copied = ref_model is None and self._needs_reference and self._copies_policy(model, peft_config, args)
        if copied:
            ref_model = frozen_copy(model)

        with no_reference(args) if not self._needs_reference else contextlib.nullcontext():
            super().__init__(
                model=model,
                ref_model=ref_model,
                args=args,
                data_collator=data_collator,
                train_dataset=train_dataset,
                eval_dataset=eval_dataset,
                processing_class=processing_class,
                compute_metrics=compute_metrics,
                callbacks=callbacks,
                optimizers=optimizers,
                quantization_config=quantization_config,
                peft_config=peft_config,
            )
        if not self._needs_reference:
            self.precompute_ref_logps = False
        if copied and self.precompute_ref_logps:
            self.ref_model = None  # it has served
        bind_forward(base_model(self.model))
        _ = self._scorer  # an impossible backend is refused now
        self._measures_alpha = getattr(self._losses.get("bias_variance"), "alpha", None) == "auto"
        if self._measures_alpha:
            check_measurable(self)
        if not self._losses:
            return

        # TRL computes its own loss types, we the rest
        weights = dict(zip(names, self.loss_weights, strict=True))
        self._weights = {name: weights[name] for name in self._losses}
        theirs = [(name, weight) for name, weight in zip(names, self.loss_weights, strict=True) if name not in losses]
        self.loss_types = [name for name, _ in theirs]
        self.loss_weights = [weight for _, weight in theirs]
        self.data_collator = PreferenceCollator(
            self.data_collator, self._numeric_columns, self._empty_trace, bool(self._groups)
        )

        described = {name: loss for name, loss in self._losses.items() if loss.paper}
        if described:
            first = next(iter(described.values()))
            self._name = " + ".join(names)
            self._paper = {"title": first.title, "id": first.paper.split(",")[0], "citation": first.citation}
            self._tag_names = [*self._tag_names, "trl-ext", *described]

    @staticmethod
    def _check_paths(*models: Any) -> None:
        for model in models:
            refuse_missing_path(model, "model")

    # Reference

    @staticmethod
    def _refuse_reference(names: list[str], ref_model: Any, args: trl.DPOConfig) -> None:
        """Refuse what would make or move a reference that no loss reads."""
        given = [name for name in ("sync_ref_model", "precompute_ref_log_probs") if getattr(args, name)]
        given += ["ref_model"] if ref_model is not None else []
        if given:
            raise ValueError(
                f"None of the losses {names} reads a reference model, so {given} would have no effect. Leave {given} out."
            )

    @staticmethod
    def _copies_policy(model: Any, peft_config: Any, args: trl.DPOConfig | None) -> bool:
        """
        Whether the reference is a copy of the policy as it was given. TRL would load it anew from where the policy came from.

        Adapters need no copy. What is precomputed needs none either, but under FSDP, where the policy is not sharded yet. Under
        ZeRO-3 a model cannot be copied, so it is loaded.
        """
        if not isinstance(model, PreTrainedModel) or peft_config is not None or is_deepspeed_zero3_enabled():
            return False
        if args is None or not args.precompute_ref_log_probs:
            return True
        # Before the accelerator is made, this is where it stands
        return bool(args.fsdp) or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"

    # Dataset

    @property
    def _empty_trace(self) -> bool:
        return TEXT_COLUMNS[0] in self._columns

    @property
    def _numeric_columns(self) -> list[str]:
        return [column for column in self._columns if column not in TEXT_COLUMNS]

    @staticmethod
    def _weighted_losses(names: list[str], losses: dict[str, Any], args: trl.DPOConfig | None) -> dict[str, Any]:
        """The losses that a `weight` column scales: ours, and TRL's `sigmoid`, which then is computed here."""
        unweighted = [name for name in names if name not in losses and name != "sigmoid"]
        if unweighted:
            raise ValueError(
                f"The train dataset has a column 'weight', which scales each pair's loss, but TRL's {unweighted} cannot "
                "be weighted per pair. Use `sigmoid` or a loss of this package, or drop the column: "
                "dataset.remove_columns('weight')."
            )
        weighted = {name: losses[name] if name in losses else SigmoidLoss() for name in names}
        if args is not None:
            check_combination(args, names, weighted)
        return weighted

    @staticmethod
    def _refuse_vision(available: list[str], losses: dict[str, Any]) -> None:
        needy = [name for name, loss in losses.items() if TEXT_COLUMNS[0] in loss.required_columns]
        if needy and {"image", "images"} & set(available):
            raise ValueError(
                f"{needy} cannot be used on a vision dataset: its completions are tokenized while training, the "
                "empty-trace pair when the dataset is prepared. Remove the images, or choose another loss."
            )
        if needy and "prompt" not in available:
            raise ValueError(
                f"{needy} needs an explicit column 'prompt': the empty-trace pair is rendered after it. The train "
                f"dataset has {sorted(available)}; `trl.extract_prompt` splits it off."
            )

    def _checked_eval(self, dataset: Any) -> Any:
        """Evaluation data, one dataset or a dict of them, with the same columns as the training data, checked."""
        if isinstance(dataset, Mapping):
            return type(dataset)({name: self._checked_split(split, name) for name, split in dataset.items()})
        return self._checked_split(dataset, "eval")

    def _checked_split(self, dataset: Any, split: str) -> Any:
        if not isinstance(dataset, (Dataset, IterableDataset)):
            return dataset
        available = columns_of(dataset, split)
        if is_grouped(available):
            # Where training is on pairs, whole groups cannot be collated: the best against the worst
            dataset = from_groups(dataset, self._pairing or "best_worst", split)
            available = columns_of(dataset, split)
        if not self._losses:
            return dataset
        if self._groups and OTHERS not in available and "other_ids" not in available:
            raise ValueError(
                f"The {split} dataset holds no groups, the train dataset does. Its columns are {available}."
            )
        missing = [column for column in self._columns if column not in available]
        if self._empty_trace and EMPTY_TRACE_PREFIX + TOKENIZED[0] in available:
            missing = [column for column in missing if column not in TEXT_COLUMNS]
        else:
            used_columns(available, self._losses, split)
        if missing:
            raise ValueError(
                f"The {split} dataset lacks the columns {missing}, which the losses read from the train dataset. Its "
                f"columns are {sorted(available)}."
            )
        return checked(dataset, self._columns, self._losses, split)

    def _prepare_dataset(self, dataset, processing_class, args, dataset_name):
        available = columns_of(dataset, dataset_name)
        if set(TOKENIZED) <= set(available):
            if set(available) & {EMPTY_TRACE_PREFIX + TOKENIZED[0], "other_ids", "ref_chosen_logps"}:
                return dataset  # prepared here before, such as `trainer.eval_dataset` handed to `evaluate`
            # Tokenized by the user, such as steps that no end of sequence follows
            return check_tokenized(dataset, dataset_name, args.max_length, args.truncation_mode == "keep_start")
        if is_conversational(next(iter(dataset))):
            require_chat_template(processing_class)
        if self._groups:
            return self._prepare_groups(dataset, processing_class, args, dataset_name)
        if self._empty_trace:
            dataset = dataset.map(check_pairs, with_indices=True, fn_kwargs={"split": dataset_name})
        else:
            warn_of_empty_completions(dataset, dataset_name)
        rows = len(dataset) if isinstance(dataset, Dataset) else None
        dataset = super()._prepare_dataset(dataset, processing_class, args, dataset_name)
        if rows is not None:
            say_what_was_dropped(rows, len(dataset), dataset_name, args.max_length)
        if not self._empty_trace:
            return dataset
        options = {"num_proc": args.dataset_num_proc} if isinstance(dataset, Dataset) else {}
        return dataset.map(
            tokenize_empty_trace, fn_kwargs={"tokenizer": self._tokenizer}, remove_columns=[HAS_TRACES], **options
        )

    def _prepare_groups(self, dataset, processing_class, args, dataset_name):
        """Best and worst as TRL's pair, then the others, tokenized by TRL as pairs of their own."""
        rows = len(dataset)
        dataset = super()._prepare_dataset(dataset, processing_class, args, dataset_name)
        say_what_was_dropped(rows, len(dataset), dataset_name, args.max_length)
        flat, starts = flatten_others(dataset)
        if len(flat):
            # A plain copy: `dataclasses.replace` would run `__post_init__` and reset the state of accelerate
            whole = copy.copy(args)
            whole.max_length = None  # rows were dropped above, where their prompts leave no room
            flat = super()._prepare_dataset(flat, processing_class, whole, f"{dataset_name} (other completions)")
        fields = {"other_prompt_ids": ("prompt_ids", "prompt_ids"), "other_ids": ("chosen_ids", "rejected_ids")}
        return gather_others(dataset, flat, starts, fields).remove_columns([OTHERS])

    def _set_signature_columns_if_needed(self):
        super()._set_signature_columns_if_needed()
        extra = list(self._numeric_columns) + (list(OTHER_FIELDS) if self._groups else [])
        if self._empty_trace:
            extra += [EMPTY_TRACE_PREFIX + name for name in EMPTY_TRACE_FIELDS]
        self._signature_columns += [name for name in extra if name not in self._signature_columns]

    def _precompute_ref_logps(self, dataset, name, batch_size):
        if not self._needs_reference or "ref_chosen_logps" in (dataset.column_names or ()):
            return dataset  # nobody reads them, or they are there already
        if not isinstance(dataset, Dataset):
            return super()._precompute_ref_logps(dataset, name, batch_size)  # says that a stream cannot be precomputed
        args = self.args
        key = (args.max_length, args.truncation_mode, args.ld_alpha, args.bf16, args.fp16, str(self._scorer))
        # Settings of the model that are no weights: positions, soft caps, windows
        scored = self.model if self.ref_model is None else self.ref_model
        key += (base_model(self.accelerator.unwrap_model(scored)).config.to_json_string(),)
        collator = self.data_collator
        if isinstance(collator, PreferenceCollator):  # `evaluate` of a new dataset: the reference reads no columns
            self.data_collator = collator.collator
        try:
            dataset = super()._precompute_ref_logps(with_cache_key(dataset, *key), name, batch_size)
            if self._groups:
                flat, starts = flatten_others(dataset)
                if len(flat):
                    flat = with_cache_key(flat, *key)
                    flat = super()._precompute_ref_logps(flat, f"{name} (other completions)", batch_size)
                fields = {"other_ref_logps": ("ref_chosen_logps", "ref_rejected_logps")}
                dataset = gather_others(dataset, flat, starts, fields)
            if self._empty_trace:
                ids = {EMPTY_TRACE_PREFIX + field: field for field in ("prompt_ids", "chosen_ids", "rejected_ids")}
                empty = with_cache_key(dataset.select_columns(list(ids)).rename_columns(ids), *key)
                empty = super()._precompute_ref_logps(empty, f"{name} (empty trace)", batch_size)
                refs = {ref: EMPTY_TRACE_PREFIX + ref for ref in ("ref_chosen_logps", "ref_rejected_logps")}
                empty = empty.select_columns(list(refs)).rename_columns(refs)
                dataset = concatenate_datasets([dataset, empty], axis=1)
        finally:
            self.data_collator = collator
        return dataset

    # Loss

    def _split(self, inputs: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        """A batch as (what the model and TRL read, numeric columns, the empty-trace pair)."""
        columns = {name: inputs[name] for name in self._numeric_columns if name in inputs}
        empty = {
            name.removeprefix(EMPTY_TRACE_PREFIX): value
            for name, value in inputs.items()
            if name.startswith(EMPTY_TRACE_PREFIX)
        }
        rest = {
            name: value
            for name, value in inputs.items()
            if name not in columns and not name.startswith(EMPTY_TRACE_PREFIX)
        }
        return rest, columns, empty

    @functools.cached_property
    def _scorer(self) -> Scorer | None:
        """Our token log-probabilities; `None` for TRL's own. Built when first needed: TRL may precompute with it."""
        return build_scorer(self.model, self.args, self.aux_loss_enabled, self.ref_model)

    def compute_ref_log_probs(self, model, inputs):
        if self._scorer is None:
            return super().compute_ref_log_probs(model, inputs)
        return self._ref_log_probs(model, inputs, self._scorer.layout(inputs, inputs["input_ids"].size(0) // 2))

    def _ref_log_probs(self, model, inputs, layout):
        if self._scorer is not None:
            model = ReferenceModel(self._scorer, model, inputs, layout)
        return super().compute_ref_log_probs(model, inputs)

    def _statistics(self) -> tuple[str, ...] | None:
        """
        Which of the per-token statistics that feed TRL's metrics to compute: all of them (`None`) in evaluation and in a
        step that will be logged, else those that cost next to nothing.
        """
        args, state = self.args, self.state
        step = state.global_step + 1
        logged = {
            "no": False,
            "steps": step % state.logging_steps == 0 if state.logging_steps else True,
            "epoch": True,  # its last step is not known in advance
        }[str(getattr(args.logging_strategy, "value", args.logging_strategy))]
        if not self.model.training or logged or (args.logging_first_step and step == 1):
            return None
        capped = getattr(self.model.config.get_text_config(), "final_logit_softcapping", None) is not None
        return ("is_top1",) if capped else ("mean_logits", "is_top1")

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if not self._losses and self._scorer is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        group = {name: inputs[name] for name in GROUP_KEYS if name in inputs}
        inputs = {name: value for name, value in inputs.items() if name not in GROUP_KEYS}
        inputs, columns, empty = self._split(inputs)
        joint = self._join(inputs, empty) if empty else inputs
        prompts = inputs["input_ids"].size(0) // 2
        if group:
            joint = self._join_others(inputs, group)

        # One forward for all sequences, through the wrapped model
        statistics = layout = None
        if self._scorer is None:
            outputs = fused_forward(model, joint, router_logits=self.aux_loss_enabled)
        else:
            statistics = self._statistics()
            layout = self._scorer.layout(joint, prompts)
            outputs = self._scorer(model, joint, layout, statistics, router_logits=self.aux_loss_enabled)
        logps = sum_completions(outputs.log_probs, joint["completion_mask"], self.ld_alpha)
        ref_logps = self._joint_ref_logps(joint, layout) if self._needs_reference else None
        lengths = completion_lengths(joint["completion_mask"])

        # The rows of the pair that TRL's method is given: [chosen, rejected]. In groups they come first; with an empty-trace
        # pair, rows are [chosen, its chosen, rejected, its rejected].
        rows = torch.arange(logps.numel(), device=logps.device)
        halves = rows.chunk(4) if empty else rows[: 2 * prompts].chunk(2)
        pair_rows = torch.cat([halves[0], halves[2]]) if empty else torch.cat(halves)

        def batch_of(rows: torch.Tensor, **fields) -> PreferenceBatch:
            references = (None, None) if ref_logps is None else ref_logps[rows].chunk(2)
            return PreferenceBatch(
                *logps[rows].chunk(2),
                *references,
                *lengths[rows].chunk(2),
                beta=self.beta,
                columns=columns,
                **fields,
            )

        empty_trace = batch_of(torch.cat([halves[1], halves[3]])) if empty else None
        batch = batch_of(pair_rows, empty_trace=empty_trace)
        group_batch = None
        if group:
            by_group = (None if t is None else t.view(-1, prompts).T for t in (logps, ref_logps, lengths))
            group_batch = self._group_batch(group, columns, *by_group)
        if len(pair_rows) < len(rows):
            narrower = joint["input_ids"].size(1) - inputs["input_ids"].size(1)
            outputs = map_rows(outputs, lambda field: field[pair_rows, : field.size(1) - narrower])

        # TRL adds its own loss types, the auxiliary loss and all of its metrics, on the outputs that are there
        for name in ("ref_chosen_logps", "ref_rejected_logps"):
            reference = getattr(batch, name)
            inputs[name] = torch.zeros_like(batch.chosen_logps).detach() if reference is None else reference
        metrics: dict[str, Any] = {}
        result = self._trls_loss(model, outputs, inputs, return_outputs, num_items_in_batch, metrics)
        if statistics is not None:
            forget_statistics(self, statistics)
        if not self._losses:
            return result
        if len(pair_rows) < len(rows) and self.model.training:
            self._count_tokens(joint["attention_mask"].sum(dim=1) * (lengths > 0), pair_rows)
        if empty:
            forget_metrics(self, PAIR_METRICS)
            metrics |= self._pair_metrics(batch)
        loss = (result[0] if return_outputs else result) + self._loss(batch, group_batch, metrics)
        return (loss, result[1]) if return_outputs else loss

    def _joint_ref_logps(self, joint: dict[str, Any], layout: Any) -> torch.Tensor:
        """Reference log-probabilities of all rows of a batch, shape `(N,)`, nats."""
        if "ref_chosen_logps" in joint:
            return torch.cat([joint["ref_chosen_logps"], joint["ref_rejected_logps"]])
        model = self.model if self.ref_model is None else self.ref_model
        return torch.cat(self._ref_log_probs(model, joint, layout))

    def _trls_loss(self, model, outputs, inputs, return_outputs, num_items_in_batch, metrics):
        """TRL's method on outputs that are there; beside losses of ours, each of its loss types goes into `metrics` by name."""
        model = Replay(model, outputs)
        with reference_in_inputs(self):
            if not self._losses or not self.loss_types:
                return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
            total = terms = None
            for name, weight in zip(self.loss_types, self.loss_weights, strict=True):
                # TRL's metrics and the auxiliary loss are added once, with the first
                with only_term(self, name, record=total is None):
                    result = super().compute_loss(model, inputs, return_outputs and total is None, num_items_in_batch)
                loss, rest = result if isinstance(result, tuple) else (result, None)
                if total is None:
                    total = self.router_aux_loss_coef * outputs.aux_loss if self.aux_loss_enabled else 0.0
                    loss, terms = loss - total, rest
                total = total + weight * loss
                metrics[f"loss/{name}"] = loss
        return (total, terms) if return_outputs else total

    def _count_tokens(self, tokens: torch.Tensor, counted: torch.Tensor) -> None:
        """Add the tokens of the rows that TRL's method, which sees the rows `counted`, did not count."""
        others = tokens.sum() - tokens[counted].sum()
        self._total_train_tokens += self.accelerator.gather_for_metrics(others).sum().item() // self._tp_size
        self._metrics["train"]["num_tokens"] = [self._total_train_tokens]

    @staticmethod
    def _pair_metrics(batch: PreferenceBatch) -> dict[str, torch.Tensor]:
        """What TRL's method says of rewards and log-probs, one value per row, NaN where a row has no traced pair."""
        logps = batch.chosen_logps.detach(), batch.rejected_logps.detach()
        rewards = logps
        if batch.ref_chosen_logps is not None:
            rewards = logps[0] - batch.ref_chosen_logps, logps[1] - batch.ref_rejected_logps
        chosen, rejected = (batch.beta * each for each in rewards)
        values = (chosen, rejected, (chosen > rejected).float(), chosen - rejected, *logps)
        there = present(batch)
        return {name: value.masked_fill(~there, torch.nan) for name, value in zip(PAIR_METRICS, values, strict=True)}

    def _join(self, inputs: dict[str, Any], empty: dict[str, Any]) -> dict[str, Any]:
        """Both pairs as one batch of `4 B` rows: chosen, its empty-trace one, rejected, its empty-trace one."""
        padding = {"input_ids": self._tokenizer.pad_token_id}
        joint = {}
        for name in inputs:
            if name not in empty:
                raise ValueError(f"The collator gives {name!r} for the traced pair but not for the empty-trace pair.")
            first, second = inputs[name], empty[name]
            if name.startswith("ref_"):
                joint[name] = torch.cat([first, second])
                continue
            parts = [part for halves in zip(first.chunk(2), second.chunk(2), strict=True) for part in halves]
            rows = [row for part in parts for row in part]
            joint[name] = pad(rows, padding_value=padding.get(name, 0), padding_side="right")
        return joint

    def _join_others(self, inputs: dict[str, Any], group: dict[str, Any]) -> dict[str, Any]:
        """Whole groups as one batch of `K B` rows: best, worst, and the others in turn."""
        padding = {"input_ids": self._tokenizer.pad_token_id}
        joint = {
            name: pad(
                [row for each in (inputs, *group["others"]) for row in each[name]],
                padding_value=padding.get(name, 0),
                padding_side="right",
            )
            for name in inputs
            if not name.startswith("ref_")
        }
        if "other_ref_logps" in group:
            others = group["other_ref_logps"].T.flatten()
            joint["ref_chosen_logps"] = torch.cat([inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]])
            joint["ref_rejected_logps"] = others
        return joint

    def _group_batch(self, group: dict[str, Any], columns: dict[str, Any], logps, ref_logps, lengths) -> GroupBatch:
        """What losses on groups are given; `(B, K)` tensors, best and worst first."""
        ends = [columns["score_chosen"].unsqueeze(1), columns["score_rejected"].unsqueeze(1)]
        mask = torch.cat([torch.ones_like(torch.cat(ends, dim=1), dtype=torch.bool), group["other_mask"]], dim=1)
        scores = torch.cat([*ends, group["other_scores"]], dim=1)
        return GroupBatch(logps, ref_logps, lengths, scores, mask, beta=self.beta, columns=columns)

    def _loss(self, batch: PreferenceBatch, group: GroupBatch | None, metrics: dict[str, Any]) -> torch.Tensor:
        """Weighted sum of the mean losses of ours. Their metrics are logged with those that are there already, all at once."""
        weight = batch.columns.get(WEIGHT)
        of_pairs = {"lengths/chosen": batch.chosen_lengths, "lengths/rejected": batch.rejected_lengths}
        if batch.ref_chosen_logps is not None:
            of_pairs |= {"logratios/chosen": batch.chosen_logratios, "logratios/rejected": batch.rejected_logratios}
        if batch.empty_trace is not None:
            there = present(batch)
            of_pairs = {name: value.float().masked_fill(~there, torch.nan) for name, value in of_pairs.items()}
        metrics |= of_pairs
        if weight is not None:
            metrics["pair_weight/mean"] = weight
        if self._mixing is not None:
            metrics |= {"mixing/alpha": self._mixing.alpha, "mixing/variance_ratio": self._mixing.variance_ratio}
        total = torch.zeros((), dtype=batch.chosen_logps.dtype, device=batch.chosen_logps.device)
        for name, loss in self._losses.items():
            given = group if group is not None and loss.takes_groups else batch
            per_pair = loss(given)
            if per_pair.shape != batch.chosen_logps.shape:
                raise ValueError(
                    f"The loss {name!r} returned shape {tuple(per_pair.shape)}; expected one value per pair, shape "
                    f"{tuple(batch.chosen_logps.shape)}. Reduce over tokens or completions, not over pairs."
                )
            if weight is not None:
                per_pair = per_pair * weight.to(per_pair.dtype)
            total = total + self._weights[name] * per_pair.mean()
            for key, value in loss.metrics(given).items():
                metrics[f"{name}/{key}" if key in metrics else key] = value
            if len(self._weights) + len(self.loss_types) > 1:
                metrics[f"loss/{name}"] = per_pair
        mode = "train" if self.model.training else "eval"
        for key, value in means_over_processes(self.accelerator, metrics).items():
            self._metrics[mode][key].append(value)
        return total

    # What a run has measured or moved, and a checkpoint keeps

    def train(self, resume_from_checkpoint=None, *args, **kwargs):
        if self._measures_alpha:
            self._mix(self._estimated_mixing(resume_from_checkpoint))
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def evaluation_loop(self, *args, **kwargs):
        if self._measures_alpha and self._mixing is None:
            self._mix(estimate_alpha(self))
        return super().evaluation_loop(*args, **kwargs)

    def _mix(self, estimate: MixingEstimate) -> None:
        """Give `bias_variance` the weight that was measured."""
        self._mixing = estimate
        loss = dataclasses.replace(self._losses["bias_variance"], alpha=estimate.alpha)
        self._losses = {**self._losses, "bias_variance": loss}
        logger.info(f"bias_variance: alpha={estimate.alpha:.3f}, measured on {estimate.rows} rows.")

    def _estimated_mixing(self, resume_from_checkpoint) -> MixingEstimate:
        if resume_from_checkpoint is True:
            resume_from_checkpoint = get_last_checkpoint(self.args.output_dir)
        path = Path(resume_from_checkpoint or "") / MIXING_FILE
        if resume_from_checkpoint and path.exists():  # what the run began with
            return MixingEstimate(**json.loads(path.read_text()))
        return self._mixing or estimate_alpha(self)

    def _save_checkpoint(self, model, trial):
        super()._save_checkpoint(model, trial)
        folder = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"
        if self.is_world_process_zero():
            save_losses(folder, self._all_weights, self._losses)
        if self._mixing is not None and self.is_world_process_zero():
            (folder / MIXING_FILE).write_text(self._mixing.to_json())
        if self.args.sync_ref_model:
            folder = f"{self._get_output_dir(trial=trial)}/checkpoint-{self.state.global_step}"
            save_reference(self.accelerator.unwrap_model(self.ref_model), folder)

    def _load_optimizer_and_scheduler(self, checkpoint):  # DeepSpeed never calls `_load_from_checkpoint`
        if checkpoint is not None:
            refuse_other_losses(checkpoint, self._all_weights, self._losses)
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and self.args.sync_ref_model:
            load_reference(self.accelerator.unwrap_model(self.ref_model), checkpoint)

    # Evaluation and model card

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        if eval_dataset is not None and not isinstance(eval_dataset, str):
            eval_dataset = self._checked_eval(eval_dataset)
        return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)

    def create_model_card(self, *args, **kwargs):
        super().create_model_card(*args, **kwargs)
        if self.is_world_process_zero():
            described = any(loss.paper for loss in self._losses.values())
            table = describe_losses(self._all_weights, self._losses, self.beta) if described else ""
            complete_model_card(self.args.output_dir, self.model, table)

    @property
    def _all_weights(self) -> dict[str, float]:
        """Weight of each loss of the run, TRL's own first."""
        return dict(zip(self.loss_types, self.loss_weights, strict=True)) | self._weights
