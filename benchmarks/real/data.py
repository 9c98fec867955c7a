"""Scored pairs of a folder as what each run begins with: token ids, derived columns, and a small model that has read the texts."""

import hashlib
import json
import random
import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, concatenate_datasets, load_from_disk

from trl_ext import DPOConfig, SFTConfig, SFTTrainer
from trl_ext.data import calibrate, score_preferences
from trl_ext.data.cache import write_atomically
from trl_ext.data.rewards import RewardFunction
from trl_ext.trainers.trl_seam import tokenize_pairs

from .losses import usual_temperature


@dataclass(frozen=True)
class Source:
    """Files of a set of pairs, and the range of their scores."""

    name: str
    train: str
    test: str
    lowest: float
    highest: float

    def files(self, folder: Path) -> dict[str, Path]:
        """The two files; a `ValueError` where one is not there."""
        found = {"train": folder / self.name / self.train, "test": folder / self.name / self.test}
        if missing := [str(path) for path in found.values() if not path.is_file()]:
            raise ValueError(
                f"There is no {' and no '.join(missing)}. Give --data the folder that holds {self.name}/{self.train} and {self.name}/"
                f"{self.test}: JSON lines with prompt, chosen, rejected, score_chosen and score_rejected."
            )
        return found


ABOUT = "about.json"  # written last, so that a folder that holds it is whole

SOURCES = {
    source.name: source
    for source in (
        Source("imdb_sentiment", "pairs_train.jsonl", "pairs_test.jsonl", 0.0, 2.0),
        Source("tldr_likert", "train.jsonl", "test.jsonl", 1.0, 7.0),
    )
}


@dataclass(frozen=True)
class Size:
    """How much is done: of the model, of pre-training, of each run, of the comparison."""

    name: str
    hidden: int = 64
    layers: int = 2
    vocabulary: int = 1024
    prompt_tokens: int = 48  # the last ones of each prompt
    completion_tokens: int = 128
    pretraining: int = 200  # steps of 16 texts
    steps: int = 50
    batch: int = 8  # pairs per step
    validation: float = 0.15  # share of the training prompts
    rows: int | None = None  # of each file, the first ones; all by default
    seeds: int = 3

    def with_seeds(self, seeds: int) -> "Size":
        return replace(self, seeds=seeds)


QUICK = Size(
    "quick",
    hidden=32,
    vocabulary=512,
    prompt_tokens=16,
    completion_tokens=24,
    pretraining=10,
    steps=4,
    rows=40,
    seeds=1,
)


def read_rows(path: Path, limit: int | None = None) -> list[dict[str, Any]]:
    """Scored pairs; a `ValueError` for a row that is none."""
    # Not `splitlines`: texts may hold separators of lines that JSON leaves as they are
    rows = [json.loads(line) for line in path.read_text().split("\n") if line.strip()][:limit]
    wanted = {
        "prompt": str,
        "chosen": str,
        "rejected": str,
        "score_chosen": (int, float),
        "score_rejected": (int, float),
    }
    for number, row in enumerate(rows):
        if wrong := [name for name, kind in wanted.items() if not isinstance(row.get(name), kind)]:
            raise ValueError(
                f"{path}, row {number}: {', '.join(wrong)} missing or of another type; expected {sorted(wanted)}."
            )
    if not rows:
        raise ValueError(f"{path} has no rows.")
    return [{name: row[name] for name in wanted} for row in rows]


def split_by_prompt(rows: list[dict[str, Any]], share: float) -> tuple[list, list]:
    """Training and validation rows; no prompt is in both."""
    prompts = sorted({row["prompt"] for row in rows})
    random.Random(0).shuffle(prompts)
    held = set(prompts[: max(1, round(share * len(prompts)))])
    return [row for row in rows if row["prompt"] not in held], [row for row in rows if row["prompt"] in held]


def with_derived(dataset: Dataset, temperature: float, source: Source, cache: Path) -> Dataset:
    """The pairs with `logit_*`, `preference_prob`, `win_*` and `q_*`; see `losses.DERIVED`."""
    table = {(row["prompt"], row[side]): row[f"score_{side}"] for row in dataset for side in ("chosen", "rejected")}

    def given(prompts, completions):
        return [table[key] for key in zip(prompts, completions, strict=True)]

    content = hashlib.sha256(json.dumps(sorted(map(repr, table.items()))).encode()).hexdigest()
    texts = dataset.select_columns(["prompt", "chosen", "rejected"])
    logits = score_preferences(texts, RewardFunction(given, version=content), temperature=temperature, cache_dir=cache)
    middle, reach = (source.highest + source.lowest) / 2, (source.highest - source.lowest) / 2

    def derive(row, index):
        chosen, rejected = logits[index]["score_chosen"], logits[index]["score_rejected"]
        probability = torch.tensor(chosen - rejected, dtype=torch.float64).sigmoid().item()
        return {
            "logit_chosen": chosen,
            "logit_rejected": rejected,
            "preference_prob": probability,
            "win_chosen": probability,
            "win_rejected": 1 - probability,
            "q_chosen": (row["score_chosen"] - middle) / reach,
            "q_rejected": (row["score_rejected"] - middle) / reach,
        }

    return dataset.map(derive, with_indices=True)


def cut(row: dict[str, Any], size: Size) -> dict[str, Any]:
    """The end of the prompt, and the beginning of the completions."""
    sides = {f"{side}_ids": row[f"{side}_ids"][: size.completion_tokens] for side in ("chosen", "rejected")}
    return {"prompt_ids": row["prompt_ids"][-size.prompt_tokens :], **sides}


@torch.no_grad()
def log_probs(model: torch.nn.Module, dataset: Dataset, batch: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability of each completion, the sum over its tokens in nats, and their number; shape `(N, 2)`, chosen and rejected."""
    model.eval()
    rows = [(row["prompt_ids"], row[f"{side}_ids"]) for row in dataset for side in ("chosen", "rejected")]
    sums, lengths = [], []
    for start in range(0, len(rows), batch):
        part = rows[start : start + batch]
        width = max(len(prompt) + len(completion) for prompt, completion in part)
        ids = torch.zeros(len(part), width, dtype=torch.long)
        attended, scored = torch.zeros_like(ids), torch.zeros(len(part), width)
        for number, (prompt, completion) in enumerate(part):
            whole = len(prompt) + len(completion)
            ids[number, :whole] = torch.tensor([*prompt, *completion])
            attended[number, :whole] = 1
            scored[number, len(prompt) : whole] = 1
        logits = model(input_ids=ids, attention_mask=attended).logits[:, :-1].float()
        each = logits.log_softmax(dim=-1).gather(2, ids[:, 1:, None]).squeeze(2)
        sums.append((each * scored[:, 1:]).double().sum(dim=1))
        lengths.append(scored.double().sum(dim=1))
    return torch.cat(sums).reshape(-1, 2), torch.cat(lengths).reshape(-1, 2)


def build_tokenizer(texts: list[str], vocabulary: int) -> Any:
    """A byte-level BPE tokenizer of these texts."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=["<|pad|>", "<|eos|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<|pad|>", eos_token="<|eos|>")


def pretrained(rows: Dataset, tokenizer: Any, size: Size, folder: Path) -> tuple[torch.nn.Module, float]:
    """A small model that has read both completions of each training pair alike, and the loss at its end (nats per token)."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=size.hidden, intermediate_size=2 * size.hidden, num_hidden_layers=size.layers,
        num_attention_heads=4, num_key_value_heads=2, head_dim=size.hidden // 4, pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id, bos_token_id=None, tie_word_embeddings=True,
    )  # fmt: skip
    texts = [{"input_ids": row["prompt_ids"] + row[f"{side}_ids"]} for row in rows for side in ("chosen", "rejected")]
    trainer = SFTTrainer(
        model=Qwen3ForCausalLM(config),
        args=SFTConfig(
            **quiet(folder / "pretraining"), max_steps=size.pretraining, per_device_train_batch_size=16, learning_rate=3e-3,
            max_length=size.prompt_tokens + size.completion_tokens, logging_steps=max(1, size.pretraining // 10), seed=0,
        ),
        train_dataset=Dataset.from_list(texts),
        processing_class=tokenizer,
    )  # fmt: skip
    trainer.train()
    return trainer.model, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry][-1]


def quiet(folder: Path) -> dict[str, Any]:
    """Arguments of a config: float32 on a CPU, and nothing is saved."""
    return {
        "output_dir": str(folder), "use_cpu": True, "bf16": False, "report_to": "none", "save_strategy": "no", "disable_tqdm": True,
        "gradient_checkpointing": False, "lr_scheduler_type": "linear", "warmup_steps": 5,
    }  # fmt: skip


def key_of(source: Source, data: Path, size: Size) -> str:
    """What a start is made of: the files, and the size where it matters."""
    sums = {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in source.files(data).items()}
    made_of = {key: value for key, value in asdict(size).items() if key not in ("name", "steps", "batch", "seeds")}
    return hashlib.sha256(json.dumps([sums, made_of], sort_keys=True).encode()).hexdigest()[:16]


def prepared(folder: Path, key: str) -> dict[str, Any] | None:
    """What is known of a start that is there already, if it was made of the same."""
    about = folder / ABOUT
    found = json.loads(about.read_text()) if about.exists() else None
    return found if found and found["key"] == key else None


def prepare(source: Source, data: Path, folder: Path, size: Size) -> dict[str, Any]:
    """
    Makes the start of all runs in `folder`, once: model and tokenizer, training, validation and test pairs. What is there and was made of
    the same files with the same size is kept.

    Returns:
        What is known of it: `key` (of files and size), numbers of pairs, temperature, calibration of scores, length bias.
    """
    from trl_ext.metrics import length_bias

    files, key = source.files(data), key_of(source, data, size)
    if (known := prepared(folder, key)) is not None:
        return known
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    train, validation = split_by_prompt(read_rows(files["train"], size.rows), size.validation)
    splits = {"train": train, "validation": validation, "test": read_rows(files["test"], size.rows)}
    temperature = usual_temperature([row["score_chosen"] - row["score_rejected"] for row in train])
    tokenizer = build_tokenizer(
        [row["prompt"] + row[side] for row in train for side in ("chosen", "rejected")], size.vocabulary
    )
    config = DPOConfig(**quiet(folder))
    pairs = {}
    for name, rows in splits.items():
        derived = with_derived(Dataset.from_list(rows), temperature, source, folder / "scores")
        pairs[name] = tokenize_pairs(derived, tokenizer, config).map(cut, fn_kwargs={"size": size})
    model, loss = pretrained(pairs["train"], tokenizer, size, folder)
    for name, dataset in pairs.items():
        sums, lengths = log_probs(model, dataset)
        columns = {"ref_chosen_logps": sums[:, 0], "ref_rejected_logps": sums[:, 1], "chosen_length": lengths[:, 0],
                   "rejected_length": lengths[:, 1]}  # fmt: skip
        added = Dataset.from_dict({column: values.tolist() for column, values in columns.items()})
        pairs[name] = concatenate_datasets([dataset.remove_columns(["prompt", "chosen", "rejected"]), added], axis=1)
        pairs[name].save_to_disk(folder / name)
    model.save_pretrained(folder / "start")
    tokenizer.save_pretrained(folder / "start")
    found = {
        "key": key,
        "pairs": {name: len(rows) for name, rows in splits.items()},
        "temperature": temperature,
        "nll": calibrate([(row["score_chosen"] - row["score_rejected"]) / temperature for row in train]).nll,
        "pretraining_loss": loss,
        "parameters": sum(each.numel() for each in model.parameters()),
        "longer_chosen": length_bias(pairs["test"]["chosen_length"][:], pairs["test"]["rejected_length"][:])[
            "longer_chosen"
        ],
    }
    write_atomically(folder / ABOUT, json.dumps(found, indent=1))
    return found


def load(folder: Path) -> tuple[Any, Any, dict[str, Dataset]]:
    """Model, tokenizer and splits that [`prepare`] has made."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder / "start", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder / "start")
    return model, tokenizer, {name: load_from_disk(folder / name) for name in ("train", "validation", "test")}
