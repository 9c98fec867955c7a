"""Datasets of groups: whole groups for losses that take them, pairs for the others."""

import math

import pytest
import torch
from datasets import Dataset

import trl_ext
from tests.conftest import preference_rows
from tests.helpers import assert_same_parameters, build, first_batch, history, loss_and_gradients, parameters
from trl_ext.data.groups import from_groups
from trl_ext.losses import GroupBatch


def groups(sizes=(3, 4, 2, 5), tie=None):
    pool = [row[side] for row in preference_rows(40) for side in ("chosen", "rejected")]
    rows = []
    for i, size in enumerate(sizes):
        scores = [float((7 * k + i) % size) for k in range(size)]
        rows.append(
            {
                "prompt": preference_rows(8)[i % 8]["prompt"],
                "completions": [pool.pop() for _ in range(size)],
                "scores": [1.0] * size if i == tie else scores,
            }
        )
    return Dataset.from_list(rows)


def trainer(model_dir, tmp_path, dataset=None, **kwargs):
    return build(trl_ext.DPOTrainer, trl_ext.DPOConfig, model_dir, tmp_path, dataset=dataset or groups(), **kwargs)


def test_rows():
    data = groups((3, 3))
    pairs = from_groups(data, "all", "train")
    assert len(pairs) == 6 and all(row["score_chosen"] > row["score_rejected"] for row in pairs)
    best = from_groups(data, "best_worst", "train")[0]
    scores, completions = data[0]["scores"], data[0]["completions"]
    assert best["chosen"] == completions[scores.index(max(scores))]
    assert best["rejected"] == completions[scores.index(min(scores))]
    whole = from_groups(data, "group", "train")[0]
    (others,) = whole["other_completions"]
    assert others["chosen"] == others["rejected"]  # one alone stands twice
    assert sorted([whole["chosen"], whole["rejected"], others["chosen"]]) == sorted(completions)


@pytest.mark.parametrize(
    "completion", [str, lambda text: [{"role": "assistant", "content": text}]], ids=["text", "messages"]
)
def test_a_thousand_groups_of_two_before_the_first_of_three(completion):
    """What the writer has seen of the others by then is nothing."""
    words = [completion(text) for text in (" a", " b", " c")]
    two = {"prompt": "p", "completions": words[:2], "scores": [1.0, 0.0], "behaviour_logps": [-1.0, -2.0]}
    three = {"prompt": "q", "completions": words, "scores": [1.0, 0.0, 0.5], "behaviour_logps": [-1.0, -2.0, -3.0]}
    whole = from_groups(Dataset.from_list([two] * 1001 + [three]), "group", "train")
    assert whole[0]["other_completions"] == [] and whole[0]["group_scores"] == [1.0, 0.0]
    last = whole[1001]
    assert last["other_completions"] == [{"chosen": words[2], "rejected": words[2]}]
    assert last["group_scores"] == [1.0, 0.0, 0.5] and last["behaviour_logps"] == [-1.0, -2.0, -3.0]
    assert (last["prompt"], last["chosen"], last["rejected"]) == ("q", words[0], words[1])


def test_streams_become_pairs():
    stream = groups((3, 3)).to_iterable_dataset()
    assert list(from_groups(stream, "all", "train")) == from_groups(groups((3, 3)), "all", "train").to_list()
    with pytest.raises(ValueError, match="need a map-style dataset"):
        from_groups(stream, "group", "train")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"completions": ["a"], "scores": [1.0]}, "has 1 completions; a group needs at least 2"),
        ({"completions": ["a", "b"], "scores": [1.0]}, "2 completions and 1 scores"),
        ({"completions": ["a", "b"], "scores": [1.0, math.nan]}, "expected finite numbers"),
        ({"completions": ["a", "b"], "scores": ["1", "2"]}, "has the score '1'"),
        ({"completions": ["a", "b"], "scores": [None, 1.0]}, "has the score None"),
        ({"completions": "ab", "scores": [1.0, 2.0]}, "must be lists"),
    ],
)
def test_refused_rows(row, message):
    with pytest.raises(ValueError, match=message):
        from_groups(Dataset.from_list([{"prompt": "p", **row}]), "best_worst", "train")


def test_groups_beside_pairs_are_refused():
    data = groups((3, 3))
    for name in ("chosen", "rejected", "score_chosen", "score_rejected"):
        both = data.add_column(name, [1.0, 2.0])
        for given in (both, both.to_iterable_dataset()):
            with pytest.raises(ValueError, match=rf"train dataset has groups .* the columns \['{name}'\].*Remove one"):
                from_groups(given, "best_worst", "train")


def test_ties_are_left_out_and_counted(caplog):
    with caplog.at_level("WARNING"):
        assert len(from_groups(groups(tie=1), "best_worst", "train")) == 3
    assert "1 of 4 groups" in caplog.text
    with pytest.raises(ValueError, match="nothing to prefer"):
        from_groups(groups((3,), tie=0), "best_worst", "train")


@pytest.mark.parametrize("pairing", ["best_worst", "all"])
def test_pair_losses_train_on_pairs(pairing, tiny_model_dir, tmp_path):
    ours = trainer(tiny_model_dir, tmp_path, loss_type="offset", pairing=pairing)
    plain = trainer(tiny_model_dir, tmp_path, dataset=from_groups(groups(), pairing, "train"), loss_type="offset")
    for each in (ours, plain):
        each.train()
    assert_same_parameters(parameters(ours), parameters(plain))


@pytest.mark.parametrize("backend", ["auto", "trl"])
@pytest.mark.parametrize("precompute", [False, True])
def test_whole_groups_by_hand(backend, precompute, tiny_model_dir, tmp_path):
    ours = trainer(
        tiny_model_dir,
        tmp_path,
        loss_type="anchored",
        logprob_backend=backend,
        precompute_ref_log_probs=precompute,
        beta=0.3,
    )
    reference = build(trl_ext.DPOTrainer, trl_ext.DPOConfig, tiny_model_dir, tmp_path).model.eval()
    with torch.no_grad():
        for parameter in ours.model.parameters():
            parameter.mul_(1.05)
    batch = first_batch(ours)
    loss, _ = loss_and_gradients(ours, batch)
    tokenizer = ours.processing_class
    expected = []
    order = {row["prompt"]: row for row in groups()}
    prompts = [tokenizer.decode(ids[mask.bool() & ~completion.bool()]) for ids, mask, completion in zip(
        batch["input_ids"][:4], batch["attention_mask"][:4], batch["completion_mask"][:4], strict=True)]  # fmt: skip
    for prompt in prompts:
        row = order[prompt]
        sums = []
        for completion in row["completions"]:
            start = tokenizer(prompt)["input_ids"]
            ids = torch.tensor([tokenizer(prompt + completion + tokenizer.eos_token)["input_ids"]])
            sums.append(
                [
                    model(input_ids=ids).logits[0, len(start) - 1 : -1].log_softmax(-1)
                    .gather(1, ids[0, len(start) :, None]).sum()
                    for model in (ours.model, reference)
                ]
            )  # fmt: skip
        logps, ref = torch.tensor(sums).unbind(1)
        batch_of_one = GroupBatch(
            logps[None],
            ref[None],
            logps[None],
            torch.tensor([row["scores"]]),
            torch.ones(1, len(logps)).bool(),
            beta=0.3,
        )
        expected.append(trl_ext.get_loss("anchored")(batch_of_one))
    torch.testing.assert_close(loss, torch.cat(expected).mean(), rtol=1e-4, atol=1e-4)


def test_pairs_and_groups_in_one_run(tiny_model_dir, tmp_path):
    ours = trainer(tiny_model_dir, tmp_path, loss_type=["anchored", "offset", "sigmoid"])
    ours.train()
    ours.evaluate()
    entry = history(ours)[0]
    assert {"loss/anchored", "offset/mean", "rewards/accuracies"} <= set(entry)
    assert any("eval_loss/anchored" in entry for entry in history(ours))


def test_only_pairs_of_two(tiny_model_dir, tmp_path):
    ours = trainer(tiny_model_dir, tmp_path, dataset=groups((2, 2, 2, 2)), loss_type="anchored")
    loss, _ = loss_and_gradients(ours, first_batch(ours))
    pairs = from_groups(groups((2, 2, 2, 2)), "best_worst", "train")
    plain = trainer(tiny_model_dir, tmp_path, dataset=pairs, loss_type="anchored")
    torch.testing.assert_close(loss, loss_and_gradients(plain, first_batch(plain))[0])


def test_options_that_groups_exclude(tiny_model_dir, tmp_path):
    with pytest.raises(ValueError, match="defined on pairs"):
        trainer(tiny_model_dir, tmp_path, loss_type="anchored", ld_alpha=0.5)
    with pytest.raises(ValueError, match="take pairs only"):
        trl_ext.DPOConfig(output_dir="out", use_cpu=True, bf16=False, loss_type="offset", pairing="group")
