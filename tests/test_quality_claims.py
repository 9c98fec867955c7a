"""The claims of papers as experiments: their data, their world, and each claim's runs at the tiniest size. No claim is judged here."""

import json
import math

import pytest
import torch

from tests.benchmark_modules import module


NAMES = ["robust_em", "offset", "anchored", "length_regularized", "bias_variance", "cyclic", "margin_adaptive"]


def path_of(*points):
    return [{"kl": kl, "reward": reward, "length": 10 * reward} for kl, reward in points]


@pytest.fixture(scope="module")
def scale():
    return module("claims.frame").Scale("tiny", seeds=2, settings=1, work=0.02, samples=6, fine_tuning=2)


@pytest.fixture(scope="module")
def world(scale, tmp_path_factory):
    threads = torch.get_num_threads()
    built = module("claims.toy").build(tmp_path_factory.mktemp("world"), scale)
    built.max_new_tokens = 8
    yield built
    torch.set_num_threads(threads)


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
        for side in ("robust_em", "DPO") for setting in (0, 1) for seed in (0, 1, 2)
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


def test_kl_is_the_sum_over_tokens_of_that_between_next_tokens(world):
    other = world.clone(world.start)
    with torch.no_grad():
        for weight in other.parameters():
            weight += 0.02 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    other.train()
    drawn = world.sample(other, [*world.held_out[:2], f"think it over , then {world.held_out[2]}"], seed=1)
    assert world.kl(world.start, drawn) == 0
    expected = 0.0
    for prompt, completion in zip(drawn.prompt_ids, drawn.ids, strict=True):
        ids = torch.cat([prompt, completion])[None]
        with torch.no_grad():
            ours, theirs = (
                model(input_ids=ids).logits[0, len(prompt) - 1 : -1].double().softmax(-1)
                for model in (other, world.start)
            )
        assert len(ours) == len(completion) <= world.max_new_tokens
        expected += (ours * (ours / theirs).log()).sum().item() / 3
    assert expected > 0.01 and world.kl(other, drawn) == pytest.approx(expected, rel=1e-4)
    assert other.training


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
