"""The trainers of `online.py`, TRL's and ours, and one optimizer step of each."""

import argparse
import math
import random
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from unittest.mock import patch

import torch
from common import model, synchronize
from datasets import Dataset
from transformers import PreTrainedTokenizerFast
from trl.experimental import online_dpo
from trl.trainer.utils import pad

from trl_ext import OnlineDPOConfig, OnlineDPOTrainer
from trl_ext.generation import Completions


PATHS = ("trl", "trl-no-checkpointing", "trl-best", "ours")
STEPS = 4  # optimizer steps until prompts come again
PAD, EOS, WORDS = 0, 1, 3
TEMPERATURE = 0.9  # TRL's default


def word_tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {"<pad>": PAD, "<eos>": EOS, "<unk>": 2, **{f"w{i}": i for i in range(WORDS, vocabulary)}}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def sum_of_ids(completion_ids, **kwargs) -> list[float]:
    """A reward that costs nothing, hardly ever ties, and does not depend on which completions are scored together."""
    return [float(sum(ids)) for ids in completion_ids]


def eos_bias(vocabulary: int, new_tokens: int) -> float:
    """What makes the end of a sequence 3 in `new_tokens` as likely at each token, where all logits are equal otherwise."""
    chance = 3 / new_tokens
    return TEMPERATURE * math.log((vocabulary - 1) * chance / (1 - chance))


def prompt_texts(args: argparse.Namespace) -> list[str]:
    """All prompts, in the order in which every path takes them."""
    rng = random.Random(0)
    return [
        " ".join(f"w{rng.randrange(WORDS, args.vocab)}" for _ in range(rng.randint(*args.prompt)))
        for _ in range(STEPS * args.accumulation * args.prompts)
    ]


def given_completions(args: argparse.Namespace) -> dict[str, list[torch.Tensor]]:
    """Random completions of each prompt of the first optimizer step; with `--ragged` of drawn lengths."""
    generator = torch.Generator().manual_seed(0)

    def draw() -> torch.Tensor:
        ids = torch.randint(WORDS, args.vocab, (args.new_tokens,), generator=generator)
        if not args.ragged:
            return ids
        length = int(torch.empty(1).geometric_(3 / args.new_tokens, generator=generator))
        return ids if length > args.new_tokens else torch.cat([ids[: length - 1], torch.tensor([EOS])])

    prompts = prompt_texts(args)[: args.accumulation * args.prompts]
    return {prompt: [draw() for _ in range(args.num_generations)] for prompt in prompts}


class Path:
    """
    A trainer whose optimizer steps are timed in parts.

    All paths learn from the same number of completions in a step. TRL's trainer samples two per prompt: for more, each prompt
    comes several times. `trl-best` has all prompts of a step in one micro-batch, so that it generates once, too.
    """

    def __init__(self, name: str, args: argparse.Namespace):
        from peft import LoraConfig

        self.args, self.ours = args, name == "ours"
        trainer, config, own = (
            (OnlineDPOTrainer, OnlineDPOConfig, {"num_generations": args.num_generations, "pairing": "all"})
            if self.ours
            else (online_dpo.OnlineDPOTrainer, online_dpo.OnlineDPOConfig, {})
        )
        copies = 1 if self.ours else args.num_generations // 2
        self.micro_batches = 1 if name == "trl-best" else args.accumulation
        dtype = getattr(torch, args.dtype)
        torch.manual_seed(0)
        self.trainer = trainer(
            model=model(args.size, args.vocab, 0, dtype, args.device),
            ref_model=None if args.lora else model(args.size, args.vocab, 1, dtype, args.device),
            reward_funcs=sum_of_ids,
            args=config(
                output_dir=tempfile.mkdtemp(),
                per_device_train_batch_size=args.prompts * copies * args.accumulation // self.micro_batches,
                gradient_accumulation_steps=self.micro_batches,
                train_sampling_strategy="sequential",
                report_to="none",
                bf16=False,
                use_cpu=args.device == "cpu",
                logging_steps=10**6,
                max_new_tokens=args.new_tokens,
                max_length=args.prompt[1] + args.new_tokens,
                temperature=TEMPERATURE,
                generation_kwargs={"sequence_bias": [[[EOS], eos_bias(args.vocab, args.new_tokens)]]}
                if args.ragged
                else {"min_new_tokens": args.new_tokens},
                gradient_checkpointing=name in ("trl", "ours") and not args.no_checkpointing,
                disable_tqdm=True,
                dataloader_pin_memory=False,
                **own,
            ),
            train_dataset=Dataset.from_dict({"prompt": [text for text in prompt_texts(args) for _ in range(copies)]}),
            processing_class=word_tokenizer(args.vocab),
            peft_config=LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
            if args.lora
            else None,
        )
        if args.lora:
            self.trainer.model.to(dtype=dtype)
        self.trainer.create_optimizer()
        self.trainer.model.train()
        self.batches = self._batches()
        self.steps: list[dict[str, float]] = []  # seconds of each part and new tokens, of each step
        self.now: dict[str, float] = defaultdict(float)
        self.generates = "generate" if self.ours else "_generate"
        self._time("generate", self.generates, self.trainer)
        self._time("score", "score" if self.ours else "_calculate_rewards_from_functions", self.trainer)
        self._time("update", "step", self.trainer.optimizer)

    def _batches(self) -> Iterator[dict]:
        loader = self.trainer.get_train_dataloader()
        while True:
            yield from loader

    def _time(self, part: str, method: str, owner: object) -> None:
        call = getattr(owner, method)

        def wrapped(*args, **kwargs):
            synchronize(self.args.device)
            start = time.perf_counter()
            result = call(*args, **kwargs)
            synchronize(self.args.device)
            self.now[part] += time.perf_counter() - start
            if part == "generate":
                self.now["tokens"] += sum(map(len, result.ids)) if self.ours else int(result[3].sum())
            return result

        setattr(owner, method, wrapped)

    def _accumulate(self) -> float:
        """Takes the micro-batches of one optimizer step as transformers' training loop does; gives the loss."""
        trainer = self.trainer
        batches, items = trainer.get_batch_samples(self.batches, self.micro_batches, trainer.args.device)
        trainer.current_gradient_accumulation_steps = len(batches)
        return sum(trainer.training_step(trainer.model, batch, items) for batch in batches).item()

    def step(self) -> None:
        """One optimizer step."""
        self.now.clear()
        self._accumulate()
        self.trainer.optimizer.step()
        self.trainer.model.zero_grad()
        self.trainer.state.global_step += 1
        self.steps.append(dict(self.now))

    def learn_from_given(self) -> tuple[float, list[torch.Tensor]]:
        """Loss and gradients of an optimizer step whose completions are given, at the weights of the start."""
        self.batches = self._batches()
        with patch.object(self.trainer, self.generates, self._given_ours if self.ours else self._given_theirs):
            loss = self._accumulate()
        # TRL's trainer adds up the gradients of micro-batches, and ours takes their mean
        times = 1 if self.ours else self.micro_batches
        parameters = self.trainer.model.parameters()
        gradients = [parameter.grad / times for parameter in parameters if parameter.grad is not None]
        self.trainer.model.zero_grad()
        return loss, gradients

    def _given_ours(self, model, inputs, *args, **kwargs) -> Completions:
        given, prompts = given_completions(self.args), inputs["prompt"]
        ids = [given[prompt][k] for k in range(self.args.num_generations) for prompt in prompts]
        return Completions(
            prompts=prompts,
            texts=self.trainer.processing_class.batch_decode(ids, skip_special_tokens=True),
            prompt_ids=[torch.tensor(row) for row in self.trainer.processing_class(prompts)["input_ids"]],
            ids=ids,
            ended=torch.tensor([bool(row[-1] == EOS) for row in ids]),
        )

    def _given_theirs(self, model, prompts, images=None) -> tuple:
        given, seen, halves = given_completions(self.args), Counter(), ([], [])
        for prompt in prompts:  # the second time that a prompt comes, it has the third and the fourth
            for half in halves:
                half.append(given[prompt][seen[prompt]])
                seen[prompt] += 1
        rows = [*halves[0], *halves[1]]
        ids, mask = pad(rows, PAD), pad([torch.ones_like(row) for row in rows], 0)
        encoded = self.trainer.processing_class(prompts, return_tensors="pt", padding=True, padding_side="left")
        tensors = (encoded["input_ids"].repeat(2, 1), encoded["attention_mask"].repeat(2, 1), ids, mask)
        return (*(tensor.to(self.args.device) for tensor in tensors), None)
