"""
Online DPO in four steps: generate, score, pair, learn.

`compute_loss` runs them one after the other; a subclass replaces any of them.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch
from accelerate.logging import get_logger
from accelerate.utils import is_peft_model
from transformers import Trainer
from transformers.integrations import is_deepspeed_zero3_enabled
from trl.experimental.online_dpo import OnlineDPOTrainer as TRLOnlineDPOTrainer
from trl.experimental.utils import create_reference_model
from trl.trainer.callbacks import SyncRefModelCallback
from trl.trainer.utils import add_fused_lm_head, create_model_from_path

from trl_ext.data.columns import takes_each_reward
from trl_ext.data.preference_model import PreferenceModel
from trl_ext.data.tokens import template_arguments
from trl_ext.generation import Completions
from trl_ext.trainers.online.blocks import Blocks
from trl_ext.trainers.online.checks import (
    check_arguments,
    check_preference_model,
    check_reference,
    learns_without_scores,
    reads_win_rates,
)
from trl_ext.trainers.online.config import OnlineDPOConfig, build_online_losses, default_pairing
from trl_ext.trainers.online.evaluate import Evaluation
from trl_ext.trainers.online.generate import Generation
from trl_ext.trainers.online.learn import Learning
from trl_ext.trainers.online.metrics import Ties
from trl_ext.trainers.online.prompts import PromptData
from trl_ext.trainers.online.rewards import Scores, judge_scores, reward_scores, rows_of
from trl_ext.trainers.online.selection import Selection, select
from trl_ext.trainers.online.together import Together
from trl_ext.trainers.options import refuse_dropped_data
from trl_ext.trainers.policy_copy import frozen_copy
from trl_ext.trainers.reference import SyncReferenceAdapter, add_reference_adapter
from trl_ext.trainers.scoring import build_scorer
from trl_ext.trainers.teachers import Teachers, given_teachers
from trl_ext.trainers.terms import Terms
from trl_ext.trainers.trl_seam import base_model, bind_forward, unbind_forward
from trl_ext.trainers.with_terms import WithTerms


logger = get_logger(__name__)


class OnlineDPOTrainer(Together, Generation, Learning, Evaluation, WithTerms, TRLOnlineDPOTrainer):
    """
    TRL's `OnlineDPOTrainer` with the losses of this package, `K` completions per prompt, and generation at full speed.

    Plain-text prompts get the tokenizer's special tokens, as in offline training; a chat template writes its own. (Prompts with
    images get none in either, as in TRL.) Completions follow the policy's distribution as the config changes it; the model's own
    `generation_config` gives nothing but its end-of-sequence tokens.

    Where none of the losses reads the reference, there is no reference model: nothing is logged that compares with it, and
    `rewards/*` are `beta` times the policy's log-probabilities.

    All micro-batches of an optimizer step are generated for and scored together, and learnt from one after the other: the policy
    does not change between them. `steps_per_generation`, `generation_batch_size` and `num_iterations` of the config change that.

    The four steps, `generate`, `score`, `pair` and `learn`, are there to be replaced in a subclass. What they hand on,
    [`~trl_ext.generation.Completions`], [`~trl_ext.trainers.online.rewards.Scores`] and
    [`~trl_ext.trainers.online.selection.Selection`], is on the CPU.

    Metrics, each a mean over the rows of all processes and micro-batches since the last log: `objective/scores`, `objective/kl`,
    `objective/entropy`, `objective/non_score_reward` and `objective/rlhf_reward` are over the same completions, those that are
    learnt from; `rlhf_reward` is the sum of `scores` and `non_score_reward`. `objective/scores_margin`, `rewards/chosen`,
    `rewards/rejected`, `rewards/margins`, `rewards/accuracies`, `logps/*`, `lengths/*` and `logratios/*` are over the pairs that
    are learnt from (for groups: the best completion against the worst). `completions/*`, `val/contain_eos_token`,
    `rewards/unscored` and each reward function's `rewards/NAME/mean` are over all sampled completions; `pairs/dropped_prompts` is
    the share of prompts of which nothing is learnt. `objective/behaviour_kl`, where the policy may have changed since it sampled,
    is the mean log-ratio of the policy that sampled to the one that learns, over the completions that are learnt from. `loss/NAME`
    of several losses is each one's own mean over prompts. Where there are neither rewards nor a judge, what compares completions is
    not logged.

    Example:

    ```python
    >>> from trl_ext import OnlineDPOConfig, OnlineDPOTrainer

    >>> def brevity(completions, **kwargs):
    ...     return [-float(len(completion)) for completion in completions]

    >>> trainer = OnlineDPOTrainer(
    ...     model="Qwen/Qwen3-0.6B",
    ...     reward_funcs=brevity,
    ...     args=OnlineDPOConfig(loss_type="offset", num_generations=4, output_dir="out"),
    ...     train_dataset=prompts,  # a column `prompt`, plain or conversational
    ...     processing_class=tokenizer,
    ... )
    >>> trainer.train()
    ```

    Args:
        reward_funcs (*optional*):
            TRL's: a function, a reward model, or a list of them, whose rewards times `reward_weights` are added up. That total
            chooses the pairs and is what losses read as scores, but for a loss that takes each of several (`reward_distillation`):
            it gets a list per completion, each entry less the penalties, and learns from completions on which all functions have
            an opinion. Beside a loss that reads one score that is an error.
        args ([`OnlineDPOConfig`] or TRL's, *optional*):
            Configuration.
        judge (`Callable`, *optional*):
            Judge of two completions in place of `reward_funcs`: `judge(prompts, completions_a, completions_b)` gives for
            each the probability, in [0, 1], that the first completion is preferred; or a [`PreferenceModel`], of which each
            process has a copy. Reaches `ipo` and `anchored` as a soft target, and `sppo_soft` as win rates against the prompt's
            other completions. A run whose losses all learn from completions and not from preferences (`aligndistil`) needs
            neither rewards nor a judge, and `pairing="group"`.
        teacher_model, reverse_model (`str` or [`~transformers.PreTrainedModel`], *optional*):
            For a loss that reads teachers, as in [`DPOTrainer`].
        train_dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            Prompts in a column `prompt`, as text or as messages. All columns are handed to reward functions. A numeric column
            `weight`, at least 0, scales the loss of each prompt.
        kwargs:
            All other arguments of TRL's `OnlineDPOTrainer`, with their meaning there.

    Raises:
        `ValueError`: For options that exclude each other and data that cannot be used, before training.
    """

    # Divide by the number of accumulation steps: the loss is a mean over prompts
    loss_is_scaled_for_ga = False

    def __init__(
        self,
        model,
        ref_model=None,
        reward_funcs=None,
        args=None,
        data_collator=None,
        train_dataset=None,
        eval_dataset=None,
        processing_class=None,
        reward_processing_classes=None,
        peft_config=None,
        compute_metrics=None,
        callbacks=None,
        optimizers=(None, None),
        preprocess_logits_for_metrics=None,
        judge: Callable[[list, list, list], Any] | None = None,
        teacher_model: Any = None,
        reverse_model: Any = None,
    ):
        if args is None:
            name = model if isinstance(model, str) else model.config._name_or_path
            args = OnlineDPOConfig(output_dir=f"{name.rstrip('/').split('/')[-1]}-Online-DPO")
        for field in dataclasses.fields(OnlineDPOConfig):  # a plain config of TRL's
            if not hasattr(args, field.name):
                setattr(args, field.name, field.default)
        losses = build_online_losses(args)
        if args.pairing is None:
            args.pairing = default_pairing(losses)
        terms = Terms(
            losses, dict(zip(losses, args.loss_weights or [1.0] * len(losses), strict=True)), can_be_empty=True
        )
        self._keep_terms(terms, "Online " + " + ".join(losses))
        check_reference(losses, args)
        for remark in filter(None, (loss.one_turn for loss in losses.values())):
            logger.warning_once(remark)
        teachers = given_teachers(
            losses,
            args,
            model=model,
            ref_model=ref_model,
            teacher_model=teacher_model,
            reverse_model=reverse_model,
        )
        reward_funcs = check_arguments(
            losses,
            model,
            ref_model,
            reward_funcs,
            reward_processing_classes,
            judge,
            processing_class,
            compute_metrics,
            args,
        )
        self.judge = judge
        self._each_reward = len(reward_funcs) > 1 and takes_each_reward(losses)
        if train_dataset is None:
            raise ValueError("`train_dataset` is required: a dataset with a column `prompt`.")
        if args.accelerator_config.dispatch_batches is None:
            # Of streams: texts are no tensors that one process could send to others
            args.accelerator_config.dispatch_batches = False
        self._data = PromptData(losses, judge is not None, processing_class, args, reward_funcs)
        train_dataset, eval_dataset = self._data.training(train_dataset), self._data.evaluation(eval_dataset)
        if isinstance(judge, PreferenceModel):
            check_preference_model(judge, next(iter(train_dataset))["prompt"])

        model_init_kwargs = args.model_init_kwargs
        load = None
        if isinstance(model, str):
            options = {"trust_remote_code": args.trust_remote_code, **(model_init_kwargs or {})}
            load = functools.partial(create_model_from_path, model, **options)
            model = load()
            args.model_init_kwargs = None  # used up; TRL refuses them beside a model
        for given in (model, ref_model):
            if given is not None:
                unbind_forward(base_model(given))
        self._needs_reference = "ref_logps" in terms.reads
        if ref_model is not None and not self._needs_reference:
            hint = " What AlignDistil's own code calls the reference is `reverse_model` here." if teachers else ""
            raise ValueError(
                f"None of the losses {list(losses)} reads a reference model. Leave `ref_model` out.{hint}"
            )
        if ref_model is None and self._needs_reference and peft_config is None:
            if is_deepspeed_zero3_enabled() and load is not None:
                ref_model = load()  # a model cannot be copied there
            elif not (args.sync_ref_model and is_peft_model(model)):
                # TRL's says what ZeRO-3 needs in place of a copy
                ref_model = create_reference_model(model) if is_deepspeed_zero3_enabled() else frozen_copy(model)
        self._has_ref_model = ref_model is not None
        for given in (model, ref_model):
            if given is not None:
                add_fused_lm_head(base_model(given))
                bind_forward(base_model(given))
        try:
            super().__init__(
                model=model,
                # Given none, TRL copies the model
                ref_model=ref_model if self._has_ref_model else torch.nn.Identity(),
                reward_funcs=reward_funcs,
                args=args,
                data_collator=data_collator,
                train_dataset=train_dataset,
                eval_dataset=eval_dataset,
                processing_class=processing_class,
                reward_processing_classes=reward_processing_classes,
                peft_config=peft_config,
                callbacks=callbacks,
                optimizers=optimizers,
                preprocess_logits_for_metrics=preprocess_logits_for_metrics,
            )
        finally:
            args.model_init_kwargs = model_init_kwargs
        if isinstance(judge, PreferenceModel):
            judge.model.to(self.accelerator.device)
        refuse_dropped_data(self)
        self.num_generations = args.num_generations
        self._thinking = (True, False) if "bias_variance" in losses else (True,)
        self._win_rates = judge is not None and any(reads_win_rates(loss) for loss in losses.values())
        # Whether equal completions are learnt from: soft targets have something to say about them
        self._keep_ties = judge is not None and all(
            "preference_prob" in loss.optional_columns or reads_win_rates(loss) for loss in losses.values()
        )
        self._scorer = build_scorer(self.model, args, False, self.ref_model if self._has_ref_model else None)
        self._teachers = Teachers(self, teachers) if teachers else None
        self._ties = Ties()
        self._blocks = Blocks(args.steps_per_generation or args.gradient_accumulation_steps, args.num_iterations)
        self.add_callback(self._blocks)
        self._sampling = self._sampling_config()
        if self.use_vllm:
            self._last_loaded_step = -1
        else:
            self.generation_config = self._sampling
            self.generation_kwargs["use_cache"] = self._sampling.use_cache
        if args.sync_ref_model:
            if self.ref_model is None:
                add_reference_adapter(self.model)
                self.add_callback(SyncReferenceAdapter())
            else:
                self.add_callback(SyncRefModelCallback(ref_model=self.ref_model, accelerator=self.accelerator))

    def create_accelerator_and_postprocess(self):
        if not self._has_ref_model:
            self.ref_model = None  # no stand-in is to be moved, wrapped or sharded
        super().create_accelerator_and_postprocess()

    @property
    def beta(self) -> float:
        """The `beta` of the current epoch, where the config has one for each."""
        if not isinstance(self._beta, (list, tuple)):
            return self._beta
        return self._beta[min(int(self.state.epoch or 0), len(self._beta) - 1)]

    # The four steps

    def training_step(self, model, inputs, num_items_in_batch=None):
        # TRL's own does everything here, and sums accumulation steps instead of averaging them
        return Trainer.training_step(self, model, inputs, num_items_in_batch)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        inputs = dict(inputs)
        sampled = self._sampled(model, inputs)
        if not self.model.training and self._needs_reference:
            for selection, thinking in zip(sampled.selections, self._thinking, strict=True):
                self._compare_with_reference(model, inputs, selection.completions, selection.scores, thinking)
        loss = self.learn(model, inputs, sampled.selections, sampled.known)
        return (loss, {}) if return_outputs else loss

    def score(self, inputs: dict[str, Any], completions: Completions) -> Scores:
        """Second step: what each completion is worth, penalties included."""
        if self.judge is not None:
            return judge_scores(self.judge, completions.prompts, completions.texts, self._judge_templates(inputs))
        if not self.reward_funcs:  # nothing is preferred, and nothing has to be
            return Scores(torch.zeros(len(completions.prompts), len(completions.ids) // len(completions.prompts)))
        return reward_scores(self, inputs, completions, self._each_reward)

    def _judge_templates(self, inputs: dict[str, Any]) -> list[dict[str, Any]] | None:
        """Arguments of the chat template of each prompt, for a judge that renders conversations with its own."""
        if not isinstance(self.judge, PreferenceModel):
            return None
        return [template_arguments(row) for row in rows_of(inputs, len(inputs["prompt"]))]

    def pair(self, completions: Completions, scores: Scores) -> Selection:
        """Third step: which completions are learnt from, and which are preferred to which."""
        return select(
            completions, scores, self.args.pairing, self._keep_ties, learns_without_scores(self._terms.losses)
        )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        self._ties.look(self._due)
        super().log(logs, start_time)
