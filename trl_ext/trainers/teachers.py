"""The two models that a loss whose `reads` holds `"teachers"` is given beside the policy: checked, placed, and run before it."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from transformers import Trainer
from trl.models import prepare_deepspeed, prepare_fsdp
from trl.trainer.utils import FusedCausalLMOutput, add_fused_lm_head, create_model_from_path

from trl_ext.data.paths import refuse_missing_path
from trl_ext.logprobs import Divergence, Projection, sum_completions
from trl_ext.logprobs.sharing import SHARED_INPUTS
from trl_ext.rows import ABSENT, Plan, Rows, Scored
from trl_ext.trainers.self_check import is_sharded
from trl_ext.trainers.trl_seam import (
    DIVERGENCE,
    base_model,
    bind_forward,
    fused_forward,
    projections_in_place,
    unbind_forward,
)


TEACHERS = ("teacher_model", "reverse_model")
NEEDED = (
    "Give the trainer `teacher_model`, trained by DPO, and `reverse_model`, trained by DPO on the same pairs with `chosen` and "
    "`rejected` swapped; or name them in the config, `teacher_model_name_or_path` and `reverse_model_name_or_path`."
)


def read_teachers(losses: Mapping[str, Any]) -> list[str]:
    """Names of the losses that read teachers."""
    return [name for name, loss in losses.items() if "teachers" in loss.reads]


def given_teachers(losses: Mapping[str, Any], args: Any, **models: Any) -> dict[str, Any]:
    """
    The two teachers as they were given, by the name of the argument; `{}` where no loss reads them.

    Args:
        losses (`dict[str, Loss]`):
            The losses of the run, by name.
        args ([`~transformers.TrainingArguments`] or `None`):
            Configuration, which may name them.
        **models:
            What the trainer was given: `model`, `ref_model`, and the two of [`TEACHERS`].

    Raises:
        `ValueError`: If they are missing, would not be used, are given twice, or are no models of their own.
    """
    given, init_kwargs = {}, getattr(args, "teacher_model_init_kwargs", None)
    for name in TEACHERS:
        option, named = f"{name}_name_or_path", getattr(args, f"{name}_name_or_path", None)
        if models[name] is not None and named is not None:
            raise ValueError(
                f"`{name}` is given to the trainer and `{option}={named!r}` in the config. Give one of them."
            )
        given[name] = named if models[name] is None else models[name]
    there = [name for name, model in given.items() if model is not None]
    readers = read_teachers(losses)
    if not readers:
        there += ["teacher_model_init_kwargs"] if init_kwargs else []
        if there:
            raise ValueError(
                f"None of the losses {list(losses) or 'of TRL'} reads teachers, so {there} would have no effect. Leave them "
                "out, or train a loss that does, such as 'aligndistil'."
            )
        return {}
    missing = [name for name in TEACHERS if name not in there]
    if missing:
        raise ValueError(f"The loss {readers[0]!r} reads two models beside the policy; missing: {missing}. {NEEDED}")
    for name, model in given.items():
        if not isinstance(model, (str, torch.nn.Module)):
            raise ValueError(
                f"`{name}` is a {type(model).__name__}; expected a model, or the folder or hub name of one."
            )
        refuse_missing_path(model, name)
    if init_kwargs and not any(isinstance(model, str) for model in given.values()):
        raise ValueError(
            f"`teacher_model_init_kwargs={init_kwargs}` would have no effect: both models are loaded already. Leave it out."
        )
    if given["teacher_model"] == given["reverse_model"]:
        raise ValueError(
            f"`teacher_model` and `reverse_model` are the same, and differ in nothing to learn from. {NEEDED}"
        )
    for name, model in given.items():
        same = [other for other in ("model", "ref_model") if models[other] is model]
        if same and not isinstance(model, str):
            raise ValueError(f"`{name}` and `{same[0]}` are the same object. Give a model of its own. {NEEDED}")
    return given


class Teachers:
    """
    The two models, ready to run, in evaluation mode.

    Args:
        trainer ([`DPOTrainer`] or [`OnlineDPOTrainer`]):
            Built, with its policy.
        given (`dict[str, Any]`):
            From [`given_teachers`], not empty.

    Raises:
        `ValueError`: For a model with another vocabulary than the policy's, or where a run cannot have them.
    """

    def __init__(self, trainer: Trainer, given: Mapping[str, Any]):
        if trainer.args.n_gpu > 1:
            raise ValueError(
                "Teachers are not run under `DataParallel`, which cuts batches by row. Start one process per GPU: `accelerate "
                "launch`."
            )
        self.trainer = trainer
        (name,) = read_teachers(trainer._terms.losses)
        self.loss = trainer._terms.losses[name]
        self.models = tuple(self._ready(name, model) for name, model in given.items())

    def _ready(self, name: str, model: Any) -> torch.nn.Module:
        trainer = self.trainer
        args, accelerator, policy = trainer.args, trainer.accelerator, trainer.model
        if isinstance(model, str):
            kwargs = {
                "dtype": policy.dtype,
                "attn_implementation": policy.config._attn_implementation,
                "trust_remote_code": args.trust_remote_code,
                **(getattr(args, "teacher_model_init_kwargs", None) or {}),
            }
            if args.distributed_state.distributed_type in ("MULTI_GPU", "DEEPSPEED"):
                kwargs["device_map"] = None  # "auto" would spread it over the devices of other processes
            model = create_model_from_path(model, **kwargs)
        sizes = [each.config.get_text_config().vocab_size for each in (policy, model)]
        if sizes[0] != sizes[1]:
            raise ValueError(
                f"`{name}` gives {sizes[1]} logits per token and the policy {sizes[0]}; distributions over different vocabularies "
                "cannot be compared. Where the tokenizer is the same and one vocabulary is padded, give both the same size: "
                f"`model.resize_token_embeddings({max(sizes)})`."
            )
        unbind_forward(base_model(model))  # of the trainer that has trained it
        add_fused_lm_head(base_model(model))
        bind_forward(base_model(model))
        model.eval()
        if trainer.is_deepspeed_enabled:
            return prepare_deepspeed(model, accelerator)
        if trainer.is_fsdp_enabled:
            return prepare_fsdp(model, accelerator)
        return accelerator.prepare_model(model, evaluation_mode=True)

    def divergence(self, rows: Rows, plan: Plan) -> Divergence:
        """
        What the policy's forward of a batch is to compute, once the teachers have run.

        They run on the completions that are learnt from alone, in plain rows: the chosen ones of pairs, all of groups.
        """
        if plan.groups is not None and self.loss.takes_groups:
            learnt = plan.groups.flatten()
        else:
            learnt = plan.pairs[:, 0]
        learnt = learnt[learnt != ABSENT].unique()
        marked = torch.zeros_like(rows.prompt, dtype=torch.bool).index_fill(0, learnt, True)
        mask = rows.completion_mask * marked.unsqueeze(1)
        scored = mask[:, 1:] != 0
        numbers = (scored.flatten().cumsum(0) - 1).view_as(scored).masked_fill(~scored, ABSENT)
        inputs = rows.inputs
        if not set(inputs) - SHARED_INPUTS:  # of images, no one says which row they belong to
            inputs, mask = {name: value[learnt] for name, value in inputs.items()}, mask[learnt]
        others = tuple(self._projection(model, {**inputs, "completion_mask": mask}) for model in self.models)
        return Divergence(self.loss.per_token, others, numbers)

    def _projection(self, model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> Projection:
        with torch.no_grad(), self.trainer.accelerator.autocast(), projections_in_place(is_sharded(model)) as found:
            fused_forward(model, inputs, router_logits=False)
        return found[0]


def with_divergences(scored: Scored, outputs: FusedCausalLMOutput, rows: Rows) -> Scored:
    """What the model says of the rows, with the sums of the divergence that its forward has computed."""
    return dataclasses.replace(scored, divergences=sum_completions(outputs[DIVERGENCE], rows.completion_mask))
