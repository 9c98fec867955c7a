"""Losses on whole groups alone, offline: groups with a column of log-probs under the policy that sampled."""

import functools
import math

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset, load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

import trl_ext
from tests.conftest import build_tokenizer, preference_rows
from tests.helpers import assert_same_parameters, build, first_batch, history, loss_and_gradients, options, parameters
from trl_ext.data.inspection import inspect_preferences


LOSSES = ["trpa", "drpo"]
BETA = 0.3
COLUMN = "behaviour_logps"


def groups(sizes=(3, 4, 2, 5), behaviour=True):
    """Levels 2 and 1 are right, 0 is wrong; the worst comes first, so that nothing stands in the batch where it stood here."""
    pool = [row[side] for row in preference_rows(40) for side in ("chosen", "rejected")]
    rows = []
    for i, size in enumerate(sizes):
        row = {
            "prompt": preference_rows(8)[i % 8]["prompt"],
            "completions": [pool.pop() for _ in range(size)],
            "scores": [float((k + (k > 2)) % 3) for k in range(size)],
        }
        rows.append(row | ({COLUMN: [-30.0 - 12 * i - 7 * k for k in range(size)]} if behaviour else {}))
    return Dataset.from_list(rows)


def trainer(model_dir, folder, loss_type, dataset=None, **overrides):
    dataset = groups() if dataset is None else dataset
    return build(
        trl_ext.DPOTrainer, trl_ext.DPOConfig, model_dir, folder, dataset=dataset, loss_type=loss_type, beta=BETA, **overrides
    )  # fmt: skip


def trpa(scores, logps, refs, old, lengths):
    ratios = [(logp - ref) / n for logp, ref, n in zip(logps, refs, lengths, strict=True)]
    pairs = [(i, j) for i in range(len(scores)) for j in range(len(scores)) if scores[i] > scores[j]]
    terms = [-F.logsigmoid((2.5 if scores[i] >= 1 else 1) * BETA * (ratios[i] - ratios[j])) for i, j in pairs]
    estimates = [(b - a) / n for a, b, n in zip(logps, old, lengths, strict=True)]
    kl = sum(n * (k.exp() - k - 1).clamp(max=10) for k, n in zip(estimates, lengths, strict=True)) / sum(lengths)
    return sum(terms) / len(terms) + 0.5 * kl


def drpo(scores, logps, refs, old, lengths):
    averages = [logp / n for logp, n in zip(logps, lengths, strict=True)]
    right = [k for k, score in enumerate(scores) if score >= 1]
    rewards = torch.tensor([(1 - lengths[k] / 12) / 0.1 for k in right], dtype=torch.float64).softmax(0)
    powers = sum((averages[k] / 10).exp() for k in range(len(scores)) if k not in right)
    kl = (sum(old) - sum(logps)) / sum(lengths)
    excess = max(0.5 * (kl.item() - 0.1), 0.0)
    ratio = powers / powers.detach()
    return -sum(w * (averages[k] - 10 * ratio) for w, k in zip(rewards, right, strict=True)) + excess * kl


OF = {
    "trpa": (trpa, {"kl_weight": 0.5}),
    "drpo": (drpo, {"max_length": 12, "kl_weight": 0.5, "delta": 0.1}),
}


@pytest.mark.parametrize("name", LOSSES)
def test_values_and_gradients(name, tiny_model_dir, tmp_path):
    """In float64 and without padding, of each completion by itself."""
    formula, kwargs = OF[name]
    ours = trainer(tiny_model_dir, tmp_path, name, loss_kwargs=kwargs)
    assert (ours.ref_model is None) == (name == "drpo")
    with torch.no_grad():
        for parameter in ours.model.parameters():
            parameter.mul_(1.05)
    loss, gradients = loss_and_gradients(ours, first_batch(ours))

    policy, reference = (AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float64) for _ in range(2))
    with torch.no_grad():
        for parameter, source in zip(policy.parameters(), ours.model.parameters(), strict=True):
            parameter.copy_(source)
    tokenizer = ours.processing_class
    total, kls = 0.0, []
    for row in groups():
        prompt = tokenizer(row["prompt"])["input_ids"]
        sums, lengths = [], []
        for text in row["completions"]:
            ids = torch.tensor([tokenizer(row["prompt"] + text + tokenizer.eos_token)["input_ids"]])
            answer = ids[0, len(prompt) :, None]
            lengths.append(len(answer))
            sums.append(
                [
                    m(input_ids=ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1).gather(1, answer).sum()
                    for m in (policy, reference)
                ]
            )
        logps, refs = zip(*sums, strict=True)
        total = total + formula(row["scores"], logps, [ref.detach() for ref in refs], row[COLUMN], lengths) / 4
        kls.append((sum(row[COLUMN]) - sum(logps).item()) / sum(lengths))
    assert min(kls) < 0.1 < max(kls), "the trust region is left by all, or by none"
    total.backward()
    torch.testing.assert_close(loss.double(), total.detach(), rtol=1e-5, atol=1e-6)
    for key, value in policy.named_parameters():
        scale = value.grad.abs().max() + 1e-9
        torch.testing.assert_close(gradients[key].double() / scale, value.grad / scale, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", LOSSES)
def test_trained_evaluated_and_resumed(name, tiny_model_dir, tmp_path):
    run = {
        "loss_kwargs": OF[name][1],
        "max_steps": 4,
        "save_strategy": "steps",
        "save_steps": 2,
        "learning_rate": 1e-2,
    }
    whole = trainer(tiny_model_dir, tmp_path / "whole", name, **run)
    whole.train()
    entry, found = history(whole)[0], whole.evaluate()
    # In each group all but the first
    assert entry["right/share"] == pytest.approx((2 / 3 + 3 / 4 + 1 / 2 + 4 / 5) / 4)
    assert found["eval_right/share"] == entry["right/share"] and "eval_behaviour/kl" in found
    assert ("logratios/chosen" in entry) == (name == "trpa")
    again = trainer(tiny_model_dir, tmp_path / "again", name, **run)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert_same_parameters(parameters(again), parameters(whole))


@pytest.mark.parametrize("name", LOSSES)
def test_eight_micro_batches_of_one_are_one_of_eight(name, tiny_model_dir, tmp_path):
    runs = []
    for size in (1, 8):
        trained = trainer(
            tiny_model_dir, tmp_path / str(size), name, groups((3, 4, 2, 5, 2, 3, 4, 2)), loss_kwargs=OF[name][1], max_steps=2,
            per_device_train_batch_size=size, gradient_accumulation_steps=8 // size, optim="sgd", learning_rate=0.1,
            max_grad_norm=0.0,
        )  # fmt: skip
        trained.train()
        runs.append(trained)
    first, second = (history(each)[1] for each in runs)
    for key in ("loss", "behaviour/kl"):
        assert first[key] == pytest.approx(second[key], rel=1e-4), key
    assert_same_parameters(parameters(runs[0]), parameters(runs[1]), rtol=1e-4, atol=1e-6)


def test_others_are_given_best_and_worst(tiny_model_dir, tmp_path):
    """Beside a loss on whole groups those on pairs learn from each group's best and worst, as they do alone."""
    names, weights = ["trpa", "drpo", "anchored", "offset", "sigmoid"], [1.0, 0.5, 2.0, 0.25, 3.0]
    mixed = trainer(tiny_model_dir, tmp_path, names, loss_weights=weights, train_sampling_strategy="sequential")
    loss, _ = loss_and_gradients(mixed, first_batch(mixed))
    parts = []
    for name in names:
        alone = trainer(tiny_model_dir, tmp_path, name, train_sampling_strategy="sequential")
        parts.append(loss_and_gradients(alone, first_batch(alone))[0].item())
    assert loss.item() == pytest.approx(sum(w * part for w, part in zip(weights, parts, strict=True)), rel=1e-5)


@pytest.mark.parametrize("name", LOSSES)
def test_pairs_are_refused_before_the_model_loads(name, tmp_path):
    def refused(message, dataset, **overrides):
        with pytest.raises(ValueError, match=message):
            trl_ext.DPOTrainer(
                model="no-such-model",
                args=trl_ext.DPOConfig(**options(tmp_path, loss_type=name, **overrides)),
                train_dataset=dataset,
            )

    pairs = Dataset.from_list(preference_rows(4))
    alone = rf"'{name}' learns from whole groups of completions alone, and it was given pairs. Set `pairing=\"group\"`; offline"
    columns = "`prompt`, `completions`, `scores`, `behaviour_logps`"
    refused(f"{alone}.*{columns}", pairs)
    refused(alone, pairs, pairing="group")
    for pairing in ("best_worst", "all"):
        refused(
            rf"`pairing='{pairing}'` makes pairs, and \['{name}'\] learn from whole groups alone",
            groups(),
            pairing=pairing,
        )
    refused(f"'{name}' reads log-probs under the policy that sampled.*'behaviour_logps'", groups(behaviour=False))
    refused("need a map-style dataset", groups().to_iterable_dataset())


@pytest.mark.parametrize("name", LOSSES)
def test_groups_are_scored_where_they_have_no_scores(name, tiny_model_dir, tmp_path):
    def vowels(completions, **kwargs):
        return [float(text.count("a") % 3) for text in completions]

    given = groups().remove_columns("scores")
    scored = given.add_column("scores", [vowels(completions) for completions in given["completions"]])
    values = [
        loss_and_gradients(each, first_batch(each))[0]
        for each in (
            trainer(tiny_model_dir, tmp_path, name, given, trainer_kwargs={"reward_funcs": vowels}),
            trainer(tiny_model_dir, tmp_path, name, scored),
        )
    ]
    assert torch.equal(*values)


def test_a_plain_config_of_trls_is_refused_pairs_too(tiny_model_dir, tmp_path):
    import trl

    with pytest.raises(ValueError, match="'trpa' learns from whole groups of completions alone"):
        build(trl_ext.DPOTrainer, trl.DPOConfig, tiny_model_dir, tmp_path, loss_type="trpa")


def test_what_an_inspection_says():
    pairs = inspect_preferences(Dataset.from_list(preference_rows(4))).losses
    without = inspect_preferences(groups(behaviour=False)).losses
    whole = inspect_preferences(groups()).losses
    for name in LOSSES:
        assert pairs[name] == (
            f"The loss {name!r} learns from whole groups with the columns ['prompt', 'completions', 'scores', 'behaviour_logps'], and "
            "['completions', 'scores', 'behaviour_logps'] are absent. Online training samples such groups."
        )
        assert "and ['behaviour_logps'] are absent" in without[name]
        assert whole[name] == ""
    assert whole["anchored"] == whole["offset"] == without["anchored"] == ""


# Real data


@pytest.fixture(scope="module")
def reviews(shared_data, tmp_path_factory):
    """Groups of four reviews, two positive and two negative, with their log-probs under the model that is then trained."""
    files = {split: str(shared_data / "imdb_sentiment" / f"{split}.jsonl") for split in ("train", "test")}
    data = load_dataset("json", data_files=files, cache_dir=str(tmp_path_factory.mktemp("cache")))

    def four(row):
        order = sorted(range(len(row["scores"])), key=row["scores"].__getitem__)
        chosen = [order[0], order[-1], order[1], order[-2]]
        return {name: [row[name][k] for k in chosen] for name in ("completions", "scores")}

    data = data.filter(
        lambda row: sum(s > 1 for s in row["scores"]) > 1 and sum(s < 1 for s in row["scores"]) > 1
    ).map(four)
    data["train"] = data["train"].select(range(32))
    tokenizer = build_tokenizer(row["prompt"] + text for row in data["train"] for text in row["completions"])
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("model")
    model = Qwen3ForCausalLM(config).eval()
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)

    @torch.no_grad()
    def scored(row):
        start, sums = len(tokenizer(row["prompt"])["input_ids"]), []
        for text in row["completions"]:
            ids = torch.tensor([tokenizer(row["prompt"] + text + tokenizer.eos_token)["input_ids"]])
            logps = model(input_ids=ids).logits[0, start - 1 : -1].log_softmax(-1)
            sums.append(logps.gather(1, ids[0, start:, None]).sum().item())
        return {COLUMN: sums}

    return path, data.map(scored)


@pytest.mark.parametrize("name", LOSSES)
def test_right_ones_gain_on_wrong_ones_in_held_out_groups(name, reviews, tmp_path):
    path, data = reviews
    ours = trl_ext.DPOTrainer(
        model=str(path),
        args=trl_ext.DPOConfig(
            **options(
                tmp_path, loss_type=name, loss_kwargs={"max_length": 64} if name == "drpo" else None, max_steps=24, beta=1.0,
                learning_rate=2e-3, per_device_eval_batch_size=16, logging_steps=12, max_length=256, gradient_checkpointing=False,
            )
        ),
        train_dataset=data["train"],
        eval_dataset=data["test"],
    )  # fmt: skip
    before = ours.evaluate()
    assert before["eval_right/share"] == 0.5
    assert before["eval_behaviour/kl"] == pytest.approx(0, abs=1e-4)
    if name == "trpa":
        assert before["eval_loss"] == pytest.approx(math.log(2), abs=1e-4) and before["eval_ranking/pairs"] >= 4
    ours.train()
    after = ours.evaluate()
    assert abs(after["eval_behaviour/kl"]) > 1e-3
    if name == "trpa":
        assert after["eval_ranking/accuracies"] > 0.6 and after["eval_loss"] < before["eval_loss"]
    else:
        gaps = [found["eval_per_token/right"] - found["eval_per_token/wrong"] for found in (before, after)]
        assert before["eval_groups/mixed"] == 1 and gaps[1] > gaps[0] + 0.02


@pytest.mark.parametrize(("over", "cut"), [(0, False), (1, True)])
def test_a_completion_that_would_be_cut_is_refused(over, cut, tiny_model_dir, tmp_path):
    """What was sampled is the whole completion, and so is its log-prob."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    data = groups()
    longest = max(
        len(tokenizer(row["prompt"] + text + tokenizer.eos_token)["input_ids"])
        for row in data
        for text in row["completions"]
    )
    run = functools.partial(trainer, tiny_model_dir, tmp_path, "trpa", max_length=longest - over)
    if not cut:
        run()
        return
    with pytest.raises(
        ValueError, match=rf"of 4 groups of the train dataset, .* completions that `max_length={longest - 1}` cuts"
    ):
        run()
    # A loss that does not read those log-probs takes what is left, as ever
    trainer(tiny_model_dir, tmp_path, "anchored", max_length=longest - over)
