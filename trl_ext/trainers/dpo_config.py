"""`trl.DPOConfig` plus the loss types of this package and their hyper-parameters."""

import json
from dataclasses import dataclass, field
from typing import Any

import trl

from trl_ext.trainers.loss_terms import build_losses, check_combination, resolve_loss_types
from trl_ext.trainers.scoring import LOGPROB_BACKENDS


@dataclass
class DPOConfig(trl.DPOConfig):
    r"""
    Configuration of [`DPOTrainer`]: all of [`trl.DPOConfig`], with more loss types.

    Parameters:
        loss_type (`str` or `list[str]`, *optional*, defaults to `"sigmoid"`):
            TRL's loss types, those of this package (`trl-ext losses` lists them) and registered ones, by name or
            alias; several are combined with `loss_weights`.
        loss_kwargs (`dict[str, Any]` or `str`, *optional*):
            Hyper-parameters of the losses of this package: flat, `{"alpha": 0.5}`, where one of them is named, else by
            loss name, `{"offset": {"alpha": 0.5}, "anchored": {"tau": 2.0}}`. A JSON object on the command line.
        logprob_backend (`str`, *optional*, defaults to `"auto"`):
            What computes token log-probabilities: `"liger"`, Liger's Triton cross-entropy; `"torch"`, for CPUs and
            other devices; `"trl"`, TRL's fused head, with which a run on TRL's loss types is TRL's to the last bit; or
            `"auto"`, the fastest for the device: Liger on a GPU, torch elsewhere.
        logprob_memory_mb (`float`, *optional*):
            MiB of memory for one tile of logits. Larger tiles are faster up to a point; 256 on a GPU and 32 on a CPU
            by default.
        share_prefix (`str` or `bool`, *optional*, defaults to `"auto"`):
            Whether a prompt runs through the model once for all of its completions: `True`, `False`, or `"auto"`, where
            that is exact for the model and costs less. Not used with `logprob_backend="trl"`.

    Raises:
        `ValueError`: For an unknown loss, hyper-parameters that no loss reads or that are out of range, or options
            that exclude each other.
    """

    _VALID_DICT_FIELDS = [*trl.DPOConfig._VALID_DICT_FIELDS, "loss_kwargs"]

    loss_type: list[str] = field(
        default_factory=lambda: ["sigmoid"],
        metadata={
            "help": "Type of loss to use: TRL's own ('sigmoid', 'hinge', 'ipo', ...), those of trl_ext ('offset', "
            "'anchored', 'margin_adaptive', 'bias_variance', 'length_regularized') and registered ones; `trl-ext "
            "losses` lists them. Several are combined with `loss_weights`."
        },
    )
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
        metadata={"help": "MiB of memory for one tile of logits; 256 on a GPU and 32 on a CPU by default."},
    )
    share_prefix: str = field(
        default="auto",
        metadata={
            "help": "Whether a prompt runs through the model once for all of its completions: 'true', 'false', or "
            "'auto' (where that is exact for the model and costs less)."
        },
    )

    def __post_init__(self):
        self.loss_type = resolve_loss_types(self.loss_type)
        if isinstance(self.loss_kwargs, str):
            # Parsed here and not by transformers, which turns strings such as "0.5" into numbers
            try:
                self.loss_kwargs = json.loads(self.loss_kwargs)
            except json.JSONDecodeError as error:
                raise ValueError(
                    f"`loss_kwargs={self.loss_kwargs!r}` is not JSON ({error}). Quote it for the shell: "
                    "--loss_kwargs '{\"alpha\": 0.5}'."
                ) from error
        if self.logprob_backend not in LOGPROB_BACKENDS:
            raise ValueError(
                f"`logprob_backend={self.logprob_backend!r}` is unknown; choose one of {list(LOGPROB_BACKENDS)}."
            )
        memory = self.logprob_memory_mb
        if memory is not None and not (isinstance(memory, (int, float)) and 0 < memory < float("inf")):
            raise ValueError(f"`logprob_memory_mb={memory!r}` must be a positive number of MiB.")
        self.share_prefix = _tristate(self.share_prefix)
        if self.share_prefix is True and self.logprob_backend == "trl":
            raise ValueError("`share_prefix=True` needs our log-probabilities; set `logprob_backend` to 'auto'.")
        check_combination(self, self.loss_type, build_losses(self.loss_type, self.loss_kwargs))
        super().__post_init__()


def _tristate(value: str | bool) -> str | bool:
    """`"auto"`, `True` or `False`, from themselves or from the words of a command line."""
    words = {"auto": "auto", "true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
    if str(value).lower() not in words:
        raise ValueError(f"`share_prefix={value!r}` is none of 'auto', True, False.")
    return words[str(value).lower()]
