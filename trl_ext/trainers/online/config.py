"""TRL's online configuration plus losses, groups, preference mixtures and moving references."""

from dataclasses import dataclass, field
from typing import Any

from trl.experimental.online_dpo import OnlineDPOConfig as TRLOnlineDPOConfig

from trl_ext.data.checks import is_finite_number
from trl_ext.data.pairing import PAIRINGS
from trl_ext.losses.base import HingeLoss, SigmoidLoss, warn_once
from trl_ext.losses.online_ipo import OnlineIPOLoss
from trl_ext.trainers.arguments import DICT_FIELDS, LossArguments
from trl_ext.trainers.loss_types import build_losses, check_combination, check_pairing, resolve_loss_types
from trl_ext.trainers.online.checks import check_losses, check_reference
from trl_ext.trainers.terms import check_reads


# TRL's loss types that have a meaning online, as TRL computes them there: on sums over tokens
ONLINE_TRL_LOSSES = {"sigmoid": SigmoidLoss, "ipo": OnlineIPOLoss, "hinge": HingeLoss}


def build_online_losses(args: Any) -> dict[str, Any]:
    """All losses of an online run by name; one that cannot be had online is a `ValueError`."""
    names = resolve_loss_types(args.loss_type)
    ours = build_losses(names, getattr(args, "loss_kwargs", None))
    undefined = [name for name in names if name not in ours and name not in ONLINE_TRL_LOSSES]
    if undefined:
        raise ValueError(
            f"`loss_type={args.loss_type!r}` names {undefined}, which are not defined online. Of TRL's loss types "
            f"{sorted(ONLINE_TRL_LOSSES)} are, and those of trl_ext (`trl-ext losses`) but `inpo` and `step_apo`."
        )
    check_losses(ours)
    return {name: ours[name] if name in ours else ONLINE_TRL_LOSSES[name]() for name in names}


def default_pairing(losses: dict[str, Any]) -> str:
    """The `pairing` of a run that sets none."""
    return "best_worst" if all(loss.takes_pairs for loss in losses.values()) else "group"


@dataclass
class OnlineDPOConfig(LossArguments, TRLOnlineDPOConfig):
    r"""
    Configuration of [`OnlineDPOTrainer`]: all of TRL's, with more losses and more than two completions.

    Parameters:
        loss_type (`str` or `list[str]`, *optional*, defaults to `"sigmoid"`):
            `"sigmoid"`, `"ipo"` or `"hinge"` on summed log-probabilities, and every loss of `trl-ext losses` but `inpo` (which
            reads the first model's log-probabilities of each completion) and `step_apo` (which reads values of a search), by
            name or alias; several are combined with `loss_weights`. Rewards reach the losses as `score_chosen` and
            `score_rejected`; a judge's answers reach them as `preference_prob`, and a loss that takes scores as win rates
            (`sppo_soft`) is given each completion's mean probability of winning against the prompt's other completions.
        loss_weights (`list[float]`, *optional*):
            Weight of each loss.
        num_generations (`int`, *optional*, defaults to `2`):
            Completions sampled for each prompt, at least 2.
        pairing (`str`, *optional*):
            `"best_worst"`: the best against the worst of them; `"all"`: each two of different rewards; `"group"`: all of
            them at once, for losses that take groups (`anchored`, `aligndistil`, `trpa`, `drpo`). By default `"group"` where a
            loss takes whole groups alone (`trpa`, `drpo`), else `"best_worst"`. Prompts whose completions tie are dropped, and the
            share of them is logged as `pairs/dropped_prompts`; `aligndistil` alone learns from them too.
        length_penalty (`float`, *optional*, defaults to `0.0`):
            What each completion token takes off the reward, in the reward's unit.
        mixture_coef (`float`, *optional*, defaults to `0.0`):
            Completions are sampled from `policy^(1 - c) reference^c`, token by token (IPO-MD; its paper has 0.125). Not
            with vLLM, with images, or where no loss needs the reference.
        mixture_samples (`str`, *optional*, defaults to `"all"`):
            Which completions come from the mixture: `"all"` (IPO-MD), or `"half"`, the second half of each prompt's,
            against those of the policy itself (the sampling of Nash-MD).
        steps_per_generation (`int`, *optional*):
            Micro-batches that are generated for together. By default those of an optimizer step, `gradient_accumulation_steps`: the
            policy does not change between them. More, a multiple of it: the later ones are learnt from when the policy has
            changed. Fewer, a divisor of it: less memory while generating. Prompts with images are generated for one micro-batch at a
            time.
        generation_batch_size (`int`, *optional*):
            Completions that are generated at a time, over all processes, to bound memory; likewise what reward functions and the
            reference are given at a time, in whole micro-batches. By default all of `steps_per_generation` micro-batches. vLLM's
            own generation is not bounded by it: vLLM is given all prompts at once, and makes its own batches.
        num_iterations (`int`, *optional*, defaults to `1`):
            How often completions are learnt from: with 2, the micro-batches of a generation come twice, and the second time the
            policy has changed. Not with streams; the last generation of an epoch is filled with its first prompts.
            `objective/behaviour_kl` is then logged: the mean log-ratio of the policy
            that sampled the completions to the one that learns from them, in nats per completion.
        sync_ref_model (`bool`, *optional*, defaults to `False`):
            Whether the reference follows the policy: the moving anchor of `anchored`.
        ref_model_sync_steps (`int`, *optional*, defaults to `512`):
            Steps between two synchronisations.
        ref_model_mixup_alpha (`float`, *optional*, defaults to `0.6`):
            `reference = alpha policy + (1 - alpha) reference`; 1.0 copies.
        loss_kwargs, logprob_backend, logprob_memory_mb, share_prefix, teacher_model_name_or_path, reverse_model_name_or_path,
        teacher_model_init_kwargs:
            See [`LossArguments`].

    Raises:
        `ValueError`: For an unknown loss, hyper-parameters that no loss reads or that are out of range, or options
            that exclude each other.
    """

    _VALID_DICT_FIELDS = [*TRLOnlineDPOConfig._VALID_DICT_FIELDS, *DICT_FIELDS, "generation_kwargs"]

    loss_type: list[str] = field(
        default_factory=lambda: ["sigmoid"],
        metadata={
            "help": "Type of loss to use: 'sigmoid', 'ipo', 'hinge' on summed log-probabilities, those of trl_ext "
            "('offset', 'anchored', 'margin_adaptive', 'bias_variance', 'length_regularized', 'sppo_soft', "
            "'alpha_dpo', 'asft', 'beta_dpo', 'cpo', 'drpo', 'eurus', 'reward_distillation', 'robust_em', 'simpo', "
            "'trpa', 'aligndistil') and registered ones. "
            "Several are combined with `loss_weights`."
        },
    )
    loss_weights: list[float] | None = field(default=None, metadata={"help": "Weight of each loss."})
    num_generations: int = field(default=2, metadata={"help": "Completions sampled for each prompt, at least 2."})
    pairing: str | None = field(
        default=None,
        metadata={
            "help": "'best_worst': the best against the worst completion; 'all': each two of different rewards; "
            "'group': all at once, for losses that take groups. By default 'group' where a loss takes nothing else, else "
            "'best_worst'.",
            "choices": list(PAIRINGS),
        },
    )
    length_penalty: float = field(
        default=0.0, metadata={"help": "What each completion token takes off the reward, in the reward's unit."}
    )
    mixture_coef: float = field(
        default=0.0,
        metadata={"help": "Sample from policy^(1 - c) reference^c, token by token; 0 samples from the policy."},
    )
    mixture_samples: str = field(
        default="all",
        metadata={"help": "Which completions come from the mixture: 'all' or 'half'.", "choices": ["all", "half"]},
    )
    steps_per_generation: int | None = field(
        default=None,
        metadata={
            "help": "Micro-batches that are generated for together; those of an optimizer step by default. More learn from what an "
            "older policy has sampled."
        },
    )
    generation_batch_size: int | None = field(
        default=None,
        metadata={"help": "Completions that are generated at a time, over all processes; all by default."},
    )
    num_iterations: int = field(default=1, metadata={"help": "How often completions are learnt from."})
    sync_ref_model: bool = field(
        default=False, metadata={"help": "Whether the reference follows the policy during training."}
    )
    ref_model_sync_steps: int = field(default=512, metadata={"help": "Steps between two synchronisations."})
    ref_model_mixup_alpha: float = field(
        default=0.6, metadata={"help": "reference = alpha policy + (1 - alpha) reference; 1.0 copies."}
    )

    def __post_init__(self):
        self.loss_type = resolve_loss_types(self.loss_type)
        self.check_shared_arguments()
        losses = build_online_losses(self)
        check_combination(self, self.loss_type, losses)
        check_reference(losses, self)
        super().__post_init__()
        self._check_groups(losses)
        self._check_sampling()
        self._check_blocks()

    def _check_blocks(self) -> None:
        for name in ("steps_per_generation", "generation_batch_size", "num_iterations"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ValueError(f"`{name}={value!r}` must be a whole number, at least 1.")
        steps, accumulated = self.steps_per_generation, self.gradient_accumulation_steps
        if steps is not None and steps % accumulated and accumulated % steps:
            raise ValueError(
                f"`steps_per_generation={steps}` must be a multiple or a divisor of `gradient_accumulation_steps={accumulated}`: else "
                "some micro-batches of an optimizer step would be older than others."
            )
        least = self.num_generations * self.world_size
        if self.generation_batch_size is not None and self.generation_batch_size < least:
            raise ValueError(
                f"`generation_batch_size={self.generation_batch_size}` must be at least {least}: `num_generations="
                f"{self.num_generations}` completions of a prompt are generated together, on {self.world_size} processes."
            )

    def _check_groups(self, losses: dict[str, Any]) -> None:
        if not isinstance(self.num_generations, int) or self.num_generations < 2:
            raise ValueError(f"`num_generations={self.num_generations!r}` must be a whole number, at least 2.")
        check_pairing(self.pairing, losses)
        if self.pairing is None:
            self.pairing = default_pairing(losses)
        single = [name for name, loss in losses.items() if not loss.takes_groups]
        whole = [name for name, loss in losses.items() if not loss.takes_pairs]
        if whole and single:
            raise ValueError(
                f"{whole} learn from whole groups alone, and {single} from pairs; an online run makes one of the two. Train with "
                "losses of one kind, or offline, where the others are given each group's best and worst."
            )
        if self.pairing == "group" and single:
            raise ValueError(
                f"`pairing='group'` needs losses that take groups; {single} take pairs. Use 'best_worst' or 'all'."
            )
        check_reads(losses, self.pairing == "group")
        sampled = [name for name, loss in losses.items() if "behaviour_logps" in loss.reads]
        if sampled and self.mixture_coef:
            raise ValueError(
                f"{sampled} read log-probs under the policy that sampled, and with `mixture_coef={self.mixture_coef}` no policy "
                "sampled but a mixture of two. Set `mixture_coef=0`."
            )
        longest = getattr(losses.get("drpo"), "max_length", self.max_new_tokens)
        if longest != self.max_new_tokens:
            warn_once(
                f"drpo: the length reward is 0 at `max_length={longest}` tokens, and completions have at most "
                f"`max_new_tokens={self.max_new_tokens}`. The two are one number in the paper: loss_kwargs="
                f'{{"max_length": {self.max_new_tokens}}}.'
            )
        if "bias_variance" in losses and self.pairing != "best_worst":
            raise ValueError(
                "`bias_variance` joins one pair with a trace and one without: use `pairing='best_worst'`."
            )

    def _check_sampling(self) -> None:
        if not (is_finite_number(self.mixture_coef) and 0 <= self.mixture_coef <= 1):
            raise ValueError(f"`mixture_coef={self.mixture_coef!r}` must lie in [0, 1].")
        if self.mixture_samples not in ("all", "half"):
            raise ValueError(f"`mixture_samples={self.mixture_samples!r}` is unknown; choose 'all' or 'half'.")
        if self.mixture_coef and self.use_vllm:
            raise ValueError("`mixture_coef` needs the logits of both models at each token; set `use_vllm=False`.")
        if self.mixture_coef and (self.generation_kwargs or {}).get("num_beams", 1) != 1:
            raise ValueError(
                "`mixture_coef` samples token by token, and `generation_kwargs` ask for beams. Leave `num_beams` out."
            )
        penalty, weights = self.missing_eos_penalty, self.reward_weights
        if penalty is not None and not (is_finite_number(penalty) and penalty > 0):
            raise ValueError(f"`missing_eos_penalty={penalty!r}` must be a positive number, or None.")
        if weights is not None and not (isinstance(weights, (list, tuple)) and all(map(is_finite_number, weights))):
            raise ValueError(
                f"`reward_weights={self.reward_weights!r}` must be finite numbers, one per reward function."
            )
        if not is_finite_number(self.length_penalty):
            raise ValueError(f"`length_penalty={self.length_penalty!r}` must be a finite number.")
        if self.sync_ref_model and not (0 < self.ref_model_mixup_alpha <= 1 and self.ref_model_sync_steps > 0):
            raise ValueError(
                f"`ref_model_mixup_alpha={self.ref_model_mixup_alpha!r}` must lie in (0, 1] and "
                f"`ref_model_sync_steps={self.ref_model_sync_steps!r}` be positive."
            )
