"""`trl.DPOConfig` plus the loss types of this package and their hyper-parameters."""

from dataclasses import dataclass, field

import trl

from trl_ext.data.checks import is_finite_number
from trl_ext.data.pairing import PAIRINGS
from trl_ext.trainers.arguments import DICT_FIELDS, LossArguments
from trl_ext.trainers.loss_types import build_losses, check_combination, check_pairing, resolve_loss_types


@dataclass
class DPOConfig(LossArguments, trl.DPOConfig):
    r"""
    Configuration of [`DPOTrainer`]: all of [`trl.DPOConfig`], with more loss types.

    Parameters:
        loss_type (`str` or `list[str]`, *optional*, defaults to `"sigmoid"`):
            TRL's loss types, those of this package (`trl-ext losses` lists them) and registered ones, by name or
            alias; several are combined with `loss_weights`.
        pairing (`str`, *optional*):
            What is made of a dataset of groups (`prompt`, `completions`, `scores`): `"group"`, whole groups for the losses
            that take them (`anchored`, `aligndistil`, `trpa`, `drpo`) and the best against the worst for the others;
            `"best_worst"`; or `"all"`, each two completions of different scores. By default whole groups where a loss takes them,
            else best against worst.
        ref_logps_memory_mb (`float`, *optional*, defaults to `1024`):
            MiB in which each process keeps log-probabilities of the reference, so that it scores a row once and not in every epoch
            and evaluation: about 200 bytes per completion, and 5 per token where a loss reads tokens (`dmpo`). What finds no
            room is computed each time, as is everything with 0. They are saved in checkpoints. Nothing is kept where the reference moves
            (`sync_ref_model`), of batches with images, or with TRL's losses and `logprob_backend="trl"`; with
            `precompute_ref_log_probs` they stand in the dataset.
        loss_kwargs, logprob_backend, logprob_memory_mb, share_prefix, teacher_model_name_or_path, reverse_model_name_or_path,
        teacher_model_init_kwargs:
            See [`LossArguments`].

    Raises:
        `ValueError`: For an unknown loss, hyper-parameters that no loss reads or that are out of range, or options
            that exclude each other.
    """

    _VALID_DICT_FIELDS = [*trl.DPOConfig._VALID_DICT_FIELDS, *DICT_FIELDS]

    loss_type: list[str] = field(
        default_factory=lambda: ["sigmoid"],
        metadata={
            "help": "Type of loss to use: TRL's own ('sigmoid', 'hinge', 'ipo', ...), those of trl_ext ('offset', "
            "'anchored', 'margin_adaptive', 'bias_variance', 'length_regularized', 'inpo', 'sppo_soft', "
            "'alpha_dpo', 'asft', 'beta_dpo', 'cpo', 'dmpo', 'drpo', 'eurus', 'reward_distillation', 'robust_em', "
            "'simpo', 'step_apo', 'trpa', 'aligndistil') and registered ones; `trl-ext losses` lists them. Several are "
            "combined with `loss_weights`."
        },
    )

    pairing: str | None = field(
        default=None,
        metadata={
            "help": "What is made of a dataset of groups (prompt, completions, scores): 'group', 'best_worst' or 'all'; "
            "whole groups by default where a loss takes them, else best against worst.",
            "choices": list(PAIRINGS),
        },
    )

    ref_logps_memory_mb: float = field(
        default=1024,
        metadata={
            "help": "MiB in which log-probabilities of the reference are kept, so that it scores a row once and not in every "
            "epoch; 0 keeps none."
        },
    )

    def __post_init__(self):
        memory = self.ref_logps_memory_mb
        if not is_finite_number(memory) or memory < 0:
            raise ValueError(f"`ref_logps_memory_mb={memory!r}` must be a number of MiB, 0 to keep nothing.")
        self.loss_type = resolve_loss_types(self.loss_type)
        self.check_shared_arguments()
        losses = build_losses(self.loss_type, self.loss_kwargs)
        check_combination(self, self.loss_type, losses)
        check_pairing(self.pairing, losses)
        if self.pairing == "group" and not any(loss.takes_groups for loss in losses.values()):
            raise ValueError(f"`pairing='group'` needs a loss that takes groups; {self.loss_type} take pairs only.")
        super().__post_init__()
