"""References that move: a model or an adapter that follows the policy, kept in checkpoints."""

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from accelerate import PartialState
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from transformers import TrainerCallback
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled


ADAPTER = "ref"
FILE = "ref_model.safetensors"


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
