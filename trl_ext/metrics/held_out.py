"""What a trainer's policy says of held-out data: completions of its own of prompts, and log-probabilities of given pairs."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import gather_object, send_to_device
from torch.distributed.fsdp import FullyShardedDataParallel
from transformers import GenerationConfig, Trainer
from trl.models.utils import unwrap_model_for_generation
from trl.trainer.dpo_trainer import DataCollatorForPreference
from trl.trainer.utils import pad

from trl_ext.data.collator import RowsCollator
from trl_ext.data.generators import stop_tokens
from trl_ext.data.reasoning import completion_text
from trl_ext.data.tokens import padding_id
from trl_ext.generation import sample_rows
from trl_ext.rows import Rows, Scored, from_batch
from trl_ext.trainers.online.generate import eager
from trl_ext.trainers.reference import reference_forward


@dataclass
class Answer:
    """
    One sampled completion.

    Attributes:
        ids (`torch.Tensor`):
            Tokens, the end-of-sequence token included where there is one.
        text (`str` or `list[dict]`):
            As reward functions and judges see it: text, or a list of one message.
        ended (`bool`):
            Whether it ended by itself.
    """

    ids: torch.Tensor
    text: Any
    ended: bool


def shared_out(
    trainer: Trainer, count: int, batch_size: int, measure: Callable[[list[int]], list[dict]]
) -> list[dict]:
    """
    What `measure` gives for each of `count` rows, in their order and in every process; each process measures its part.

    All processes call `measure` equally often, because a model that is sharded runs in all of them together: where rows do not go
    round, some are measured twice and count once.

    Args:
        trainer ([`~transformers.Trainer`]):
            Knows the processes.
        count (`int`):
            Number of rows.
        batch_size (`int`):
            Rows at a time.
        measure (`Callable`):
            Takes indices of rows and gives one dict of plain values for each.
    """
    rank, world = trainer.accelerator.process_index, trainer.accelerator.num_processes
    mine = range(rank, rank + -(-count // world) * world, world)
    found = []
    for start in range(0, len(mine), batch_size):
        part = mine[start : start + batch_size]
        found += [*zip(part, measure([place % count for place in part]), strict=True)]
    everyone = dict(gather_object(found) if world > 1 else found)
    return [everyone[place] for place in range(count)]


def sample_answers(
    trainer: Trainer,
    prompts: list,
    prompt_ids: list[list[int]],
    max_new_tokens: int,
    seed: int,
    reference: bool = False,
) -> list[Answer]:
    """
    One completion of each prompt, drawn from the policy's own distribution: temperature 1, without cut-offs or penalties.

    Args:
        trainer ([`DPOTrainer`] or [`OnlineDPOTrainer`]):
            Whose policy it is, in evaluation mode.
        prompts (`list`):
            As the dataset has them.
        prompt_ids (`list[list[int]]`):
            Their tokens.
        max_new_tokens (`int`):
            Tokens that a completion has at most.
        seed (`int`):
            The random numbers of training stay as they are.
        reference (`bool`, *optional*, defaults to `False`):
            Whether the reference answers in place of the policy.
    """
    tokenizer, device = trainer._tokenizer, trainer.accelerator.device
    rows = [torch.tensor(row) for row in prompt_ids]
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.no_grad():
        torch.manual_seed(seed)
        with _to_sample_from(trainer, reference) as model:
            stops = stop_tokens(model.generation_config, tokenizer)
            config = GenerationConfig(
                max_new_tokens=max_new_tokens,
                do_sample=True,
                pad_token_id=padding_id(tokenizer),
                eos_token_id=stops or None,
                use_cache=True,
            )
            output = sample_rows(model, rows, config, 1, device)
    return [_answer(row.cpu(), prompt, stops, tokenizer) for row, prompt in zip(output, prompts, strict=True)]


@contextlib.contextmanager
def _to_sample_from(trainer: Trainer, reference: bool) -> Iterator[torch.nn.Module]:
    """Policy or reference, unwrapped, with its parameters where `generate` needs them."""
    accelerator, args = trainer.accelerator, trainer.args
    with contextlib.ExitStack() as stack:
        if reference:
            stack.enter_context(reference_forward(trainer))
            model = accelerator.unwrap_model(_reference_of(trainer))
        else:
            context = unwrap_model_for_generation(
                trainer.model_wrapped,
                accelerator,
                gather_deepspeed3_params=getattr(args, "ds3_gather_for_generation", True),
                gradient_checkpointing_kwargs=args.gradient_checkpointing_kwargs,
            )
            model = stack.enter_context(context)
        if trainer.is_fsdp_enabled:
            stack.enter_context(FullyShardedDataParallel.summon_full_params(trainer.model_wrapped, recurse=False))
        yield eager(model)


def _answer(ids: torch.Tensor, prompt: Any, stops: list[int], tokenizer: Any) -> Answer:
    ended = int(ids[-1]) in stops
    text = completion_text(ids[: len(ids) - ended].tolist(), tokenizer)
    return Answer(
        ids=ids, text=text if isinstance(prompt, str) else [{"role": "assistant", "content": text}], ended=ended
    )


def score_answers(
    trainer: Trainer, prompt_ids: list[list[int]], answers: list[Answer]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability of each completion under policy and reference, nats; shape `(N,)` each."""
    ids = [torch.cat([torch.tensor(row), answer.ids]) for row, answer in zip(prompt_ids, answers, strict=True)]
    masks = [
        (torch.arange(len(row)) >= len(row) - len(answer.ids)).long() for row, answer in zip(ids, answers, strict=True)
    ]
    inputs = {
        "input_ids": pad(ids, padding_value=padding_id(trainer._tokenizer), padding_side="right"),
        "attention_mask": pad([torch.ones_like(row) for row in ids], padding_value=0, padding_side="right"),
    }
    number = torch.arange(len(ids))
    mask = pad(masks, padding_value=0, padding_side="right")
    inputs, mask, number = send_to_device((inputs, mask, number), trainer.accelerator.device)
    scored = _scored(trainer, Rows(inputs, mask, number, number))
    return scored.logps.cpu(), scored.ref_logps.cpu()


def score_pairs(trainer: Trainer, examples: list[dict[str, Any]]) -> Scored:
    """
    What policy and reference say of tokenized pairs: the chosen completions of all, then the rejected ones. On the CPU.

    They are cut to the training's `max_length`.
    """
    args = trainer.args
    collate = DataCollatorForPreference(
        padding_id(trainer._tokenizer), args.max_length, getattr(args, "truncation_mode", "keep_start")
    )
    rows, _ = from_batch(send_to_device(RowsCollator(collate)(examples), trainer.accelerator.device))
    scored = _scored(trainer, rows)
    return Scored(scored.logps.cpu(), scored.lengths.cpu(), scored.ref_logps.cpu())


def _scored(trainer: Trainer, rows: Rows) -> Scored:
    scorer = trainer._scorer
    with torch.no_grad(), trainer.accelerator.autocast():
        policy = scorer.forward(trainer.model_wrapped, rows, statistics=()).log_probs
    with reference_forward(trainer):
        reference = scorer.forward(_reference_of(trainer), rows, statistics=()).log_probs
    return scorer.scored(rows, policy, reference, ())


def has_reference(trainer: Trainer) -> bool:
    """Whether there is a reference to ask: a model of its own, or the policy without its adapter."""
    adapter = hasattr(trainer.accelerator.unwrap_model(trainer.model), "peft_config")
    return trainer._needs_reference and (trainer.ref_model is not None or adapter)


def _reference_of(trainer: Trainer) -> torch.nn.Module:
    return trainer.model if trainer.ref_model is None else trainer.ref_model
