"""Generation for all micro-batches of an optimizer step, or of several, at once."""

import json
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch.utils.data import Sampler

from trl_ext.data.cache import write_atomically
from trl_ext.generation import evaluating
from trl_ext.rows import Plan, Rows, stacked
from trl_ext.trainers.online.blocks import BLOCK, RepeatedBlocks, Sampled
from trl_ext.trainers.online.cutting import completions_of, joined, scores_of, slices


class Together:
    """How [`OnlineDPOTrainer`] takes its micro-batches, and generates and scores for a block of them."""

    @property
    def _off_policy(self) -> bool:
        """Whether the policy may have changed since it wrote what is learnt from."""
        return self.args.num_iterations > 1 or self._blocks.length > self.args.gradient_accumulation_steps

    @property
    def _completions_at_once(self) -> int | None:
        """How many completions this process generates or scores at a time; all by default."""
        size = self.args.generation_batch_size
        return None if size is None else size // self.accelerator.num_processes

    # Which micro-batches

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        def pull(count: int) -> list[dict[str, Any]]:
            return super(Together, self).get_batch_samples(epoch_iterator, count, device)[0]

        # No micro-batch has labels, whose number the loss would be divided by
        return self._blocks.take(num_batches, pull), None

    def _get_train_sampler(self, train_dataset=None) -> Sampler | None:
        if self.args.num_iterations == 1:
            return super()._get_train_sampler(train_dataset)
        rows = len(self.train_dataset if train_dataset is None else train_dataset)
        shards = 1 if self.args.accelerator_config.split_batches else self.accelerator.num_processes
        size = self._train_batch_size * shards * self._blocks.length

        def order() -> list[int]:
            if self.args.train_sampling_strategy == "sequential":
                return list(range(rows))
            # Alike in all processes, and in a resumed run
            seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
            generator = torch.Generator().manual_seed(seed + int(self.state.epoch or 0))
            return torch.randperm(rows, generator=generator).tolist()

        return RepeatedBlocks(rows, size, self.args.num_iterations, order)

    # What they are learnt from

    def _sampled(self, model: torch.nn.Module, inputs: dict[str, Any]) -> Sampled:
        """What a micro-batch is learnt from. The first of a block has it made for all."""
        place = inputs.pop(BLOCK, None)
        if place is None:  # evaluation
            return self._sampled_for(model, [inputs])[0]
        block = place.block
        if block.batches:
            block.sampled, block.batches = self._sampled_for(model, block.batches), []
        sampled = block.sampled[place.number]
        if any(selection.completions.prompts != inputs["prompt"] for selection in sampled.selections):
            raise ValueError(
                "The data has other prompts than those that completions were generated for: it was changed since the checkpoint "
                "was saved. Begin a new run, or resume with the data as it was."
            )
        if place.last:
            block.sampled[place.number] = None
        return sampled

    def _sampled_for(self, model: torch.nn.Module, batches: list[dict[str, Any]]) -> list[Sampled]:
        if "image" in batches[0] and len(batches) > 1:  # an image's tensors cannot be cut
            return [each for batch in batches for each in self._sampled_for(model, [batch])]
        inputs, sizes = joined(batches), [len(batch["prompt"]) for batch in batches]
        halves = []
        for thinking in self._thinking:
            completions, selections = self.generate(model, inputs, thinking), []
            for part in self._parts(batches):
                whole = completions_of(completions, slice(sum(sizes[: part.start]), sum(sizes[: part.stop])))
                scores = self.score(joined(batches[part]), whole)
                selections += [
                    self.pair(completions_of(whole, prompts), scores_of(scores, prompts))
                    for prompts in slices(sizes[part])
                ]
            halves.append(selections)
        sampled = [Sampled(list(selections)) for selections in zip(*halves, strict=True)]
        if len(batches) > 1:
            self._ask_ahead(model, batches, sampled)
        return sampled

    def _parts(self, batches: list[Any]) -> list[slice]:
        """Micro-batches that are scored together: as many as `generation_batch_size` has room for, in all processes alike."""
        size = len(batches)
        if self._completions_at_once is not None:
            size = max(1, self._completions_at_once // (self._train_batch_size * self.num_generations))
        return [slice(first, first + size) for first in range(0, len(batches), size)]

    def _ask_ahead(self, model: torch.nn.Module, batches: list[dict[str, Any]], sampled: list[Sampled]) -> None:
        """What the reference says of all tables of a block, and the policy, where it will have changed before some are learnt from."""
        for batch, each in zip(batches, sampled, strict=True):
            each.known.table = self._table(batch, each.selections)
        tables = [each.known.table.rows for each in sampled]
        for part in self._parts(batches):
            if self._needs_reference:
                with torch.no_grad(), self._reference() as reference, self.accelerator.autocast():
                    found = self._log_probs(reference, tables[part])
                for each, values in zip(sampled[part], found, strict=True):
                    each.known.ref_token_logps, each.known.ref_step = values, self.state.global_step
            if self._blocks.length > self.args.gradient_accumulation_steps:
                inner = self.accelerator.unwrap_model(model)
                with evaluating(inner, self.args.gradient_checkpointing_kwargs), self.accelerator.autocast():
                    found = self._log_probs(model, tables[part])
                for each, rows, values in zip(sampled[part], tables[part], found, strict=True):
                    each.known.behaviour_logps = self._scorer.scored(rows, values.to("cpu"), None, ()).logps

    def _log_probs(self, model: torch.nn.Module, tables: list[Rows]) -> list[torch.Tensor]:
        """Token log-probs of several tables, which the model sees as one."""
        nothing = Plan(torch.empty(0, 2, dtype=torch.long))
        rows, _ = self._on_device(self._laid_out(stacked(tables)), nothing)
        found = self._scorer(model, rows, statistics=()).log_probs.split([len(table.prompt) for table in tables])
        return [values[:, : table.completion_mask.size(1) - 1] for values, table in zip(found, tables, strict=True)]

    # Checkpoints

    def _save_own(self, folder: Path) -> None:
        super()._save_own(folder)
        state, file = self._blocks.state(), folder / f"block_{self.accelerator.process_index}.json"
        if state is None:
            file.unlink(missing_ok=True)  # of a run before, in the same folder
        else:
            state["processes"] = self.accelerator.num_processes
            write_atomically(file, json.dumps(state))

    def _load_optimizer_and_scheduler(self, checkpoint):
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None or self.args.ignore_data_skip:
            return
        own = Path(checkpoint) / f"block_{self.accelerator.process_index}.json"
        any_part = own if own.exists() else next(Path(checkpoint).glob("block_*.json"), None)
        state = None if any_part is None else json.loads(any_part.read_text())
        # All processes refuse, or none does
        check_processes(checkpoint, gather_object([(own.exists(), None if state is None else state["processes"])]))
        if state is not None:
            self._blocks.load(state)


def check_processes(checkpoint: str, parts: list[tuple[bool, int | None]]) -> None:
    """
    Raise a `ValueError` where a checkpoint within a block is not one of as many processes, or lacks the part of one.

    Args:
        checkpoint (`str`):
            Its folder.
        parts (`list[tuple[bool, int | None]]`):
            For each process of this run, whether its own part is there, and how many there are as the parts say that it sees;
            `None` where it sees none.
    """
    found = {number for _, number in parts if number is not None}
    hint = "or from a checkpoint at the end of an epoch."
    for number in found - {len(parts)}:
        raise ValueError(
            f"{checkpoint} holds the completions of {number} processes, and this run has {len(parts)}. Resume with as many "
            f"processes, {hint}"
        )
    missing = [f"block_{process}.json" for process, (there, _) in enumerate(parts) if not there]
    if found and missing:
        raise ValueError(
            f"{checkpoint} holds the completions of {len(parts)} processes, of which {missing} are missing. Resume with all files "
            f"that the run has written, {hint}"
        )
