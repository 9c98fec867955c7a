"""The comparison of losses on real pairs: what it measures, by hand; runs that are done once or fail; the choice of settings; the report."""

import concurrent.futures
import csv
import json
import math
import shutil

import pytest
import torch
from datasets import Dataset

from tests.benchmark_modules import module


TEXTS = (" good", " bad", " a great film", " a dull film", " liked it", " hated it")


def rows(count, first=0):
    """Pairs of which the better one is likelier to be short; two of them share a prompt."""
    return [
        {
            "prompt": f"the film of {number // 2}",
            "chosen": TEXTS[number % 3],
            "rejected": TEXTS[(number + 1) % 3] + TEXTS[5],
            "score_chosen": 1.5 + 0.01 * number,
            "score_rejected": 0.01 * number,
        }
        for number in range(first, first + count)
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Files as the benchmark reads them."""
    path = tmp_path_factory.mktemp("data")
    for name in ("imdb_sentiment/pairs_train", "imdb_sentiment/pairs_test", "tldr_likert/train", "tldr_likert/test"):
        file = path / f"{name}.jsonl"
        file.parent.mkdir(exist_ok=True)
        file.write_text(
            "".join(json.dumps(row) + "\n" for row in rows(8 if "test" in name else 16, 100 * ("test" in name)))
        )
    return path


@pytest.fixture(scope="module")
def size():
    data = module("real.data")
    return data.Size("tiny", hidden=16, layers=1, vocabulary=280, prompt_tokens=4, completion_tokens=8, pretraining=2,
                     steps=2, batch=2, seeds=2)  # fmt: skip


@pytest.fixture(scope="module")
def start(folder, size, tmp_path_factory):
    data = module("real.data")
    place = tmp_path_factory.mktemp("work") / "imdb_sentiment" / "start"
    return place, data.prepare(data.SOURCES["imdb_sentiment"], folder, place, size)


# Data


def test_lines_are_those_of_json(tmp_path):
    file = tmp_path / "rows.jsonl"
    row = {**rows(1)[0], "chosen": " one\u2028two\x85three"}
    file.write_text(json.dumps(row, ensure_ascii=False) + "\n")
    assert module("real.data").read_rows(file) == [row]


@pytest.mark.parametrize("broken", [{"chosen": None}, {"score_rejected": "0.5"}])
def test_a_row_that_is_no_scored_pair_is_named(broken, tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in [*rows(2), {**rows(1)[0], **broken}]))
    with pytest.raises(ValueError, match=f"row 2: {next(iter(broken))} missing or of another type"):
        module("real.data").read_rows(file)


def test_no_prompt_is_in_both_splits():
    train, validation = module("real.data").split_by_prompt(rows(40), 0.25)  # 20 prompts
    assert len(train) == 30 and len(validation) == 10
    assert not {row["prompt"] for row in train} & {row["prompt"] for row in validation}


def test_derived_columns_by_hand(tmp_path):
    data = module("real.data")
    pairs = Dataset.from_list([{**rows(1)[0], "score_chosen": 7.0, "score_rejected": 1.0}, {**rows(2)[1], "score_chosen": 5.0, "score_rejected": 4.0}])  # fmt: skip
    found = data.with_derived(pairs, 2.0, data.SOURCES["tldr_likert"], tmp_path)
    assert found["logit_chosen"][:] == [3.5, 2.5] and found["logit_rejected"][:] == [0.5, 2.0]
    shares = [1 / (1 + math.exp(-3)), 1 / (1 + math.exp(-0.5))]
    assert found["preference_prob"][:] == pytest.approx(shares) and found["win_chosen"][:] == pytest.approx(shares)
    assert found["win_rejected"][:] == pytest.approx([1 - share for share in shares])
    assert found["q_chosen"][:] == pytest.approx([1.0, 1 / 3]) and found["q_rejected"][:] == pytest.approx([-1.0, 0.0])
    assert found["score_chosen"][:] == [7.0, 5.0]  # as they were given
    assert module("real.losses").usual_temperature([6.0, 1.0, 5.0]) == 2.0


def test_log_probs_are_those_of_each_text_alone(start):
    data = module("real.data")
    model, _, pairs = data.load(start[0])
    sums, lengths = data.log_probs(model, pairs["test"], batch=5)
    for number, row in enumerate(pairs["test"]):
        for column, side in enumerate(("chosen", "rejected")):
            ids = torch.tensor([row["prompt_ids"] + row[f"{side}_ids"]])
            with torch.no_grad():
                each = model(input_ids=ids).logits[0].double().log_softmax(dim=-1)
            first = len(row["prompt_ids"])
            expected = sum(each[at - 1, ids[0, at]].item() for at in range(first, ids.shape[1]))
            assert sums[number, column].item() == pytest.approx(expected, abs=1e-3)
            assert lengths[number, column] == len(row[f"{side}_ids"]) == row[f"{side}_length"]
            assert row[f"ref_{side}_logps"] == pytest.approx(expected, abs=1e-3)
    assert max(map(len, pairs["train"]["prompt_ids"])) == 4 and max(map(len, pairs["train"]["rejected_ids"])) == 8


def test_what_is_prepared_is_kept_until_the_data_changes(folder, size, start, tmp_path, monkeypatch):
    data = module("real.data")
    place, about = start
    source = data.SOURCES["imdb_sentiment"]
    monkeypatch.setattr(data, "build_tokenizer", lambda *args: pytest.fail("prepared anew"))
    assert data.prepare(source, folder, place, size) == about
    assert data.prepare(source, folder, place, size.with_seeds(9)) == about  # of which the start does not depend
    assert about["pairs"] == {"train": 14, "validation": 2, "test": 8} and about["temperature"] == pytest.approx(0.75)
    other = tmp_path / "data"
    (other / "imdb_sentiment").mkdir(parents=True)
    for name, file in source.files(folder).items():
        lines = file.read_text().split("\n")
        (other / "imdb_sentiment" / file.name).write_text("\n".join(lines if name == "test" else lines[2:]))
    with pytest.raises(pytest.fail.Exception, match="prepared anew"):
        data.prepare(source, other, shutil.copytree(place, tmp_path / "start"), size)


# Losses


def test_all_of_our_losses_are_compared_or_left_out(monkeypatch):
    losses = module("real.losses")
    losses.check_all_named()
    assert len({len(side.settings()) for side in losses.SIDES.values()}) == 1  # equal search
    assert not set(losses.SIDES) & set(losses.LEFT_OUT)
    monkeypatch.setattr(losses, "list_losses", lambda: ["offset", "of_tomorrow"])
    with pytest.raises(ValueError, match="of_tomorrow: neither in SIDES nor in LEFT_OUT"):
        losses.check_all_named()


def test_settings_and_the_unit_of_rewards():
    losses = module("real.losses")
    ipo, inpo, asft = (losses.SIDES[name] for name in ("ipo", "inpo", "asft"))
    assert [(each["beta"], each["learning_rate"]) for each in ipo.settings((1.0, 2.0))] == [
        (0.5, 1.0), (0.5, 2.0), (2.5, 1.0), (2.5, 2.0),
    ]  # fmt: skip
    assert ipo.scale(ipo.settings()[3]) == 2.5
    assert inpo.settings()[0]["loss_kwargs"] == {"eta": 0.1} and inpo.scale(inpo.settings()[0]) == 0.1
    assert asft.scale(asft.settings()[2]) == 1.0
    assert losses.described(inpo.settings((0.001,))[0]) == "eta 0.1, lr 0.001"


# A run


def test_measures_by_hand():
    start = [[-10.0, -10.0], [-8.0, -4.0], [-6.0, -9.0], [-5.0, -5.0]]
    policy = [[-6.0, -10.0], [-10.0, -4.0], [-4.0, -9.0], [-5.0, -5.0]]  # log-ratios (4, 0), (-2, 0), (2, 0), (0, 0)
    lengths = [[4.0, 2.0], [1.0, 2.0], [4.0, 4.0], [3.0, 1.0]]
    pairs = Dataset.from_dict(
        {
            "ref_chosen_logps": [each[0] for each in start],
            "ref_rejected_logps": [each[1] for each in start],
            "score_chosen": [5.0, 2.0, 4.0, 3.0],
            "score_rejected": [1.0, 1.0, 1.0, 1.0],
        }
    )
    measure = module("real.training").measure
    given = torch.tensor(policy, dtype=torch.float64), torch.tensor(lengths, dtype=torch.float64), pairs
    found = measure(*given, scale=0.5, per_token=False)
    assert found["accuracy"] == found["accuracy_sums"] == 2.5 / 4  # the last one is a tie
    assert found["margin"] == pytest.approx((2 - 1 + 1 + 0) / 4) and found["chosen_logratio"] == pytest.approx(1.0)
    # Margins 2, -1, 1, 0 (mean 0.5) and gaps 4, 1, 3, 2 (mean 2.5): both are an order, one stretched by nothing
    assert found["score_correlation"] == pytest.approx(1.0)
    # Gaps of lengths 2, -1, 0, 2 (mean 0.75)
    covariance = 1.5 * 1.25 + -1.5 * -1.75 + 0.5 * -0.75 + -0.5 * 1.25
    assert found["length_correlation"] == pytest.approx(covariance / math.sqrt(5.0 * 6.75))
    assert found["longer_preferred"] == pytest.approx((1 + 1 + 0.5 + 0.5) / 4)
    # Confidence of each: bins of 0.05 from 0.5 on hold one pair each
    sure, right = [1 / (1 + math.exp(-abs(each))) for each in (2, -1, 1, 0)], [1, 0, 1, 0.5]
    expected = (abs(sure[0] - 1) + abs(sure[1] + sure[2] - 1) + abs(sure[3] - 0.5)) / 4
    assert found["calibration_error"] == pytest.approx(expected)
    assert found["overconfidence"] == pytest.approx((sum(sure) - sum(right)) / 4)
    # Per token: 1, -2, 0.5, 0, times 2
    by_token = measure(*given, scale=2.0, per_token=True)
    assert by_token["margin"] == pytest.approx(2 * (1 - 2 + 0.5) / 4) and by_token["accuracy_sums"] == 2.5 / 4
    assert by_token["chosen_logratio"] == pytest.approx(1.0)


def test_margins_that_are_all_alike_have_no_correlation():
    pairs = Dataset.from_dict({f"ref_{side}_logps": [-1.0, -2.0] for side in ("chosen", "rejected")} |
                              {"score_chosen": [1.0, 2.0], "score_rejected": [0.0, 0.0]})  # fmt: skip
    sums = torch.tensor([[-1.0, -1.0], [-2.0, -2.0]], dtype=torch.float64)
    found = module("real.training").measure(sums, torch.tensor([[1.0, 2.0], [2.0, 1.0]]), pairs, 1.0, False)
    assert found["score_correlation"] is None and found["length_correlation"] is None and found["accuracy"] == 0.5


def test_losses_train_on_what_they_read_and_in_one_order(start, size, monkeypatch):
    """Derived columns, none, and no reference; the same batches for the same seed."""
    training, losses = module("real.training"), module("real.losses")
    seen = {}
    given = training.DPOTrainer.compute_loss

    def recorded(self, model, inputs, *args, **kwargs):
        seen[name, seed].append(inputs["input_ids"].clone())
        return given(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(training.DPOTrainer, "compute_loss", recorded)
    for name, seed in (("sigmoid", 1), ("sigmoid", 2), ("margin_adaptive", 1), ("inpo", 1), ("cpo", 1)):
        seen[name, seed] = []
        side = losses.SIDES[name]
        found = training.execute(start[0], side, side.settings()[3], seed, size, "test")
        assert found["accuracy"] is not None and found["margin"] != 0  # it has moved from the start
    first = seen["sigmoid", 1]
    assert len(first) == 2
    for other in ("margin_adaptive", "inpo", "cpo"):
        assert all(torch.equal(a, b) for a, b in zip(first, seen[other, 1], strict=True)), other
    assert any(a.shape != b.shape or not torch.equal(a, b) for a, b in zip(first, seen["sigmoid", 2], strict=True))
    columns = training.columns_for(losses.SIDES["inpo"], module("real.data").load(start[0])[2]["train"])
    assert columns["initial_chosen_logps"][:] == columns["ref_chosen_logps"][:]
    logits = training.columns_for(losses.SIDES["margin_adaptive"], module("real.data").load(start[0])[2]["train"])
    assert min(a - b for a, b in zip(logits["score_chosen"], logits["score_rejected"], strict=True)) == pytest.approx(
        2.0
    )


# Runs in processes


@pytest.fixture
def place(tmp_path, size):
    """Two losses and one set of pairs; `work` gives what the test says."""
    return module("real.runner").Place(tmp_path, size, {"imdb_sentiment": "key"}, ["sigmoid", "cpo"])


MEASURED = {"accuracy_pairs_low": 0.4, "accuracy_pairs_high": 0.8, "accuracy_sums": 0.6, "margin": 0.1, "score_correlation": 0.2,
            "length_correlation": None, "longer_preferred": 0.5, "calibration_error": 0.1, "overconfidence": 0.0, "chosen_logratio": -3.0}  # fmt: skip


@pytest.fixture
def work(monkeypatch):
    """Runs in a thread, without a model: `work.answer(run)` is the result, `work.done` the runs."""
    runner = module("real.runner")

    class Work:
        done: list = []
        answer = staticmethod(lambda run: {"accuracy": 0.5})

        def __call__(self, start, size, run):
            self.done.append(run)
            return {**MEASURED, **self.answer(run)}

    fake = Work()
    fake.done = []
    monkeypatch.setattr(runner, "work", fake)
    pool = module("pool")
    monkeypatch.setattr(pool, "make_pool", lambda folder, workers: concurrent.futures.ThreadPoolExecutor(1))
    return fake


def test_the_setting_that_is_best_on_validation_pairs_is_tested(place, work):
    runner = module("real.runner")
    work.answer = lambda run: {
        "accuracy": {"sigmoid": (0.5, 0.7, 0.6, 0.7), "cpo": (0.1, 0.2, 0.3, 0.4)}[run.loss][run.setting]
    }
    assert runner.run_all(place, 2, math.inf) == 0
    searched, tested = ([run for run in work.done if run.split == split] for split in ("validation", "test"))
    assert len(searched) == 8 and {run.seed for run in searched} == {0}
    # The first of equal ones; other seeds than that of the search
    assert sorted((run.loss, run.setting, run.seed) for run in tested) == [
        ("cpo", 3, 1), ("cpo", 3, 2), ("sigmoid", 1, 1), ("sigmoid", 1, 2),
    ]  # fmt: skip
    assert len(work.done) == place.total() == 12


def test_a_run_is_done_once(place, work, size):
    runner = module("real.runner")
    runner.run_all(place, 1, math.inf)
    again = runner.Place(place.folder, size, place.keys, place.losses)
    assert again.results == place.results and runner.run_all(again, 1, math.inf) == 0 and len(work.done) == 12
    runner.run_all(runner.Place(place.folder, size.with_seeds(3), place.keys, place.losses), 1, math.inf)
    assert len(work.done) == 14  # one more seed of each loss
    assert not runner.Place(place.folder, size, {"imdb_sentiment": "other"}, place.losses).results  # other data
    changed = module("real.data").Size(**{**size.__dict__, "steps": 3})
    assert not runner.Place(place.folder, changed, place.keys, place.losses).results


def test_no_run_is_begun_after_the_time(place, work):
    runner = module("real.runner")
    assert runner.run_all(place, 1, 0.0) == place.total() == 12 and not work.done


def test_a_run_that_fails_is_a_row_that_says_so(place, work, size):
    runner, report = module("real.runner"), module("real.report")
    work.answer = lambda run: (
        {"error": "ValueError: NaN"} if run.loss == "cpo" or run.setting == 0 or run.seed == 2 else {"accuracy": 0.5}
    )
    runner.run_all(place, 1, math.inf)
    good, bad = (report.row_of(place, "imdb_sentiment", loss) for loss in ("sigmoid", "cpo"))
    assert good["state"] == "part" and good["seeds"] == 1 and good["accuracy"] == 0.5 and good["accuracy_low"] is None
    assert good["setting"] == "beta 0.1, lr 0.002" and good["validation_accuracy"] == "- 0.500 0.500 0.500"
    assert good["note"] == ("validation, setting 0, seed 0: ValueError: NaN; test, setting 1, seed 2: ValueError: NaN")
    assert bad["state"] == "failed" and bad["accuracy"] is None and bad["note"].count("ValueError: NaN") == 4
    assert runner.run_all(place, 1, math.inf) == 0 and len(work.done) == 10  # nothing of it is tried anew
    place.forget_failures()
    work.answer = lambda run: {"accuracy": 0.5}
    runner.run_all(place, 1, math.inf)
    assert report.row_of(place, "imdb_sentiment", "cpo")["state"] == "ok"


# The report


ABOUT = {"pairs": {"train": 10, "validation": 2, "test": 4}, "longer_chosen": 0.75, "parameters": 12345, "pretraining_loss": 4.5,
         "temperature": 0.5, "nll": 0.3}  # fmt: skip


def test_the_table(place, work, size, tmp_path, capsys):
    runner, report = module("real.runner"), module("real.report")
    place.size = size.with_seeds(3)
    work.answer = lambda run: {"accuracy": {1: 0.6, 2: 0.7, 3: 0.8}.get(run.seed, 0.5)}
    runner.run_all(place, 1, math.inf)
    report.write_all(place, {"imdb_sentiment": ABOUT}, tmp_path / "out", "a shared machine")
    with open(tmp_path / "out" / "real_data_tiny.csv") as file:
        found = list(csv.DictReader(file))
    assert [(row["data"], row["loss"], row["state"], row["seeds"]) for row in found] == [
        ("imdb_sentiment", "sigmoid", "ok", "3"), ("imdb_sentiment", "cpo", "ok", "3"),
    ]  # fmt: skip
    # t for two degrees of freedom is 4.303; the standard deviation is 0.1
    reach = 4.303 * 0.1 / math.sqrt(3)
    assert float(found[0]["accuracy"]) == pytest.approx(0.7)
    assert float(found[0]["accuracy_low"]) == pytest.approx(0.7 - reach, abs=1e-4)
    assert float(found[0]["accuracy_high"]) == pytest.approx(0.7 + reach, abs=1e-4)
    assert found[0]["length_correlation"] == "" and float(found[0]["accuracy_pairs_high"]) == 0.8
    assert (
        found[0]["machine"] == "a shared machine"
        and found[0]["torch"]
        and found[0]["trl"]
        and float(found[0]["cpu_seconds_per_run"]) >= 0
    )
    with open(tmp_path / "out" / "real_data_tiny_runs.csv") as file:
        assert len(list(csv.DictReader(file))) == 14
    text = (tmp_path / "out" / "real_data_tiny.md").read_text()
    assert "| sigmoid | beta 0.1, lr 0.0005 | 3 | 0.700 ± 0.248 | [0.40, 0.80] |" in text and "14 of 14 runs" in text
    # Equal on validation pairs: the first setting, with the smaller rate
    assert "0 of 2 losses did best on validation pairs with the larger learning rate" in text
    assert "a shared machine" in text and "`bias_variance`: " in text and "75%" in text
    assert "0.700 ± 0.248" in capsys.readouterr().out


def test_what_is_missing_stands_in_the_table(place, tmp_path, capsys):
    report = module("real.report")
    report.write_all(place, {"imdb_sentiment": ABOUT}, tmp_path / "out", "")
    text = (tmp_path / "out" / "real_data_tiny.md").read_text()
    assert "NOT RUN: 6 runs are missing" in text and "0 of 12 runs" in text


# The command


def test_what_was_not_asked_for_stays_in_the_report(folder, work, tmp_path, monkeypatch, capsys):
    runner, data = module("real.runner"), module("real.data")

    def prepare(source, given, place, size):
        place.mkdir(parents=True)
        known = {"key": data.key_of(source, given, size), **ABOUT}
        (place / "about.json").write_text(json.dumps(known))
        return known

    monkeypatch.setattr(runner, "prepare", prepare)
    flags = [
        "--data",
        str(folder),
        "--work",
        str(tmp_path / "work"),
        "--out",
        str(tmp_path),
        "--quick",
        "--seeds",
        "2",
    ]
    for name, loss in (("imdb_sentiment", "sigmoid"), ("tldr_likert", "cpo")):
        assert module("real_data").main([*flags, "--sets", name, "--losses", loss]) == 0
        assert "runs are left" not in capsys.readouterr().out
    with open(tmp_path / "real_data_quick.csv") as file:
        found = [(row["data"], row["loss"], row["state"], row["seeds"]) for row in csv.DictReader(file)]
    assert found == [
        ("imdb_sentiment", "sigmoid", "ok", "2"), ("imdb_sentiment", "cpo", "not run", "0"),
        ("tldr_likert", "sigmoid", "not run", "0"), ("tldr_likert", "cpo", "ok", "2"),
    ]  # fmt: skip
    assert len(work.done) == 12
    monkeypatch.setattr(module("pool"), "make_pool", lambda *given: pytest.fail("everything is done already"))
    assert module("real_data").main([*flags, "--sets", "tldr_likert", "--losses", "cpo"]) == 0


def test_wrong_flags_and_missing_data_say_what_is_right(folder, tmp_path):
    main = module("real_data").main
    work = ["--work", str(tmp_path), "--out", str(tmp_path)]
    with pytest.raises(
        SystemExit, match=r"There is no .*pairs_train.jsonl and no .*Give --data the folder that holds"
    ):
        main(["--data", str(tmp_path / "nowhere"), *work])
    with pytest.raises(SystemExit, match="--losses sigmoyd: there are sigmoid, ipo"):
        main(["--data", str(folder), "--losses", "sigmoyd", *work])
    with pytest.raises(SystemExit, match="--sets hh: there are imdb_sentiment, tldr_likert"):
        main(["--data", str(folder), "--sets", "hh", *work])
    with pytest.raises(SystemExit):
        main(["--workers", "0"])
    assert not list(tmp_path.iterdir())
