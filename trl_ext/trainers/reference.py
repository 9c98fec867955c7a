"""References that move: a model or an adapter that follows the policy, kept in checkpoints."""

from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback


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
                reference.data.lerp_(policy.data, args.ref_model_mixup_alpha)


def save_reference(model: torch.nn.Module, folder: str) -> None:
    """Write the weights of a reference that has moved, for a run that is resumed."""
    # Tied weights are one tensor under two names, which the format refuses
    state = {name: value.contiguous().clone() for name, value in model.state_dict().items()}
    save_file(state, Path(folder) / FILE)


def load_reference(model: torch.nn.Module, folder: str) -> None:
    """Read what [`save_reference`] wrote; a checkpoint without it is a `ValueError`."""
    path = Path(folder) / FILE
    if not path.exists():
        raise ValueError(
            f"The checkpoint {folder} has no {FILE}, so the reference that `sync_ref_model=True` moved cannot be "
            "restored. Resume from a checkpoint that was saved with it, or start anew from the checkpoint's model."
        )
    model.load_state_dict(load_file(path, device=str(next(model.parameters()).device)))
