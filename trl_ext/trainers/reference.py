"""The reference of a run: whether there is one, how it is run, and how one that follows the policy is kept."""

import contextlib
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import is_peft_model
from datasets import Dataset
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from transformers import PreTrainedModel, Trainer, TrainerCallback
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from trl import DPOConfig
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.utils import use_adapter

from trl_ext.data.checks import REFERENCES, TOKENIZED
from trl_ext.data.collator import RowsCollator
from trl_ext.data.further import FURTHER, map_further
from trl_ext.trainers.trl_seam import base_model, with_cache_key


ADAPTER = "ref"
FILE = "ref_model.safetensors"


def refuse_reference(names: list[str], ref_model: Any, args: DPOConfig, teachers: Any = None) -> None:
    """Raise a `ValueError` for what would make or move a reference that none of the losses `names` reads."""
    given = [name for name in ("sync_ref_model", "precompute_ref_log_probs") if getattr(args, name)]
    given += ["ref_model"] if ref_model is not None else []
    if given:
        hint = " What AlignDistil's own code calls the reference is `reverse_model` here." if teachers else ""
        raise ValueError(
            f"None of the losses {names} reads a reference model, so {given} would have no effect. Leave {given} out.{hint}"
        )


def copies_policy(model: Any, peft_config: Any, args: DPOConfig | None) -> bool:
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


@contextlib.contextmanager
def reference_forward(trainer: Trainer) -> Iterator[None]:
    """
    While open, a forward is the reference's, as in `trl.DPOTrainer.compute_ref_log_probs`: no gradients or checkpointing, and
    where there is no model of its own the policy's adapter is off, or the one that it began with is on.
    """
    policy, adapter = trainer.accelerator.unwrap_model(trainer.model), contextlib.nullcontext()
    if trainer.ref_model is None and is_peft_model(trainer.model):
        adapter = use_adapter(policy, adapter_name=ADAPTER if ADAPTER in policy.peft_config else None)
    checkpointing = disable_gradient_checkpointing(trainer.model, trainer.args.gradient_checkpointing_kwargs)
    with torch.no_grad(), checkpointing, adapter, trainer.accelerator.autocast():
        yield


def precomputed(trainer: Trainer, precompute: Callable, dataset: Dataset, name: str, batch_size: int) -> Dataset:
    """
    The dataset with reference log-probs of its pairs and of those beside them, kept by all that they depend on.

    Args:
        trainer ([`DPOTrainer`]):
            Whose reference scores.
        precompute (`Callable`):
            TRL's own method, which keeps what it computes by the dataset's fingerprint and the model's weights.
        dataset ([`~datasets.Dataset`]):
            Token ids.
        name (`str`):
            What it is called.
        batch_size (`int`):
            Pairs at a time.
    """
    args = trainer.args
    key = (args.max_length, args.truncation_mode, args.ld_alpha, args.bf16, args.fp16, str(trainer._scorer))
    # Settings of the model that are no weights: positions, soft caps, windows
    scored = trainer.model if trainer.ref_model is None else trainer.ref_model
    key += (base_model(trainer.accelerator.unwrap_model(scored)).config.to_json_string(),)
    collator = trainer.data_collator
    if isinstance(collator, RowsCollator):  # `evaluate` of a new dataset: TRL's method takes TRL's batches
        trainer.data_collator = collator.collator

    def further(flat: Dataset) -> Dataset:
        return precompute(with_cache_key(flat, *key), f"{name} (further completions)", batch_size)

    try:
        dataset = precompute(with_cache_key(dataset, *key), name, batch_size)
        if FURTHER in dataset.column_names:
            dataset = map_further(dataset, FURTHER, further, (*TOKENIZED, *REFERENCES))
    finally:
        trainer.data_collator = collator
    return dataset


def add_reference_adapter(model: PeftModel) -> None:
    """A frozen copy of the active adapter, named `ref`: what the reference runs with."""
    active = model.active_adapter
    if ADAPTER not in model.peft_config:
        model.add_adapter(ADAPTER, model.peft_config[active])
    for policy, reference in _adapter_pairs(model):
        reference.data.copy_(policy.data)
        reference.requires_grad_(False)
    model.set_adapter(active)


def _adapter_pairs(model: PeftModel) -> list[tuple[torch.nn.Parameter, torch.nn.Parameter]]:
    parameters = dict(model.named_parameters())
    active = f".{model.active_adapter}."
    names = {name: name.replace(active, f".{ADAPTER}.") for name in parameters if active in name}
    return [(parameters[name], parameters[other]) for name, other in names.items() if other in parameters]


class SyncReferenceAdapter(TrainerCallback):
    """What TRL's `SyncRefModelCallback` does, for the adapters of one model."""

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step % args.ref_model_sync_steps == 0:
            model = getattr(model, "module", model)
            for policy, reference in _adapter_pairs(model):
                with _gathered(policy, reference, written=True):
                    reference.data.lerp_(policy.data, args.ref_model_mixup_alpha)


def save_reference(model: torch.nn.Module, folder: str) -> None:
    """
    Write the weights of a reference that has moved, for a run that is resumed.

    Called in every process, with the model unwrapped: where it is sharded, each process has a part. The first one writes.
    """
    main = PartialState().is_main_process
    if is_deepspeed_zero3_enabled():
        state = {}
        for name, value in model.state_dict(keep_vars=True).items():
            with _gathered(value):
                state |= {name: value.detach().cpu()} if main else {}
    else:
        state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if main:
        # Tied weights are one tensor under two names, which the format refuses
        save_file({name: value.contiguous().clone() for name, value in state.items()}, Path(folder) / FILE)


def load_reference(model: torch.nn.Module, folder: str) -> None:
    """Read in every process what [`save_reference`] wrote; a checkpoint without it is a `ValueError`."""
    path = Path(folder) / FILE
    if not path.exists():
        raise ValueError(
            f"The checkpoint {folder} has no {FILE}, so the reference that `sync_ref_model=True` moved cannot be "
            "restored. Resume from a checkpoint that was saved with it, or start anew from the checkpoint's model."
        )
    state = load_file(path)
    # Else each process has a part of every weight, or other names
    if PartialState().num_processes == 1 and not is_deepspeed_zero3_enabled():
        forms, wanted = (
            {name: tuple(value.shape) for name, value in each.items()} for each in (state, model.state_dict())
        )
        different = sorted(name for name in {*forms, *wanted} if forms.get(name) != wanted.get(name))
        if different:
            raise ValueError(
                f"The weights in {path} are not those of this run's reference: {different[:4]} are absent or of another shape. Resume from a "
                "checkpoint of this run."
            )
    if is_deepspeed_zero3_enabled():
        for name, value in model.state_dict(keep_vars=True).items():
            with _gathered(value, written=True):
                value.data.copy_(state[name])
    else:
        set_model_state_dict(model, state, options=StateDictOptions(full_state_dict=True))


def _gathered(*values: torch.Tensor, written: bool = False) -> AbstractContextManager:
    """Makes parameters that ZeRO-3 has partitioned whole; `written`: the first process's changes are given to all."""
    partitioned = [value for value in values if hasattr(value, "ds_id")]
    if not partitioned:
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(partitioned, modifier_rank=0 if written else None)
