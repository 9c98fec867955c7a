"""
Online DPO in four steps: generate, score, pair, learn.

`compute_loss` runs them one after the other; a subclass replaces any of them.
"""

import contextlib
import dataclasses
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from accelerate.logging import get_logger
from accelerate.utils import is_peft_model
from datasets import Dataset, IterableDataset
from torch.distributed.fsdp import FullyShardedDataParallel
from transformers import PreTrainedModel, Trainer
from trl.data_utils import is_conversational, maybe_apply_chat_template
from trl.experimental.online_dpo import OnlineDPOTrainer as TRLOnlineDPOTrainer
from trl.experimental.utils import create_reference_model, truncate_right
from trl.models.utils import unwrap_model_for_generation
from trl.trainer.callbacks import SyncRefModelCallback
from trl.trainer.utils import add_fused_lm_head, create_model_from_path, pad, use_adapter

from trl_ext.data.columns import TEXT_COLUMNS, columns_of
from trl_ext.data.pairing import Pairs, pair_up
from trl_ext.data.reasoning import answer_text, empty_trace_prompt
from trl_ext.generation import Completions, GeometricMixture, evaluating, last_logits, sample
from trl_ext.logprobs import completion_lengths, sum_completions
from trl_ext.losses import GroupBatch, PreferenceBatch
from trl_ext.trainers.online.config import OnlineDPOConfig, build_online_losses
from trl_ext.trainers.online.rewards import (
    Scores,
    call_preference_fn,
    call_reward_function,
    call_reward_model,
    preference_scores,
)
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

SCORE_COLUMNS = ("score_chosen", "score_rejected")


@dataclasses.dataclass
class Selection:
    """
    What is learnt from: `M` completions of each of `G` prompts, and the pairs among them.

    Attributes:
        completions ([`Completions`]): What was generated.
        scores ([`Scores`]): What it is worth.
        rows (`torch.Tensor` of shape `(G,)`): Which prompts.
        members (`torch.Tensor` of shape `(G, M)`): Which completions of each.
        pairs ([`Pairs`] or `None`): Indices into `(G, M)`; `None` where whole groups are learnt from.
    """

    completions: Completions
    scores: Scores
    rows: torch.Tensor
    members: torch.Tensor
    pairs: Pairs | None


class OnlineDPOTrainer(TRLOnlineDPOTrainer):
    """
    TRL's `OnlineDPOTrainer` with every loss of this package, `K` completions a prompt, and generation at full speed.

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
            soft target.
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
        losses = build_online_losses(args)
        self._check_arguments(reward_funcs, preference_fn, processing_class, compute_metrics, ref_model, model)
        reward_funcs = [] if reward_funcs is None else reward_funcs
        reward_funcs = list(reward_funcs) if isinstance(reward_funcs, (list, tuple)) else [reward_funcs]
        self._extra_columns = self._check_dataset(train_dataset, "train", losses, preference_fn is not None)
        for name, split in eval_dataset.items() if isinstance(eval_dataset, Mapping) else [("eval", eval_dataset)]:
            if split is not None:
                self._check_dataset(split, name, losses, preference_fn is not None)

        if isinstance(train_dataset, Dataset) and "image" in train_dataset.column_names:
            self._check_images(args, losses)

        model_init_kwargs = args.model_init_kwargs
        if isinstance(model, str):
            model = create_model_from_path(
                model, **{"trust_remote_code": args.trust_remote_code, **(model_init_kwargs or {})}
            )
            args.model_init_kwargs = None  # used up; TRL refuses them beside a model
        for given in (model, ref_model):
            if given is not None:
                unbind_forward(base_model(given))
        if ref_model is None and peft_config is None and not (args.sync_ref_model and is_peft_model(model)):
            ref_model = create_reference_model(model)
        for given in (model, ref_model):
            if given is not None:
                add_fused_lm_head(base_model(given))
                bind_forward(base_model(given))
        try:
            super().__init__(
                model=model,
                ref_model=ref_model,
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
        if ref_model is None:
            self.ref_model = None  # the adapter switched off; TRL copies a `PeftModel` it is given
        self.num_generations = args.num_generations
        self.preference_fn = preference_fn
        self._losses = losses
        weights = args.loss_weights or [1.0] * len(losses)
        self._weights = dict(zip(losses, weights, strict=True))
        self._thinking = (True, False) if "bias_variance" in losses else (True,)
        self._soft = all("preference_prob" in loss.optional_columns for loss in losses.values())
        self._scorer = build_scorer(self.model, args, aux_loss=False)
        self._metrics: dict[str, dict[str, list[float]]] = {"train": defaultdict(list), "eval": defaultdict(list)}
        if self.use_vllm:
            self._last_loaded_step = -1
        elif "use_cache" not in (args.generation_kwargs or {}):
            self.generation_config.use_cache = self.generation_kwargs["use_cache"] = True
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

    # What can be said before training

    @staticmethod
    def _check_arguments(reward_funcs, preference_fn, processing_class, compute_metrics, ref_model, model) -> None:
        if (reward_funcs is None or reward_funcs == []) == (preference_fn is None):
            given = "neither" if preference_fn is None else "both"
            raise ValueError(
                f"Completions are judged by `reward_funcs` or by a `preference_fn`; got {given}. Give one of the two."
            )
        if preference_fn is not None and not callable(preference_fn):
            raise ValueError(f"`preference_fn={preference_fn!r}` is not callable.")
        if processing_class is None:
            raise ValueError("`processing_class` must be provided: the tokenizer or processor of the model.")
        if compute_metrics is not None:
            raise ValueError(
                "`compute_metrics` would not be called: evaluation generates completions. Give a reward function; each "
                "one's mean is reported."
            )
        if ref_model is not None and ref_model is model:
            raise ValueError(
                "`model` and `ref_model` are the same object. Leave `ref_model` out to start from a copy of the model."
            )

    @staticmethod
    def _check_images(args: OnlineDPOConfig, losses: Mapping[str, Any]) -> None:
        if args.num_generations % 2 or "bias_variance" in losses:
            raise ValueError("Prompts with images need an even `num_generations` and a loss other than bias_variance.")
        if args.use_vllm:
            raise ValueError(
                "Prompts with images cannot be sampled with vLLM: TRL's method gives back no image tensors, so log-probabilities "
                "would be those of the text alone. Set `use_vllm=False`."
            )

    def _check_dataset(self, dataset, split: str, losses: Mapping[str, Any], oracle: bool) -> list[str]:
        """The columns beside scores that the losses read from the prompts' dataset."""
        if dataset is None:
            raise ValueError("`train_dataset` is required: a dataset with a column `prompt`.")
        if not isinstance(dataset, (Dataset, IterableDataset)):
            return []
        available = columns_of(dataset, split)
        if "prompt" not in available:
            raise ValueError(
                f"The {split} dataset has no column 'prompt'; its columns are {sorted(available)}. Online training "
                "reads prompts and generates completions itself."
            )
        given = ("preference_prob",) if oracle else SCORE_COLUMNS
        extra = []
        for name, loss in losses.items():
            for column in loss.required_columns:
                if column in (*given, *TEXT_COLUMNS):
                    continue
                if column in SCORE_COLUMNS:
                    raise ValueError(f"The loss {name!r} needs {column!r}: rewards, which a `preference_fn` has not.")
                if column not in available:
                    raise ValueError(
                        f"The loss {name!r} needs the column {column!r}, which the {split} dataset does not have. Its "
                        f"columns are {sorted(available)}."
                    )
                extra.append(column)
        return extra

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
            if not self.model.training:
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
                Whether the reference generates, one completion a prompt.
        """
        count = 1 if reference else self.num_generations
        prompts, images = inputs["prompt"], inputs.get("image")
        vision = None
        if (self.use_vllm and not reference) or images is not None:
            texts = prompts if thinking else [self._render(inputs, row, thinking) for row in range(len(prompts))]
            if images is not None:
                texts = [_with_image(prompt) for prompt in texts]
            times = -(-count // 2)  # TRL's methods give two completions a prompt, in blocks
            generate = self._generate_vllm if self.use_vllm else lambda *args: self._generate(model, *args)
            prompt_ids, prompt_mask, ids, mask, *vision = generate(texts * times, images and images * times)
            vision = vision[0] if vision else None
            ids, mask = ids[: count * len(prompts)], mask[: count * len(prompts)]
        else:
            prompt_ids, prompt_mask, ids, mask = self._sample(model, inputs, thinking, reference, count)
        lengths = mask.sum(dim=1).tolist()
        ids = [row[:length] for row, length in zip(ids, lengths, strict=True)]
        stops = torch.tensor(self.eos_token_ids, device=self.accelerator.device)
        return Completions(
            prompts=prompts,
            texts=self._texts(prompts, ids),
            prompt_ids=[row[keep.bool()] for row, keep in zip(prompt_ids, prompt_mask, strict=True)][: len(prompts)],
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
                values = call_reward_model(function, tokenizer, prompts * k, completions.texts, device)
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
        b, k = scores.values.shape
        everything = torch.arange(b, device=scores.values.device), torch.arange(k, device=scores.values.device)
        if self.args.pairing == "group":
            pairs = pair_up(scores.values, scores.mask, "best_worst")  # those with anything to learn
            rows, pairs = pairs.group, None
            members = everything[1].expand(len(rows), k)
        else:
            pairs = pair_up(scores.values, scores.mask, self.args.pairing, scores.probabilities, self._soft_ties)
            if self.args.pairing == "best_worst":
                rows, members = pairs.group, torch.stack([pairs.chosen, pairs.rejected], dim=1)
                at = torch.arange(len(rows), device=rows.device)
                pairs = Pairs(at, torch.zeros_like(at), torch.ones_like(at))
            else:
                rows, at = pairs.group.unique(return_inverse=True)
                members, pairs = everything[1].expand(len(rows), k), dataclasses.replace(pairs, group=at)
        if completions.vision is not None and pairs is not None:
            # Image tensors have no row a completion in some models: all rows stay, in their order
            pairs = Pairs(rows[pairs.group], members[pairs.group, pairs.chosen], members[pairs.group, pairs.rejected])
            rows, members = everything[0], everything[1].expand(b, k)
        return Selection(completions, scores, rows, members, pairs)

    @property
    def _soft_ties(self) -> bool:
        """Whether equal completions are learnt from: soft targets have something to say about them."""
        return self._soft and self.preference_fn is not None

    def learn(self, model: torch.nn.Module, inputs: dict[str, Any], selections: list[Selection]) -> torch.Tensor:
        """Fourth step: the mean loss over the prompts of the batch; a prompt without a pair adds 0."""
        batch, groups, members = self._rows(selections)
        layout = None if self._scorer is None else self._scorer.layout(batch, groups)

        def log_probs(network) -> torch.Tensor:
            if self._scorer is None:
                outputs = fused_forward(network, batch, router_logits=False)
            else:
                outputs = self._scorer(network, batch, layout, statistics=())
            return sum_completions(outputs.log_probs, batch["completion_mask"]).view(members, groups).T

        logps = log_probs(model)
        with torch.no_grad(), self._reference() as reference, self.accelerator.autocast():
            ref_logps = log_probs(reference)
        lengths = completion_lengths(batch["completion_mask"]).view(members, groups).T
        counts = [max(len(selection.rows), 1) for selection in selections]
        parts = list(zip(*(tensor.split(counts) for tensor in (logps, ref_logps, lengths)), strict=True))
        # A batch without a pair still runs, so that all processes take part; it adds nothing
        nothing = 0.0 * logps.sum()
        if len(selections) == 2:
            loss = self._learn_two_traces(inputs, selections, parts)
        else:
            loss = self._learn_groups(inputs, selections[0], *parts[0])
        self._log_step(selections, parts)
        return loss + nothing

    # What the steps are made of

    def _render(self, inputs: dict[str, Any], row: int, thinking: bool) -> str:
        example = {name: inputs[name][row] for name in ("prompt", "tools", "chat_template_kwargs") if name in inputs}
        if not thinking:
            return empty_trace_prompt(example, self._tokenizer)
        options = example.pop("chat_template_kwargs", None) or {}
        tools = example.pop("tools", None)
        return maybe_apply_chat_template(example, self.processing_class, tools, **options)["prompt"]

    def _sample(self, model, inputs, thinking: bool, reference: bool, count: int):
        """Prompts and completions of transformers' generation, padded, with their masks; completions in blocks."""
        texts = [self._render(inputs, row, thinking) for row in range(len(inputs["prompt"]))]
        encoded = self.processing_class(
            text=texts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False
        ).to(self.accelerator.device)
        ids, mask = encoded["input_ids"], encoded["attention_mask"]
        if ids.size(1) == 0 or not mask.any(dim=1).all():
            raise ValueError(f"The prompt {texts[int((~mask.any(dim=1)).int().argmax())]!r} has no tokens.")
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
            if self.args.cache_implementation is not None:
                policy.generation_config.cache_implementation = self.args.cache_implementation
            mixture = None
            if self.args.mixture_coef and not reference:
                mixture = self._mixture(count)
            output = sample(policy, ids, mask, self.generation_config, count, mixture)
        output, output_mask = truncate_right(output, self.eos_token_ids, self._tokenizer.pad_token_id)
        return ids, mask, output, output_mask

    def _mixture(self, count: int) -> Callable[[torch.Tensor], GeometricMixture]:
        """What makes the mixture with the reference for a batch of prompts, each repeated `count` times in a row."""

        def reference(**kwargs):
            with self._reference() as network:
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

    def _texts(self, prompts: list, ids: list[torch.Tensor]) -> list:
        """Completions as reward functions see them; for two traces, the answer alone."""
        skip = len(self._thinking) == 1
        texts = self.processing_class.batch_decode(ids, skip_special_tokens=skip)
        if not skip:
            special = [token for token in self._tokenizer.all_special_tokens if "think" not in token]
            for token in special:
                texts = [text.replace(token, "") for text in texts]
            texts = [answer_text(text) for text in texts]
        if is_conversational({"prompt": prompts[0]}):
            return [[{"role": "assistant", "content": text}] for text in texts]
        return texts

    def _rows(self, selections: list[Selection]) -> tuple[dict[str, torch.Tensor], int, int]:
        """One padded batch of all selected completions, member by member, with the numbers of groups and members."""
        columns = []
        for selection in selections:
            rows, members = selection.rows, selection.members
            if not len(rows):  # one group, of which nothing is learnt
                rows = torch.zeros(1, dtype=torch.long, device=rows.device)
                members = torch.arange(2 if len(selections) == 2 else members.size(1), device=rows.device).unsqueeze(0)
            columns.append([(selection.completions, row, m) for row, m in zip(rows.tolist(), members.tolist())])  # noqa: B905
        groups = [group for column in columns for group in column]
        count = len(groups[0][2])
        ids, masks = [], []
        for member in range(count):
            for completions, row, members in groups:
                answers = [completions.ids[m * len(completions.prompts) + row] for m in members]
                prompt = completions.prompt_ids[row]
                if completions.vision is None:
                    # From the left, as TRL does, and alike for all completions of a prompt
                    room = max(self.max_length - max(len(answer) for answer in answers), 0)
                    prompt = prompt[max(len(prompt) - room, 0) :]
                answer = answers[member]
                if completions.vision is None:
                    answer = answer[: self.max_length]
                ids.append(torch.cat([prompt, answer]))
                masks.append(torch.cat([torch.zeros_like(prompt), torch.ones_like(answer)]))
        batch = {
            "input_ids": pad(ids, padding_value=self._tokenizer.pad_token_id, padding_side="right"),
            "attention_mask": pad([torch.ones_like(row) for row in ids], padding_value=0, padding_side="right"),
            "completion_mask": pad(masks, padding_value=0, padding_side="right"),
            **(selections[0].completions.vision or {}),
        }
        return batch, len(groups), count

    def _batch(self, inputs, selection: Selection, logps, ref_logps, lengths) -> PreferenceBatch | GroupBatch:
        """What the losses are given."""
        rows, members, pairs = selection.rows, selection.members, selection.pairs
        scores = selection.scores.values[rows].gather(1, members)
        if pairs is None:
            mask = selection.scores.mask[rows].gather(1, members)
            return GroupBatch(logps, ref_logps, lengths, scores, mask, beta=self.beta)
        g, chosen, rejected = pairs.group, pairs.chosen, pairs.rejected
        if selection.scores.probabilities is None:
            columns = {"score_chosen": scores[g, chosen], "score_rejected": scores[g, rejected]}
        else:
            probabilities = selection.scores.probabilities[rows[g], members[g, chosen], members[g, rejected]]
            columns = {"preference_prob": probabilities}
        for name in self._extra_columns:
            columns[name] = torch.tensor([float(value) for value in inputs[name]], device=logps.device)[rows[g]]
        sides = [tensor[g, side] for tensor in (logps, ref_logps, lengths) for side in (chosen, rejected)]
        return PreferenceBatch(*sides, beta=self.beta, columns=columns)

    def _learn_groups(self, inputs, selection: Selection, logps, ref_logps, lengths) -> torch.Tensor:
        prompts = len(selection.completions.prompts)
        if not len(selection.rows):
            return torch.zeros((), device=logps.device)
        batch = self._batch(inputs, selection, logps, ref_logps, lengths)
        if selection.pairs is None:
            share = torch.ones(len(selection.rows), device=logps.device)
        else:
            counts = selection.pairs.group.bincount(minlength=len(selection.rows))
            share = 1 / counts[selection.pairs.group]  # each prompt counts once, whatever its number of pairs
        return self._total(batch, share / prompts)

    def _learn_two_traces(self, inputs, selections: list[Selection], parts: list[tuple]) -> torch.Tensor:
        """`bias_variance`: each prompt's pair with a trace beside its pair without; either may be missing."""
        prompts = len(selections[0].completions.prompts)
        halves, there = [], torch.zeros(prompts, dtype=torch.bool, device=parts[0][0].device)
        for selection, tensors in zip(selections, parts, strict=True):
            there[selection.rows] = True
            batch = self._batch(inputs, selection, *tensors)

            def spread(value: torch.Tensor, rows=selection.rows) -> torch.Tensor:
                return value.new_zeros(prompts).index_put((rows,), value)

            fields = {
                field.name: spread(getattr(batch, field.name))
                for field in dataclasses.fields(batch)
                if isinstance(getattr(batch, field.name), torch.Tensor)
            }
            columns = {name: spread(value) for name, value in batch.columns.items()}
            halves.append(dataclasses.replace(batch, **fields, columns=columns))
        if not there.any():
            return torch.zeros((), device=there.device)
        batch = dataclasses.replace(halves[0], empty_trace=halves[1])
        return self._total(batch, there.float() / prompts)

    def _total(self, batch: PreferenceBatch | GroupBatch, share: torch.Tensor) -> torch.Tensor:
        """Weighted sum of the losses; `share` is what each pair or group counts."""
        total = torch.zeros((), device=share.device)
        used = share > 0
        for name, loss in self._losses.items():
            values = loss(batch)
            if values.shape != share.shape:
                raise ValueError(
                    f"The loss {name!r} returned shape {tuple(values.shape)}; expected {tuple(share.shape)}, one value "
                    "a pair or group."
                )
            total = total + self._weights[name] * (values * share.to(values.dtype)).sum()
            if len(self._losses) > 1:
                self._note(f"loss/{name}", values[used].mean())
            for key, value in loss.metrics(batch).items():
                self._note(key, value)
        return total

    # Metrics

    def _note(self, name: str, value: torch.Tensor | float) -> None:
        mode = "train" if self.model.training else "eval"
        value = value.item() if isinstance(value, torch.Tensor) else value
        if not math.isnan(value):  # a mean over nothing says nothing
            self._metrics[mode][name].append(value)

    def _log_step(self, selections: list[Selection], parts: list[tuple]) -> None:
        """Means over the completions of the step, by their real tokens. TRL's names where TRL has one."""
        self._note("beta", self.beta)
        for selection, (logps, ref_logps, _), suffix in zip(selections, parts, ("", "_empty_trace"), strict=False):
            completions, scores = selection.completions, selection.scores
            lengths = torch.tensor([float(len(row)) for row in completions.ids])
            self._note(f"completions/mean_length{suffix}", lengths.mean())
            self._note(f"completions/truncated{suffix}", 1 - completions.ended.float().mean())
            self._note(f"val/contain_eos_token{suffix}", completions.ended.float().mean())
            values = scores.values.masked_fill(~scores.mask, math.nan)
            self._note(f"objective/scores{suffix}", values.nanmean())
            for name, rewards in scores.per_function.items():
                self._note(f"rewards/{name}/mean{suffix}", rewards.nanmean())
            if scores.per_function:
                self._note(f"rewards/unscored{suffix}", 1 - scores.mask.float().mean())
            learnt = len(selection.rows if selection.pairs is None else selection.pairs.group.unique())
            self._note(f"pairs/dropped_prompts{suffix}", 1 - learnt / len(completions.prompts))
            if not learnt:
                continue
            self._log_pairs(selection, logps.detach(), ref_logps, suffix)

    def _log_pairs(self, selection: Selection, logps: torch.Tensor, ref_logps: torch.Tensor, suffix: str) -> None:
        kl = logps - ref_logps
        scores = selection.scores.values[selection.rows].gather(1, selection.members)
        self._note(f"objective/kl{suffix}", kl.mean())
        self._note(f"objective/entropy{suffix}", -logps.mean())
        self._note(f"objective/non_score_reward{suffix}", -self.beta * kl.mean())
        self._note(f"objective/rlhf_reward{suffix}", (scores - self.beta * kl).mean())
        pairs = selection.pairs
        if pairs is None:
            pairs = Pairs(torch.arange(len(scores), device=scores.device), scores.argmax(dim=1), scores.argmin(dim=1))
        g, chosen, rejected = pairs.group, pairs.chosen, pairs.rejected
        rewards = self.beta * kl
        margins = rewards[g, chosen] - rewards[g, rejected]
        self._note(f"objective/scores_margin{suffix}", (scores[g, chosen] - scores[g, rejected]).mean())
        self._note(f"logps/chosen{suffix}", logps[g, chosen].mean())
        self._note(f"logps/rejected{suffix}", logps[g, rejected].mean())
        self._note(f"rewards/chosen{suffix}", rewards[g, chosen].mean())
        self._note(f"rewards/rejected{suffix}", rewards[g, rejected].mean())
        self._note(f"rewards/margins{suffix}", margins.mean())
        self._note(f"rewards/accuracies{suffix}", (margins > 0).float().mean())

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        mode = "train" if self.model.training else "eval"
        own = {name: (sum(values), len(values)) for name, values in self._metrics[mode].items()}
        if self.accelerator.num_processes > 1:
            # Once a logged step; a process may lack a metric that another has
            everyone = [None] * self.accelerator.num_processes
            torch.distributed.all_gather_object(everyone, own)
            names = dict.fromkeys(name for each in everyone for name in each)
            own = {
                name: tuple(
                    sum(column) for column in zip(*(each.get(name, (0.0, 0)) for each in everyone), strict=True)
                )
                for name in names
            }
        prefix = "eval_" if mode == "eval" else ""
        logs.update({prefix + name: total / count for name, (total, count) in own.items()})
        Trainer.log(self, logs, start_time)
        self._metrics[mode].clear()

    # transformers' own: TRL's rounds the loss and divides by the number of its statistics, which may be none
    _maybe_log_save_evaluate = Trainer._maybe_log_save_evaluate

    # Evaluation

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        """
        Generates on the evaluation prompts. Beside the loss and the metrics of training, each with the prefix `eval_`:
        `eval_win_rate`, the share of the policy's completions that are better than the reference's own (ties are half).

        The same seed each time, so that two evaluations differ by the policy alone and training is not disturbed.
        """
        devices = [self.accelerator.device] if self.accelerator.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(self.args.seed + self.accelerator.process_index)
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = self.compute_loss(model, inputs)
        return loss.detach(), None, None

    def _compare_with_reference(self, model, inputs, completions: Completions, scores: Scores, thinking: bool) -> None:
        if completions.vision is not None:
            return
        baseline = self.generate(model, inputs, thinking, reference=True)
        prompts = completions.prompts
        k = len(completions.ids) // len(prompts)
        if self.preference_fn is not None:
            wins = call_preference_fn(self.preference_fn, prompts * k, completions.texts, baseline.texts * k)
        else:
            theirs = self.score(inputs, baseline)
            difference = scores.values - theirs.values
            wins = ((difference > 0) + 0.5 * (difference == 0))[scores.mask & theirs.mask]
            self._note("reference/scores", theirs.values[theirs.mask].mean())
        suffix = "" if thinking else "_empty_trace"
        self._note(f"win_rate{suffix}", wins.float().mean())
        self._note(f"reference/mean_length{suffix}", sum(len(row) for row in baseline.ids) / max(len(baseline.ids), 1))

    # Checkpoints

    def _save_checkpoint(self, model, trial):
        super()._save_checkpoint(model, trial)
        if self.args.sync_ref_model and self.ref_model is not None:
            folder = f"{self._get_output_dir(trial=trial)}/checkpoint-{self.state.global_step}"
            save_reference(self.accelerator.unwrap_model(self.ref_model), folder)

    def _load_optimizer_and_scheduler(
        self, checkpoint
    ):  # which DeepSpeed resumes by too, unlike `_load_from_checkpoint`
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and self.args.sync_ref_model and self.ref_model is not None:
            load_reference(self.accelerator.unwrap_model(self.ref_model), checkpoint)


def _with_image(prompt: Any) -> Any:
    """Messages whose texts are content parts, the image's placeholder before the first of the user's."""
    if isinstance(prompt, str) or any(isinstance(message.get("content"), list) for message in prompt):
        return prompt
    parts = [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in prompt]
    first = next((message for message in parts if message["role"] == "user"), parts[0])
    first["content"].insert(0, {"type": "image"})
    return parts
