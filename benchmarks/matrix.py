"""What `gpu.py` runs: each case one call of a script here, the most telling first, so that a short lease has them."""

import itertools
import json
from dataclasses import dataclass
from pathlib import Path


PARTS = ("tests", "logprobs", "throughput", "online")


@dataclass(frozen=True)
class Case:
    """One call of the script that its part is called after, whose rows are written together."""

    part: str
    name: str
    flags: tuple[str, ...] = ()


# Model, flags of its size, whether a LoRA is trained
MODELS = {
    "0.6b full": ("--size", "0.6b", "--vocab", "151936", "--steps", "8"),
    "8b LoRA": ("--size", "8b", "--vocab", "128256", "--steps", "3", "--batches", "2", "--lora"),
    "0.6b LoRA": ("--size", "0.6b", "--vocab", "151936", "--steps", "8", "--lora"),
    "8b full": ("--size", "8b", "--vocab", "128256", "--steps", "3", "--batches", "2"),
}
LENGTHS = {
    "ultrafeedback": ("--profile", "ultrafeedback", "--pairs", "8"),
    "prompts of 1024": ("--prompt", "1024", "--completion", "64", "512", "--pairs", "8"),
    "tldr": ("--profile", "tldr", "--pairs", "8"),
    "hh": ("--profile", "hh", "--pairs", "8"),
    # The later `--batches` counts
    "prompts of 4096": ("--prompt", "4096", "--completion", "64", "512", "--pairs", "4", "--batches", "2"),
}
# Hidden size, vocabulary, and MiB of a tile of 4,096 tokens, three of which are kept
HEADS = {"H=1024 V=151936": ("1024", "151936", "1200"), "H=4096 V=128256": ("4096", "128256", "1010")}


def gpu() -> list[Case]:
    """The whole comparison, in half an hour on an H200."""
    same = ("--device", "cuda", "--dtype", "bfloat16")
    quick = (*same, "--memory", "allocator")
    cases = [Case("tests", "tests marked gpu")]
    for name, (hidden, vocab, tile) in HEADS.items():
        head = (*quick, "--tokens", "8192", "--hidden", hidden, "--vocab", vocab)
        modes = ("--modes", "full", "frozen", "reference", "--memory-mb", tile)
        # A head alone has no step around it whose memory it could use: tiles of 256 MiB
        alone = ("--modes", "full", "frozen", "--paths", "trl", "liger", "products")
        twice = ("--modes", "full", "--paths", "trl", "liger", "products", "--memory-mb", tile, "--tokens", "16384")
        cases.append(Case("logprobs", name, (*head, *modes)))
        cases.append(Case("logprobs", f"{name}, 16384 tokens, logits computed twice", (*head, *twice)))
        cases.append(Case("logprobs", f"{name}, tiles of 256 MiB", (*head, *alone)))
        cases.append(Case("logprobs", f"{name}, statistics", (*head, *modes, "--statistics")))
    for (lengths, ours), completions, (size, flags) in itertools.product(LENGTHS.items(), (2, 8), MODELS.items()):
        name = f"{size}, {lengths}, K={completions}"
        more = ("--paths", "trl", "ours", "--num_generations", str(completions))
        cases.append(Case("throughput", name, (*quick, *flags, *ours, *more)))
    for lora in ((), ("--lora",)):
        flags = (
            "--size",
            "0.6b",
            "--vocab",
            "151936",
            "--prompts",
            "8",
            "--prompt",
            "100",
            "200",
            "--new-tokens",
            "128",
        )
        name = f"0.6b {'LoRA' if lora else 'full'}, 128 new tokens"
        cases.append(Case("online", name, (*same, *flags, "--steps", "3", *lora)))
    return cases


def dry_run() -> list[Case]:
    """The same command on a CPU, so small that its figures say nothing."""
    size = ("--size", "tiny", "--vocab", "500", "--steps", "1")
    step = (
        *size,
        "--pairs",
        "4",
        "--prompt",
        "20",
        "--completion",
        "4",
        "12",
        "--paths",
        "trl",
        "ours",
        "--memory",
        "none",
        "--blocks",
    )
    head = ("--tokens", "16", "--hidden", "8", "--vocab", "300", "--rounds", "1", "--memory", "none", "--blocks")
    return [
        Case("tests", "tests marked gpu"),
        Case("logprobs", "tiny", head),
        Case("throughput", "tiny, K=2", step),
        Case("throughput", "tiny LoRA, K=4", (*step, "--num_generations", "4", "--lora")),
        Case("online", "tiny", (*size, "--prompts", "2", "--prompt", "5", "9", "--new-tokens", "6")),
    ]


def read(path: str) -> list[Case]:
    """
    Cases of one's own: a JSON list of objects with `part`, `name` and `flags`.

    Raises:
        `ValueError`: For anything else in the file.
    """
    try:
        cases = [
            Case(each["part"], each["name"], tuple(each.get("flags", ())))
            for each in json.loads(Path(path).read_text())
        ]
    except (OSError, json.JSONDecodeError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(
            f'{path} holds no cases ({type(error).__name__}: {error}); expected a list of {{"part": ..., "name": ..., "flags": [...]}}'
        ) from error
    names = [(case.part, case.name) for case in cases]
    if wrong := [part for part, _ in names if part not in PARTS]:
        raise ValueError(f"{path} has parts {wrong}; expected {PARTS}")
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"{path} has cases of one name: {twice}; a call that goes on could not tell them apart")
    return cases
