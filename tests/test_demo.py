"""The small world, and the demonstration in it."""

import argparse
import json
import math
import random
import statistics

import pytest
import torch

from trl_ext import demo
from trl_ext.cli import main
from trl_ext.demo import COMPARED, lm, world
from trl_ext.demo.data import EXAMPLES, Task, measure


def run(*arguments):
    parser = argparse.ArgumentParser()
    demo.add_arguments(parser)
    return demo.run(parser.parse_args([str(argument) for argument in arguments]))


def results(folder):
    return json.loads((folder / "results.json").read_text())["results"]


def test_true_reward():
    assert world.reward(" the plot was superb .") == 3.0
    assert world.reward(" the plot was superb . the cast was awful .") == 0.0
    assert world.reward(" i liked the lead . the script was very dull .") == 0.0
    assert world.reward(" i liked the lead .") == 1.5
    assert world.reward(" the plot was the plot .") == 0.0
    # A trace earns nothing, and neither does length
    assert world.reward(" <think> awful awful </think> the plot was superb .") == 3.0
    assert world.reward(" the plot was superb ." * 5) == 3.0


def test_grammar_speaks_the_vocabulary_only():
    words = set(world.vocabulary())
    texts = world.corpus(random.Random(0), 300)
    assert {word for prompt, completion in texts for word in (prompt + completion).split()} <= words
    assert world.corpus(random.Random(1), 5) == world.corpus(random.Random(1), 5)


def test_preferences_are_bradley_terry():
    rng = random.Random(0)
    better, worse = " the plot was good .", " the plot was slow ."  # 1.5 and 0
    wins = sum(world.prefer(rng, better, worse)[0] == better for _ in range(20_000))
    assert wins / 20_000 == pytest.approx(1 / (1 + math.exp(-1.5)), abs=0.01)


def test_kl_to_reference_equals_the_mean_log_ratio():
    """In expectation; and it is 0 for the same model."""
    import copy

    torch.manual_seed(0)
    tokenizer = lm.word_tokenizer(world.vocabulary())
    reference = lm.build_model(tokenizer, 64).eval()
    policy = copy.deepcopy(reference)
    for parameter in policy.parameters():
        parameter.data += 0.03 * torch.randn_like(parameter)
    prompts = lm.encode(tokenizer, world.PROMPTS[:4] * 150)
    completions = lm.sample(policy, tokenizer, prompts, max_new_tokens=6)
    assert lm.kl_to_reference(policy, policy, prompts, completions).tolist() == [0] * len(prompts)
    alike = {}  # rows of the same lengths, which need no padding
    for prompt, completion in zip(prompts, completions, strict=True):
        alike.setdefault((len(prompt), len(completion)), []).append(torch.cat([prompt, completion]))
    ratios = []
    for (_, length), rows in alike.items():
        ids = torch.stack(rows)
        with torch.no_grad():
            ours, theirs = (
                model(input_ids=ids)
                .logits[:, :-1]
                .log_softmax(-1)
                .gather(-1, ids[:, 1:, None])[:, -length:]
                .sum((1, 2))
                for model in (policy, reference)
            )
        ratios += (ours - theirs).tolist()
    each = lm.kl_to_reference(policy, reference, prompts, completions)
    # One per completion: of the first alone it is the same
    first = lm.kl_to_reference(policy, reference, prompts[:1], completions[:1])
    assert first.tolist() == pytest.approx(each[:1].tolist(), abs=1e-4)
    deviation = torch.tensor(ratios).std().item() / math.sqrt(len(ratios))
    assert each.mean().item() == pytest.approx(sum(ratios) / len(ratios), abs=4 * deviation)


def test_each_model_is_asked_the_same_with_the_same_random_numbers():
    """The first token by hand: where a point of the seed's lies in the distribution."""
    torch.manual_seed(0)
    tokenizer = lm.word_tokenizer(world.vocabulary())
    model = lm.build_model(tokenizer, 128).eval()
    task = Task("plain", 7, None, None, world.PROMPTS[:3], 128)
    before = torch.get_rng_state()
    values, texts = measure(model, model, tokenizer, task)
    assert torch.equal(torch.get_rng_state(), before) and len(texts) == EXAMPLES == 2
    torch.manual_seed(7)
    points = torch.rand(3, 1, dtype=torch.float64)
    for prompt, point, text in zip(task.prompts, points, texts, strict=False):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([tokenizer(prompt)["input_ids"]])).logits[0, -1]
        token = int(torch.searchsorted(logits.double().softmax(-1).cumsum(-1), point))
        assert text.split()[0] == tokenizer.convert_ids_to_tokens(token)
    assert measure(model, model, tokenizer, task) == (values, texts)


TINY = ("--seeds", 2, "--num_processes", 1, "--max_steps", 2)


@pytest.fixture
def tiny(monkeypatch):
    for name, size in {"FINE_TUNING_STEPS": 4, "PAIRS": 32, "HELD_OUT_PAIRS": 8, "SAMPLES": 16}.items():
        monkeypatch.setattr(f"trl_ext.demo.data.{name}", size)
    monkeypatch.setattr("trl_ext.demo.lm.MAX_NEW_TOKENS", 8)


def test_in_the_small_world(tiny, tmp_path, capsys, monkeypatch):
    """Every loss with every seed, each from the start of its seed; progress in lines; all files."""
    monkeypatch.setattr("trl_ext.demo.data.EXAMPLES", 16)  # all that is sampled
    assert run(*TINY, "--loss_type", "odpo", "bias_variance", "--seed", 3, "--output_dir", tmp_path) == 0
    found = json.loads((tmp_path / "results.json").read_text())
    assert found["settings"]["seeds"] == [3, 4]
    runs = [(each["data"], each["loss"], each["seed"]) for each in found["runs"]]
    names = [("plain", "offset"), ("traced", "sigmoid"), ("traced", "bias_variance")]
    assert runs == [(*name, seed) for name in names for seed in (3, 4)]
    for each in found["runs"]:
        first, *rest = each["points"]
        assert first["step"] == first["kl"] == 0 and [point["step"] for point in rest] == [1, 2]
        assert rest[-1]["kl"] > 0 and rest[-1]["kl_standard_error"] > 0  # the first step warms up from 0
        assert math.isfinite(each["accuracy"]) and -3 <= rest[-1]["reward"] <= 3
        # What is shown is what was measured
        for when, point in (("before", first), ("after", rest[-1])):
            rewards = [world.reward(example[when]) for example in each["examples"]]
            assert len(rewards) == 16 and statistics.fmean(rewards) == pytest.approx(point["reward"], abs=1e-6)
    starts = {(each["data"], each["seed"]): [] for each in found["runs"]}
    for each in found["runs"]:
        starts[each["data"], each["seed"]].append(each["points"][0])
    assert all(each[0] == each[-1] for each in starts.values()) and len(starts["traced", 3]) == 2
    assert starts["plain", 3] != starts["plain", 4] != starts["traced", 4]
    assert [(row["loss"], row["data"]) for row in found["results"]] == [
        ("start", "plain"), ("offset", "plain"),
        ("start", "traced"), ("sigmoid", "traced"), ("bias_variance", "traced"),
    ]  # fmt: skip
    shown = capsys.readouterr().out
    for line in ("s] training ...", "s] training: 6 of 6", "s] fine-tuning the start: 4 of 4"):
        assert line in shown
    for each in found["runs"]:
        if each["seed"] == 3:
            assert f"{each['loss']} │ {world.reward(each['examples'][0]['after']):.2f} │" in " ".join(shown.split())
    assert set(found["summary"]) == {"plain", "traced"}
    for text in found["summary"].values():
        assert text in " ".join(shown.split())
    assert "…" not in shown and max(map(len, shown.splitlines()[:30])) <= 80
    assert (tmp_path / "reward_kl.png").stat().st_size > 10_000
    assert (tmp_path / "results.csv").read_text().startswith("loss,data,reward,kl")
    saved = {path.name for path in tmp_path.iterdir() if (path / "config.json").exists()}
    assert saved == {"start", "offset", "sigmoid-traced", "bias_variance-traced"}


def test_own_dataset(tiny, shared_data, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("trl_ext.demo.data.OWN_LENGTH", 64)
    data = tmp_path / "pairs.jsonl"
    lines = (shared_data / "imdb_sentiment" / "pairs_train.jsonl").read_text().split("\n")
    data.write_text("\n".join(lines[:40]))
    losses = ("sigmoid", "odpo", "bias_variance")
    assert run(*TINY, "--dataset_name", data, "--loss_type", *losses, "--output_dir", tmp_path) == 0
    rows = results(tmp_path)
    assert [row["loss"] for row in rows] == ["start", "sigmoid", "offset"]
    assert all(row["reward"] is None and row["kl"] >= 0 and 0 <= row["accuracy"] <= 1 for row in rows)
    assert rows[0]["accuracy"] == 0.5
    shown = capsys.readouterr().out
    reason = "bias_variance was skipped: The loss 'bias_variance' needs the column 'chosen_empty_trace'"
    assert reason in " ".join(shown.split())
    assert "reward at" not in shown and "held-out pairs ranked right" in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--loss_type", "ofset"], "Did you mean 'offset'"),
        (["--loss_type", "inpo"], "trl-ext iterate"),
        (["--loss_type", "sigmoid", "sppo_soft"], "trl-ext iterate"),
        (["--loss_type", "gpo", "--online"], "trl-ext iterate"),
        (
            ["--loss_type", "drpo"],
            "learns from whole groups of completions, and the small world has pairs. Add `--online`",
        ),
        (["--loss_type", "bco_pair", "--online"], "['hinge', 'ipo', 'sigmoid'] are"),
        (["--max_steps", "0"], "at least 1 step"),
        (["--max_steps", "-3", "--online"], "at least 1 step"),
        (["--seed", "-1"], "whole number from 0"),
        (["--seed", str(2**32 - 1)], "`--seed 4294967295` with `--seeds 5`, which makes 4294967299 the last one"),
        (["--seeds", "0"], "`--seeds 0`: the number of seeds, at least 1"),
        (["--num_processes", "0"], "at least 1 process"),
        (["--output_dir", "notes.txt"], "`output_dir='notes.txt'` cannot be a folder"),
        (["--output_dir", "notes.txt/out"], "notes.txt' is a file"),
        (["--dataset_name", "notes.txt"], "expected a file that ends in"),
        (["--dataset_name", "nowhere.jsonl"], "There is no dataset 'nowhere.jsonl'"),
        (["--dataset_name", "notes.jsonl", "--online"], "only the small world has"),
    ],
)
def test_mistakes_are_refused_at_once(arguments, message, tmp_path, monkeypatch, capsys):
    """Before a process is started or a model built, and before the hub is asked."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("trl_ext.demo.demonstration.processes", None)
    monkeypatch.setattr("trl_ext.demo.lm.build_model", None)
    (tmp_path / "notes.txt").write_text("")
    assert main(["demo", *arguments]) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["notes.txt"]


def test_a_loss_without_its_columns_is_refused_at_once(monkeypatch, tmp_path, capsys):
    from trl_ext.losses import OffsetLoss, registry

    class Needy(OffsetLoss):
        columns = ("score_chosen", "clicks")

    monkeypatch.setitem(registry._classes, "needy", Needy)
    monkeypatch.setattr("trl_ext.demo.lm.build_model", None)
    assert main(["demo", "--loss_type", "needy", "--output_dir", str(tmp_path)]) == 2
    assert "needs the columns ['clicks']" in capsys.readouterr().err


@pytest.mark.parametrize(("environment", "expected"), [({}, 1), ({"OMP_NUM_THREADS": "2"}, 3)])
def test_threads(environment, expected, monkeypatch):
    """One, for models this small, unless the environment says how many; what was there before comes back."""
    from trl_ext.demo.training import one_thread

    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with one_thread():
            assert torch.get_num_threads() == expected
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_an_error_of_a_process_is_one_message(monkeypatch):
    """As one that is raised here: no traceback for what the user gave."""
    from concurrent.futures import ThreadPoolExecutor

    from trl_ext.cli import _is_about_input
    from trl_ext.demo.processes import processes

    monkeypatch.setattr("concurrent.futures.ProcessPoolExecutor", lambda number, *_, **__: ThreadPoolExecutor(number))
    with processes(2) as each, pytest.raises(ValueError, match="invalid literal") as found:
        list(each(int, [("1",), ("x",)]))
    assert _is_about_input(found.value)
    with processes(2) as each:
        assert sorted(each(int, [("1",), ("2",), ("3",)])) == [1, 2, 3]


def test_quiet_leaves_the_loggers_as_they_were():
    import logging

    from trl_ext.demo.training import quiet

    before = [logging.getLogger(name).level for name in ("accelerate", "trl_ext")]
    with quiet():
        assert not logging.getLogger("trl_ext.trainers").isEnabledFor(logging.WARNING)
        assert logging.getLogger("trl_ext.trainers").isEnabledFor(logging.ERROR)
    assert [logging.getLogger(name).level for name in ("accelerate", "trl_ext")] == before


@pytest.mark.slow
def test_the_demonstration(tmp_path, capsys):
    """In two processes: each loss raises the true reward; everything it promises to save is there, and loads."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert run("--output_dir", tmp_path, "--seeds", 1, "--seed", 1) == 0
    rows = results(tmp_path)
    start = {row["data"]: row for row in rows if row["loss"] == "start"}
    trained = [row for row in rows if row["loss"] != "start"]
    assert {row["loss"] for row in trained} == {"sigmoid", *COMPARED}
    for row in trained:
        assert row["reward"] > start[row["data"]]["reward"] + 0.3, row
        # Of 384 pairs whose labels are drawn: a standard error is 0.025. What learns to rank plain pairs ranks 0.6 and more of them right.
        # Traces tell nothing, and a price on length is paid in ranking: over several runs 0.55 of thousands of pairs are right (sigmoid),
        # 0.60 (bias_variance) and 0.59 (length_regularized), each within two standard errors of 0.55
        ranks = row["data"] == "plain" and row["loss"] != "length_regularized"
        assert row["accuracy"] > (0.55 if ranks else 0.5), row
        assert 0 < row["kl"] < 50, row
        name = row["loss"] if row["data"] == "plain" else f"{row['loss']}-traced"
        AutoModelForCausalLM.from_pretrained(tmp_path / name)
        AutoTokenizer.from_pretrained(tmp_path / name)
        assert (tmp_path / name / "README.md").is_file()
    lengths = {row["loss"]: row["length"] for row in trained if row["data"] == "plain"}
    assert lengths["length_regularized"] < lengths["sigmoid"]
    assert "offset" in capsys.readouterr().out


def test_online(tiny, tmp_path):
    """Prompts alone are made: the policy writes what it learns from."""
    assert (
        run(*TINY, "--online", "--loss_type", "sigmoid", "bias_variance", "--seeds", 1, "--output_dir", tmp_path) == 0
    )
    found = json.loads((tmp_path / "results.json").read_text())
    rows = found["results"]
    assert [(row["loss"], row["data"]) for row in rows if row["loss"] != "start"] == [
        ("sigmoid", "plain"), ("sigmoid", "traced"), ("bias_variance", "traced")
    ]  # fmt: skip
    assert all(math.isfinite(row["reward"]) for row in rows)
    assert found["settings"]["online"] is True
    assert "One seed has no interval" in found["summary"]["traced"]
