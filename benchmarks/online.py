"""
A whole online step, generate, score, learn and update, through TRL's `OnlineDPOTrainer` and ours in one run.

    python benchmarks/online.py                        # 12 M parameters, 4 prompts of 60-100 tokens, 96 new tokens
    python benchmarks/online.py --no-checkpointing     # TRL then generates with a cache too
    python benchmarks/online.py --lora --device cuda --size 0.6b --vocab 151936 --dtype bfloat16

Both get the same prompts and write the same number of tokens. `update` is the optimizer's step, `learn` what is left:
log-probabilities, reference, loss, backward. Agreement of loss and gradients, and peak memory, are those of learning from the same given
completions. Memory is measured in a process of its own: its peak, libraries and models included, and what learning adds to
them (gradients, activations, logits).
"""

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
import time
import warnings
from collections import defaultdict


os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import datasets
import torch
from common import (
    SIZES,
    distance,
    in_own_process,
    interleaved,
    model,
    peak_of,
    plot,
    provenance,
    ratio,
    synchronize,
    table,
    timed,
    write,
)
from datasets import Dataset
from transformers import PreTrainedTokenizerFast
from transformers.utils.logging import set_verbosity_error
from trl.experimental import online_dpo

from trl_ext import OnlineDPOConfig, OnlineDPOTrainer
from trl_ext.generation import Completions


PATHS = ("trl", "ours")
COLUMNS = {
    "path": "path",
    "seconds": "seconds\nper step",
    "speed": "speed,\nTRL = 1",
    "generate": "generate\ns",
    "score": "score\ns",
    "learn": "learn\ns",
    "update": "update\ns",
    "learn_speed": "learn,\nTRL = 1",
    "peak_mb": "process,\npeak MiB",
    "memory": "process,\nTRL = 1",
    "added_mb": "learning\nadds, MiB",
    "added_memory": "learning,\nTRL = 1",
    "loss_difference": "loss\nvs TRL",
    "gradient_difference": "gradient\nvs TRL",
}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="12m", help="shape of the model")
    parser.add_argument("--vocab", type=int, default=32000, help="entries of the vocabulary")
    parser.add_argument("--prompts", type=int, default=4, help="prompts per step")
    parser.add_argument("--prompt", type=int, nargs=2, default=[60, 100], metavar=("MIN", "MAX"), help="their tokens")
    parser.add_argument("--new-tokens", type=int, default=96, help="tokens of a completion")
    parser.add_argument("--lora", action="store_true", help="train a LoRA of rank 16 on all linear layers")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--steps", type=int, default=7, help="rounds that count")
    parser.add_argument("--threads", type=int, help="CPU threads; torch's own choice by default")
    parser.add_argument("--no-checkpointing", action="store_true", help="train without gradient checkpointing")
    parser.add_argument("--csv", help="write the rows here")
    parser.add_argument("--plot", help="draw a plot here")
    parser.add_argument("--measure-memory", metavar="PATH", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def word_tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {"<pad>": 0, "<eos>": 1, "<unk>": 2, **{f"w{i}": i for i in range(3, vocabulary)}}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def first_token(completion_ids, **kwargs) -> list[float]:
    """A reward that costs nothing and never ties."""
    return [float(ids[0]) + index / 10 for index, ids in enumerate(completion_ids)]


class Path:
    """A trainer whose steps are timed in parts."""

    def __init__(self, name: str, args: argparse.Namespace):
        from peft import LoraConfig

        self.args, self.ours = args, name == "ours"
        trainer, config = (
            (OnlineDPOTrainer, OnlineDPOConfig)
            if self.ours
            else (online_dpo.OnlineDPOTrainer, online_dpo.OnlineDPOConfig)
        )
        rng = random.Random(0)
        texts = [
            " ".join(f"w{rng.randrange(3, args.vocab)}" for _ in range(rng.randint(*args.prompt)))
            for _ in range(4 * args.prompts)
        ]
        dtype = getattr(torch, args.dtype)
        torch.manual_seed(0)
        self.trainer = trainer(
            model=model(args.size, args.vocab, 0, dtype, args.device),
            ref_model=None if args.lora else model(args.size, args.vocab, 1, dtype, args.device),
            reward_funcs=first_token,
            args=config(
                output_dir=tempfile.mkdtemp(),
                per_device_train_batch_size=args.prompts,
                report_to="none",
                bf16=False,
                use_cpu=args.device == "cpu",
                logging_steps=10**6,
                max_new_tokens=args.new_tokens,
                generation_kwargs={"min_new_tokens": args.new_tokens},
                gradient_checkpointing=not args.no_checkpointing,
                disable_tqdm=True,
                dataloader_pin_memory=False,
            ),
            train_dataset=Dataset.from_dict({"prompt": texts}),
            processing_class=word_tokenizer(args.vocab),
            peft_config=LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
            if args.lora
            else None,
        )
        if args.lora:
            self.trainer.model.to(dtype=dtype)
        self.trainer.create_optimizer()
        self.trainer.model.train()
        self.trainer.current_gradient_accumulation_steps = 1
        self.batches = list(self.trainer.get_train_dataloader())
        self.turn, self.parts = 0, defaultdict(list)
        self._time("generate", "generate" if self.ours else "_generate", self.trainer)
        self._time("score", "score" if self.ours else "_calculate_rewards_from_functions", self.trainer)
        self._time("update", "step", self.trainer.optimizer)

    def _time(self, part: str, method: str, owner: object) -> None:
        call = getattr(owner, method)

        def wrapped(*args, **kwargs):
            synchronize(self.args.device)
            start = time.perf_counter()
            result = call(*args, **kwargs)
            synchronize(self.args.device)
            self.parts[part].append(time.perf_counter() - start)
            return result

        setattr(owner, method, wrapped)

    def step(self) -> None:
        batch = self.batches[self.turn % len(self.batches)]
        self.turn += 1
        self.trainer.training_step(self.trainer.model, dict(batch))
        self.trainer.optimizer.step()
        self.trainer.model.zero_grad()

    def learn_from_given(self) -> tuple[float, list[torch.Tensor]]:
        """Loss and gradients of given completions, at the weights of the start."""
        generator = torch.Generator().manual_seed(0)
        shape = (2 * self.args.prompts, self.args.new_tokens)
        ids = torch.randint(3, self.args.vocab, shape, generator=generator).to(self.args.device)
        trainer, prompts = self.trainer, self.batches[0]["prompt"]
        encoded = trainer.processing_class(prompts, return_tensors="pt", padding=True, padding_side="left")
        prompt_ids, mask = encoded["input_ids"].to(ids.device), encoded["attention_mask"].to(ids.device)
        if self.ours:
            given = Completions(
                prompts,
                trainer.processing_class.batch_decode(ids),
                [row[keep.bool()] for row, keep in zip(prompt_ids.cpu(), mask.cpu(), strict=True)],
                list(ids.cpu()),
                torch.zeros(len(ids), dtype=torch.bool),
            )
            trainer.generate = lambda *args, **kwargs: given
        else:
            given = (prompt_ids.repeat(2, 1), mask.repeat(2, 1), ids, torch.ones_like(ids), None)
            trainer._generate = lambda *args, **kwargs: given
        loss = trainer.training_step(trainer.model, dict(self.batches[0]))
        gradients = [parameter.grad.clone() for parameter in trainer.model.parameters() if parameter.grad is not None]
        trainer.model.zero_grad()
        return loss.item(), gradients


def measure(args: argparse.Namespace, flags: list[str]) -> list[dict]:
    paths = {name: Path(name, args) for name in PATHS}
    seconds = interleaved(
        {name: lambda path=path: timed(path.step, args.device) for name, path in paths.items()}, args.steps, "steps"
    )
    parts = {name: {part: values[1:] for part, values in path.parts.items()} for name, path in paths.items()}
    learn = {
        name: [total - sum(part[i] for part in parts[name].values()) for i, total in enumerate(seconds[name])]
        for name in PATHS
    }
    fresh = {name: Path(name, args).learn_from_given() for name in PATHS}
    memory = {name: in_own_process(__file__, [*flags, "--measure-memory", name]) for name in PATHS}
    added = {name: values["peak_mb"] - values["before_mb"] for name, values in memory.items()}
    return [
        {
            "path": name,
            **{
                key: getattr(args, key)
                for key in ("size", "vocab", "prompts", "prompt", "new_tokens", "lora", "dtype")
            },
            "checkpointing": not args.no_checkpointing,
            "seconds": statistics.median(seconds[name]),
            "seconds_min": min(seconds[name]),
            "seconds_max": max(seconds[name]),
            "speed": ratio(seconds["trl"], seconds[name]),
            **{part: statistics.median(values) for part, values in parts[name].items()},
            "learn": statistics.median(learn[name]),
            "learn_speed": ratio(learn["trl"], learn[name]),
            "peak_mb": memory[name]["peak_mb"],
            "memory": memory[name]["peak_mb"] / memory["trl"]["peak_mb"],
            "added_mb": added[name],
            "added_memory": added[name] / added["trl"],
            "loss_difference": abs(fresh[name][0] - fresh["trl"][0]) / abs(fresh["trl"][0]),
            "gradient_difference": distance(fresh[name][1], fresh["trl"][1]),
            **provenance(args.device),
        }
        for name in PATHS
    ]


def results(args: argparse.Namespace, flags: list[str]) -> list[dict]:
    """The rows that the flags ask for."""
    datasets.disable_progress_bars()
    set_verbosity_error()
    warnings.filterwarnings("ignore", category=FutureWarning)
    if args.threads:
        torch.set_num_threads(args.threads)
    return measure(args, flags)


def main() -> None:
    args = parse()
    if args.measure_memory:
        set_verbosity_error()
        path = Path(args.measure_memory, args)

        def learn() -> None:
            for _ in range(2):
                path.learn_from_given()

        print(json.dumps(peak_of(learn, args.device)))
        return
    rows = results(args, sys.argv[1:])
    what = f"{args.size}{' LoRA' if args.lora else ''}, {args.dtype}, {args.new_tokens} new tokens"
    table(rows, COLUMNS, f"An online step: {what}; {rows[0]['device']}")
    if args.csv:
        write(rows, args.csv)
    if args.plot:
        plot(rows, args.plot, None, f"An online step: {what}")


if __name__ == "__main__":
    main()
