"""The claims of papers as experiments: their pieces at the tiniest size, and what turns runs into a verdict. No claim is judged here."""

import concurrent.futures
import csv
import importlib
import json
import math
import random
import statistics
from pathlib import Path

import pytest
import torch

from trl_ext.demo import lm


BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
NAMES = ["robust_em", "offset", "anchored", "length_regularized", "bias_variance", "cyclic", "margin_adaptive"]


@pytest.fixture(scope="module", autouse=True)
def path():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        yield


def module(name):
    return importlib.import_module(name)


@pytest.fixture(scope="module")
def scale(path):
    return module("claims.frame").Scale("tiny", seeds=2, settings=1, work=0.02, samples=6, fine_tuning=2)


@pytest.fixture(scope="module")
def world(scale, tmp_path_factory):
    threads = torch.get_num_threads()
    built = module("claims.toy").build(tmp_path_factory.mktemp("world"), scale)
    built.max_new_tokens = 8
    yield built
    torch.set_num_threads(threads)


# Verdicts


def test_an_interval_is_that_of_student():
    found = module("claims.judging").interval([1.0, 2.0, 3.0])
    # t for two degrees of freedom is 4.303; the standard deviation is 1
    assert (found.mean, found.count) == (2.0, 3)
    assert found.low == pytest.approx(2 - 4.303 / math.sqrt(3)) and found.high == pytest.approx(
        2 + 4.303 / math.sqrt(3)
    )
    alone = module("claims.judging").interval([1.0])
    assert (alone.mean, alone.low, alone.high) == (1.0, -math.inf, math.inf)


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


def test_a_path_is_read_between_its_points_in_the_root_of_kl():
    at_kl = module("claims.judging").at_kl
    points = path_of((0, 0), (4, 3), (1, 1))
    assert at_kl(points, 2.25) == pytest.approx(2.0)  # root 1.5, half way from 1 to 2
    assert at_kl(points, 0.25) == pytest.approx(0.5)
    assert at_kl(points, 4, "length") == pytest.approx(30)
    assert at_kl(points, 4.01) is None


def test_the_common_kl_is_one_that_half_of_the_settings_of_each_side_reach():
    def side(*reaches):
        return {at: {seed: path_of((0, 0), (reach + seed, 1)) for seed in (0, 1)} for at, reach in enumerate(reaches)}

    common = module("claims.judging").common_kl
    assert common(side(1, 5, 3)) == 3  # the middle one, at the seed that goes less far
    assert common(side(1, 5, 3, 4)) == 3
    assert common(side(1, 5, 3), side(9, 2)) == 2


def test_no_seed_chooses_its_own_setting():
    values = {0: {0: 100.0, 1: 0.0, 2: 0.0}, 1: {0: 1.0, 1: 1.0, 2: 1.0}, 2: {0: 999.0, 1: 999.0, 2: None}}
    # Setting 0 owes all to seed 0, which itself must do with what the others say; setting 2 does not get that far
    assert module("claims.judging").chosen(values, [0, 1, 2]) == {0: 1, 1: 0, 2: 0}
    assert module("claims.judging").chosen({0: {0: 1.0}, 1: {0: 2.0}}, [0]) == {0: 1}


def test_sides_are_compared_at_equal_kl():
    def side(slopes):  # reward is slope times the root of KL, exactly as paths are read
        return {
            setting: {seed: path_of((0, 0), (4, 2 * slope + seed), (16, 4 * slope + 2 * seed)) for seed in (0, 1, 2)}
            for setting, slope in enumerate(slopes)
        }

    values, kl, means = module("claims.judging").compare(side([1, 3, 2]), side([1, 1, 1]))
    # At KL 4, 8 and 16 the roots are 2, 2.83 and 4: 3 against 1 times their mean, whatever the seed adds to both
    assert kl == 16 and values == pytest.approx([2 * (2 + math.sqrt(8) + 4) / 3] * 3)
    assert means[0]["theirs"] == pytest.approx((2 + math.sqrt(8) + 4) / 3)
    with pytest.raises(ValueError, match="no seed has finished"):
        module("claims.judging").compare(side([1]), {0: {7: path_of((0, 0), (4, 1))}})


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


# The pieces of claims


def test_labels():
    labelled = module("claims.data").labelled
    groups = [
        {"prompt": "p", "completions": ["a", "b", "c", "d"], "scores": [1000.0, 0.0, 0.0, 1000.0]} for _ in range(50)
    ]
    rows = labelled(groups, 0)
    assert [(row["chosen"], row["rejected"]) for row in rows] == [("a", "b"), ("d", "c")] * 50
    assert [(row["group"], row["first"], row["second"]) for row in rows[:3]] == [(0, 0, 1), (0, 3, 2), (1, 0, 1)]
    flipped = labelled(groups, 0, noise=1.0)
    assert [(row["rejected"], row["chosen"]) for row in flipped] == [("a", "b"), ("d", "c")] * 50
    some = labelled(groups, 0, noise=0.4)
    assert 25 < sum(row["chosen"] in "bc" for row in some) < 55
    # Log 3: three of four
    close = [{**group, "scores": [math.log(3), 0.0, 0.0, 0.0]} for group in groups * 8]
    assert 270 < sum(row["chosen"] == "a" for row in labelled(close, 1)) < 330
    dataset = module("claims.data").pairs(rows, "group")
    assert dataset.column_names == ["prompt", "chosen", "rejected", "group"]


def test_annotators_flip_as_often_as_they_are_said_to(scale, world, monkeypatch):
    claims = module("claims.robust_em")
    monkeypatch.setattr(claims, "FLIPS", (0.0, 1.0))
    monkeypatch.setattr(module("claims.data"), "labelled", lambda groups, seed: [
        {"prompt": "p", "chosen": "right", "rejected": "wrong"} for _ in range(40)
    ])  # fmt: skip
    claim = claims.RobustEM(scale)
    rows = claim.data(world, claim.runs()[0])
    assert set(rows["annotator_id"]) == {0, 1}
    assert all(row["chosen"] == ("right", "wrong")[row["annotator_id"]] for row in rows)


def test_how_well_reliabilities_are_recovered(scale):
    claims = module("claims.robust_em")
    assert claims.spearman([0.9, 0.8, 0.7], [3.0, 2.0, 1.0]) == 1 and claims.spearman([1, 1, 1], [3, 2, 1]) == 0
    assert claims.error([1.0, 0.5], [0.9, 0.7]) == pytest.approx(0.15)
    truth = [1 - flip for flip in claims.FLIPS]  # 1, 0.9, 0.8, 0.7, 0.55: mean 0.79, mean distance from it 0.132
    found = [
        {"side": side, "condition": "", "setting": setting, "seed": seed, "points": path_of((0, 0), (1, 1)),
         "reliability": [value - 0.05 for value in truth]}
        for side in ("robust_em", "DPO") for setting in (0, 1) for seed in (0, 1)
    ]  # fmt: skip
    order, error, reward = claims.RobustEM(scale).rows(found)
    assert order.effect == pytest.approx(1) and order.verdict == "holds"
    assert error.effect == pytest.approx(0.132 - 0.05) and error.verdict == "holds"
    assert reward.effect == 0 and reward.verdict == "does not"


def test_groups_have_the_scores_of_their_pairs():
    as_group = module("claims.anchored").as_group
    rows = [
        {"first": 1, "second": 0, "score_chosen": 10.0, "score_rejected": 20.0},
        {"first": 2, "second": 3, "score_chosen": 30.0, "score_rejected": 40.0},
    ]
    other = [{**row, "score_chosen": -1.0, "score_rejected": -2.0} for row in rows]
    found = as_group({"prompt": "p", "completions": ["a", "b", "c", "d"], "scores": [0] * 4}, 1, other + rows)
    assert found == {"prompt": "p", "completions": ["a", "b", "c", "d"], "scores": [20.0, 10.0, 30.0, 40.0]}


def test_what_beats_a_policy_in_a_circle():
    cyclic = module("claims.cyclic")
    assert cyclic.exploitability([1 / 3] * 3) == pytest.approx(0)
    assert [cyclic.exploitability(shares) for shares in ([1, 0, 0], [0, 1, 0], [0, 0, 1])] == [0.45] * 3
    # The upper kind beats the lower 75 % and loses to the middle 15 %
    assert cyclic.exploitability([0.75, 0.15, 0.1]) == pytest.approx(0.45 * 0.75 - 0.45 * 0.15)
    assert [cyclic.kind(score, [0.0, 1.0]) for score in (-1, 0, 0.5, 1, 2)] == [0, 1, 1, 2, 2]
    assert all(cyclic.LEAD[a][b] == -cyclic.LEAD[b][a] for a in range(3) for b in range(3))


def test_win_rates_in_a_circle(scale, world):
    cyclic, frame = module("claims.cyclic"), module("claims.frame")
    claim = cyclic.Cyclic(scale)
    group = {"prompt": "p", "completions": ["low", "middle", "high", "low"] * 2, "scores": [0, 1, 2, 0] * 2}
    rows = claim.labelled(world, [group] * 100, [0.5, 1.5], frame.Run("cyclic", "", cyclic.SPPO, 0, 0))
    # Of the seven others, to low: three low, two middle, two high
    wins = {"low": 0.5, "middle": 0.5 + 0.45 * (2 - 4) / 7, "high": 0.5 + 0.45 * (4 - 2) / 7}
    for row in rows:
        assert row["score_chosen"] == pytest.approx(wins[row["chosen"]])
        assert row["score_rejected"] == pytest.approx(wins[row["rejected"]])
    won = [row["chosen"] for row in rows]
    assert 0.9 < won[::2].count("low") / 200 < 0.99 and 0.9 < won[1::2].count("high") / 200 < 0.99


def test_bad_data_has_texts_that_no_policy_wrote(scale, world, monkeypatch):
    claim = module("claims.margin_adaptive").MarginAdaptive(scale)
    foreign = [f" the plot was superb . number {i}" for i in range(100)]
    monkeypatch.setattr(type(world), "foreign", lambda self, prompts, seed: foreign[: len(prompts)])
    run = next(run for run in claim.runs() if run.condition == "bad data" and run.side == "DPO")
    assert all((row["chosen"] in foreign) != (row["rejected"] in foreign) for row in claim.data(world, run))
    run = next(run for run in claim.runs() if run.condition == "good data" and run.side == "DPO")
    assert not any({row["chosen"], row["rejected"]} & set(foreign) for row in claim.data(world, run))


def test_offset_has_no_ties_and_few_pairs(world):
    frame = module("claims.frame")
    claim = module("claims.offset").Offset(frame.Scale(work=0.1))
    world_groups = [{"prompt": "p", "completions": list("abcd"), "scores": [1.0, 2.0, 3.0, 3.0]}] * 40

    class Given:
        def groups(self, seed, count):
            return world_groups[:count]

    rows = claim.data(Given(), claim.runs()[0])
    assert len(rows) == 10  # a tenth of 96
    assert {(row["chosen"], row["score_chosen"], row["score_rejected"]) for row in rows} == {("b", 2.0, 1.0)}


# The world


def test_kl_is_that_of_the_demonstration(world):
    other = world.clone(world.start)
    with torch.no_grad():
        for weight in other.parameters():
            weight += 0.02 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    prompts = world.held_out[:5]
    drawn = world.sample(other, prompts, seed=1)
    assert world.kl(world.start, drawn) == 0
    completions = [row[start:] for row, start in zip(drawn.rows, drawn.starts, strict=True)]
    expected = lm.kl_to_reference(other, world.start, world.tokenizer, prompts, completions)
    assert expected > 0.01 and world.kl(other, drawn) == pytest.approx(expected, rel=1e-4)
    assert drawn.lengths == [len(completion) for completion in completions]


def test_sampling_has_random_numbers_of_its_own(world):
    torch.manual_seed(3)
    first = torch.rand(1)
    torch.manual_seed(3)
    texts = world.sample(world.start, world.held_out[:3], seed=5).texts
    assert torch.rand(1) == first
    assert world.sample(world.start, world.held_out[:3], seed=5).texts == texts
    assert world.sample(world.start, world.held_out[:3], seed=6).texts != texts


def test_what_is_kept_is_made_once(world):
    made = []
    assert [world.kept("once", lambda: made.append(1) or len(made)) for _ in range(2)] == [1, 1]


@pytest.mark.parametrize("name", NAMES)
def test_the_runs_of_a_claim(name, scale, world, monkeypatch):
    """Each side trains and is measured, and the rows say what was compared; whether the claim holds is not asked."""
    for each in ("cyclic", "length_regularized"):
        monkeypatch.setattr(module(f"claims.{each}"), "ROUNDS", 2)
    claim = module("claims").CLAIMS[name](scale)
    results = []
    for run in claim.runs():
        if run.condition != claim.conditions[-1] or run.seed:
            continue
        found = json.loads(json.dumps(claim.execute(world, run)))
        results.append({**vars(run), **found})
        if run.side == "gradients":
            continue
        first, last = found["points"][0], found["points"][-1]
        assert first["step"] == 0 and first["kl"] == 0 and last["step"] >= 2
        assert last["kl"] > 0 and all(math.isfinite(value) for point in found["points"] for value in point.values())
    assert {each["side"] for each in results} >= {side.name for side in claim.sides}
    # The same once more as a second seed
    rows = claim.rows(results + [{**each, "seed": 1} for each in results])
    measured = [row for row in rows if not math.isnan(row.effect)]
    assert measured and all(row.claim == name and row.verdict in ("holds", "does not", "undecided") for row in rows)
    assert len({row.measured for row in rows}) == len(rows)


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
    monkeypatch.setattr(found, "make_pool", lambda place, workers: concurrent.futures.ThreadPoolExecutor(workers))
    monkeypatch.setattr(found, "_here", {"world": None})
    return found


def start(runner, claim, folder, **given):
    scale = module("claims.frame").Scale("tiny")
    place = runner.Place(folder, scale)
    runner._here["place"] = place
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
    assert start(runner, kind, tmp_path, minutes=0)[2] == 12 and not kind.calls
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
    assert compared.verdict == "holds" and compared.note.endswith("2 seeds")  # the third has not all settings
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
    # One more at KL 4, read at KL 1, 2 and 4: (1/2 + 0.707 + 1) / 3, and up to a tenth of noise at the end
    assert float(row["low"]) < float(row["effect"]) < float(row["high"]) and 0.66 < float(row["effect"]) < 0.81
    text = (out / "quality_toy.md").read_text()
    line = next(line for line in text.splitlines() if line.startswith("| one |"))
    assert "true reward, ours less theirs" in line and "| holds |" in line and "at KL 1, 2, 4; 3 seeds" in line
    assert module("claims.judging").RULE in text and module("claims.judging").SEARCH in text
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


def test_progress_elsewhere_than_in_a_terminal(runner, capsys, monkeypatch):
    clock = iter(range(0, 1000, 10))
    monkeypatch.setattr(runner.time, "monotonic", lambda: float(next(clock)))
    progress = runner.Progress(10, every=30)
    progress.bar = None
    for number in range(10):
        progress.step(f"run {number}", 0)
    lines = capsys.readouterr().out.splitlines()
    assert 3 <= len(lines) <= 5 and lines[-1].startswith("10 of 10 runs, 0 failed, about 0 min left")


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
    assert sum(full.values()) < 720  # of ten seconds each, two at a time
    keys = [(run.claim, run.key) for claim in claims.values() for run in claim(frame.SCALES["toy"]).runs()]
    assert len(set(keys)) == len(keys)
    assert statistics.fmean(full.values()) > 20


@pytest.mark.slow  # two processes that load the libraries, and two more
def test_a_process_that_dies_takes_no_other_run_along(tmp_path):
    runner, frame = module("claims.runner"), module("claims.frame")
    from tests.dying_claim import Dying

    place = runner.Place(tmp_path, frame.Scale("tiny", fine_tuning=2))
    claim = Dying(place.scale)
    assert runner.run_all([claim], place, workers=2, minutes=9, again=False) == 0
    errors = {each["setting"]: each.get("error") for each in place.results(claim)}
    assert errors == {0: None, 1: "the process died twice in this run", 2: None}


def test_the_same_claims_at_real_size(scale, world, tmp_path):
    """A model from a folder, prompts from a file, a reward function by name: what a hub and a GPU would give."""
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("\n".join(json.dumps({"prompt": prompt}) for prompt in world.prompts[:20]))
    flags = [
        "--model",
        world.name,
        "--prompts",
        str(prompts),
        "--gold",
        "trl_ext.demo.online:reward",
        "--max-new-tokens",
        "6",
    ]
    quality = module("quality")
    built = module("claims.real").build(tmp_path, scale, **quality.real_world(quality.parse(flags)))
    assert built.batches(16) == {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 8}
    claim = module("claims.offset").Offset(scale)
    points = claim.execute(built, claim.runs()[-1])["points"]
    assert points[0]["kl"] == 0 and points[-1]["kl"] > 0
    with pytest.raises(ValueError, match="column `chosen`"):
        built.foreign(built.prompts[:1], 0)
