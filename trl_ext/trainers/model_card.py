"""What the model card says beside TRL's text."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from transformers import PreTrainedModel, Trainer


# How TRL's card names a model that was loaded from a local folder
UNNAMED = "[None](https://huggingface.co/None)"
# What the training data is called, where a command knows it and the dataset does not
DATASET_NAME: ContextVar[str | None] = ContextVar("dataset_name", default=None)
# Readers of files, under whose names `datasets` keeps what was read: no names of data
READERS = ("arrow", "csv", "generator", "json", "parquet", "text")


def complete_model_card(folder: str, model: PreTrainedModel, sections: Sequence[str] = ()) -> None:
    """
    Name the base model where TRL's card does not, and add sections before the versions.

    Args:
        folder (`str`):
            Where the card lies, as `README.md`.
        model ([`~transformers.PreTrainedModel`]):
            The model, which knows where it was loaded from.
        sections (`Sequence[str]`, *optional*):
            Markdown, such as that of [`describe_losses`].
    """
    path = Path(folder) / "README.md"
    card = ModelCard.load(path)
    # The name of the folder alone: where it lies is nobody's business
    name = Path(getattr(model.config, "_name_or_path", "") or "").name
    card.text = card.text.replace(UNNAMED, f"the local model `{name}`" if name else "a model that has no name", 1)
    if sections:
        added = "\n\n".join([*sections, "### Framework versions"])
        card.text = card.text.replace("### Framework versions", added, 1)
    card.save(path)


def describe_losses(weights: Mapping[str, float], losses: Mapping[str, Any], beta: float) -> str:
    """
    A table of the losses of a run, with weights, hyper-parameters and papers.

    Args:
        weights (`dict[str, float]`):
            Weight of each loss, by name, TRL's own among them.
        losses (`dict[str, Loss]`):
            Those that are not TRL's.
        beta (`float`):
            DPO temperature.
    """
    lines = ["### Loss", "", "| loss | weight | hyper-parameters | paper |", "| --- | --- | --- | --- |"]
    for name, weight in weights.items():
        loss = losses.get(name)
        values = json.dumps(dataclasses.asdict(loss), default=str) if loss else ""
        papers = [paper.strip() for paper in loss.paper.split(",") if paper] if loss else []
        links = ", ".join(f"[{paper}](https://huggingface.co/papers/{paper})" for paper in papers)
        lines.append(f"| `{name}` | {weight} | {f'`{values}`' if values else ''} | {links} |")
    return "\n".join([*lines, "", f"With [trl_ext](https://pypi.org/project/trl-ext/), `beta={beta}`."])


def describe_training(trainer: Trainer, dataset_name: str | None = None) -> str:
    """
    A table of what a model was trained on, and how.

    Args:
        trainer ([`~transformers.Trainer`]):
            Its settings and how far it has come.
        dataset_name (`str`, *optional*):
            What the training data is called; without it, what `datasets` or the command knows.
    """
    args, state = trainer.args, trainer.state
    accumulated, processes = args.gradient_accumulation_steps, args.world_size
    per_device = args.per_device_train_batch_size * max(args.n_gpu, 1)
    rows = {
        "data": _described(trainer.train_dataset, dataset_name),
        "steps": f"{state.global_step} of {state.max_steps}, {state.epoch or 0:.4g} epochs",
        "rows per step": f"{per_device * accumulated * processes}: {per_device} x {accumulated} accumulated x {processes} process{'es' * (processes > 1)}",
        "learning rate": f"{args.learning_rate:g}, {getattr(args.lr_scheduler_type, 'value', args.lr_scheduler_type)}, "
        f"{args.get_warmup_steps(state.max_steps)} steps of warm-up",
        "optimizer": f"{getattr(args.optim, 'value', args.optim)}, weight decay {args.weight_decay:g}, gradients clipped at {args.max_grad_norm:g}",
        "precision": "bfloat16, mixed" if args.bf16 else "float16, mixed" if args.fp16 else "that of the weights",
        "longest sequence": "not cut" if args.max_length is None else f"{args.max_length} tokens",
        "adapter": _adapter(trainer.model),
        "seed": str(args.seed),
    }
    lines = [f"| {name} | {value} |" for name, value in rows.items() if value]
    return "\n".join(["### Data and settings", "", "| | |", "| --- | --- |", *lines])


def describe_evaluation(history: Sequence[Mapping[str, Any]]) -> str:
    """
    A table of the last value of each metric of an evaluation, or that there was none.

    Args:
        history (`Sequence[Mapping]`):
            What a trainer has logged, `log_history` of its state.
    """
    last = {}
    for entry in history:
        for name, value in entry.items():
            timing = name.endswith(("_runtime", "_per_second", "_preparation_time"))
            if name.startswith("eval_") and isinstance(value, (int, float)) and not timing:
                last[name] = (value, entry["step"])
    if not last:
        return "### Evaluation\n\nNone was made while training."
    lines = [f"| `{name.removeprefix('eval_')}` | {value:.4g} | {step} |" for name, (value, step) in last.items()]
    return "\n".join(["### Evaluation", "", "| metric | value | step |", "| --- | --- | --- |", *lines])


def _described(dataset: Any, name: str | None) -> str:
    """Name and size of the training data."""
    known = getattr(getattr(dataset, "info", None), "dataset_name", None)
    name = name or DATASET_NAME.get() or (known if known not in READERS else None)
    size = f"{len(dataset)} rows" if hasattr(dataset, "__len__") else "a stream"
    return f"`{name}`, {size}" if name else f"{size} without a name"


def _adapter(model: PreTrainedModel) -> str:
    """What is trained in place of all weights; empty where all are."""
    config = next(iter(getattr(model, "peft_config", {}).values()), None)
    if config is None:
        return ""
    targets = getattr(config, "target_modules", None)
    on = targets if isinstance(targets, str) else ", ".join(sorted(targets or []))
    sizes = [f"{name} {getattr(config, name)}" for name in ("r", "lora_alpha") if hasattr(config, name)]
    return ", ".join(
        [str(getattr(config.peft_type, "value", config.peft_type)), *sizes, *([f"on {on}"] if on else [])]
    )
