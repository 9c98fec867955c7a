"""What turns runs into verdicts: intervals, equal KL and equal search; runs that are done once, fail or die; the report and the command."""

import concurrent.futures
import csv
import math
import pickle
import random
import re
import statistics

import pytest

from tests.benchmark_modules import BENCHMARKS, module


NAMES = ["robust_em", "offset", "anchored", "length_regularized", "bias_variance", "cyclic", "margin_adaptive"]


@pytest.fixture(scope="module")
def scale():
    return module("claims.frame").Scale("tiny", seeds=2, settings=1, work=0.02, samples=6, fine_tuning=2)


# Verdicts


@pytest.mark.parametrize(
    "low, high, verdict",
    [
        (0.01, 0.05, "holds"),  # small, and sure
        (0.2, 0.9, "holds"),
        (0.0, 0.5, "undecided"),
        (-0.1, 0.1, "undecided"),  # what is worth naming is not ruled out
        (-0.1, 0.09, "does not"),
        (-0.9, -0.2, "does not"),
        (math.nan, math.nan, "undecided"),
        (-math.inf, math.inf, "undecided"),
    ],
)
def test_the_rule(low, high, verdict):
    assert module("claims.judging").verdict(low, high, smallest=0.1) == verdict


def path_of(*points):
    return [{"kl": kl, "reward": reward, "length": 10 * reward} for kl, reward in points]


def test_a_frontier_is_the_upper_concave_hull():
    hull = module("claims.judging").hull
    # 1 lies on the line from 0 to 2 and is no corner, 3 lies below that from 2 to 4, 5 costs KL and gives nothing
    assert hull([(0, 0), (1, 1), (2, 2), (3, 2.4), (4, 3), (9, 3)]) == [0, 2, 4]
    assert hull([(4, 3), (0, 0), (1, 2.9), (1, 2)]) == [1, 2, 0]
    assert hull([(0, 0), (1, -1), (2, -0.5)]) == [0]  # what only makes it worse
    assert hull([(0, 0)]) == [0]


def test_a_frontier_is_read_between_policies_and_flat_beyond_them():
    side = {0: {0: path_of((0, 0), (2, 4), (8, 3))}, 1: {0: path_of((0, 0), (1, 1), (4, 5))}}
    found = module("claims.judging").frontier(side, [0], [0, 1, 2, 3, 4, 99])
    assert found == {0: pytest.approx([0, 2, 4, 4.5, 5, 5])}
    assert module("claims.judging").frontier(side, [0], [1, 3], "length") == {0: pytest.approx([20, 45])}


def test_sides_are_compared_where_their_settings_end():
    def side(*ends):  # of two seeds
        return {at: {seed: path_of((0, 0), (end + seed, 1)) for seed in (0, 1)} for at, end in enumerate(ends)}

    judging = module("claims.judging")
    assert judging.end_kls(side(1, 5), side(3)) == [1.5, 5.5, 3.5]
    assert judging.common_kls(side(1, 5, 2), side(9, 3, 7)) == (2.25, 4.5, 9)


def test_no_seed_chooses_its_own_setting():
    values = {0: {0: 100.0, 1: 0.0, 2: 0.0}, 1: {0: 1.0, 1: 1.0, 2: 1.0}, 2: {0: 999.0, 1: 999.0, 2: None}}
    # Setting 0 owes all to seed 0, which itself must do with what the others say; setting 2 does not get that far
    assert module("claims.judging").chosen(values, [0, 1, 2]) == {0: 1, 1: 0, 2: 0}
    assert module("claims.judging").chosen({0: {0: 1.0}, 1: {0: 2.0}}, [0]) == {0: 1}


def test_no_seed_chooses_the_policies_of_its_frontier():
    def side(*rewards):  # one policy of KL 1 for each setting, with a reward for each seed
        return {
            at: {seed: path_of((0, 0), (1, reward)) for seed, reward in enumerate(each)}
            for at, each in enumerate(rewards)
        }

    found = module("claims.judging").frontier(side([100, 0, 0], [1, 1, 1]), [0, 1, 2], [1])
    # Setting 0 owes all to seed 0, which itself must do with what the others say
    assert found == {0: [1], 1: [0], 2: [0]}


def test_sides_are_compared_at_equal_kl():
    def side(slopes):  # reward is slope times KL, and the seed's number to both
        return {
            setting: {seed: path_of((0, 0), (4, 4 * slope + seed)) for seed in (0, 1, 2)}
            for setting, slope in enumerate(slopes)
        }

    values, kls, means = module("claims.judging").compare(side([1, 3, 2]), side([1, 1, 1]))
    # At KL 2, 4 and 8, the last beyond all policies: (2 + 4 + 4) * 3 / 3 against (2 + 4 + 4) / 3, whatever the seed adds to both
    assert kls == (2, 4, 8) and values == pytest.approx([2 * 10 / 3] * 3)
    assert means[0] == {"ours": pytest.approx(10), "theirs": pytest.approx(10 / 3)}
    assert means[2]["theirs"] == pytest.approx(10 / 3 + 2 * 2.5 / 3)
    with pytest.raises(ValueError, match="no seed has finished"):
        module("claims.judging").compare(side([1]), {0: {7: path_of((0, 0), (4, 1))}})
    with pytest.raises(ValueError, match="no seed has finished"):
        module("claims.judging").compare(side([1]), {})


def test_a_seed_without_all_settings_is_no_seed_yet():
    assert module("claims.judging").whole({0: [1, 2], 1: [3, 4], 2: [5]}) == {0: [1, 2], 1: [3, 4]}
    assert module("claims.judging").whole({}) == {}


def test_length_is_read_under_the_setting_that_the_reward_chooses():
    short = {seed: [{"kl": 0, "reward": 0, "length": 9}, {"kl": 1, "reward": 0.5, "length": 1}] for seed in (0, 1)}
    good = {seed: [{"kl": 0, "reward": 0, "length": 9}, {"kl": 1, "reward": 2.0, "length": 9}] for seed in (0, 1)}
    values, _, means = module("claims.judging").compare({0: short, 1: good}, {0: good, 1: good}, "length")
    assert values == [0, 0] and means[0]["ours"] == 9


def test_sides_with_unequal_search_are_refused(scale):
    frame = module("claims.frame")

    class Unfair(frame.Claim):
        name = "unfair"
        sides = (frame.Side("ours", ({"beta": 1}, {"beta": 2})), frame.Side("theirs", ({"beta": 1},)))

    with pytest.raises(ValueError, match="unequal search"):
        Unfair(scale)


# The runner


def fake(name="fake", fail=()):
    frame, judging = module("claims.frame"), module("claims.judging")

    class Fake(frame.Claim):
        paper, text = "0000.00000", "Ours is better."
        sides = (
            frame.Side("ours", ({"beta": 1.0}, {"beta": 2.0})),
            frame.Side("theirs", ({"beta": 1.0}, {"beta": 2.0})),
        )
        seeds = 3
        calls = []

        def execute(self, world, run):
            self.calls.append(run.key)
            if (run.side, run.setting, run.seed) in fail:
                raise ValueError("the loss is\nNaN")
            noise = random.Random(run.key).random() / 10
            return {"points": path_of((0, 0), (4, (2 if run.side == "ours" else 1) + noise))}

    Fake.name = name
    assert judging
    return Fake


@pytest.fixture
def runner(monkeypatch):
    """Runs in threads of this process, without a world."""
    found = module("claims.runner")
    pool = module("pool")
    monkeypatch.setattr(pool, "make_pool", lambda folder, workers: concurrent.futures.ThreadPoolExecutor(workers))
    monkeypatch.setattr(found, "build", lambda folder, scale: None)
    return found


def start(runner, claim, folder, **given):
    scale = module("claims.frame").Scale("tiny")
    place = runner.Place(folder, scale)
    claim = claim(scale)
    left = runner.run_all([claim], place, **{"workers": 2, "minutes": 9, "again": False, **given})
    return claim, place, left


def test_runs_are_done_once(runner, tmp_path):
    kind = fake()
    claim, place, left = start(runner, kind, tmp_path)
    assert left == 0 and sorted(kind.calls) == sorted(run.key for run in claim.runs()) and len(kind.calls) == 12
    start(runner, kind, tmp_path)
    assert len(kind.calls) == 12
    place.file(claim.runs()[5]).unlink()
    start(runner, kind, tmp_path)
    assert len(kind.calls) == 13 and kind.calls[-1] == claim.runs()[5].key
    # Other arguments are another run
    kind.steps = 7
    start(runner, kind, tmp_path)
    assert len(kind.calls) == 25


def test_no_run_is_started_when_time_is_over(runner, tmp_path):
    kind = fake()
    claim, place, left = start(runner, kind, tmp_path, minutes=0)
    assert left == 12 and not kind.calls
    written = module("claims.report").Report(tmp_path / "out", "toy", "cpu")
    written.add(claim, place.results(claim))
    (row,) = written.rows
    assert (
        row.verdict == "undecided" and "no seed has finished" in row.note and "12 of 12 runs are missing" in row.note
    )
    assert "**Incomplete: 12 of 12 runs have not been done yet.**" in written.markdown([])
    assert start(runner, kind, tmp_path)[2] == 0


def test_a_run_that_fails_is_a_row(runner, tmp_path):
    kind = fake(fail={("theirs", 1, 2)})
    claim, place, _ = start(runner, kind, tmp_path)
    results = place.results(claim)
    assert len(results) == 12 and [each["error"] for each in results if "error" in each] == [
        "ValueError: the loss is NaN"
    ]
    report = module("claims.report").Report(tmp_path / "out", "quick", "cpu")
    report.add(claim, results)
    compared, failed = report.rows
    # The third seed has not all settings, and two are too few for a verdict
    assert compared.low > 0 and compared.verdict == "undecided" and compared.note.endswith("2 seeds")
    assert failed.verdict == "failed" and failed.note == "ValueError: the loss is NaN"
    assert failed.measured == "run: theirs setting 1, seed 2"
    # It is not tried again unasked
    start(runner, kind, tmp_path)
    assert len(kind.calls) == 12
    start(runner, kind, tmp_path, again=True)
    assert len(kind.calls) == 13


def test_the_report(runner, tmp_path, capsys):
    report = module("claims.report")
    out = tmp_path / "out"
    for name, expected in (("one", 1), ("two", 2), ("one", 2)):
        claim, place, _ = start(runner, fake(name), tmp_path)
        written = report.Report(out, "toy", "cpu")
        written.add(claim, place.results(claim))
        written.write()
        with open(out / "quality_toy.csv") as file:
            rows = list(csv.DictReader(file))
        assert len(rows) == expected  # of claims without runs here the old rows stay
    assert {row["claim"] for row in rows} == {"one", "two"} and all(row["torch"] and row["device"] for row in rows)
    (row,) = (row for row in rows if row["claim"] == "one")
    assert row["measured"] == "true reward, ours less theirs" and row["verdict"] == "holds"
    # One more at KL 4, read at KL 2, 4 and 8: (1/2 + 1 + 1) / 3, and up to a tenth of noise at the end
    assert float(row["low"]) < float(row["effect"]) < float(row["high"]) and 0.74 < float(row["effect"]) < 0.92
    text = (out / "quality_toy.md").read_text()
    line = next(line for line in text.splitlines() if line.startswith("| one |"))
    assert "true reward, ours less theirs" in line and "| holds |" in line and "at KL 2, 4, 8; 3 seeds" in line
    assert module("claims.judging").RULE in text and module("claims.judging").SEARCH in text
    assert "Incomplete" not in text
    assert (out / "quality_toy.png").stat().st_size > 0
    with open(out / "quality_toy_points.csv") as file:
        assert len(list(csv.DictReader(file))) == 24
    assert "inside the interval that stood there" in capsys.readouterr().out


def test_a_figure_that_was_not_reproduced_is_said_so(runner, tmp_path):
    report = module("claims.report")
    claim, place, _ = start(runner, fake(), tmp_path)
    first = report.Report(tmp_path, "toy", "cpu")
    first.add(claim, place.results(claim))
    first.write()
    file = tmp_path / "quality_toy.csv"
    rows = list(csv.DictReader(file.open()))
    module("common").write([{**row, "low": "5", "high": "6"} for row in rows], file, say=False)
    second = report.Report(tmp_path, "toy", "cpu")
    second.add(claim, place.results(claim))
    (line,) = second.reproduced()
    assert "OUTSIDE the interval that stood there, [5, 6]" in line


def test_remarks_go_into_the_report(runner, tmp_path):
    claim, place, _ = start(runner, fake(), tmp_path)
    (tmp_path / "quality_toy_remarks.md").write_text("## Remarks\n\nWhy.\n")
    written = module("claims.report").Report(tmp_path, "toy", "cpu")
    written.add(claim, place.results(claim))
    written.write()
    assert "## Remarks\n\nWhy.\n" in (tmp_path / "quality_toy.md").read_text()


# The command


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--gold", "m:f"], "--prompts and --gold go with --model"),
        (["--model", "m", "--prompts", "p"], "--model needs --prompts, a dataset, and --gold"),
        (["--quick", "--model", "m", "--prompts", "p", "--gold", "g"], "set --work-share"),
        (["--workers", "-1"], "at least 1 process"),
    ],
)
def test_flags_that_do_not_go_together(flags, said, capsys):
    with pytest.raises(SystemExit) as error:
        module("quality").parse(flags)
    assert error.value.code == 2 and said in capsys.readouterr().err


def test_an_unknown_claim_is_named_beside_those_there_are(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", "")
    with pytest.raises(SystemExit, match="there is no claim ofset; there are robust_em, offset"):
        module("quality").main(["--claim", "ofset"])


def test_each_claim_has_equal_search_and_fits_into_an_hour(scale):
    frame, claims = module("claims.frame"), module("claims").CLAIMS
    assert list(claims) == NAMES
    full = {name: len(claim(frame.SCALES["toy"]).runs()) for name, claim in claims.items()}
    report = (BENCHMARKS / "results" / "quality_toy.md").read_text()
    (minutes,) = re.findall(r"All runs together took (\d+) minutes of one core", report)
    measured = sum(map(int, re.findall(r"(\d+) runs\.$", report, flags=re.MULTILINE)))
    assert sum(full.values()) * (int(minutes) / measured) / 2 < 60  # two at a time
    keys = [(run.claim, run.key) for claim in claims.values() for run in claim(frame.SCALES["toy"]).runs()]
    assert len(set(keys)) == len(keys)
    assert statistics.fmean(full.values()) > 20


def test_runs_can_be_sent_to_processes(scale, tmp_path):
    runner = module("claims.runner")
    place = runner.Place(tmp_path, scale)
    for kind in module("claims").CLAIMS.values():
        sent = runner.work, place, kind, kind(scale).runs()[-1]
        assert pickle.loads(pickle.dumps(sent)) == sent


# What is said of the figures


@pytest.mark.parametrize(
    ("measured", "places", "sign"),
    [
        ("true reward, offset less DPO (96 pairs)", 2, 1),
        ("true reward, offset less DPO (640 pairs)", 2, 1),
        ("tokens saved by length_regularized beside plain DPO, at equal KL", 0, 1),
        ("exploitability saved by sppo_soft beside DPO in rounds, after three rounds", 3, -1),
        ("true reward, margin_adaptive less DPO (good data)", 2, 1),
        ("true reward, margin_adaptive less DPO (bad data)", 2, 1),
        ("true reward, anchored less robust (20 % flipped)", 2, 1),
        ("true reward, anchored less DPO (20 % flipped)", 2, 1),
        ("true reward, anchored less DPO (40 % flipped)", 2, 1),
        ("rank correlation of estimated and true reliability, mean over settings", 2, 1),
        ("true reward, robust_em less DPO", 2, 1),
    ],
)
def test_the_readme_has_the_figures_of_the_report(measured, places, sign):
    with open(BENCHMARKS / "results" / "quality_toy.csv") as file:
        (row,) = (row for row in csv.DictReader(file) if row["measured"] == measured)
    effect, *bounds = (sign * float(row[name]) for name in ("effect", "low", "high"))
    low, high = sorted(bounds)
    shown = f"{effect:.{places}f} [{low:.{places}f}, {high:.{places}f}]"
    readme = (BENCHMARKS.parent / "README.md").read_text()
    assert shown in readme, f"{shown} {row['verdict']}"
    line = next(line for line in readme.splitlines() if shown in line)
    assert f"| {row['verdict']} |" in line
