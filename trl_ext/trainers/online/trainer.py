"""
Online DPO in four steps: generate, score, pair, learn.

`compute_loss` runs them one after the other; a subclass replaces any of them.
"""

import contextlib
import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from accelerate.logging import get_logger
from accelerate.utils import is_peft_model
from datasets import Dataset, IterableDataset
from torch.distributed.fsdp import FullyShardedDataParallel
from transformers import GenerationConfig, PreTrainedModel, Trainer
from transformers.integrations import is_deepspeed_zero3_enabled
from trl.data_utils import is_conversational, maybe_apply_chat_template
from trl.experimental.online_dpo import OnlineDPOTrainer as TRLOnlineDPOTrainer
from trl.experimental.utils import create_reference_model, truncate_right
from trl.models.utils import unwrap_model_for_generation
from trl.trainer.callbacks import SyncRefModelCallback
from trl.trainer.utils import add_fused_lm_head, create_model_from_path, pad, use_adapter

from trl_ext.data.columns import WEIGHT, columns_of
from trl_ext.data.reasoning import answer_text, empty_trace_prompt, trace_is_open
from trl_ext.data.tokens import prompt_ids
from trl_ext.generation import (
    Completions,
    GeometricMixture,
    evaluating,
    last_logits,
    sample,
    without_defaults,
)
from trl_ext.logprobs import completion_lengths, sum_completions
from trl_ext.losses import GroupBatch, PreferenceBatch
from trl_ext.trainers.checkpoint import refuse_other_losses, save_losses
from trl_ext.trainers.model_card import complete_model_card, describe_losses
from trl_ext.trainers.online.checks import (
    check_arguments,
    check_images,
    check_prompts,
    check_reference,
    check_rewards,
    needs_reference,
    read_columns,
    reads_win_rates,
)
from trl_ext.trainers.online.config import OnlineDPOConfig, build_online_losses
from trl_ext.trainers.online.metrics import Means, of_completions, of_learnt
from trl_ext.trainers.online.rewards import (
    Scores,
    call_preference_fn,
    call_reward_function,
    call_reward_model,
    preference_scores,
)
from trl_ext.trainers.online.selection import Selection, build_batch, join_traces, padded_rows, select, take
from trl_ext.trainers.policy_copy import frozen_copy
from trl_ext.trainers.reference import (
    ADAPTER,
    SyncReferenceAdapter,
    add_reference_adapter,
    load_reference,
    save_reference,
)
from trl_ext.trainers.scoring import build_scorer
from trl_ext.trainers.trl_seam import base_model, bind_forward, fused_forward, unbind_forward


logger = get_logger(__name__)

# Batches of a process in a row of which nothing was learnt, after which the run says so
TIED_BATCHES = 10


class OnlineDPOTrainer(TRLOnlineDPOTrainer):
    """
    TRL's `OnlineDPOTrainer` with the losses of this package, `K` completions per prompt, and generation at full speed.

    Plain-text prompts get the tokenizer's special tokens, as in offline training; a chat template writes its own. (Prompts with
    images get none in either, as in TRL.) Completions follow the policy's distribution as the config changes it; the model's own
    `generation_config` gives nothing but its end-of-sequence tokens.

    Where none of the losses reads the reference, there is no reference model: nothing is logged that compares with it, and
    `rewards/*` are `beta` times the policy's log-probabilities.

    Metrics, each a mean over all processes and micro-batches: `objective/scores`, `objective/kl`, `objective/entropy`,
    `objective/non_score_reward` and `objective/rlhf_reward` are over the same completions, those that are learnt from;
    `rlhf_reward` is the sum of `scores` and `non_score_reward`. `objective/scores_margin`, `rewards/chosen`, `rewards/rejected`,
    `rewards/margins`, `rewards/accuracies` and `logps/*` are over the pairs that are learnt from (for groups: the best completion
    against the worst). `completions/*`, `val/contain_eos_token`, `rewards/unscored` and each reward function's
    `rewards/NAME/mean` are over all sampled completions; `pairs/dropped_prompts` is the share of prompts of which nothing is
    learnt.

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
        args ([`OnlineDPOConfig`] or TRL's, *optional*):
            Configuration.
        preference_fn (`Callable`, *optional*):
            Preference oracle in place of `reward_funcs`: `preference_fn(prompts, completions_a, completions_b)` gives for
            each the probability, in [0, 1], that the first completion is preferred. Reaches `ipo` and `anchored` as a
            soft target, and `sppo_soft` as win rates against the prompt's other completions.
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
        preference_fn: Callable[[list, list, list], Any] | None = None,
    ):
        if args is None:
            name = model if isinstance(model, str) else model.config._name_or_path
            args = OnlineDPOConfig(output_dir=f"{name.rstrip('/').split('/')[-1]}-Online-DPO")
        for field in dataclasses.fields(OnlineDPOConfig):  # a plain config of TRL's
            if not hasattr(args, field.name):
                setattr(args, field.name, field.default)
        self._losses = losses = build_online_losses(args)
        check_reference(losses, args)
        reward_funcs = check_arguments(
            model,
            ref_model,
            reward_funcs,
            reward_processing_classes,
            preference_fn,
            processing_class,
            compute_metrics,
            args,
        )
        self.preference_fn = preference_fn
        self.processing_class = processing_class  # which the checks of the prompts read
        if train_dataset is None:
            raise ValueError("`train_dataset` is required: a dataset with a column `prompt`.")
        self._columns: list[str] = []
        if args.accelerator_config.dispatch_batches is None:  # of streams
            args.accelerator_config.dispatch_batches = (
                False  # texts are no tensors that one process could send to others
            )
        if isinstance(train_dataset, (Dataset, IterableDataset)):
            available = columns_of(train_dataset, "train")
            check_images(available, args, losses)
            self._columns = read_columns(available, "train", losses, preference_fn is not None)
            train_dataset = check_prompts(train_dataset, self._columns, "train", processing_class)
        eval_dataset = self._checked_eval(eval_dataset)

        model_init_kwargs = args.model_init_kwargs
        if isinstance(model, str):
            model = create_model_from_path(
                model, **{"trust_remote_code": args.trust_remote_code, **(model_init_kwargs or {})}
            )
            args.model_init_kwargs = None  # used up; TRL refuses them beside a model
        for given in (model, ref_model):
            if given is not None:
                unbind_forward(base_model(given))
        self._needs_reference = needs_reference(losses)
        if ref_model is not None and not self._needs_reference:
            raise ValueError(f"None of the losses {list(losses)} reads a reference model. Leave `ref_model` out.")
        if ref_model is None and self._needs_reference and peft_config is None:
            if not (args.sync_ref_model and is_peft_model(model)):
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
        self.num_generations = args.num_generations
        weights = args.loss_weights or [1.0] * len(losses)
        self._weights = dict(zip(losses, weights, strict=True))
        self._thinking = (True, False) if "bias_variance" in losses else (True,)
        self._win_rates = preference_fn is not None and any(reads_win_rates(loss) for loss in losses.values())
        # Whether equal completions are learnt from: soft targets have something to say about them
        self._keep_ties = preference_fn is not None and all(
            "preference_prob" in loss.optional_columns or reads_win_rates(loss) for loss in losses.values()
        )
        self._scorer = build_scorer(self.model, args, False, self.ref_model if self._has_ref_model else None)
        self._metrics = {"train": Means(), "eval": Means()}
        self._eval_prefix = "eval"
        self._tied_batches, self._said_tied = 0, False
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
        described = [loss for loss in losses.values() if loss.paper]
        if described:
            self._name = "Online " + " + ".join(losses)
            first = described[0]
            self._paper = {"title": first.title, "id": first.paper.split(",")[0], "citation": first.citation}

    def create_accelerator_and_postprocess(self):
        if not self._has_ref_model:
            self.ref_model = None  # no stand-in is to be moved, wrapped or sharded
        super().create_accelerator_and_postprocess()

    def _checked_eval(self, dataset: Any) -> Any:
        """Evaluation data, one dataset or a dict of them, with the columns that are read from the training data, checked."""
        if isinstance(dataset, Mapping):
            return type(dataset)({name: self._checked_split(split, name) for name, split in dataset.items()})
        return self._checked_split(dataset, "eval")

    def _checked_split(self, dataset: Any, split: str) -> Any:
        if not isinstance(dataset, (Dataset, IterableDataset)):
            return dataset
        available = columns_of(dataset, split)
        read_columns(available, split, self._losses, self.preference_fn is not None)
        missing = [column for column in self._columns if column not in available]
        if missing:
            raise ValueError(
                f"The {split} dataset lacks the columns {missing}, which are read from the train dataset. Its columns are "
                f"{sorted(available)}."
            )
        return check_prompts(dataset, self._columns, split, self.processing_class)

    def _sampling_config(self) -> GenerationConfig:
        """How transformers samples: all that the config says, and nothing of the model's own."""
        args = self.args
        options = {
            "max_new_tokens": args.max_new_tokens,
            "do_sample": True,
            "temperature": args.temperature,
            "top_k": args.top_k,
            "top_p": args.top_p,
            "min_p": args.min_p,
            "repetition_penalty": args.repetition_penalty,
            "cache_implementation": args.cache_implementation,
            "pad_token_id": self._tokenizer.pad_token_id,
            "bos_token_id": self._tokenizer.bos_token_id,
            "eos_token_id": self.eos_token_ids,
            "use_cache": True,
            **((not self.use_vllm and args.generation_kwargs) or {}),  # with vLLM, these are arguments of its own
        }
        return GenerationConfig(**{name: value for name, value in options.items() if value is not None})

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
        selections = []
        for thinking in self._thinking:
            completions = self.generate(model, inputs, thinking)
            scores = self.score(inputs, completions)
            selections.append(self.pair(completions, scores))
            if not self.model.training and self._needs_reference:
                self._compare_with_reference(model, inputs, completions, scores, thinking)
        loss = self.learn(model, inputs, selections)
        return (loss, {}) if return_outputs else loss

    def generate(
        self, model: torch.nn.Module, inputs: dict[str, Any], thinking: bool = True, reference: bool = False
    ) -> Completions:
        """
        First step: `K` completions of each prompt.

        Args:
            model (`torch.nn.Module`):
                The policy, wrapped or not.
            inputs (`dict[str, Any]`):
                A batch of the dataset: lists by column.
            thinking (`bool`, *optional*, defaults to `True`):
                Whether reasoning is left as the template has it, or switched off.
            reference (`bool`, *optional*, defaults to `False`):
                Whether the reference generates, one completion per prompt.
        """
        count = 1 if reference else self.num_generations
        prompts, images = inputs["prompt"], inputs.get("image")
        vision = None
        if images is not None:
            texts, times = [_with_image(prompt) for prompt in prompts], -(-count // 2)  # as TRL gives two per prompt
            with without_defaults(self.accelerator.unwrap_model(model)):
                prompt_rows, prompt_mask, ids, mask, vision = self._generate(model, texts * times, images * times)
            ids, mask = ids[: count * len(prompts)], mask[: count * len(prompts)]
            prompt_rows = [row[keep.bool()] for row, keep in zip(prompt_rows, prompt_mask, strict=True)]
            prompt_rows = prompt_rows[: len(prompts)]
        else:
            texts = [self._render(inputs, row, thinking) for row in range(len(prompts))]
            prompt_rows = self._prompt_ids(prompts, texts)
            if self.use_vllm and not reference:
                ids, mask = self._sample_vllm(texts, prompt_rows, count)
            else:
                ids, mask = self._sample(model, prompt_rows, reference, count)
        lengths = mask.sum(dim=1).tolist()
        ids = [row[:length] for row, length in zip(ids, lengths, strict=True)]
        stops = torch.tensor(self.eos_token_ids, device=self.accelerator.device)
        return Completions(
            prompts=prompts,
            texts=self._texts(prompts, prompt_rows, ids),
            prompt_ids=prompt_rows,
            ids=ids,
            ended=torch.stack([torch.isin(row, stops).any() for row in ids]),
            vision=vision,
        )

    def score(self, inputs: dict[str, Any], completions: Completions) -> Scores:
        """Second step: what each completion is worth, penalties included."""
        prompts, b = completions.prompts, len(completions.prompts)
        k = len(completions.ids) // b
        device = self.accelerator.device
        if self.preference_fn is not None:
            if k == 1:
                return Scores(torch.zeros(b, 1), torch.ones(b, 1, dtype=torch.bool), None, {})
            scores = preference_scores(self.preference_fn, prompts, completions.texts)
            return dataclasses.replace(
                scores,
                values=scores.values.to(device),
                mask=scores.mask.to(device),
                probabilities=scores.probabilities.to(device),
            )
        columns = {
            name: list(value) * k if isinstance(value, (list, tuple)) else value
            for name, value in inputs.items()
            if name != "prompt"
        }
        ids = [row.tolist() for row in completions.ids]
        rewards = {}
        for name, function, tokenizer in zip(
            self.reward_func_names, self.reward_funcs, self.reward_processing_classes, strict=True
        ):
            if isinstance(function, torch.nn.Module):
                rendering = {name: columns[name] for name in ("tools", "chat_template_kwargs") if name in columns}
                values = call_reward_model(function, tokenizer, prompts * k, completions.texts, device, **rendering)
            else:
                values = call_reward_function(
                    name, function, prompts * k, completions.texts, ids, trainer_state=self.state, **columns
                )
            # Two functions may have one name
            rewards[name if name not in rewards else f"{name}_{len(rewards)}"] = values.to(device)
        stacked = torch.stack(list(rewards.values()), dim=1)
        total = (stacked * self.reward_weights.to(device)).nansum(dim=1)
        if self.args.missing_eos_penalty is not None:
            total = total - self.args.missing_eos_penalty * ~completions.ended.to(device)
        if self.args.length_penalty:
            lengths = torch.tensor([len(row) for row in ids], device=device)
            total = total - self.args.length_penalty * lengths

        def by_prompt(values: torch.Tensor) -> torch.Tensor:
            return values.view(k, b).T

        return Scores(
            by_prompt(total),
            by_prompt(~stacked.isnan().all(dim=1)),
            None,
            {name: by_prompt(values) for name, values in rewards.items()},
        )

    def pair(self, completions: Completions, scores: Scores) -> Selection:
        """Third step: which completions are learnt from, and which are preferred to which."""
        return select(completions, scores, self.args.pairing, self._keep_ties)

    def learn(self, model: torch.nn.Module, inputs: dict[str, Any], selections: list[Selection]) -> torch.Tensor:
        """Fourth step: the mean loss over the prompts of the batch; a prompt without a pair adds 0."""
        batch, groups, members = padded_rows(selections, self.max_length, self._tokenizer.pad_token_id)
        layout = None if self._scorer is None else self._scorer.layout(batch, groups)

        def log_probs(network) -> torch.Tensor:
            if self._scorer is None:
                outputs = fused_forward(network, batch, router_logits=False)
            else:
                outputs = self._scorer(network, batch, layout, statistics=())
            return sum_completions(outputs.log_probs, batch["completion_mask"]).view(members, groups).T

        logps = log_probs(model)
        ref_logps = None
        if self._needs_reference:
            with torch.no_grad(), self._reference() as reference, self.accelerator.autocast():
                ref_logps = log_probs(reference)
        lengths = completion_lengths(batch["completion_mask"]).view(members, groups).T
        parts, start = [], 0
        for selection in selections:
            here = slice(start, start + len(selection.rows))
            parts.append([None if tensor is None else tensor[here] for tensor in (logps, ref_logps, lengths)])
            start += max(
                len(selection.rows), 1
            )  # one without prompts stands there with one, of which nothing is learnt
        columns = {
            name: torch.tensor([float(value) for value in inputs[name]], device=logps.device) for name in self._columns
        }
        # A batch without a pair still runs, so that all processes take part; it adds nothing
        loss = self._total(selections, parts, columns) + 0.0 * logps.sum()
        self._log_step(selections, parts, columns.get(WEIGHT))
        return loss

    # What the steps are made of

    def _render(self, inputs: dict[str, Any], row: int, thinking: bool) -> str:
        example = {name: inputs[name][row] for name in ("prompt", "tools", "chat_template_kwargs") if name in inputs}
        if not thinking:
            return empty_trace_prompt(example, self._tokenizer)
        options = example.pop("chat_template_kwargs", None) or {}
        tools = example.pop("tools", None)
        tools = json.loads(tools) if isinstance(tools, str) else tools
        return maybe_apply_chat_template(example, self.processing_class, tools, **options)["prompt"]

    def _prompt_ids(self, prompts: list, texts: list[str]) -> list[torch.Tensor]:
        """Tokens of rendered prompts."""
        conversational = is_conversational({"prompt": prompts[0]})
        rows = [prompt_ids(text, self._tokenizer, conversational) for text in texts]
        for text, row in zip(texts, rows, strict=True):
            if not row:
                raise ValueError(f"The prompt {text!r} has no tokens.")
        return [torch.tensor(row, device=self.accelerator.device) for row in rows]

    def _sample_vllm(
        self, texts: list[str], rows: list[torch.Tensor], count: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Completions of vLLM, padded, and their mask, in blocks.

        TRL's method samples two completions per prompt. It is handed rendered prompts, as it knows neither `tools` nor
        `chat_template_kwargs`: token ids where vLLM runs in this process, and text for a server.
        """
        ids = [row.tolist() for row in rows]
        if self.vllm_mode == "server":
            prompts = [server_text(text, row, self._tokenizer) for text, row in zip(texts, ids, strict=True)]
        else:
            prompts = [{"prompt_token_ids": row} for row in ids]
        self.num_generations = 2  # what TRL's method asks a server for, and counts by
        try:
            _, _, output, mask = self._generate_vllm(prompts * -(-count // 2))
        finally:
            self.num_generations = self.args.num_generations
        return output[: count * len(rows)], mask[: count * len(rows)]

    def _sample(self, model, rows: list[torch.Tensor], reference: bool, count: int):
        """Completions of transformers' generation, padded, and their mask; in blocks."""
        ids = pad(rows, padding_value=self._tokenizer.pad_token_id, padding_side="left")
        mask = pad([torch.ones_like(row) for row in rows], padding_value=0, padding_side="left")
        checkpointing = self.args.gradient_checkpointing_kwargs
        with contextlib.ExitStack() as stack:
            if reference:
                policy = stack.enter_context(self._reference())
                policy = self.accelerator.unwrap_model(policy)
            else:
                inner = self.accelerator.unwrap_model(model)
                stack.enter_context(evaluating(inner, checkpointing))
                policy = stack.enter_context(
                    unwrap_model_for_generation(
                        model,
                        self.accelerator,
                        gather_deepspeed3_params=self.args.ds3_gather_for_generation,
                        generation_kwargs=self.generation_kwargs,
                        gradient_checkpointing_kwargs=checkpointing,
                    )
                )
            if self.is_fsdp_enabled:
                stack.enter_context(FullyShardedDataParallel.summon_full_params(self.model_wrapped, recurse=False))
            stack.enter_context(torch.no_grad())
            mixture = None
            if self.args.mixture_coef and not reference:
                mixture = self._mixture(count)
            policy = eager(policy)
            output = sample(policy, ids, mask, self._sampling, count, mixture)
        return truncate_right(output, self.eos_token_ids, self._tokenizer.pad_token_id)

    def _mixture(self, count: int) -> Callable[[torch.Tensor], GeometricMixture]:
        """What makes the mixture with the reference for a batch of prompts, each repeated `count` times in a row."""

        def reference(**kwargs):
            with self._reference() as network:
                network = eager(network)
                # Of a prompt too: its other logits would be the largest tensor of the run
                return network(**kwargs, **last_logits(self.accelerator.unwrap_model(network)))

        reference.config = self.model.config

        def make(mask: torch.Tensor) -> GeometricMixture:
            coefficient = torch.full((count,), float(self.args.mixture_coef), device=mask.device)
            if self.args.mixture_samples == "half":
                coefficient[: count // 2] = 0
            return GeometricMixture(reference, mask, coefficient.repeat(mask.size(0) // count).unsqueeze(1))

        return make

    @contextlib.contextmanager
    def _reference(self) -> Iterator[PreTrainedModel]:
        """The reference: a model of its own, or the policy with its adapter off or replaced."""
        if self.ref_model is not None:
            yield self.ref_model
            return
        inner = self.accelerator.unwrap_model(self.model)
        adapter = ADAPTER if ADAPTER in inner.peft_config else None
        with evaluating(inner, self.args.gradient_checkpointing_kwargs), use_adapter(inner, adapter_name=adapter):
            yield self.model

    def _texts(self, prompts: list, prompt_ids: list[torch.Tensor], ids: list[torch.Tensor]) -> list:
        """Completions as reward functions see them; for two traces, the answer alone."""
        skip = len(self._thinking) == 1
        texts = self.processing_class.batch_decode(ids, skip_special_tokens=skip)
        if not skip:
            special = [token for token in self._tokenizer.all_special_tokens if "think" not in token]
            for token in special:
                texts = [text.replace(token, "") for text in texts]
            opened = [trace_is_open(text) for text in self.processing_class.batch_decode(prompt_ids)]
            texts = [answer_text(text, opened[i % len(prompts)]) for i, text in enumerate(texts)]
        if is_conversational({"prompt": prompts[0]}):
            return [[{"role": "assistant", "content": text}] for text in texts]
        return texts

    def _total(
        self, selections: list[Selection], parts: list[list], columns: Mapping[str, torch.Tensor]
    ) -> torch.Tensor:
        """Weighted sum of the losses: a mean over the prompts of the batch, times each prompt's `weight`."""
        extra = {name: values for name, values in columns.items() if name != WEIGHT}
        batches = [
            build_batch(selection, extra, *tensors, beta=self.beta, win_rates=self._win_rates)
            for selection, tensors in zip(selections, parts, strict=True)
        ]
        for selection, batch in zip(selections, batches, strict=True):
            given = _checkable(selection, batch)
            for name, loss in self._losses.items():
                check_rewards(name, loss, given)
        if len(selections) == 2:
            batch, prompts = join_traces(selections, batches)
            share = torch.ones_like(prompts, dtype=torch.float32)
        else:
            batch, prompts, share = batches[0], selections[0].prompts(), selections[0].share()
        share = share / len(selections[0].completions.prompts)
        if WEIGHT in columns:
            share = share * columns[WEIGHT][prompts]
        used = share > 0
        return self._sum_of_losses(take(batch, used), share[used])

    def _sum_of_losses(self, batch: PreferenceBatch | GroupBatch, share: torch.Tensor) -> torch.Tensor:
        """The losses of the rows of `batch`, each times its `share`, shape `(N,)`; their metrics are noted on the way."""
        total = torch.zeros((), device=share.device)
        if not len(share):
            return total
        for name, loss in self._losses.items():
            values = loss(batch)
            if values.shape != share.shape:
                raise ValueError(
                    f"The loss {name!r} returned shape {tuple(values.shape)}; expected {tuple(share.shape)}, one value "
                    "per pair or group."
                )
            total = total + self._weights[name] * (values * share.to(values.dtype)).sum()
            if len(self._losses) > 1:
                self._note(f"loss/{name}", values)
            for key, value in loss.metrics(batch).items():
                if isinstance(value, torch.Tensor) and value.shape not in ((), share.shape):
                    raise ValueError(
                        f"The metric {key!r} of the loss {name!r} has shape {tuple(value.shape)}; expected a number, or "
                        f"{tuple(share.shape)}, one value per pair or group."
                    )
                self._note(key, value, len(share))
        return total

    # Metrics

    def _note(self, name: str, value: torch.Tensor | float, rows: int = 1) -> None:
        self._metrics["train" if self.model.training else "eval"].add(name, value, rows)

    def _log_step(self, selections: list[Selection], parts: list[list], weight: torch.Tensor | None) -> None:
        """What this batch adds to the metrics. TRL's names where TRL has one."""
        self._note("beta", self.beta)
        learnt = 0
        for selection, (logps, ref_logps, _), suffix in zip(selections, parts, ("", "_empty_trace"), strict=False):
            values = of_completions(selection.completions, selection.scores)
            prompts = selection.prompts()
            dropped = torch.ones(len(selection.completions.prompts))
            dropped[prompts.cpu()] = 0
            values["pairs/dropped_prompts"] = dropped
            if weight is not None:
                values["pair_weight/mean"] = weight[prompts]
            counted = torch.ones_like(prompts, dtype=torch.bool) if weight is None else weight[prompts] > 0
            values |= of_learnt(selection, counted, logps, ref_logps, self.beta)
            for name, value in values.items():
                self._note(name + suffix, value)
            learnt += len(prompts)
        if self.model.training:
            self._tied_batches = 0 if learnt else self._tied_batches + 1
            if self._tied_batches == TIED_BATCHES:
                self._say_tied(f"{TIED_BATCHES} batches in a row")

    def _say_tied(self, since: str) -> None:
        """Once in a run: nothing is being learnt."""
        if self._said_tied:
            return
        self._said_tied = True
        logger.warning(
            f"Nothing was learnt in {since}: all prompts were dropped, because no two of a prompt's completions have different "
            "scores. Likely causes: the reward function gives the same value to every completion, or None (metric "
            "`rewards/unscored`); it looks at something that the completions do not have, such as another form of answer; the "
            "completions of a prompt are alike (a low `temperature`, greedy decoding, a small `max_new_tokens`). Look at some "
            "completions and their scores."
        )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        mode = "train" if self.model.training else "eval"
        own = self._metrics[mode].over_processes()
        self._metrics[mode] = Means()
        if mode == "train" and own.get("pairs/dropped_prompts") == 1 == own.get(
            "pairs/dropped_prompts_empty_trace", 1
        ):
            self._say_tied("the steps that were just logged")
        prefix = f"{self._eval_prefix}_" if mode == "eval" else ""
        logs.update({prefix + name: value for name, value in own.items()})
        Trainer.log(self, logs, start_time)

    # transformers' own: TRL's rounds the loss and divides by the number of its statistics, which may be none
    _maybe_log_save_evaluate = Trainer._maybe_log_save_evaluate

    # Evaluation

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        """
        Generates on the evaluation prompts. Beside the loss and the metrics of training, each with the prefix `eval_`:
        `eval_win_rate`, the share of the policy's completions that are better than the reference's own (ties are half), where
        the losses have a reference.

        The same seed each time, so that two evaluations differ by the policy alone and training is not disturbed.
        """
        if eval_dataset is not None and not isinstance(eval_dataset, str):
            eval_dataset = self._checked_eval(eval_dataset)
        devices = [self.accelerator.device] if self.accelerator.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(self.args.seed + self.accelerator.process_index)
            self._eval_prefix = metric_key_prefix  # with the name of one of several datasets
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = self.compute_loss(model, inputs)
        return loss.detach(), None, None

    def _compare_with_reference(self, model, inputs, completions: Completions, scores: Scores, thinking: bool) -> None:
        if completions.vision is not None:
            return
        suffix = "" if thinking else "_empty_trace"
        baseline = self.generate(model, inputs, thinking, reference=True)
        prompts = completions.prompts
        k = len(completions.ids) // len(prompts)
        if self.preference_fn is not None:
            wins = call_preference_fn(self.preference_fn, prompts * k, completions.texts, baseline.texts * k)
        else:
            theirs = self.score(inputs, baseline)
            difference = scores.values - theirs.values
            wins = ((difference > 0) + 0.5 * (difference == 0))[scores.mask & theirs.mask]
            self._note(f"reference/scores{suffix}", theirs.values[theirs.mask])
        self._note(f"win_rate{suffix}", wins.float())
        self._note(f"reference/mean_length{suffix}", torch.tensor([float(len(row)) for row in baseline.ids]))

    # Checkpoints

    def _save_checkpoint(self, model, trial):
        super()._save_checkpoint(model, trial)
        folder = f"{self._get_output_dir(trial=trial)}/checkpoint-{self.state.global_step}"
        if self.is_world_process_zero():
            save_losses(folder, self._weights, self._losses)
        if self.args.sync_ref_model and self.ref_model is not None:
            save_reference(self.accelerator.unwrap_model(self.ref_model), folder)

    def _load_optimizer_and_scheduler(
        self, checkpoint
    ):  # which DeepSpeed resumes by too, unlike `_load_from_checkpoint`
        if checkpoint is not None:
            refuse_other_losses(checkpoint, self._weights, self._losses)
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and self.args.sync_ref_model and self.ref_model is not None:
            load_reference(self.accelerator.unwrap_model(self.ref_model), checkpoint)

    def create_model_card(self, *args, **kwargs):
        super().create_model_card(*args, **kwargs)
        if self.is_world_process_zero():
            described = any(loss.paper for loss in self._losses.values())
            table = describe_losses(self._weights, self._losses, self.beta) if described else ""
            complete_model_card(self.args.output_dir, self.model, table)


def _with_image(prompt: Any) -> Any:
    """Messages whose texts are content parts, the image's placeholder before the first of the user's."""
    if isinstance(prompt, str) or any(isinstance(message.get("content"), list) for message in prompt):
        return prompt
    parts = [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in prompt]
    first = next((message for message in parts if message["role"] == "user"), parts[0])
    first["content"].insert(0, {"type": "image"})
    return parts


def eager(model: torch.nn.Module) -> torch.nn.Module:
    """The model without `torch.compile`, which would compile it anew for each length of a completion."""
    return getattr(model, "_orig_mod", model)


def server_text(text: str, ids: list[int], tokenizer: Any) -> str:
    """
    A text that becomes exactly `ids` in a vLLM server, which adds the tokenizer's special tokens itself.

    Raises:
        `ValueError`: If there is none.
    """
    for candidate in (text, text.removeprefix(tokenizer.bos_token or "")):
        if tokenizer(candidate)["input_ids"] == ids:
            return candidate
    raise ValueError(
        f"A vLLM server would read the prompt {text!r} with other special tokens than training: it adds the tokenizer's own. "
        "Set `vllm_mode='colocate'`, where token ids are handed over."
    )


def _checkable(selection: Selection, batch: PreferenceBatch | GroupBatch) -> dict[str, torch.Tensor]:
    """The columns of a batch; of groups, with the scores of the best and the worst completion."""
    if isinstance(batch, PreferenceBatch):
        return dict(batch.columns)
    scores = [batch.scores.gather(1, end.unsqueeze(1)).squeeze(1) for end in selection.ends()]
    return {**batch.columns, "score_chosen": scores[0], "score_rejected": scores[1]}
