"""
A whole DPO training step, through the trainers, on four paths in one run:

- `trl`: TRL's `DPOTrainer` as it is
- `liger`: the same with `LigerFusedLinearDPOLoss` for head and loss
- `logits`: the same with plain logits of all tokens
- `ours`: `trl_ext.DPOTrainer`; `ours-plain` is that without shared prompts

    python benchmarks/throughput.py                                  # 26 M parameters, prompts of about 200 tokens
    python benchmarks/throughput.py --prompt 500 --lora
    python benchmarks/throughput.py --device cuda --size 0.6b --vocab 151936 --dtype bfloat16 --profile ultrafeedback
    python benchmarks/throughput.py --scale prompt 50 200 800

Each path takes the same batches in turn. A step is forward, backward and an optimizer update; TRL's defaults hold, gradient
checkpointing among them. Peak memory is measured in a process of its own for each path.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import warnings


os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import datasets
import torch
import trl
from common import (
    PROFILES,
    SIZES,
    Lengths,
    distance,
    in_own_process,
    interleaved,
    model,
    peak_mb,
    plot,
    provenance,
    ratio,
    table,
    timed,
    tokenizer,
    write,
)
from datasets import Dataset
from transformers.utils.logging import set_verbosity_error

import trl_ext


PATHS = ("trl", "liger", "logits", "ours", "ours-plain")
COLUMNS = {
    "path": "path",
    "seconds": "seconds\nper step",
    "tokens_per_s": "tokens/s",
    "speed": "speed,\nTRL = 1",
    "peak_mb": "peak\nMiB",
    "memory": "memory,\nTRL = 1",
    "loss_difference": "loss\nvs TRL",
    "gradient_difference": "gradient\nvs TRL",
    "gradient_error": "gradient\nvs float64",
}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--paths", nargs="+", choices=PATHS, default=["trl", "liger", "logits", "ours"])
    parser.add_argument("--size", choices=SIZES, default="26m", help="shape of the model")
    parser.add_argument("--vocab", type=int, default=32000, help="entries of the vocabulary")
    parser.add_argument("--prompt", type=int, default=200, help="tokens of a prompt, give or take 20%%")
    parser.add_argument("--completion", type=int, nargs=2, default=[32, 256], metavar=("MIN", "MAX"))
    parser.add_argument(
        "--profile", choices=PROFILES, help="lengths like those of a dataset, in place of the two above"
    )
    parser.add_argument("--pairs", type=int, default=4, help="pairs per step")
    parser.add_argument(
        "--num_generations",
        type=int,
        default=2,
        help="completions of each prompt, an even number: ours learns from the whole group (anchored), the others from half as "
        "many pairs with that prompt, so that all score the same completions; losses then differ",
    )
    parser.add_argument("--lora", action="store_true", help="train a LoRA of rank 16 on all linear layers")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--steps", type=int, default=7, help="rounds that count")
    parser.add_argument("--threads", type=int, help="CPU threads; torch's own choice by default")
    parser.add_argument("--no-checkpointing", action="store_true", help="train without gradient checkpointing")
    parser.add_argument("--memory-mb", type=float, help="`logprob_memory_mb` of our paths")
    parser.add_argument("--exact", action="store_true", help="compare gradients with a float64 model too")
    parser.add_argument(
        "--scale",
        nargs="+",
        metavar=("AXIS", "VALUE"),
        help="prompt, vocab, pairs or num_generations, and the values to run it at",
    )
    parser.add_argument("--csv", help="write the rows here")
    parser.add_argument("--plot", help="draw a plot here")
    parser.add_argument("--measure-memory", metavar="PATH", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.scale and (args.scale[0] not in ("prompt", "vocab", "pairs", "num_generations") or len(args.scale) < 2):
        parser.error("--scale takes prompt, vocab, pairs or num_generations, then values: --scale prompt 50 200 800")
    if (
        args.num_generations < 2
        or args.num_generations % 2
        or (args.num_generations > 2 and args.pairs % (args.num_generations // 2))
    ):
        parser.error("--num_generations takes an even number, and --pairs a multiple of half of it")
    if args.paths[0] != "trl":
        parser.error("--paths begins with trl: the others are compared with it")
    return args


class LogitsTrainer(trl.DPOTrainer):
    """TRL's trainer with logits of all tokens, as before it had a fused head."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        def log_probs(network):
            logits = network(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False)
            token = trl.trainer.utils.selective_log_softmax(logits.logits[:, :-1], inputs["input_ids"][:, 1:])
            return (token * inputs["completion_mask"][:, 1:]).sum(1)

        with torch.no_grad():
            reference = self.with_reference(log_probs)
        chosen, rejected = (log_probs(model) - reference).chunk(2)
        return -torch.nn.functional.logsigmoid(self.beta * (chosen - rejected)).mean()

    def with_reference(self, function):
        if self.ref_model is not None:
            return function(self.ref_model)
        with self.model.disable_adapter():
            return function(self.model)


class LigerTrainer(LogitsTrainer):
    """TRL's trainer with Liger's chunked DPO loss, which projects the hidden states itself."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

        def hidden(network):
            # The decoder of the wrapped model: these are single-process runs
            base = network.get_base_model() if hasattr(network, "get_base_model") else network
            return base.model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False)

        labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)[:, 1:]
        with torch.no_grad():
            reference = self.with_reference(hidden).last_hidden_state[:, :-1]
        head = model.get_output_embeddings().weight
        ref_head = head if self.ref_model is None else self.ref_model.get_output_embeddings().weight
        loss = LigerFusedLinearDPOLoss(beta=self.beta, compiled=self.args.device.type != "cpu")
        states = hidden(model).last_hidden_state[:, :-1]
        return loss(head, states, labels, ref_input=reference, ref_weight=ref_head.detach())[0]


TRAINERS = {"trl": trl.DPOTrainer, "liger": LigerTrainer, "logits": LogitsTrainer}


class Path:
    """A trainer, its batches and its steps."""

    def __init__(self, name: str, args: argparse.Namespace, dtype: torch.dtype | None = None):
        from peft import LoraConfig

        self.args = args
        dtype = dtype or getattr(torch, args.dtype)
        ours = name.startswith("ours")
        options = {"logprob_memory_mb": args.memory_mb, "share_prefix": name == "ours" and "auto"} if ours else {}
        text = {"prompt": "a ", "chosen": "b", "rejected": "c"}
        grouped = ours and args.num_generations > 2
        if grouped:
            options["loss_type"] = "anchored"
            text = {"prompt": "a ", "completions": ["b", "c", "b"], "scores": [2.0, 1.0, 0.0]}
        config = (trl_ext if ours else trl).DPOConfig(
            output_dir=tempfile.mkdtemp(),
            per_device_train_batch_size=args.pairs // (args.num_generations // 2 if grouped else 1),
            report_to="none",
            bf16=False,
            use_cpu=args.device == "cpu",
            logging_steps=10**6,
            max_length=None,
            gradient_checkpointing=not args.no_checkpointing,
            disable_tqdm=True,
            dataloader_pin_memory=False,
            **options,
        )
        torch.manual_seed(0)
        self.trainer = (trl_ext.DPOTrainer if ours else TRAINERS[name])(
            model=model(args.size, args.vocab, 0, dtype, args.device),
            ref_model=None if args.lora else model(args.size, args.vocab, 1, dtype, args.device),
            args=config,
            processing_class=tokenizer(),
            train_dataset=Dataset.from_list([text]),
            peft_config=LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
            if args.lora
            else None,
        )
        if args.lora:
            self.trainer.model.to(dtype=dtype)
        self.trainer.train_dataset = (
            groups(args) if grouped else rows(args)
        )  # token ids as they are, past the tokenizer
        self.trainer.create_optimizer()
        if config.gradient_checkpointing:  # which transformers turns on in `train()`
            self.trainer.model.gradient_checkpointing_enable(config.gradient_checkpointing_kwargs)
        self.trainer.model.train()
        self.trainer.current_gradient_accumulation_steps = 1
        self.examples: list[list[dict]] = []
        self.collate, self.trainer.data_collator = self.trainer.data_collator, self.collate_and_keep
        self.batches = [self.trainer._prepare_inputs(batch) for batch in self.trainer.get_train_dataloader()]
        self.turn = 0

    def collate_and_keep(self, examples: list[dict]) -> dict:
        self.examples.append(examples)
        return self.collate(examples)

    def step(self) -> None:
        examples = self.examples[self.turn % len(self.examples)]
        self.turn += 1
        # Padding and layout are part of the step: without workers, a run waits for them
        self.trainer.training_step(self.trainer.model, self.trainer._prepare_inputs(self.collate(examples)))
        self.trainer.optimizer.step()
        self.trainer.model.zero_grad()

    def gradients(self) -> tuple[float, list[torch.Tensor]]:
        """Loss and gradients of the first batch, at the weights of the start."""
        loss = self.trainer.training_step(self.trainer.model, self.batches[0])
        gradients = [
            parameter.grad.clone() for parameter in self.trainer.model.parameters() if parameter.grad is not None
        ]
        self.trainer.model.zero_grad()
        return loss.item(), gradients


def sampled(args: argparse.Namespace) -> list[tuple[list[int], list[list[int]]]]:
    """Token ids of prompts with K completions each, for four batches."""
    lengths = Lengths(args.prompt, tuple(args.completion), args.profile)

    def ids(count: int) -> list[int]:
        return [lengths.random.randrange(6, args.vocab) for _ in range(count)]

    prompts = 4 * args.pairs // (args.num_generations // 2)
    return [
        (ids(lengths.prompt()), [ids(lengths.completion()) for _ in range(args.num_generations)])
        for _ in range(prompts)
    ]


def rows(args: argparse.Namespace) -> Dataset:
    """As pairs."""
    return Dataset.from_list(
        [
            {"prompt_ids": prompt, "chosen_ids": completions[k], "rejected_ids": completions[k + 1]}
            for prompt, completions in sampled(args)
            for k in range(0, args.num_generations, 2)
        ]
    )


def groups(args: argparse.Namespace) -> Dataset:
    """As whole groups."""
    return Dataset.from_list(
        [
            {
                "prompt_ids": prompt,
                "chosen_ids": completions[0],
                "rejected_ids": completions[1],
                "score_chosen": 1.0,
                "score_rejected": 0.0,
                "further_pairs": [
                    {"prompt_ids": prompt, "chosen_ids": completions[k], "rejected_ids": completions[k + 1]}
                    for k in range(2, args.num_generations, 2)
                ],
                "group_scores": [1.0, 0.0, *[0.5] * (args.num_generations - 2)],
            }
            for prompt, completions in sampled(args)
        ]
    )


def measure(args: argparse.Namespace, flags: list[str]) -> list[dict]:
    """One row a path."""
    paths = {name: Path(name, args) for name in args.paths}
    agreement = {name: path.gradients() for name, path in paths.items()}
    exact = Path("logits", args, torch.float64).gradients() if args.exact else None
    seconds = interleaved(
        {name: lambda path=path: timed(path.step, args.device) for name, path in paths.items()}, args.steps, "steps"
    )
    tokens = statistics.mean(int(batch["attention_mask"].sum()) for batch in paths["trl"].batches)
    del paths
    memory = {name: in_own_process(__file__, [*flags, "--measure-memory", name])["peak_mb"] for name in args.paths}
    theirs = agreement["trl"]
    return [
        {
            "path": name,
            **{
                key: getattr(args, key)
                for key in (
                    "size",
                    "vocab",
                    "prompt",
                    "completion",
                    "profile",
                    "pairs",
                    "num_generations",
                    "lora",
                    "dtype",
                )
            },
            "checkpointing": not args.no_checkpointing,
            "seconds": statistics.median(seconds[name]),
            "seconds_min": min(seconds[name]),
            "seconds_max": max(seconds[name]),
            "tokens_per_s": tokens / statistics.median(seconds[name]),
            "speed": ratio(seconds["trl"], seconds[name]),
            "peak_mb": memory[name],
            "memory": memory[name] / memory["trl"],
            "loss_difference": abs(agreement[name][0] - theirs[0]) / abs(theirs[0])
            if args.num_generations == 2
            else None,
            "gradient_difference": distance(agreement[name][1], theirs[1]) if args.num_generations == 2 else None,
            "gradient_error": distance(agreement[name][1], exact[1]) if exact else None,
            **provenance(args.device),
        }
        for name in args.paths
    ]


def main() -> None:
    args = parse()
    datasets.disable_progress_bars()
    set_verbosity_error()
    warnings.filterwarnings("ignore", category=FutureWarning)
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.measure_memory:
        path = Path(args.measure_memory, args)
        for _ in path.batches:
            path.step()
        print(json.dumps({"peak_mb": peak_mb(args.device)}))
        return
    axis, *values = args.scale or [None, None]
    results = []
    for value in values:
        flags = sys.argv[1:]
        if axis:
            setattr(args, axis, int(value))
            at = flags.index("--scale")
            flags = flags[:at] + flags[at + 1 + len(args.scale) :] + [f"--{axis}", value]
        results += measure(args, flags)
    what = f"{args.size}{' LoRA' if args.lora else ''}, {args.dtype}"
    lengths = (
        args.profile or f"prompts of {args.prompt}, completions of {args.completion[0]}-{args.completion[1]} tokens"
    )
    columns = {"path": COLUMNS["path"], **({axis: axis} if axis else {}), **COLUMNS}
    table(results, columns, f"A DPO step: {what}; {lengths}; {results[0]['device']}")
    if args.csv:
        write(results, args.csv)
    if args.plot:
        plot(results, args.plot, axis, f"A DPO step: {what}")


if __name__ == "__main__":
    main()
