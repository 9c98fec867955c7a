"""Options that offline and online training share: losses and token log-probabilities."""

import importlib.util
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import is_xpu_available
from transformers.integrations import integration_utils

from trl_ext.data.checks import is_finite_number
from trl_ext.sources import read_hyperparameters
from trl_ext.trainers.options import check_options
from trl_ext.trainers.scoring import LOGPROB_BACKENDS


# Fields that are JSON objects on the command line
DICT_FIELDS = ("loss_kwargs", "teacher_model_init_kwargs")


@dataclass
class LossArguments:
    """
    Fields of [`DPOConfig`] and [`OnlineDPOConfig`] alike.

    Parameters:
        loss_kwargs (`dict[str, Any]` or `str`, *optional*):
            Hyper-parameters of the losses of this package: flat, `{"alpha": 0.5}`, where one of them is named, else by
            loss name, `{"offset": {"alpha": 0.5}, "anchored": {"tau": 2.0}}`. A JSON object on the command line.
        logprob_backend (`str`, *optional*, defaults to `"auto"`):
            What computes token log-probabilities: `"liger"`, Liger's Triton cross-entropy; `"torch"`, for CPUs and
            other devices; `"trl"`, TRL's fused head, with which a run on TRL's loss types is TRL's to the last bit; or
            `"auto"`, the fastest for the device: Liger on a GPU, torch elsewhere.
        logprob_memory_mb (`float`, *optional*):
            MiB of memory for one tile of logits. Where the head is trained and all logits fit in three tiles, they are
            kept and not computed twice. By default 32 on a CPU, while a GPU is asked: a tile has up to 4096 tokens, and
            logits are kept, where that does not raise the peak of the run; 256 MiB bound a tile else.
        share_prefix (`str` or `bool`, *optional*, defaults to `"auto"`):
            Whether a prompt runs through the model once for all of its completions: `True`, `False`, or `"auto"`, where
            that is exact for the model and costs less. Rows have no padding then. A few rows of the first batch are
            scored both ways, forward and backward: if more than rounding differs, `"auto"` goes on in plain rows, with a
            warning, and `True` stops. Not used with `logprob_backend="trl"`.
        teacher_model_name_or_path (`str`, *optional*):
            Folder or hub name of the trainer's `teacher_model`, a model trained by DPO, for a loss that reads teachers
            (`aligndistil`).
        reverse_model_name_or_path (`str`, *optional*):
            The same of its `reverse_model`, trained by DPO on swapped pairs.
        teacher_model_init_kwargs (`dict[str, Any]` or `str`, *optional*):
            What `from_pretrained` is given for both. By default they have the policy's dtype and attention.
    """

    loss_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "Hyper-parameters of trl_ext's losses as a JSON object: flat, '{\"alpha\": 0.5}', where one of them "
            'is named, else by loss name, \'{"offset": {"alpha": 0.5}}\'. `trl-ext losses NAME` explains them.'
        },
    )
    logprob_backend: str = field(
        default="auto",
        metadata={
            "help": "What computes token log-probabilities: 'liger' (Liger's Triton cross-entropy), 'torch' (for CPUs and "
            "other devices), 'trl' (TRL's fused head) or 'auto' (the fastest for the device).",
            "choices": list(LOGPROB_BACKENDS),
        },
    )
    logprob_memory_mb: float | None = field(
        default=None,
        metadata={
            "help": "MiB of memory for one tile of logits; by default 32 on a CPU, and on a GPU 4096 tokens where that "
            "does not raise the peak of the run, else 256."
        },
    )
    share_prefix: str = field(
        default="auto",
        metadata={
            "help": "Whether a prompt runs through the model once for all of its completions: 'true', 'false', or "
            "'auto' (where that is exact for the model and costs less)."
        },
    )
    teacher_model_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "Folder or hub name of a model trained by DPO, the teacher of a loss that reads teachers (aligndistil)."
        },
    )
    reverse_model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "The same of a model trained by DPO on pairs with chosen and rejected swapped."},
    )
    teacher_model_init_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "What `from_pretrained` is given for both teachers, as a JSON object."},
    )

    def check_shared_arguments(self) -> None:
        """Bring the fields into their own types; a `ValueError` for one that cannot be used."""
        self.loss_kwargs = read_hyperparameters(self.loss_kwargs)
        if self.logprob_backend not in LOGPROB_BACKENDS:
            raise ValueError(
                f"`logprob_backend={self.logprob_backend!r}` is unknown; choose one of {list(LOGPROB_BACKENDS)}."
            )
        memory = self.logprob_memory_mb
        if memory is not None and not (is_finite_number(memory) and memory > 0):
            raise ValueError(f"`logprob_memory_mb={memory!r}` must be a positive number of MiB.")
        self.share_prefix = _tristate(self.share_prefix)
        if self.share_prefix is True and self.logprob_backend == "trl":
            raise ValueError("`share_prefix=True` needs our log-probabilities; set `logprob_backend` to 'auto'.")
        for name in ("teacher_model_name_or_path", "reverse_model_name_or_path"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, (str, Path)) and str(value)):
                raise ValueError(f"`{name}={value!r}` must be a name or a path.")
        check_options(self)


def _tristate(value: str | bool) -> str | bool:
    """`"auto"`, `True` or `False`, from themselves or from the words of a command line."""
    words = {"auto": "auto", "true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
    if str(value).lower() not in words:
        raise ValueError(f"`share_prefix={value!r}` is none of 'auto', True, False.")
    return words[str(value).lower()]


def explained(error: Exception) -> str:
    """The message of an error that a training config raised, with the way out where transformers' own hides it."""
    if "bf16/gpu" not in str(error):
        return str(error)
    return (
        "there is no GPU that computes in bfloat16, which TRL trains in by default. On a CPU set `use_cpu` to true, and `bf16` "
        "to false for float32, which is faster there (command line: --use_cpu --bf16 false); on an older GPU set `fp16` to true."
    )


def refuse_liger_without_gpu(use_cpu: bool) -> None:
    """Raise a `ValueError` where `use_liger_kernel=True` would fail at the first step: on a CPU, or without Liger."""
    if importlib.util.find_spec("liger_kernel") is None:
        raise ValueError("`use_liger_kernel` needs Liger: pip install liger-kernel.")
    if use_cpu or not (torch.cuda.is_available() or is_xpu_available()):
        raise ValueError("`use_liger_kernel` needs a GPU, and this run is on a CPU. Leave it out.")


def refuse_missing_trackers(report_to: str | list[str] | None) -> None:
    """Raise a `ValueError` where `report_to` names a tracker that is none or is not installed: training would fail where it begins."""
    known = [*integration_utils.INTEGRATION_TO_CALLBACK, "all", "none"]
    for name in [report_to] if isinstance(report_to, str) else report_to or []:
        if isinstance(name, str) and name not in known:
            raise ValueError(f"`report_to` names {name!r}, which is no tracker; choose some of {sorted(known)}.")
        installed = getattr(integration_utils, f"is_{name}_available", None)
        if installed is not None and not installed():
            raise ValueError(f"`report_to` names {name!r}, which is not installed: pip install {name}.")
