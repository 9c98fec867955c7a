"""The reference that a run begins with, where none is given: the policy as it stands."""

import copy
import logging
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import PreTrainedModel


logger = logging.getLogger(__name__)

# What of each file of a saved model is compared with memory: enough to see training, cheap to read from disk and device
TENSORS, TENSOR_ROWS = 4, 256


def frozen_copy(model: PreTrainedModel) -> PreTrainedModel:
    """
    A copy of `model` with the weights that it has now, in evaluation mode and without gradients.

    Where these are not the weights that it was loaded with, which TRL would take for the reference, a warning says so.
    """
    if differs_from_source(model):
        logger.warning(
            "No `ref_model` was given, so the reference is a copy of the model as it stands. Its weights differ from those in "
            f"{model.config._name_or_path!r}, for instance since it was trained in between. For another reference, such as that "
            "one, pass `ref_model=`."
        )
    reference = copy.deepcopy(model)
    reference.requires_grad_(False)
    return reference.eval()


def differs_from_source(model: PreTrainedModel) -> bool:
    """
    Whether `model` has other weights than the local folder that it was loaded from.

    The first rows of a few tensors are compared, spread over the model. A model that was loaded from the hub, or saved in another form than
    safetensors, is taken to be as it was loaded.
    """
    folder = Path(getattr(model.config, "_name_or_path", "") or "")
    files = sorted(folder.glob("*.safetensors")) if str(folder) != "." and folder.is_dir() else []
    parameters = {name: value for name, value in model.named_parameters() if value.dim() and not value.is_meta}
    for file in files:
        with safe_open(file, framework="pt") as saved:
            names = sorted(name for name in saved.keys() if name in parameters)
            for name in names[:: max(1, len(names) // TENSORS)]:
                value = parameters[name].detach()[:TENSOR_ROWS].cpu()
                if not torch.equal(saved.get_slice(name)[:TENSOR_ROWS].to(value.dtype), value):
                    return True
    return False
