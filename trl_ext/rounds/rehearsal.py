"""The training of a round, rehearsed before anything is sampled: what its trainer refuses is refused then."""

import dataclasses
import tempfile
from typing import Any

from accelerate.utils import parse_flag_from_env
from datasets import Dataset, are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from trl_ext.trainers.arguments import explained
from trl_ext.trainers.dpo import DPOTrainer
from trl_ext.trainers.dpo_config import DPOConfig


# What is written, sent or loaded, and what a dataset of two rows cannot have
LEFT_OUT = {
    "report_to": "none",
    "push_to_hub": False,
    "disable_tqdm": True,
    "model_init_kwargs": None,
    "dataset_num_proc": None,
    "dataloader_drop_last": False,
}


def made_up_groups(prompts: Dataset) -> Dataset:
    """Two completions of each of the two shortest prompts, with scores: if these have no room for an answer, none has."""
    shortest = sorted(range(len(prompts)), key=lambda index: len(str(prompts[index]["prompt"])))[:2]
    rows = [prompts[index] for index in shortest]

    def answers(prompt: Any) -> list[Any]:
        texts = [" yes", " no"]
        return texts if isinstance(prompt, str) else [[{"role": "assistant", "content": text}] for text in texts]

    return Dataset.from_list([{**row, "completions": answers(row["prompt"]), "scores": [1.0, 0.0]} for row in rows])


def rehearse(args: DPOConfig, data: Dataset, tokenizer: PreTrainedTokenizerBase, with_reference: bool) -> None:
    """
    Build the trainer of a round on made-up rows, with a model of a few weights in place of the policy, and draw a batch.

    A wrong option is an error of the trainer, which a round builds after it has sampled and scored, maybe for hours. Where models
    are sharded nothing is rehearsed: that is said in terms of the policy's own layers.

    Args:
        args ([`DPOConfig`]):
            Of the training.
        data ([`~datasets.Dataset`]):
            Rows as the pairs of a round are.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            That of the policy.
        with_reference (`bool`):
            Whether a round's trainer is given a reference model.

    Raises:
        `ValueError`: For a training that cannot be.
    """
    sharded = any(map(parse_flag_from_env, ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED")))
    if sharded or args.fsdp or args.deepspeed or args.parallelism_config:
        return
    shown = not are_progress_bars_disabled()
    disable_progress_bars()
    try:
        with tempfile.TemporaryDirectory() as folder:
            _build(dataclasses.replace(args, output_dir=folder, **LEFT_OUT), data, tokenizer, with_reference)
    except (ValueError, TypeError, ImportError) as error:
        raise ValueError(f"`training` cannot be used: {explained(error)}") from error
    finally:
        if shown:
            enable_progress_bars()


def _build(args: DPOConfig, data: Dataset, tokenizer: PreTrainedTokenizerBase, with_reference: bool) -> None:
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    trainer = DPOTrainer(
        model=LlamaForCausalLM(config),
        ref_model=LlamaForCausalLM(config) if with_reference else None,
        args=args,
        train_dataset=data,
        processing_class=tokenizer,
    )
    next(iter(trainer.get_train_dataloader()))
    if args.optim_target_modules is None:  # names of the policy's own layers
        trainer.get_optimizer_cls_and_kwargs(args, trainer.model)
    trainer.accelerator.free_memory()
