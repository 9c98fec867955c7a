"""`trl.DPOTrainer` with the losses of this package."""

import contextlib
import dataclasses
import functools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import trl
from accelerate.logging import get_logger
from datasets import Dataset, IterableDataset
from transformers import DataCollator, PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin, TrainerCallback

from trl_ext.data.cache import write_atomically
from trl_ext.data.checks import REFERENCES, refuse_unknown_tokens
from trl_ext.data.collator import RowsCollator
from trl_ext.data.columns import over_splits
from trl_ext.data.paths import refuse_missing_path
from trl_ext.rows import TABLE, Plan, Rows, from_batch
from trl_ext.trainers.checkpoints import TOKENS_FILE
from trl_ext.trainers.dpo_config import DPOConfig
from trl_ext.trainers.loss_types import build_losses, check_combination, resolve_loss_types
from trl_ext.trainers.metrics import pair_metrics
from trl_ext.trainers.mixing import MeasuredMixing
from trl_ext.trainers.options import refuse_dropped_data
from trl_ext.trainers.policy_copy import frozen_copy
from trl_ext.trainers.prepare import PreferenceData
from trl_ext.trainers.reference import copies_policy, precomputed, reference_forward, refuse_reference
from trl_ext.trainers.reference_memory import ReferenceMemory
from trl_ext.trainers.scoring import Scorer, build_scorer, statistics_of_step
from trl_ext.trainers.teachers import Teachers, given_teachers, with_divergences
from trl_ext.trainers.terms import Terms
from trl_ext.trainers.trl_seam import (
    PAIR_METRICS,
    Replay,
    base_model,
    bind_forward,
    forget_metrics,
    forget_statistics,
    map_rows,
    no_reference,
    only_term,
    reference_in_inputs,
    unbind_forward,
)
from trl_ext.trainers.with_scores import with_scores
from trl_ext.trainers.with_terms import WithTerms


logger = get_logger(__name__)


class DPOTrainer(WithTerms, trl.DPOTrainer):
    """
    Drop-in for [`trl.DPOTrainer`] that knows more loss types.

    With TRL's loss types it is TRL's trainer. With ours, the dataset columns that a loss reads reach it, and each loss
    is computed on the same log-probabilities and in the same forward as TRL's own, with which it can be mixed.

    Beside TRL's metrics are logged, each a mean over the rows of all processes and micro-batches since the last log: `lengths/*`
    (tokens) and `logratios/*` (nats) of chosen and rejected completions, `pair_weight/mean`, what each loss gives as `metrics`, and
    of several losses each one's own mean, `loss/NAME`. Those of an evaluation begin with its dataset, `eval_NAME_`. With
    `bias_variance`, TRL's `rewards/*` and `logps/*` are over the rows that have a traced pair.

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
            no `ref_logps` in `reads` have none, unless they are mixed with one that reads it.
        args ([`DPOConfig`] or [`trl.DPOConfig`], *optional*):
            Configuration. With TRL's class, losses of ours have their default hyper-parameters.
        train_dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            Preference data in any form that TRL takes, with the columns that the losses require (`trl-ext losses NAME`
            says which). A numeric column `weight`, at least 0, scales the loss of each pair. Where a loss reads tokens (`dmpo`), of
            conversations the assistant's turns alone are scored.
        reward_funcs (*optional*):
            What [`~trl_ext.data.score_preferences`] takes: a reward model, a function, or a list of them. Scores the pairs (or
            groups) where a loss reads scores and the dataset has none. The rewards of a list are added up, but for a loss that
            takes each of them (`reward_distillation`): it gets lists, one number per reward, and their sum would make another
            method of it. Beside a loss that reads one score, or for groups, where one score decides which completion is
            preferred, it is an error; an [`~trl_ext.data.Ensemble`] says there how to combine them.
        judge (`Callable`, *optional*):
            A judge of two in place of `reward_funcs`, a function or a [`PreferenceModel`]; pairs get the column
            `preference_prob`.
        teacher_model, reverse_model (`str` or [`~transformers.PreTrainedModel`], *optional*):
            For a loss whose `reads` holds `"teachers"`, such as `aligndistil`: a model trained by DPO, and one trained by DPO on
            the same pairs with `chosen` and `rejected` swapped. They are run, never trained. A run has them from here or from the
            config.
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
        reward_funcs: Any | None = None,
        judge: Callable | None = None,
        teacher_model: "str | PreTrainedModel | None" = None,
        reverse_model: "str | PreTrainedModel | None" = None,
    ):
        names, losses = ["sigmoid"], {}
        if args is not None:
            names = resolve_loss_types(args.loss_type)
            losses = build_losses(names, args.loss_kwargs if isinstance(args, DPOConfig) else None)
            check_combination(args, names, losses)
        teachers = given_teachers(
            losses,
            args,
            model=model,
            ref_model=ref_model,
            teacher_model=teacher_model,
            reverse_model=reverse_model,
        )
        if reward_funcs is not None or judge is not None:
            self._check_paths(model, ref_model)  # before the scoring, which may take long
            train_dataset, eval_dataset = (
                with_scores(data, reward_funcs, judge, losses) for data in (train_dataset, eval_dataset)
            )
        self._data = PreferenceData(names, losses, args)
        train_dataset = self._data.training(train_dataset)
        if eval_dataset is not None:
            eval_dataset = self._data.evaluation(eval_dataset)
        losses = self._data.losses
        dispatched = args is not None and args.accelerator_config.dispatch_batches
        if losses and dispatched:
            raise ValueError(
                "`dispatch_batches=True` has one process cut batches for the others, and what losses read of a batch has no row for "
                "each of its sequences. Leave it out of `accelerator_config`: each process then reads its own part."
            )
        self._check_paths(model, ref_model)
        for given in (model, ref_model):
            if isinstance(given, torch.nn.Module):
                unbind_forward(base_model(given))  # of an earlier trainer, or of the model this one is a copy of
        weights = list(zip(names, getattr(args, "loss_weights", None) or [1.0] * len(names), strict=True))
        theirs = [(name, weight) for name, weight in weights if name not in losses]
        terms = Terms(losses, {name: weight for name, weight in weights if name in losses}, dict(theirs))
        self._keep_terms(terms, " + ".join(names))
        self._needs_reference = "ref_logps" in terms.reads
        if not self._needs_reference:
            refuse_reference(names, ref_model, args, teachers)
        copied = ref_model is None and self._needs_reference and copies_policy(model, peft_config, args)
        if copied:
            ref_model = frozen_copy(model)

        with no_reference(model) if not self._needs_reference else contextlib.nullcontext():
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
        if copied and self.precompute_ref_logps:
            self.ref_model = None  # it has served
        refuse_dropped_data(self)
        for split, data in (("train", self.train_dataset), ("eval", self.eval_dataset)):
            over_splits(data, functools.partial(refuse_unknown_tokens, model=self.model), split)
        bind_forward(base_model(self.model))
        self._teachers = Teachers(self, teachers) if teachers else None
        self._mixing = MeasuredMixing(self)
        self._memory = ReferenceMemory(self)
        if losses:  # TRL computes its own loss types, we the rest
            self.loss_types, self.loss_weights = [name for name, _ in theirs], [weight for _, weight in theirs]
        if losses or (self._scorer.head is not None and not dispatched):
            data = self._data
            self.accelerator.dataloader_config.dispatch_batches = False  # which a stream would have turned on
            kinds = {"empty_trace": data.empty_trace, "groups": data.groups, "turns": data.turns}
            self.data_collator = RowsCollator(
                self.data_collator,
                data.numeric_columns,
                sharing=self._scorer.sharing,
                keys=self._memory.on,
                ld_alpha=self.ld_alpha,
                **kinds,
            )
        if self._memory.on:
            self.add_callback(self._memory)

    @staticmethod
    def _check_paths(*models: Any) -> None:
        for model in models:
            refuse_missing_path(model, "model")

    # Dataset

    def _prepare_dataset(self, dataset, processing_class, args, dataset_name):
        tokenize = super()._prepare_dataset
        return self._data.tokenized(dataset, processing_class, self._tokenizer, args, dataset_name, tokenize)

    def _set_signature_columns_if_needed(self):
        super()._set_signature_columns_if_needed()
        self._signature_columns += [name for name in self._data.signature if name not in self._signature_columns]

    def _precompute_ref_logps(self, dataset, name, batch_size):
        if not self._needs_reference or REFERENCES[0] in (dataset.column_names or ()):
            return dataset  # nobody reads them, or they are there already
        if not isinstance(dataset, Dataset):
            return super()._precompute_ref_logps(dataset, name, batch_size)  # says that a stream cannot be precomputed
        refuse_unknown_tokens(dataset, name, self.model)  # before the reference reads them, while this is being built
        return precomputed(self, super()._precompute_ref_logps, dataset, name, batch_size)

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        if eval_dataset is not None and not isinstance(eval_dataset, str):
            eval_dataset = self._data.evaluation(eval_dataset)
        return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)

    # Loss

    @functools.cached_property
    def _scorer(self) -> Scorer:
        """Our token log-probabilities, or TRL's own. Built when first needed: TRL may precompute with it."""
        return build_scorer(self.model, self.args, self.aux_loss_enabled, self.ref_model)

    def compute_ref_log_probs(self, model, inputs):
        """TRL's, for one of its own batches: what is precomputed."""
        if self._scorer.head is None:
            return super().compute_ref_log_probs(model, inputs)
        rows, _ = self._table(inputs)
        token_logps = self._reference_token_logps(model, rows)
        return self._scorer.scored(rows, token_logps, None, (), self.ld_alpha).logps.chunk(2)

    def _reference_token_logps(self, model, rows: Rows) -> torch.Tensor:
        with reference_forward(self):
            return self._scorer(model, rows, statistics=()).log_probs

    def _table(self, inputs: Mapping[str, Any]) -> tuple[Rows, Plan]:
        """The table of a batch; one of TRL's own has its rows in order, chosen completions first."""
        if TABLE in inputs:
            return from_batch(inputs)
        inputs = dict(inputs)
        ref = [inputs.pop(name) for name in REFERENCES if name in inputs]
        mask = inputs.pop("completion_mask")
        rows = Rows.of_pairs(inputs, mask, ref_logps=torch.cat(ref) if ref else None)
        if self._scorer.sharing is not None:
            rows = dataclasses.replace(rows, layout=self._scorer.sharing.layout(inputs, mask, rows.prompt))
        return rows, Plan(torch.arange(len(mask), device=mask.device).view(2, -1).T)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        terms, scorer = self._terms, self._scorer
        if not terms.losses and scorer.head is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        rows, plan = self._table(inputs)
        # The reference first: what the policy keeps for its backward is not in memory yet
        ref_token_logps = None
        if self._needs_reference and rows.ref_logps is None:
            reference = self.model if self.ref_model is None else self.ref_model
            forward = functools.partial(self._reference_token_logps, reference, rows)
            rows, ref_token_logps = self._memory.logps(reference, rows, forward)
        divergence = None if self._teachers is None else self._teachers.divergence(rows, plan)
        # One forward for all rows, through the wrapped model
        statistics = None if scorer.head is None else statistics_of_step(self)
        outputs = scorer(model, rows, statistics, router_logits=self.aux_loss_enabled, divergence=divergence)
        scored = scorer.scored(rows, outputs.log_probs, ref_token_logps, terms.reads, self.ld_alpha)
        if divergence is not None:
            scored = with_divergences(scored, outputs, rows)

        # TRL's method is given the rows of its pairs, which come first. It adds its own loss types, the auxiliary loss and all of
        # its metrics, on the outputs that are there.
        first = 2 * len(plan.pairs)
        mask, ref_logps = rows.completion_mask, scored.ref_logps
        ref_logps = torch.zeros_like(scored.logps) if ref_logps is None else ref_logps
        theirs = {**rows.inputs, "completion_mask": mask[:first]}
        theirs |= zip(REFERENCES, ref_logps[:first].chunk(2), strict=True)
        if first < len(mask):
            outputs = map_rows(outputs, lambda field: field[:first])
            # The attention mask stays whole: TRL counts tokens by it
            theirs["input_ids"] = theirs["input_ids"][:first]
        alone: dict[str, Any] = {}
        replay = Replay(model, outputs, rows.inputs)
        result = self._trls_loss(replay, outputs, theirs, return_outputs, num_items_in_batch, alone)
        if statistics is not None:
            forget_statistics(self, statistics)
        if not terms.losses:
            return result
        total, metrics, ours = terms.total(scored, plan, self.beta, self.model.training, self._over_processes)
        if plan.empty_pairs is not None:
            forget_metrics(self, PAIR_METRICS)
            metrics |= pair_metrics(scored.pair_batch(plan, self.beta), PAIR_METRICS)
        if len(terms.all_weights) > 1:
            metrics |= alone | ours
        self._note(metrics | self._mixing.metrics, len(plan.pairs))
        loss = (result[0] if return_outputs else result) + total
        return (loss, result[1]) if return_outputs else loss

    def _trls_loss(self, model, outputs, inputs, return_outputs, num_items_in_batch, metrics):
        """TRL's method on outputs that are there; beside losses of ours, each of its loss types goes into `metrics` by name."""
        with reference_in_inputs(self):
            if not self._terms.losses or not self.loss_types:
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

    # What `alpha="auto"` measures before the first step, and what is known of the reference

    def _before_training(self, checkpoint):
        file = Path(checkpoint or "") / TOKENS_FILE
        if checkpoint and file.exists():  # TRL would count from 0, in the same curve
            self._total_train_tokens = json.loads(file.read_text())
        self._memory.before_training(checkpoint)
        self._mixing.before_training(checkpoint)

    def evaluation_loop(self, *args, **kwargs):
        self._memory.before_evaluation()
        self._mixing.before_evaluation()
        return super().evaluation_loop(*args, **kwargs)

    def _save_own(self, folder):
        super()._save_own(folder)
        if self.is_world_process_zero():
            write_atomically(folder / TOKENS_FILE, json.dumps(self._total_train_tokens))
        self._mixing.save(folder)
        self._memory.save(folder)
