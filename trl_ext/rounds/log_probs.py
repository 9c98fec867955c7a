"""Log-probabilities of given completions under a model: implicit rewards, and the columns of two-reference losses."""

from collections.abc import Iterator

import torch
from accelerate.utils import gather_object, send_to_device
from datasets import Dataset
from torch import nn
from tqdm import tqdm
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase
from trl.trainer.dpo_trainer import DataCollatorForPreference
from trl.trainer.utils import add_fused_lm_head

from trl_ext.data.cache import processes
from trl_ext.data.checks import TOKENIZED
from trl_ext.data.collator import RowsCollator
from trl_ext.data.further import in_twos
from trl_ext.data.tokens import padding_id
from trl_ext.rows import from_batch
from trl_ext.trainers.dpo_config import DPOConfig
from trl_ext.trainers.scoring import build_scorer
from trl_ext.trainers.trl_seam import bind_forward, tokenize_pairs, unbind_forward


def load_model(name: str, args: DPOConfig) -> nn.Module:
    """The model as the rounds train it: in float32, unless `model_init_kwargs` says otherwise."""
    return AutoModelForCausalLM.from_pretrained(name, **{"dtype": "float32", **(args.model_init_kwargs or {})})


def pair_log_probs(
    name: str,
    pairs: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    args: DPOConfig,
    batch_size: int = 8,
    ld_alpha: float | None = None,
) -> list[tuple[float, float]]:
    """
    Log-probability of both completions of each pair, as the trainer would compute it for a reference model.

    Tokens, truncation, precision and backend are those of the training that `args` describes. The pairs are shared among the
    processes of the run; each has a copy of the model on its device.

    Args:
        name (`str`):
            Hub name or folder of the model.
        pairs ([`~datasets.Dataset`]):
            `prompt`, `chosen`, `rejected`, plain or conversational, and what the chat template reads.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The trainer's.
        args ([`DPOConfig`]):
            Of the training.
        batch_size (`int`, *optional*, defaults to `8`):
            Pairs at a time.
        ld_alpha (`float`, *optional*):
            Weight of the tokens beyond the length that both completions of a pair have (LD-DPO).

    Returns:
        `list[tuple[float, float]]`: sums over the completion's tokens that are kept, in nats; in each process all of them.
    """
    state = processes()
    examples = list(tokenize_pairs(pairs, tokenizer, args).select_columns(list(TOKENIZED)))
    pad_id = padding_id(tokenizer)
    # Longest first, so that rows of a batch are alike and memory runs out at once or never
    order = sorted(range(len(examples)), key=lambda index: -sum(map(len, examples[index].values())))
    mine = order[state.process_index :: state.num_processes]
    model = load_model(name, args).to(state.device).eval()
    unbind_forward(model)
    add_fused_lm_head(model)
    bind_forward(model)
    scorer = build_scorer(model, args, aux_loss=False)
    collate = RowsCollator(
        DataCollatorForPreference(pad_id, args.max_length, args.truncation_mode), sharing=scorer.sharing
    )
    low = torch.bfloat16 if args.bf16 else torch.float16
    done = {}
    for start in tqdm(range(0, len(mine), batch_size), desc="log-probs", disable=not state.is_main_process):
        part = mine[start : start + batch_size]
        rows, plan = from_batch(send_to_device(collate([examples[index] for index in part]), state.device))
        with torch.no_grad(), torch.autocast(state.device.type, low, enabled=args.bf16 or args.fp16):
            outputs = scorer(model, rows, statistics=())
        logps = scorer.scored(rows, outputs.log_probs, None, (), ld_alpha).logps
        done |= zip(part, map(tuple, logps[plan.pairs].tolist()), strict=True)
    everything = {index: values for each in gather_object([done]) for index, values in each.items()}
    return [everything[index] for index in range(len(examples))]


def implicit_rewards(
    groups: Dataset,
    policy: str,
    reference: str,
    tokenizer: PreTrainedTokenizerBase,
    args: DPOConfig,
    batch_size: int = 8,
) -> Dataset:
    """
    Groups with `scores`: `log policy - log reference` of each completion, in nats (DICE's rewards, without `beta`).

    Arguments as in [`pair_log_probs`].
    """
    pairs = Dataset.from_list(
        [
            {**{name: row[name] for name in ("prompt", "tools", "chat_template_kwargs") if name in row}, **pair}
            for row in groups
            for pair in in_twos(row["completions"])
        ]
    )
    ratios = (
        ours - theirs
        for both in zip(
            *(pair_log_probs(name, pairs, tokenizer, args, batch_size) for name in (policy, reference)), strict=True
        )
        for ours, theirs in zip(*both, strict=True)
    )
    scores = [_take(ratios, len(completions)) for completions in groups["completions"]]
    there = ["scores"] if "scores" in groups.column_names else []
    return groups.remove_columns(there).add_column("scores", scores)


def _take(values: Iterator[float], count: int) -> list[float]:
    """The next `count` values; with an odd number one more is passed over."""
    taken = [next(values) for _ in range(count + count % 2)]
    return taken[:count]
