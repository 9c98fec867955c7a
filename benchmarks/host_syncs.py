"""
How often a training step makes the host wait for the device, by who asks: TRL, this package, others.

Counted on any device, a CPU included, where nobody waits: operations whose result the host reads (`item`, `nonzero`, masks as
indices) and tensors that are fetched (`cpu`, `tolist`, `numpy`). What this package does on the CPU before a batch is sent to the
device, as its collator does, is no part of a step.

    python benchmarks/host_syncs.py
    python benchmarks/host_syncs.py --loss_type offset --lines      # with the lines that ask
"""

import argparse
import tempfile
import traceback
from collections import Counter
from pathlib import Path

import torch
import trl
from common import model, provenance, table, tokenizer, write
from datasets import Dataset
from torch.utils._python_dispatch import TorchDispatchMode

import trl_ext


READ = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal")
FETCHED = ("cpu", "tolist", "numpy")
# By folder: a checkout may be called as the package is
FOLDERS = {module.__name__: f"{Path(module.__file__).parent}/" for module in (trl_ext, trl)}
HEADINGS = {"loss": "loss", "of_ours": "trl_ext", "of_trl": "TRL", "of_others": "others"}


class Waits(TorchDispatchMode):
    """Counts by owner and line while it is open."""

    def __init__(self):
        super().__init__()
        self.found: Counter[tuple[str, str]] = Counter()
        self.plain = {name: getattr(torch.Tensor, name) for name in FETCHED}

    def note(self) -> None:
        for frame in reversed(traceback.extract_stack()):
            if "/torch/" in frame.filename or frame.filename == __file__:
                continue
            owners = [owner for owner, folder in FOLDERS.items() if frame.filename.startswith(folder)]
            self.found[(owners or ["others"])[0], f"{frame.filename.rpartition('/')[2]}:{frame.lineno}"] += 1
            return

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        name = str(operation)
        masks = args[1] if name.startswith(("aten.index.", "aten.index_put")) else ()
        if any(part in name for part in READ) or any(mask is not None and mask.dtype == torch.bool for mask in masks):
            self.note()
        return operation(*args, **(kwargs or {}))

    def __enter__(self):
        for name, function in self.plain.items():

            def fetched(tensor, *args, function=function, **kwargs):
                self.note()
                return function(tensor, *args, **kwargs)

            setattr(torch.Tensor, name, fetched)
        return super().__enter__()

    def __exit__(self, *error):
        for name, function in self.plain.items():
            setattr(torch.Tensor, name, function)
        return super().__exit__(*error)


def waits(loss_type: str, device: str) -> Counter:
    """Of the second step of a run, which is not logged."""
    rows = [{"prompt": "a " * (3 + i), "chosen": "b " * (2 + i), "rejected": "c " * (9 - i)} for i in range(8)]
    rows = [{**row, "score_chosen": 1.0, "score_rejected": 0.0, "weight": 1.0} for row in rows]
    rows = [{**row, "chosen_empty_trace": "a b", "rejected_empty_trace": "c"} for row in rows]
    used = {"sigmoid": 3, "bias_variance": 8}.get(loss_type, 5)  # columns; a weight has ours compute TRL's sigmoid
    args = trl_ext.DPOConfig(
        output_dir=tempfile.mkdtemp(), loss_type=loss_type, per_device_train_batch_size=4, logging_steps=100, bf16=False,
        use_cpu=device == "cpu", report_to="none", gradient_checkpointing=False, disable_tqdm=True,
    )  # fmt: skip
    trainer = trl_ext.DPOTrainer(
        model=model("tiny", 500, 0, torch.float32, device),
        ref_model=model("tiny", 500, 1, torch.float32, device),
        args=args,
        processing_class=tokenizer(),
        train_dataset=Dataset.from_list(rows).select_columns(list(rows[0])[:used]),
    )
    first, batch = (trainer._prepare_inputs(batch) for batch in trainer.get_train_dataloader())
    trainer.model.train()
    trainer.compute_loss(trainer.model, first).backward()  # of which a few rows are scored both ways
    with Waits() as counted:
        trainer.compute_loss(trainer.model, batch).backward()
    return counted.found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--loss_type",
        nargs="+",
        default=["sigmoid", "offset", "length_regularized", "bias_variance"],
        help="one run of each",
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--lines", action="store_true", help="print the lines of this package that ask")
    parser.add_argument("--csv", help="write the rows here")
    args = parser.parse_args()
    rows = []
    for name in args.loss_type:
        found = waits(name, args.device)
        by_owner = {
            owner: sum(n for (who, _), n in found.items() if who == owner) for owner in ("trl_ext", "trl", "others")
        }
        counts = {"of_ours": by_owner["trl_ext"], "of_trl": by_owner["trl"], "of_others": by_owner["others"]}
        rows.append({"loss": name, **counts, **provenance(args.device)})
        if args.lines:
            print(*(f"{name}: {line} ({n})" for (who, line), n in found.items() if who == "trl_ext"), sep="\n")
    table(rows, HEADINGS, f"Waits of the host per step; {rows[0]['device']}")
    if args.csv:
        write(rows, args.csv)


if __name__ == "__main__":
    main()
