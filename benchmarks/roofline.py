"""
A roofline model of a DPO step and of the head alone: what a GPU's rates allow, where no GPU is there to ask. Not a measurement.

A step is a list of stages. Each has matrix operations and bytes moved; it takes as long as the slower of the two,
`max(operations / rate, bytes / bandwidth)`, and stages follow one another. Everything that the model leaves out costs time: launches
of kernels and the host, kernels that do not reach the rates, elementwise work in more than one pass (as eager norms are), a LoRA's
own small products. What stands here is therefore a bound, and its ratios are those of two bounds.

Of a model there are known: hidden size `H`, `layers`, intermediate size `I`, query heads and key-value heads of size `D`, vocabulary `V`.
A value has `width` bytes, 2 in bfloat16. A product of `(a, b)` and `(b, c)` takes `2 a b c` operations.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

from common import SIZES
from lengths import Prompt


# Tokens per tile of logits; TRL's has no more than this many entries of the vocabulary
TILE, TRL_COLUMNS = 4096, 32768
# Bytes of a tile of ours where the run has no room for more
LEAST = 2**28

Stages = dict[str, tuple[float, float]]  # operations and bytes


@dataclass(frozen=True)
class Rates:
    """What a device does: operations and bytes per second, and what it is called."""

    tflops: float
    terabytes: float
    name: str

    def __str__(self) -> str:
        return f"{self.tflops:g} TFLOP/s and {self.terabytes:g} TB/s ({self.name})"

    def milliseconds(self, operations: float, moved: float) -> float:
        return 1e3 * max(operations / (self.tflops * 1e12), moved / (self.terabytes * 1e12))


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model-only", action="store_true", help="run nothing: what a roofline model of a GPU says")
    parser.add_argument("--tflops", type=float, default=790, help="of the model: TFLOP/s of a large matrix product")
    parser.add_argument("--bandwidth", type=float, default=4.3, help="of the model: TB/s of a large copy")
    parser.add_argument("--rates-of", default="H200", help="of the model: the device that the two were measured on")


def rates(parser: argparse.ArgumentParser, args: argparse.Namespace) -> Rates:
    """Raises where a file of predictions would be taken for one of measurements."""
    unmarked = [path for path in (args.csv, args.plot) if path and "model" not in Path(path).name]
    if args.model_only and unmarked:
        parser.error(
            f"--model-only measures nothing, so the name of a file it writes contains 'model'; got {unmarked}"
        )
    return Rates(args.tflops, args.bandwidth, args.rates_of)


def title(rates: Rates) -> str:
    return f"a MODEL, nothing was measured: {rates}"


@dataclass(frozen=True)
class Shape:
    """A model: its matrices."""

    hidden: int
    layers: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    tied: bool
    vocab: int

    @classmethod
    def of(cls, size: str, vocab: int) -> "Shape":
        return cls(*SIZES[size], vocab)

    @classmethod
    def of_head(cls, hidden: int, vocab: int) -> "Shape":
        """A head without a model."""
        return cls(hidden, 0, 0, 0, 0, 0, False, vocab)

    @property
    def inner(self) -> int:
        """Width of the queries of all heads."""
        return self.heads * self.head_dim

    @property
    def qkv(self) -> int:
        """Width of queries, keys and values together."""
        return (self.heads + 2 * self.kv_heads) * self.head_dim

    @property
    def trunk(self) -> int:
        """Weights of all layers: into q, k and v; out of attention; gate, up and down."""
        return self.layers * (self.hidden * self.qkv + self.inner * self.hidden + 3 * self.hidden * self.intermediate)

    @property
    def parameters(self) -> int:
        """Weights of the layers, the embeddings and, unless it is they, the head."""
        return self.trunk + self.vocab * self.hidden * (1 if self.tied else 2)

    @property
    def product_values(self) -> int:
        """Values read and written per token by a layer's products: in and out of each of the four."""
        return (self.hidden + self.qkv) + (self.inner + self.hidden) + 3 * (self.hidden + self.intermediate)

    @property
    def other_values(self) -> int:
        """Values read and written per token by what else a layer does, each in one pass: two norms, two additions, norm and
        rotation of queries and keys, gate times up."""
        rotated = (self.heads + self.kv_heads) * self.head_dim
        return 2 * 2 * self.hidden + 2 * 3 * self.hidden + 2 * 2 * rotated + 3 * self.intermediate

    @property
    def saved_values(self) -> int:
        """Values per token that the backward of one layer needs, as autograd keeps them: about the inputs of all of the above."""
        return 8 * self.hidden + 3 * self.qkv + 4 * self.intermediate


@dataclass(frozen=True)
class Work:
    """What of a batch a path runs: tokens through the layers, pairs of query and key that attention computes, tokens through the head."""

    tokens: int
    seen: int
    scored: int


def plain_rows(batch: list[Prompt], every_position: bool = False) -> Work:
    """TRL's: a row for each completion, padded to the longest; a padded batch has a mask, under which no block is skipped."""
    lengths = [(len(prompt), len(completion)) for prompt, completions in batch for completion in completions]
    rows, width = len(lengths), max(sum(length) for length in lengths)
    scored = rows * (width - 1) if every_position else sum(completion for _, completion in lengths)
    return Work(rows * width, rows * width**2, scored)


def unpadded_rows(batch: list[Prompt]) -> Work:
    """What TRL would run without padding and without a mask: which part of a difference is padding, which is shared prompts."""
    lengths = [len(prompt) + len(completion) for prompt, completions in batch for completion in completions]
    seen = sum(length * (length + 1) // 2 for length in lengths)
    return Work(sum(lengths), seen, plain_rows(batch).scored)


def shared_prompts(batch: list[Prompt]) -> Work:
    """Ours: each prompt once without its last token, then for each completion that token and all of its own but the last."""
    tokens = seen = scored = 0
    for prompt, completions in batch:
        prefix, lengths = len(prompt) - 1, [len(completion) for completion in completions]
        tokens += prefix + sum(lengths)
        seen += prefix * (prefix + 1) // 2 + sum(length * prefix + length * (length + 1) // 2 for length in lengths)
        scored += sum(lengths)
    return Work(tokens, seen, scored)


def head_products(path: str, kept: str = "", *, mode: str) -> int:
    """Matrix products of the head, forward and backward; `mode` is full, frozen or reference. Kept logits are not computed again."""
    if mode == "reference":
        return 1
    bare = 3 if mode == "full" else 2
    again = path == "trl" or (path == "ours" and mode == "full" and not kept)
    return bare + again


def head(
    shape: Shape, scored: int, path: str, mode: str, width: int = 2, kept: bool = False, rows: int = TILE
) -> Stages:
    """The head alone, in tiles of so many rows. Logits `(scored, V)` are written by a product, then read by kernels and by the other
    products."""
    weights, logits = shape.vocab * shape.hidden, scored * shape.vocab * width
    products, tiles = head_products(path, "kept" * kept, mode=mode), -(-scored // rows)
    operations = 2 * products * scored * weights
    moved = products * (weights * width + scored * shape.hidden * width + logits)
    # Kernels pass over the logits: TRL's read, and in the backward read and write. Ours read for the sum and, for a gradient, read and
    # write once more; where the logits are computed again, the first time has no gradient.
    passes = (
        {"reference": 1, "frozen": 3, "full": 3 if path == "trl" or kept else 4}[mode] if path != "products" else 0
    )
    # The weight's gradient is summed in float32 over tiles, and rounded; TRL begins with zeros. Of kept logits it is one product.
    sums = (
        {"trl": 4 + 8 * tiles + 6, "ours": 0 if kept else 8 * tiles + 2, "products": 0}[path] if mode == "full" else 0
    )
    return {"head: products": (operations, moved), "head: kernels": (0, passes * logits + sums * weights)}


def step(shape: Shape, work: Work, path: str, lora: bool, checkpointing: bool = True, width: int = 2) -> Stages:
    """A whole step: reference, policy forward, its recomputation under checkpointing, backward, head, optimizer."""
    forwards = 2 + checkpointing  # reference, policy, and the policy again
    backward = 1 if lora else 2  # gradients of the inputs; of the weights too
    layer_tokens = work.tokens * shape.layers
    trunk = (forwards + backward) * 2 * shape.trunk * work.tokens
    trunk_bytes = (forwards + backward) * (shape.trunk + layer_tokens * shape.product_values) * width
    # Two products forward, five backward
    attention = (forwards + 2.5) * 4 * shape.layers * shape.inner * work.seen
    attention_bytes = (forwards + 2) * layer_tokens * (shape.qkv + shape.inner) * width
    other_bytes = (forwards + 2) * layer_tokens * shape.other_values * width
    kept = path == "ours" and not lora and keeps(shape, work, width)
    rows = tile_rows(shape, work, lora, width) if path == "ours" else TILE
    policy = head(shape, work.scored, path, "frozen" if lora else "full", width, kept, rows)
    reference = head(shape, work.scored, path, "reference", width)
    # Gradients are written and read; weights and two moments are read and written
    optimizer = 0 if lora else 8 * shape.parameters * width
    return {
        "layers: products": (trunk, trunk_bytes),
        "attention": (attention, attention_bytes),
        "layers: elementwise": (0, other_bytes),
        **{name: tuple(a + b for a, b in zip(policy[name], reference[name], strict=True)) for name in policy},
        "optimizer": (0, optimizer),
    }


def at_head(shape: Shape, work: Work, path: str, lora: bool, width: int, kept: bool = False) -> float:
    """Bytes in the head's backward beyond what stands always: checkpoints, logits, the weight's gradient, the hidden states'."""
    rows = min(work.scored, TILE if path == "trl" else tile_rows(shape, work, lora, width))
    columns = min(shape.vocab, TRL_COLUMNS) if path == "trl" else shape.vocab
    checkpoints = work.tokens * shape.layers * shape.hidden * width
    logits = (work.scored if kept else rows) * columns * width
    weight = 0 if lora else shape.vocab * shape.hidden * (width if kept else 4)
    return checkpoints + logits + weight + 4 * work.scored * shape.hidden


def at_layers(shape: Shape, work: Work, lora: bool, width: int) -> float:
    """The same in the backward of the layers: half way, and at its end, when all gradients are there."""
    checkpoints = work.tokens * shape.layers * shape.hidden * width
    gradients = 0 if lora else shape.parameters * width
    return max(checkpoints / 2 + gradients / 2 + work.tokens * shape.saved_values * width, gradients)


def room(shape: Shape, work: Work, lora: bool, width: int) -> float:
    """Bytes that the backward of the layers needs later, less what stands at the head: checkpoints, and the head's own gradients."""
    own = work.tokens * shape.layers * shape.hidden * width + 4 * work.scored * shape.hidden
    return at_layers(shape, work, lora, width) - own - (0 if lora else 4 * shape.vocab * shape.hidden)


def tile_rows(shape: Shape, work: Work, lora: bool, width: int) -> int:
    """Tokens per tile of ours, from the second step on: what raises no peak, and `LEAST` bytes whatever they do to it."""
    rows = TILE
    while rows > 1 and rows * shape.vocab * width > max(LEAST, room(shape, work, lora, width)):
        rows //= 2
    return rows


def keeps(shape: Shape, work: Work, width: int) -> bool:
    """Whether ours keeps the logits of a trained head: where that raises no peak of the run."""
    return work.scored * shape.vocab * width <= room(shape, work, False, width)


def peak_gb(shape: Shape, work: Work, path: str, lora: bool, width: int = 2) -> float:
    """Peak memory with checkpointing: policy, reference and moments, which stand always, then the larger of the two above."""
    always = shape.parameters * width * (1 if lora else 2 + 2)
    kept = path == "ours" and not lora and keeps(shape, work, width)
    return (always + max(at_head(shape, work, path, lora, width, kept), at_layers(shape, work, lora, width))) / 1e9


def predicted(stages: list[Stages], rates: Rates) -> dict[str, float | str]:
    """Milliseconds of a path, the mean over batches, and what takes most of them."""
    parts = {name: sum(rates.milliseconds(*batch[name]) for batch in stages) / len(stages) for name in stages[0]}
    most = max(parts, key=parts.get)
    operations, moved = (sum(batch[most][k] for batch in stages) for k in (0, 1))
    bound = "operations" if operations / rates.tflops > moved / rates.terabytes else "bytes"
    share = parts[most] / sum(parts.values())
    return {
        "milliseconds": sum(parts.values()),
        "tera_operations": sum(batch[name][0] for batch in stages for name in batch) / len(stages) / 1e12,
        "gigabytes": sum(batch[name][1] for batch in stages for name in batch) / len(stages) / 1e9,
        "bound": f"{most}, {bound} ({share:.0%})",
    }


def compared(rows: list[dict], rates: Rates) -> list[dict]:
    """Rows of one setting with their ratio to TRL's, marked for what they are: no device has run them."""
    trl = next(row for row in rows if row["path"] == "trl")
    return [
        {"kind": "model", **row, "speed": trl["milliseconds"] / row["milliseconds"]}
        | ({"memory": row["peak_mb"] / trl["peak_mb"]} if "peak_mb" in row else {})
        | {"assumed": str(rates)}
        for row in rows
    ]
