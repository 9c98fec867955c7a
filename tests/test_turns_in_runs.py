"""Runs on conversations whose turns are scored: losses, masks and metrics against each trajectory alone, from spans made by hand."""

import contextlib
import copy
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from accelerate.logging import MultiProcessAdapter
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

import trl_ext
from tests.conversations import assistant, by_hand, rows, user
from tests.helpers import (
    assert_same_parameters,
    build,
    first_batch,
    history,
    loss_and_gradients,
    masked_rows,
    parameters,
)
from tests.online.runs import Scripted, batch, online
from tests.plain import assert_equals_plain, token_logps
from tests.stateful import keep_registry
from trl_ext.losses.base import Loss
from trl_ext.trainers.prepare import PreferenceData


SIDES = ("chosen", "rejected")
GAMMA, BETA = 0.5, 0.3
# phi by hand at gamma 1/2
PHI = {1: [1.0], 2: [1.0, 1 / 3], 3: [1.0, 3 / 7, 1 / 7]}
SEEN: list = []


@pytest.fixture(autouse=True)
def spying(monkeypatch):
    """`spy` keeps the batches it is given; `of_policy` reads tokens of the policy alone."""
    keep_registry(monkeypatch)
    SEEN.clear()

    @trl_ext.register_loss("spy")
    @dataclass(frozen=True)
    class Spy(Loss):
        reads: ClassVar[frozenset[str]] = frozenset({"ref_logps", "token_logps"})

        def __call__(self, batch):
            SEEN.append(batch)
            return 0 * batch.delta

    @trl_ext.register_loss("of_policy")
    @dataclass(frozen=True)
    class OfPolicy(Loss):
        reads: ClassVar[frozenset[str]] = frozenset({"token_logps"})

        def __call__(self, batch):
            return 0 * batch.chosen_logps

    @trl_ext.register_loss("grouped")
    @dataclass(frozen=True)
    class Grouped(Loss):
        takes_groups: ClassVar[bool] = True

        def __call__(self, batch):
            SEEN.append(batch)
            return 0 * batch.logps.sum(1)


@pytest.fixture
def reference(tiny_model_dir):
    """One that differs from the policy."""
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return model


def trainer(model_dir, tmp_path, loss_type="dmpo", dataset=None, trainer_kwargs=None, **options):
    defaults = {"train_sampling_strategy": "sequential", "beta": BETA, "share_prefix": False}
    if loss_type == "dmpo":
        defaults["loss_kwargs"] = {"gamma": GAMMA}
    dataset = Dataset.from_list(rows()) if dataset is None else dataset
    return build(
        trl_ext.DPOTrainer, trl_ext.DPOConfig, model_dir, tmp_path, loss_type=loss_type, dataset=dataset,
        trainer_kwargs=trainer_kwargs, **{**defaults, **options},
    )  # fmt: skip


def scored(policy, reference, tokenizer, example):
    """Log-ratios of the tokens of both completions, each in a list by turns, what no assistant says left out."""
    turns = {}
    for side in SIDES:
        prompt, ids, numbers = by_hand(tokenizer, example["prompt"], example[side])
        with torch.no_grad():
            ref_logps = token_logps(reference, prompt, ids)
        logratios = token_logps(policy, prompt, ids) - ref_logps
        turns[side] = [
            [logratios[place] for place, number in enumerate(numbers) if number == turn]
            for turn in range(max(numbers) + 1)
        ]
    return turns


LAYOUTS = [
    {},
    {"share_prefix": True},
    {"share_prefix": True, "masked": True},
    {"logprob_backend": "trl"},
    {"gradient_checkpointing": False, "dataset_num_proc": 2},
]


@pytest.mark.parametrize("options", LAYOUTS, ids=str)
def test_loss_and_gradients_equal_the_plain_way(options, tiny_model_dir, tmp_path, reference):
    masked = options.get("masked")
    options = {name: value for name, value in options.items() if name != "masked"}
    with masked_rows() if masked else contextlib.nullcontext():
        ours = trainer(tiny_model_dir, tmp_path, trainer_kwargs={"ref_model": reference}, **options)
    if options.get("share_prefix"):
        assert ours._scorer.sharing.unpadded != bool(masked)
    inputs = first_batch(ours)
    loss, gradients = loss_and_gradients(ours, inputs)
    policy = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float64)
    theirs, tokenizer = copy.deepcopy(reference).double(), ours.processing_class
    values, counts = [], {side: [] for side in SIDES}
    for example in rows():
        turns = scored(policy, theirs, tokenizer, example)
        sums = {
            side: sum(phi * sum(tokens) for phi, tokens in zip(PHI[len(of)], of, strict=True)) for side, of in turns.items()
        }  # fmt: skip
        values.append(-F.logsigmoid(BETA * (sums["chosen"] - sums["rejected"])))
        for side in SIDES:
            counts[side].append(sum(map(len, turns[side])))
    assert_equals_plain(loss, gradients, torch.stack(values).mean(), policy)
    # What is logged counts the assistant's tokens alone
    assert inputs["completion_mask"].sum(1).tolist() == [*counts["chosen"], *counts["rejected"]]
    logged = ours._means["train"].over_processes()
    assert [logged[name] for name in ("turns/chosen", "turns/rejected")] == [6 / 4, 8 / 4]
    assert [logged[f"lengths/{side}"] for side in SIDES] == [sum(counts[side]) / 4 for side in SIDES]


def test_mixed_with_trls_loss(tiny_model_dir, tmp_path, reference):
    """TRL's is given the same tokens, and so are its metrics."""
    ours = trainer(
        tiny_model_dir, tmp_path, ["sigmoid", "dmpo"], trainer_kwargs={"ref_model": reference}, loss_weights=[1.0, 0.0], max_steps=1
    )  # fmt: skip
    loss, _ = loss_and_gradients(ours, first_batch(ours))
    policy = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float64)
    theirs, values = copy.deepcopy(reference).double(), []
    with torch.no_grad():
        for example in rows():
            turns = scored(policy, theirs, ours.processing_class, example)
            sums = [sum(sum(tokens) for tokens in turns[side]) for side in SIDES]
            values.append(sums[0] - sums[1])
    deltas = torch.stack(values)
    assert loss.item() == pytest.approx(-F.logsigmoid(BETA * deltas).mean().item(), rel=1e-5)
    ours.train()
    assert history(ours)[0]["rewards/margins"] == pytest.approx(BETA * deltas.mean().item(), rel=1e-4)


def singles(count=8):
    words = [" good", " bad film", " slow sad film", " very long sad film"]
    return [
        {"prompt": [user(f"what {number}")], "chosen": [assistant(words[number % 4])], "rejected": [assistant(words[(number + 1) % 4])]}
        for number in range(count)
    ]  # fmt: skip


@pytest.mark.parametrize("backend", ["auto", "trl"])
def test_one_turn_is_a_run_of_sigmoid(backend, tiny_model_dir, tmp_path):
    """To the last bit: all that follows the prompt is scored, the line break behind the end-of-turn token included."""
    runs = [
        trainer(tiny_model_dir, tmp_path / name, name, Dataset.from_list(singles()), logprob_backend=backend)
        for name in ("dmpo", "sigmoid")
    ]
    for run in runs:
        run.train()
        run.evaluate()
    assert_same_parameters(*map(parameters, runs))
    for ours, trls in zip(*map(history, runs), strict=True):
        assert ours.items() >= trls.items()
    assert runs[0].train_dataset[0]["chosen_turns"] == [0] * len(runs[1].train_dataset[0]["chosen_ids"])
    assert "chosen_turns" not in runs[1].train_dataset.column_names


def test_one_turn_is_remarked_upon(tiny_model_dir, tmp_path, caplog):
    def said(dataset, **options):
        caplog.clear()
        trainer(tiny_model_dir, tmp_path, dataset=dataset, **options)
        return sum("one assistant turn: `dmpo` is then DPO" in record.message for record in caplog.records)

    ids = [{"prompt_ids": [7], "chosen_ids": [8, 9], "rejected_ids": [9]}]
    given = [{**ids[0], "chosen_turns": [0, 1], "rejected_turns": [0]}]
    text = [{"prompt": "what", "chosen": " good", "rejected": " bad"}]
    for data, times in ((singles(), 1), (text, 1), (ids, 1), (rows(), 0), (given, 0)):
        assert said(Dataset.from_list(data)) == times
    assert said(Dataset.from_list(singles()).to_iterable_dataset(), max_steps=1) == 0  # it would have to be read
    assert said(Dataset.from_list(singles()), loss_type="sigmoid") == 0


@pytest.mark.parametrize(
    "options", [{"gradient_accumulation_steps": 4, "per_device_train_batch_size": 1}, {}], ids=str
)
def test_accumulated_streamed_and_resumed(options, tiny_model_dir, tmp_path):
    """Eight micro-batches of one pair are one of eight; a stream is its dataset; a resumed run is the whole one."""
    data = Dataset.from_list(rows() * 2)
    kwargs = {"per_device_train_batch_size": 4, "max_steps": 4, "dataset": data, "max_grad_norm": 0.0}
    whole = trainer(tiny_model_dir, tmp_path / "run", save_strategy="steps", save_steps=2, **kwargs)
    whole.train()
    if options:
        others = [trainer(tiny_model_dir, tmp_path, **{**kwargs, **options})]
    else:
        stream = trainer(tiny_model_dir, tmp_path, **{**kwargs, "dataset": data.to_iterable_dataset()})
        others = [stream, trainer(tiny_model_dir, tmp_path / "again", **kwargs)]
    for number, other in enumerate(others):
        other.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2") if number else None)
        assert_same_parameters(
            parameters(whole), parameters(other), **({"rtol": 1e-3, "atol": 1e-4} if options else {})
        )


def test_evaluation_of_several_datasets(tiny_model_dir, tmp_path, reference):
    """Each as in training, one that was prepared before included; of its own turns."""
    data = Dataset.from_list(rows())
    ours = trainer(
        tiny_model_dir, tmp_path, dataset=data,
        trainer_kwargs={"ref_model": reference, "eval_dataset": {"all": data, "one": data.select([3])}},
    )  # fmt: skip
    metrics = ours.evaluate()
    assert (metrics["eval_all_turns/chosen"], metrics["eval_one_turns/chosen"]) == (1.5, 1.0)
    expected, _ = loss_and_gradients(ours, first_batch(ours))
    assert metrics["eval_all_loss"] == pytest.approx(expected.item(), rel=1e-5)
    for given in (ours.eval_dataset["all"], data, data.to_iterable_dataset()):
        again = ours.evaluate(given)
        assert again["eval_loss"] == pytest.approx(expected.item(), rel=1e-5) and again["eval_turns/rejected"] == 2.0


def test_conversations_without_a_prompt(tiny_model_dir, tmp_path):
    """Turns that both share at the beginning are the prompt."""
    shared = [user("what"), assistant("this"), user("why")]
    pair = {
        "chosen": [*shared, assistant("good"), user("so"), assistant("end")],
        "rejected": [*shared, assistant("bad")],
    }
    ours = trainer(tiny_model_dir, tmp_path, dataset=Dataset.from_list([pair] * 4))
    prompt, ids, turns = by_hand(ours.processing_class, shared, pair["chosen"][3:])
    row = ours.train_dataset[0]
    assert (row["prompt_ids"], row["chosen_ids"], row["chosen_turns"]) == (prompt, ids, turns)
    assert set(row["rejected_turns"]) == {0} and len(row["rejected_turns"]) == len(row["rejected_ids"])


def test_the_collator_cuts_turns_with_their_tokens(tiny_model_dir, tmp_path):
    for mode in ("keep_start", "keep_end"):
        for length in (22, 30, 40):
            ours = trainer(tiny_model_dir, tmp_path, "spy", max_length=length, truncation_mode=mode)
            SEEN.clear()
            ours.compute_loss(ours.model, first_batch(ours))
            (seen,) = SEEN
            row = 0
            for example in rows():
                for side in SIDES:
                    prompt, _, turns = by_hand(ours.processing_class, example["prompt"], example[side])
                    if mode == "keep_start" and len(prompt) >= length:
                        continue  # dropped, as TRL does
                    whole = [-1] * len(prompt) + turns
                    kept = whole[:length] if mode == "keep_start" else whole[-length:]
                    left = [turn for turn in kept[1:] if turn >= 0]  # a row's first token is never scored
                    left = [turn - min(left) for turn in left]
                    got = getattr(seen.tokens, f"{side}_turns")[row]
                    assert got[got >= 0].tolist() == left, (mode, length, row, side)
                    assert getattr(seen, f"{side}_lengths")[row] == len(left)
                row += mode == "keep_end" or len(prompt) < length
            assert row == len(seen.chosen_logps)


def test_another_template_is_tokenized_anew(tiny_model_dir, tmp_path):
    """What lies in the cache of datasets belongs to the template that it was made with."""
    path = tmp_path / "data.jsonl"
    Dataset.from_list(rows()).to_json(path)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    turns = []
    for end in ("<|im_end|>\n", "<|im_end|>", "<|im_end|>\n"):
        tokenizer.chat_template = tokenizer.chat_template.replace("<|im_end|>\n", "<|im_end|>").replace(
            "<|im_end|>", end
        )
        ours = trl_ext.DPOTrainer(
            model=AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32),
            args=trl_ext.DPOConfig(output_dir=str(tmp_path), loss_type="dmpo", report_to="none", use_cpu=True, bf16=False),
            processing_class=tokenizer,
            train_dataset=Dataset.from_json(str(path), cache_dir=str(tmp_path / "cache")),
        )  # fmt: skip
        row = ours.train_dataset[0]
        assert len(row["chosen_turns"]) == len(row["chosen_ids"])
        turns.append([row["chosen_turns"].count(turn) for turn in (0, 1)])
    assert turns[0] == turns[2] == [count + 1 for count in turns[1]]


def test_groups_of_trajectories(tiny_model_dir, tmp_path):
    """Those beside the best and the worst too: of all of them the assistant's tokens are scored."""
    several = [side for row in rows()[:3] for side in (row["chosen"], row["rejected"])]
    data = [
        {"prompt": [user("what")], "completions": several[:3], "scores": [2.0, 1.0, 3.0]},
        {"prompt": [user("how")], "completions": several[2:], "scores": [1.0, 4.0, 2.0, 3.0]},
        {"prompt": [user("so")], "completions": several[:2], "scores": [1.0, 0.0]},
    ]
    ours = trainer(tiny_model_dir, tmp_path, ["spy", "grouped"], Dataset.from_list(data))
    ours.compute_loss(ours.model, first_batch(ours))
    pairs, groups = SEEN
    assert groups.mask.sum(1).tolist() == [3, 4, 2]
    for number, row in enumerate(data):
        ranked = sorted(range(len(row["scores"])), key=lambda place: -row["scores"][place])
        order = [
            ranked[0],
            ranked[-1],
            *(place for place in range(len(ranked)) if place not in (ranked[0], ranked[-1])),
        ]
        counts = []
        for place in order:
            _, _, turns = by_hand(ours.processing_class, row["prompt"], row["completions"][place])
            counts.append(sum(turn >= 0 for turn in turns))
        assert groups.lengths[number, : len(order)].tolist() == counts
        assert [pairs.chosen_lengths[number], pairs.rejected_lengths[number]] == counts[:2]
    best, worst = ours.train_dataset[1]["chosen_turns"], pairs.tokens.chosen_turns[1]
    assert worst[worst >= 0].tolist() == [turn for turn in best if turn >= 0]
    ours.train()


def test_beside_pairs_with_an_empty_trace(tiny_model_dir, tmp_path):
    """Those are one turn; of a row without a traced pair nothing is scored."""
    data = [
        {**row, "chosen_empty_trace": row["chosen"][:1], "rejected_empty_trace": row["rejected"][:1]} for row in rows()
    ]
    data[1] |= {"chosen": None, "rejected": None}
    data[2] |= {"chosen_empty_trace": None, "rejected_empty_trace": None}
    ours = trainer(tiny_model_dir, tmp_path, ["spy", "bias_variance"], Dataset.from_list(data))
    ours.compute_loss(ours.model, first_batch(ours))
    (seen,) = SEEN
    assert (seen.tokens.chosen_turns.amax(1) + 1).tolist() == [2, 0, 2, 1]
    assert (seen.tokens.rejected_turns.amax(1) + 1).tolist() == [3, 0, 2, 1]
    assert (seen.empty_trace.tokens.rejected_turns.amax(1) + 1).tolist() == [1, 1, 0, 1]
    assert seen.chosen_lengths[1] == 0 and seen.empty_trace.chosen_lengths[2] == 0


def test_token_ids_with_turns(tiny_model_dir, tmp_path):
    """As the dataset that is made of messages, with the turns or without them."""
    made = trainer(tiny_model_dir, tmp_path).train_dataset
    names = ["prompt_ids", "chosen_ids", "rejected_ids"]
    runs = [
        trainer(tiny_model_dir, tmp_path, dataset=data)
        for data in (made, made.select_columns([*names, "chosen_turns", "rejected_turns"]), made.select_columns(names))
    ]
    losses = [loss_and_gradients(run, first_batch(run))[0].item() for run in runs]
    masks = [first_batch(run)["completion_mask"].sum().item() for run in runs]
    assert losses[0] == losses[1] and masks[0] == masks[1] < masks[2]
    wrong = made.select_columns([*names, "chosen_turns"])
    with pytest.raises(ValueError, match="Row 0 of the train dataset has no list in 'rejected_turns'"):
        trainer(tiny_model_dir, tmp_path, dataset=wrong)
    # No loss reads them
    plain = trainer(tiny_model_dir, tmp_path, "sigmoid", made, remove_unused_columns=False)
    assert first_batch(plain)["completion_mask"].sum() == masks[2]


def test_several_messages_beside_images_are_refused(tiny_model_dir, tmp_path):
    """They are tokenized while training, by a processor."""
    data = Dataset.from_list([{**row, "images": ["none"]} for row in (rows()[3], rows()[0])])
    given = PreferenceData(["dmpo"], {"dmpo": trl_ext.get_loss("dmpo")}, None)
    for each in (data, data.to_iterable_dataset()):
        for split in ("train", "held_out"):
            message = rf"Row 1 of the {split} dataset: 'chosen' has several messages beside images"
            with pytest.raises(ValueError, match=message):
                list(given.training(each) if split == "train" else given.evaluation({split: each})[split])


def test_what_would_be_scored_whole_is_refused(tiny_model_dir, tmp_path):
    """Precomputed references of a loss beside one that reads tokens of the policy alone."""
    kwargs = {"precompute_ref_log_probs": True}
    with pytest.raises(
        ValueError, match=r"of the train dataset the assistant's turns alone are scored.*Set `precompute_r"
    ):
        trainer(tiny_model_dir, tmp_path, ["of_policy", "sigmoid"], **kwargs)
    trainer(tiny_model_dir, tmp_path, ["of_policy", "sigmoid"], Dataset.from_list(singles()), **kwargs)


def test_online_it_is_dpo(tiny_model_dir, tmp_path, caplog):
    """Completions that are sampled are one turn each; it is said once."""
    MultiProcessAdapter.warning_once.cache_clear()
    runs = [online(tiny_model_dir, tmp_path, cls=Scripted, loss_type=name) for name in ("dmpo", "dmpo", "sigmoid")]
    assert sum("one assistant turn: `dmpo` is then DPO" in record.message for record in caplog.records) == 1
    inputs = batch(runs[0])
    results = []
    for run in runs[1:]:
        run.train()
        results.append(parameters(run))
    assert inputs and history(runs[1])[0]["turns/chosen"] == 1.0
    assert_same_parameters(*results)
