"""Generation for several micro-batches at once: which are taken, what comes of them, several uses, checkpoints, evaluation."""

import itertools
import json

import pytest
import torch
from datasets import Dataset
from transformers import TrainerCallback

import trl_ext
from tests.helpers import assert_same_parameters, history, options, parameters
from tests.online.runs import Scripted, length_reward, online, prompts, scripted
from trl_ext.generation import Completions
from trl_ext.rows import Rows, stacked
from trl_ext.trainers.checkpoints import CONTENTS
from trl_ext.trainers.online.blocks import BLOCK, Blocks, Known, RepeatedBlocks, Sampled, packed, unpacked
from trl_ext.trainers.online.cutting import completions_of, joined, scores_of, slices
from trl_ext.trainers.online.rewards import Scores
from trl_ext.trainers.online.selection import Selection
from trl_ext.trainers.online.together import check_processes


FOUR = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4, "max_steps": 2, "learning_rate": 1e-2}


# Which micro-batches


def taking(blocks, rows):
    """Takes so many micro-batches: number of the row, number in the block, last use, and the block, for each."""
    source = iter([{"row": row} for row in rows])

    def take(count):
        found = blocks.take(count, lambda pulled: list(itertools.islice(source, pulled)))
        assert all(set(batch) == {"row", BLOCK} for batch in found)
        return [(batch["row"], batch[BLOCK].number, batch[BLOCK].last, batch[BLOCK].block) for batch in found]

    return take


def without_block(taken):
    return [each[:3] for each in taken]


def test_a_block_is_an_optimizer_step():
    take = taking(Blocks(2, 1), "abcde")
    first, second, third = take(2), take(2), take(2)
    assert without_block(first) == [("a", 0, True), ("b", 1, True)]
    assert without_block(second) == [("c", 0, True), ("d", 1, True)]
    assert without_block(third) == [("e", 0, True)] and not take(2)
    assert first[0][3] is first[1][3] is not second[0][3] and len(third[0][3].batches) == 1
    assert first[0][3].batches == [{"row": "a"}, {"row": "b"}]


def test_a_block_of_several_steps_and_several_blocks_of_a_step():
    take = taking(Blocks(4, 1), "abcdef")
    steps = [take(2) for _ in range(3)]
    assert [[each[0] for each in step] for step in steps] == [["a", "b"], ["c", "d"], ["e", "f"]]
    assert steps[0][0][3] is steps[1][1][3] is not steps[2][0][3]
    take = taking(Blocks(1, 1), "abcd")
    assert without_block(take(4)) == [("a", 0, True), ("b", 0, True), ("c", 0, True), ("d", 0, True)]


def test_a_block_comes_as_often_as_it_is_used():
    take = taking(Blocks(2, 2), "ababcdcd")
    assert without_block(take(2)) == [("a", 0, False), ("b", 1, False)]
    (again, *_), (third, _) = take(2), take(2)
    assert again[2] is True and again[3] is not third[3]
    assert third[3].batches == [{"row": "c"}, {"row": "d"}]


def test_another_epoch_begins_with_a_block_of_its_own():
    blocks = Blocks(4, 1)
    first = taking(blocks, "abcd")(2)  # and stopped
    blocks.on_epoch_end(None, None, None)
    second = taking(blocks, "efgh")(2)
    assert without_block(second) == [("e", 0, True), ("f", 1, True)] and first[0][3] is not second[0][3]


def saved(blocks):
    state = blocks.state()
    return None if state is None else json.loads(json.dumps(state))


def resumed(state):
    blocks = Blocks(3, 2)
    blocks.load(state)
    return blocks


def learnt(taken):
    """As training does: what is no longer needed is let go."""
    for row, number, last, block in taken:
        block.sampled[number] = None if last else f"of {row}"
    return taken


def test_what_a_resumed_run_goes_on_with():
    """Saved, resumed, saved and resumed again after any numbers of steps, before its first one too: nothing is lost or comes twice."""
    rows = "abcabcdefdef"
    for steps, further in itertools.product(range(1, 12), (0, 1, 2)):
        blocks = Blocks(3, 2)
        take = taking(blocks, rows)
        learnt([take(1)[0] for _ in range(steps)])
        state = saved(blocks)
        assert (state is None) == (steps == 6)
        if state is None:
            continue
        again = resumed(state)
        assert saved(again) == state
        first, whole = learnt(taking(again, rows[steps:])(further)), learnt(take(further))
        assert without_block(first) == without_block(whole)
        state, expected = saved(again), saved(blocks)
        assert (state is None) == (expected is None) == (steps + further == 6 or steps + further >= 12)
        if state is None:
            continue
        rest, expected = taking(resumed(state), rows[steps + further :])(9), take(9)
        assert without_block(rest) == without_block(expected) and len(rest) == min(9, 12 - steps - further)
        block = expected[0][3]
        assert rest[0][3].sampled == [
            each if number in _needed(expected, block) else None for number, each in enumerate(block.sampled)
        ]


def _needed(taken, block):
    return {each[1] for each in taken if each[3] is block}


ONE, TWO, THREE, FOUR_PARTS = ((True, number) for number in (1, 2, 3, 4))
NONE = (False, None)


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ([TWO], "checkpoint-3 holds the completions of 2 processes, and this run has 1. Resume with as many"),
        ([FOUR_PARTS] * 2, "checkpoint-3 holds the completions of 4 processes, and this run has 2. Resume with as many"),
        ([ONE, (False, 1)], "checkpoint-3 holds the completions of 1 processes, and this run has 2. Resume with as many"),
        ([ONE, NONE], "checkpoint-3 holds the completions of 1 processes, and this run has 2. Resume with as many"),
        ([(False, 2)], "checkpoint-3 holds the completions of 2 processes, and this run has 1. Resume with as many"),
        ([TWO, TWO, THREE], "checkpoint-3 holds the completions of 2 processes, and this run has 3. Resume with as many"),
        ([THREE, (False, 3), THREE], r"of 3 processes, of which \['block_1.json'\] are missing. Resume with all files"),
        ([TWO, NONE], r"of 2 processes, of which \['block_1.json'\] are missing. Resume with all files"),
    ],
    ids=["fewer, one", "fewer", "more", "more, on another disk", "fewer, and another's part", "two runs", "one is missing",
         "missing on another disk"],
)  # fmt: skip
def test_parts_of_a_checkpoint_that_do_not_belong_to_this_run(parts, said):
    with pytest.raises(ValueError, match=said):
        check_processes("out/checkpoint-3", parts)


@pytest.mark.parametrize("parts", [[NONE], [NONE, NONE], [ONE], [TWO, TWO]])
def test_parts_of_a_checkpoint_that_do(parts):
    check_processes("out/checkpoint-3", parts)


def test_rows_come_in_blocks():
    order = lambda: [4, 0, 3, 1, 2]  # noqa: E731
    sampler = RepeatedBlocks(rows=5, size=4, times=2, order=order)
    # The block that is not whole is filled with the first rows
    assert list(sampler) == [4, 0, 3, 1, 4, 0, 3, 1, 2, 4, 0, 3, 2, 4, 0, 3] and len(sampler) == 16
    assert list(RepeatedBlocks(4, 2, 1, lambda: [3, 2, 1, 0])) == [3, 2, 1, 0]
    assert list(RepeatedBlocks(1, 4, 1, lambda: [0])) == [0, 0, 0, 0]


# Joined and cut


def test_micro_batches_are_joined_and_cut():
    batches = [{"prompt": ["a", "b"], "n": torch.tensor([1, 2])}, {"prompt": ["c"], "n": torch.tensor([3])}]
    whole = joined(batches)
    assert whole["prompt"] == ["a", "b", "c"] and whole["n"].tolist() == [1, 2, 3]
    assert slices([2, 1]) == [slice(0, 2), slice(2, 3)]
    ids = [
        torch.tensor([number]) for number in range(6)
    ]  # two of each prompt: 0 and 3 of a, 1 and 4 of b, 2 and 5 of c
    completions = Completions(["a", "b", "c"], list("ABCabc"), [torch.tensor([p]) for p in (7, 8, 9)], ids,
                              torch.tensor([True, False, False, True, False, True]))  # fmt: skip
    scores = Scores(
        torch.arange(6.0).view(3, 2), probabilities=torch.rand(3, 2, 2), per_function={"f": torch.ones(3, 2)}
    )
    found, worth = completions_of(completions, slice(1, 3)), scores_of(scores, slice(1, 3))
    assert found.prompts == ["b", "c"] and found.texts == ["B", "C", "b", "c"]
    assert [int(row) for row in found.ids] == [1, 2, 4, 5] and [int(row) for row in found.prompt_ids] == [8, 9]
    assert found.ended.tolist() == [False, False, False, True]
    assert worth.values.tolist() == [[2, 3], [4, 5]] and worth.mask.shape == (2, 2)
    assert torch.equal(worth.probabilities, scores.probabilities[1:]) and worth.per_function["f"].shape == (2, 2)
    assert completions_of(completions, slice(0, 3)) is completions and scores_of(scores, slice(0, 3)) is scores


def test_tables_are_stacked():
    def table(ids, mask, prompt, partner):
        ids = torch.tensor(ids)
        return Rows({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, torch.tensor(mask), torch.tensor(prompt),
                    torch.tensor(partner))  # fmt: skip

    found = stacked([
        table([[5, 6]], [[0, 1]], [0], [0]),
        table([[7, 8, 9], [1, 2, 3]], [[0, 1, 1], [0, 0, 1]], [0, 1], [1, 0]),
        table([[4]], [[1]], [0], [0]),
    ])  # fmt: skip
    assert found.inputs["input_ids"].tolist() == [[5, 6, 0], [7, 8, 9], [1, 2, 3], [4, 0, 0]]
    assert found.inputs["attention_mask"].tolist() == [[1, 1, 0], [1, 1, 1], [1, 1, 1], [1, 0, 0]]
    assert found.completion_mask.tolist() == [[0, 1, 0], [0, 1, 1], [0, 0, 1], [1, 0, 0]]
    assert found.prompt.tolist() == [0, 1, 2, 3] and found.partner.tolist() == [0, 2, 1, 3]


def test_what_is_saved_is_what_was_there():
    completions = Completions(
        [[{"role": "user", "content": "p"}]], ["a", "b"], [torch.tensor([1])], [torch.tensor([2, 3]), torch.tensor([4])],
        torch.tensor([True, False]),
    )  # fmt: skip
    values = torch.tensor([[0.1, float("nan")]])
    scores = Scores(values, torch.tensor([[True, False]]), per_function={"f": values.double() / 3})
    groups = torch.empty(0, 2, dtype=torch.long)
    known = Known(torch.randn(2, 3), 7, torch.randn(2, dtype=torch.bfloat16), table=object())
    given = Sampled([Selection(completions, scores, torch.tensor([[0, 1]]), groups)], known)
    found = unpacked(json.loads(json.dumps(packed(given))))
    (selection,) = found.selections
    assert selection.completions.prompts == completions.prompts and selection.completions.vision is None
    assert [row.tolist() for row in selection.completions.ids] == [[2, 3], [4]]
    for mine, theirs in (
        (selection.scores.values, values),
        (selection.scores.per_function["f"], values.double() / 3),
        (found.known.ref_token_logps, known.ref_token_logps),
        (found.known.behaviour_logps, known.behaviour_logps),
        (selection.scores.mask, scores.mask),
        (selection.groups, groups),
    ):
        assert mine.dtype == theirs.dtype and mine.shape == theirs.shape
        assert torch.equal(
            mine.nan_to_num(9.0) if mine.is_floating_point() else mine,
            theirs.nan_to_num(9.0) if mine.is_floating_point() else theirs,
        )
    assert found.known.ref_step == 7 and found.known.table is None


# Runs


class Counting(Scripted):
    """Notes what was generated for and scored, and at which step."""

    def generate(self, model, inputs, thinking=True, reference=False):
        if not reference:
            self.__dict__.setdefault("generated", []).append((self.state.global_step, list(inputs["prompt"])))
        return super().generate(model, inputs, thinking, reference)

    def score(self, inputs, completions):
        self.__dict__.setdefault("scored", []).append(list(inputs["prompt"]))
        return super().score(inputs, completions)


def run(model_dir, folder, cls=Counting, **given):
    trainer = online(model_dir, folder, cls=cls, **{**FOUR, **given})
    trainer.train()
    return trainer


@pytest.mark.parametrize(
    "given",
    [
        {"loss_type": "offset"},
        {"loss_type": ["sigmoid", "anchored"], "num_generations": 4, "pairing": "all"},
        {"loss_type": "trpa", "num_generations": 4},
        {"loss_type": "simpo"},
        {"loss_type": "offset", "share_prefix": True},
        {"loss_type": "offset", "generation_batch_size": 4},
    ],
    ids=["pairs", "several losses", "groups", "no reference", "shared prompts", "bounded"],
)
def test_the_same_completions_teach_the_same(given, tiny_model_dir, tmp_path):
    """Weights and metrics are those of a generation for each micro-batch, up to rounding of the reference's wider batch."""
    together = run(tiny_model_dir, tmp_path / "together", **given)
    separate = run(
        tiny_model_dir, tmp_path / "separate", steps_per_generation=1, **{**given, "generation_batch_size": None}
    )
    assert [len(asked) for _, asked in together.generated] == [4, 4]
    assert [len(asked) for _, asked in separate.generated] == [1] * 8
    assert [each for _, asked in together.generated for each in asked] == [
        each for _, asked in separate.generated for each in asked
    ]
    assert_same_parameters(parameters(together), parameters(separate), rtol=1e-4, atol=1e-6)
    for ours, theirs in zip(history(together)[:2], history(separate)[:2], strict=True):
        assert ours.keys() == theirs.keys()
        for name, value in ours.items():
            assert value == pytest.approx(theirs[name], rel=1e-4, abs=1e-5), name


def test_what_is_scored_at_a_time(tiny_model_dir, tmp_path):
    """Columns stay with their prompts; four completions at a time are two micro-batches."""
    seen = []

    def reward(prompts, completions, number, **kwargs):
        seen.append(number)
        assert all(prompt == f"{value} and more" for prompt, value in zip(prompts, number, strict=True))
        return length_reward(completions)

    rows = Dataset.from_list([{"prompt": f"{value} and more", "number": value} for value in range(8)])
    given = {"train_dataset": rows, "reward_funcs": reward}
    whole = run(tiny_model_dir, tmp_path / "whole", trainer_kwargs=dict(given))
    assert [len(each) for each in seen] == [8, 8] and [len(each) for each in whole.scored] == [4, 4]
    seen.clear()
    run(tiny_model_dir, tmp_path / "bounded", generation_batch_size=5, trainer_kwargs=dict(given))
    assert [len(each) for each in seen] == [4] * 4


def test_generation_keeps_to_its_bound(tiny_model_dir, tmp_path, monkeypatch):
    """Through transformers' generation: no batch is larger, and every prompt has its own completions."""
    sizes = []
    forward = trl_ext.OnlineDPOTrainer._sample

    def sample(self, model, rows, reference, count):
        ids = forward(self, model, rows, reference, count)
        sizes.append(len(ids))
        return ids

    monkeypatch.setattr(trl_ext.OnlineDPOTrainer, "_sample", sample)
    trainer = run(tiny_model_dir, tmp_path, cls=trl_ext.OnlineDPOTrainer, num_generations=3)
    assert sizes == [12, 12] and all("completions/mean_length" in entry for entry in history(trainer)[:2])


def test_completions_are_learnt_from_twice(tiny_model_dir, tmp_path):
    trainer = run(
        tiny_model_dir,
        tmp_path,
        num_iterations=2,
        max_steps=-1,
        num_train_epochs=2,
        loss_type="trpa",
        num_generations=4,
    )
    assert trainer.state.global_step == 8 and [step for step, _ in trainer.generated] == [0, 2, 4, 6]
    first, second = (
        set(itertools.chain(*(asked for _, asked in part))) for part in (trainer.generated[:2], trainer.generated[2:])
    )
    assert first == second == set(prompts()["prompt"]) and trainer.generated[0][1] != trainer.generated[2][1]
    kl = [entry["objective/behaviour_kl"] for entry in history(trainer)[:8]]
    assert all(abs(value) < 1e-6 for value in kl[::2]) and all(abs(value) > 1e-3 for value in kl[1::2])
    # What the loss is given is the same policy
    of_loss = [entry["behaviour/kl"] for entry in history(trainer)[:8]]
    assert all(abs(value) < 1e-9 for value in of_loss[::2]) and all(value > 1e-8 for value in of_loss[1::2])


def test_micro_batches_of_later_steps(tiny_model_dir, tmp_path):
    """The policy that sampled is asked at once: when the later ones are learnt from, it is another."""
    asked = []

    class Watched(Counting):
        def learn(self, model, inputs, selections, known=None):
            rows = self._table(inputs, selections).rows
            if not asked:
                self.first = self._scorer.scored(rows, self._log_probs(self.model, [rows])[0].detach(), None, ()).logps
            asked.append((self.state.global_step, known.behaviour_logps))
            return super().learn(model, inputs, selections, known)

    trainer = run(tiny_model_dir, tmp_path, cls=Watched, steps_per_generation=8, loss_type="offset")
    assert [step for step, _ in trainer.generated] == [0] and [step for step, _ in asked] == [0] * 4 + [1] * 4
    torch.testing.assert_close(asked[0][1], trainer.first)
    kl = [entry["objective/behaviour_kl"] for entry in history(trainer)[:2]]
    assert abs(kl[0]) < 1e-5 and abs(kl[1]) > 1e-3
    plain = run(tiny_model_dir, tmp_path / "plain", loss_type="offset")
    assert "objective/behaviour_kl" not in history(plain)[0]


def test_a_reference_that_moves_is_asked_anew(tiny_model_dir, tmp_path):
    moving = {"sync_ref_model": True, "ref_model_sync_steps": 1, "ref_model_mixup_alpha": 1.0, "loss_type": "anchored"}
    trainer = run(tiny_model_dir, tmp_path, num_iterations=2, **moving)
    assert [abs(entry["objective/kl"]) < 1e-4 for entry in history(trainer)[:2]] == [
        True,
        True,
    ]  # it is the policy at each step
    still = run(tiny_model_dir, tmp_path / "still", num_iterations=2, loss_type="anchored")
    assert abs(history(still)[1]["objective/kl"]) > 1e-3


def test_a_reference_that_stands_is_asked_once(tiny_model_dir, tmp_path):
    calls = []

    class Watched(Counting):
        def create_accelerator_and_postprocess(self):
            super().create_accelerator_and_postprocess()
            self.ref_model.register_forward_hook(lambda *args: calls.append(self.state.global_step))

    run(tiny_model_dir, tmp_path, cls=Watched, num_iterations=2, max_steps=4, share_prefix=False)
    assert calls == [0, 2]


@pytest.mark.parametrize("given", [{}, {"steps_per_generation": 1}, {"num_iterations": 2}], ids=str)
def test_a_table_is_made_once(given, tiny_model_dir, tmp_path):
    """For the reference of a block, and for each time that it is learnt from; a resumed run makes it anew."""
    made = []

    class Watched(Scripted):
        def _table(self, inputs, selections):
            made.append(list(inputs["prompt"]))
            return super()._table(inputs, selections)

    given = {"save_strategy": "steps", "save_steps": 1, **given}
    run(tiny_model_dir, tmp_path / "whole", cls=Watched, **given)
    uses = given.get("num_iterations", 1)
    assert len(made) == 8 // uses == len({tuple(each) for each in made})
    if uses == 2:
        first = made.copy()
        made.clear()
        resumed = online(tiny_model_dir, tmp_path / "resumed", cls=Watched, **{**FOUR, **given})
        resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-1"))
        assert made == first


def test_an_epoch_that_is_stopped_leaves_nothing(tiny_model_dir, tmp_path):
    """The next one generates anew, and so does another training of the same trainer."""

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_epoch_stop = True

    trainer = online(
        tiny_model_dir, tmp_path, cls=Counting, **{**FOUR, "num_iterations": 2, "max_steps": -1, "num_train_epochs": 2}
    )
    trainer.add_callback(Stop())
    trainer.train()
    assert [step for step, _ in trainer.generated] == [0, 1]
    trainer.remove_callback(Stop)

    class Fail(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            raise RuntimeError("out of memory")

    trainer.add_callback(Fail())
    with pytest.raises(RuntimeError, match="out of memory"):
        trainer.train()
    trainer.remove_callback(Fail)
    trainer.train()
    assert [step for step, _ in trainer.generated][2:] == [0, 0, 2, 4, 6]


@pytest.mark.parametrize(
    ("given", "steps"),
    [
        ({"num_iterations": 2}, [1]),
        ({"num_iterations": 3, "max_steps": 4, "save_steps": 1}, [2]),
        ({"steps_per_generation": 8, "max_steps": 3}, [1]),
        ({"steps_per_generation": 8, "num_iterations": 2, "max_steps": 4}, [1, 3]),
    ],
    ids=["second use", "third use", "later step", "both, and twice"],
)
def test_a_run_resumed_within_a_block_continues_exactly(given, steps, tiny_model_dir, tmp_path):
    given = {"save_strategy": "steps", "save_steps": 1, "loss_type": "trpa", "num_generations": 4, **given}
    whole = run(tiny_model_dir, tmp_path / "whole", cls=trl_ext.OnlineDPOTrainer, **given)
    folder = tmp_path / "whole"
    for step in steps:
        checkpoint = folder / f"checkpoint-{step}"
        assert (checkpoint / "block_0.json").exists()
        folder = tmp_path / f"resumed at {step}"
        resumed = online(tiny_model_dir, folder, **{**FOUR, **given})
        resumed.train(resume_from_checkpoint=str(checkpoint))
        assert_same_parameters(parameters(resumed), parameters(whole))
        logged = [history(each)[step : whole.state.max_steps] for each in (resumed, whole)]
        assert logged[0] == logged[1] and logged[0]


def test_a_checkpoint_between_blocks_holds_none(tiny_model_dir, tmp_path):
    """Nor what a run before has left in its folder."""
    (tmp_path / "checkpoint-1").mkdir()
    (tmp_path / "checkpoint-1" / "block_0.json").write_text("{}")
    run(tiny_model_dir, tmp_path, save_strategy="steps", save_steps=1)
    assert (tmp_path / "checkpoint-2").exists() and not list(tmp_path.rglob("block_*"))


def test_a_checkpoint_of_other_data_or_processes_is_refused(tiny_model_dir, tmp_path):
    given = {"num_iterations": 2, "save_strategy": "steps", "save_steps": 1}
    run(tiny_model_dir, tmp_path / "whole", **given)
    checkpoint = tmp_path / "whole" / "checkpoint-1"
    other = online(tiny_model_dir, tmp_path / "other", cls=Counting, **{**FOUR, **given, "seed": 5})
    with pytest.raises(ValueError, match="other prompts than those that completions were generated for"):
        other.train(resume_from_checkpoint=str(checkpoint))
    (checkpoint / CONTENTS).unlink()
    state = json.loads((checkpoint / "block_0.json").read_text())
    assert state["processes"] == 1
    fewer = online(tiny_model_dir, tmp_path / "fewer", cls=Counting, **{**FOUR, **given})
    for part, processes, said in (
        ("block_0.json", 2, "holds the completions of 2 processes, and this run has 1"),
        ("block_1.json", 2, "holds the completions of 2 processes, and this run has 1"),
        ("block_1.json", 1, r"holds the completions of 1 processes, of which \['block_0.json'\] are missing"),
    ):
        (checkpoint / "block_0.json").unlink(missing_ok=True)
        (checkpoint / part).write_text(json.dumps({**state, "processes": processes}))
        with pytest.raises(ValueError, match=said):
            fewer.train(resume_from_checkpoint=str(checkpoint))
    assert not hasattr(fewer, "generated")


def test_evaluation_and_single_batches_know_no_blocks(tiny_model_dir, tmp_path):
    trainer = online(
        tiny_model_dir, tmp_path, cls=Counting, trainer_kwargs={"eval_dataset": prompts(6)}, per_device_eval_batch_size=3,
        eval_strategy="steps", eval_steps=1, **{**FOUR, "num_iterations": 2},
    )  # fmt: skip
    trainer.train()
    assert [len(asked) for step, asked in trainer.generated] == [4, 3, 3, 3, 3]
    batch = {"prompt": prompts()["prompt"][:2]}
    assert trainer.compute_loss(trainer.model, batch).isfinite() and set(batch) == {"prompt"}


# Arguments


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"steps_per_generation": 0}, "`steps_per_generation=0` must be a whole number, at least 1"),
        ({"num_iterations": 1.5}, "`num_iterations=1.5` must be a whole number"),
        ({"generation_batch_size": True}, "`generation_batch_size=True` must be a whole number"),
        ({"steps_per_generation": 3, "gradient_accumulation_steps": 2}, "must be a multiple or a divisor of `gradient_accumulation_steps=2`"),
        ({"generation_batch_size": 3, "num_generations": 4}, "must be at least 4: `num_generations=4`"),
    ],
)  # fmt: skip
def test_what_cannot_be(given, said, tmp_path):
    with pytest.raises(ValueError, match=said):
        trl_ext.OnlineDPOConfig(**options(tmp_path, **given))


def test_data_that_cannot_be_repeated(tiny_model_dir, tmp_path):
    with pytest.raises(
        ValueError, match="`num_iterations=2` takes prompts several times, and a stream gives each once"
    ):
        online(
            tiny_model_dir,
            tmp_path,
            num_iterations=2,
            max_steps=2,
            trainer_kwargs={"train_dataset": prompts().to_iterable_dataset()},
        )
    with pytest.raises(ValueError, match="`train_sampling_strategy='group_by_length'` has an order of its own"):
        online(tiny_model_dir, tmp_path, num_iterations=2, train_sampling_strategy="group_by_length")


def test_in_sequence(tiny_model_dir, tmp_path):
    trainer = run(tiny_model_dir, tmp_path, num_iterations=2, max_steps=4, train_sampling_strategy="sequential")
    assert [asked for _, asked in trainer.generated] == [prompts()["prompt"][:4], prompts()["prompt"][4:]]
    assert scripted("a", 0) != scripted("a", 1)
