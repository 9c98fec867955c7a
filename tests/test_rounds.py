"""Rounds: stages done once, killed runs, recipes."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from datasets import Dataset, load_from_disk
from safetensors.torch import load_file

import trl_ext
from tests.conftest import preference_rows
from trl_ext.cli import main
from trl_ext.rounds import IterativeDPO, RoundsConfig
from trl_ext.rounds.extrapolate import extrapolate
from trl_ext.rounds.log_probs import completion_log_probs, implicit_rewards
from trl_ext.rounds.shaping import balance_lengths, drop_truncated, mix_replay


RECIPES = sorted((Path(__file__).resolve().parents[1] / "examples" / "rounds").glob("*.yaml"))
TRAINING = {"max_steps": 2, "use_cpu": True, "bf16": False, "report_to": "none", "per_device_train_batch_size": 2,
            "learning_rate": 1e-2, "save_strategy": "no", "disable_tqdm": True}  # fmt: skip


def length(prompts, completions):
    return [float(len(completion)) for completion in completions]


def longer(prompts, first, second):
    return [1.0 if len(a) > len(b) else 0.0 if len(a) < len(b) else 0.5 for a, b in zip(first, second, strict=True)]


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": row["prompt"]}) for row in preference_rows(4)))
    return str(path)


def settings(model_dir, prompts, folder, **overrides):
    training = {**TRAINING, **overrides.pop("training", {})}
    return {
        "model": str(model_dir),
        "prompts": prompts,
        "judge": "tests.test_rounds:length",
        "output_dir": str(folder),
        "rounds": 2,
        "n": 3,
        "sampling": {"max_new_tokens": 6, "batch_size": 2},
        "training": training,
        **overrides,
    }


def run(*args, **kwargs):
    return IterativeDPO(RoundsConfig(**settings(*args, **kwargs))).run()


def test_two_rounds(tiny_model_dir, prompts, tmp_path):
    metrics = run(tiny_model_dir, prompts, tmp_path / "run")
    assert [row["round"] for row in metrics] == [1, 2, 3]
    for number in (1, 2):
        folder = tmp_path / "run" / f"round-{number}"
        pairs = load_from_disk(folder / "pairs")
        assert all(row["score_chosen"] > row["score_rejected"] for row in pairs)
        assert (folder / "model" / "model.safetensors").exists() and (folder / "log.json").exists()
    first, second = (load_from_disk(tmp_path / "run" / f"round-{n}" / "samples") for n in (1, 2))
    assert first["completions"] != second["completions"]
    assert json.loads((tmp_path / "run" / "metrics.json").read_text()) == metrics


def test_what_is_done_is_not_done_again(tiny_model_dir, prompts, tmp_path, monkeypatch):
    first = run(tiny_model_dir, prompts, tmp_path / "run")
    for name in ("sample_completions", "score_preferences", "DPOTrainer"):
        monkeypatch.setattr(f"trl_ext.rounds.iterate.{name}", None)
    assert run(tiny_model_dir, prompts, tmp_path / "run") == first


def test_more_rounds_can_be_added_and_other_settings_not(tiny_model_dir, prompts, tmp_path):
    short = run(tiny_model_dir, prompts, tmp_path / "run", rounds=1)
    long = run(tiny_model_dir, prompts, tmp_path / "run", rounds=2)
    assert long[0] == short[0] and long == run(tiny_model_dir, prompts, tmp_path / "new", rounds=2)
    with pytest.raises(ValueError, match=r"other settings: \['n'\] differ"):
        run(tiny_model_dir, prompts, tmp_path / "run", n=4)


def test_a_reference_that_is_kept(tiny_model_dir, prompts, tmp_path):
    kept = run(tiny_model_dir, prompts, tmp_path / "kept", reference="keep")
    reset = run(tiny_model_dir, prompts, tmp_path / "reset", reference="reset")
    assert kept[1] == reset[1]
    losses = [json.loads((tmp_path / name / "round-2" / "log.json").read_text()) for name in ("kept", "reset")]
    first = [next(entry["train_loss"] for entry in log if "train_loss" in entry) for log in losses]
    assert first[0] != first[1]


KILL = """
import json, sys
from trl_ext.rounds import IterativeDPO, RoundsConfig
if __name__ == "__main__":
    IterativeDPO(RoundsConfig(**json.loads(sys.argv[1]))).run()
"""


def weights(folder):
    return load_file(folder / "round-2" / "model" / "model.safetensors")


@pytest.mark.slow
def test_killed_at_random_and_started_again(tiny_model_dir, prompts, tmp_path):
    training = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2}
    whole = run(tiny_model_dir, prompts, tmp_path / "whole", training=training)
    config = settings(tiny_model_dir, prompts, tmp_path / "killed", training=training)
    command = [sys.executable, "-c", KILL, json.dumps(config)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1])}
    chance = random.Random(0)
    for _ in range(3):
        process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            process.wait(timeout=10 + chance.random() * 6)  # past the imports, in the middle of the work
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            time.sleep(0.1)
    assert IterativeDPO(RoundsConfig(**config)).run() == whole
    for name, value in weights(tmp_path / "whole").items():
        assert torch.equal(value, weights(tmp_path / "killed")[name]), name


@pytest.mark.parametrize("stage", ["samples", "scored", "pairs", "model"])
def test_a_stage_that_fails_half_way(stage, tiny_model_dir, prompts, tmp_path):
    whole = run(tiny_model_dir, prompts, tmp_path / "whole", rounds=1)
    folder = tmp_path / "run"
    run(tiny_model_dir, prompts, folder, rounds=1)
    # as it is left by a kill in the middle: a folder without its mark
    order = ["samples", "scored", "pairs", "model"]
    for later in order[order.index(stage) :]:
        (folder / "round-1" / f"{later}.done").unlink()
    next((folder / "round-1" / stage).iterdir()).unlink()
    assert run(tiny_model_dir, prompts, folder, rounds=1)[0] == whole[0]


# Recipes


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe(path, tiny_model_dir, prompts, tmp_path):
    replay = tmp_path / "replay.jsonl"
    replay.write_text(
        "\n".join(json.dumps({k: row[k] for k in ("prompt", "chosen", "rejected")}) for row in preference_rows(30))
    )
    recipe = yaml.safe_load(path.read_text())
    pair = isinstance(recipe["judge"], dict)
    overrides = {
        "model": str(tiny_model_dir),
        "prompts": prompts,
        "output_dir": str(tmp_path / "run"),
        "rounds": 2,
        "n": 4,
        "drop_truncated": False,
        "sampling.max_new_tokens": 8,
        **{f"training.{name}": value for name, value in TRAINING.items()},
    }
    if pair:
        overrides["judge"] = {"pair": "tests.test_rounds:longer"}
    elif recipe["judge"] != "implicit":
        overrides["judge"] = "tests.test_rounds:length"
    if recipe.get("implicit_reference"):
        changed = tmp_path / "other"
        model = trl_ext.rounds.iterate.AutoModelForCausalLM.from_pretrained(tiny_model_dir)
        with torch.no_grad():
            for value in model.parameters():
                value.mul_(0.9)
        model.save_pretrained(changed)
        trl_ext.rounds.iterate.AutoTokenizer.from_pretrained(tiny_model_dir).save_pretrained(changed)
        overrides["implicit_reference"] = str(changed)
    if recipe.get("replay"):
        overrides["replay"] = str(replay)
    metrics = IterativeDPO(RoundsConfig.from_yaml(path, overrides)).run()
    assert len(metrics) == 3
    if recipe.get("extrapolation"):
        assert (tmp_path / "run" / "round-2" / "policy" / "model.safetensors").exists()
    page = path.with_suffix(".md").read_text()
    assert "trl-ext iterate" in page and f"{path.name}" in page


def test_every_recipe_is_listed():
    readme = (RECIPES[0].parent / "README.md").read_text()
    assert all(f"[{path.stem}]({path.stem}.md)" in readme for path in RECIPES)


# Parts


def test_log_probs_by_hand(tiny_model_dir):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    rows = [("what", " a film"), ("how so", " good and very dull story")]
    for (prompt, completion), value in zip(rows, completion_log_probs(str(tiny_model_dir), rows), strict=True):
        start = len(tokenizer(prompt)["input_ids"])
        ids = torch.tensor([tokenizer(prompt + completion + tokenizer.eos_token)["input_ids"]])
        with torch.no_grad():
            logps = model(input_ids=ids).logits[0, start - 1 : -1].log_softmax(-1)
        assert value == pytest.approx(logps.gather(1, ids[0, start:, None]).sum().item(), abs=1e-3)


def test_implicit_rewards_of_a_model_to_itself_are_nothing(tiny_model_dir):
    groups = Dataset.from_list([{"prompt": "what", "completions": [" a", " good film"]}])
    scored = implicit_rewards(groups, str(tiny_model_dir), str(tiny_model_dir))
    assert scored["scores"][0] == pytest.approx([0.0, 0.0], abs=1e-5)


def test_lengths_are_balanced():
    rng = random.Random(0)
    rows = []
    for i in range(40):
        completions = ["x" * rng.randint(10, 200) for _ in range(6)]
        rows.append(
            {
                "prompt": str(i),
                "completions": completions,
                "scores": [0.05 * len(c) + rng.gauss(0, 3) for c in completions],
            }
        )
    groups = Dataset.from_list(rows)
    shaped, penalty = balance_lengths(groups)

    def gap(data):
        total = 0
        for row in data:
            best, worst = (row["scores"].index(f(row["scores"])) for f in (max, min))
            total += len(row["completions"][best]) - len(row["completions"][worst])
        return abs(total) / len(data)

    assert gap(shaped) < gap(groups) / 5 and 0.02 < penalty < 0.1
    assert shaped[0]["scores"] == pytest.approx(
        [s - penalty * len(c) for s, c in zip(rows[0]["scores"], rows[0]["completions"], strict=True)]
    )


def test_truncated_completions_are_dropped():
    rows = [{"prompt": "p", "completions": ["a", "b", "c"], "scores": [1.0, 2.0, 3.0], "stop_reasons": ["stop", "length", "stop"]},
            {"prompt": "q", "completions": ["a", "b"], "scores": [1.0, 2.0], "stop_reasons": ["stop", "length"]}]  # fmt: skip
    (kept,) = drop_truncated(Dataset.from_list(rows))
    assert kept["completions"] == ["a", "c"] and kept["scores"] == [1.0, 3.0]
    with pytest.raises(ValueError, match="drop_truncated"):
        drop_truncated(Dataset.from_list(rows[1:]))


def test_replay():
    columns = ("prompt", "chosen", "rejected")
    data = Dataset.from_list([{k: row[k] for k in columns} for row in preference_rows(20)])
    new = data.select(range(6))
    old = data.select(range(6, 20))
    mixed = mix_replay(new, old, 0.5, seed=0)
    assert len(mixed) == 12 and sum(row in new.to_list() for row in mixed) == 6
    with pytest.raises(ValueError, match="needs 18 pairs to replay, and there are 14"):
        mix_replay(new, old, 0.75, seed=0)


def test_extrapolation_by_hand(tiny_model_dir, tmp_path):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    before = {name: value.clone() for name, value in model.named_parameters()}
    with torch.no_grad():
        for value in model.parameters():
            value.mul_(2)
    model.save_pretrained(tmp_path / "trained")
    extrapolate(tmp_path / "trained", tiny_model_dir, 0.5, tmp_path / "out")
    for name, value in AutoModelForCausalLM.from_pretrained(tmp_path / "out").named_parameters():
        torch.testing.assert_close(value, 2.5 * before[name])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rounds": 0}, "`rounds=0`"),
        ({"n": 1}, "`n=1`"),
        ({"pairing": "best"}, "choose one of"),
        ({"reference": "ema"}, "choose one of"),
        ({"judge": "implicit"}, "implicit_reference"),
        ({"judge": "tests.test_rounds:nothing"}, "cannot be imported"),
        ({"judge": {"vote": []}}, "expected one of the keys"),
        ({"replay_share": 1.0}, r"must lie in \[0, 1\)"),
        ({"training": {"output_dir": "x"}}, "may not set"),
        ({"training": {"loss_type": "ofset"}}, "Did you mean 'offset'"),
        ({"training": {"loss_type": "bias_variance"}}, "which rounds do not make"),
        ({"sampling": {"max_tokens": 3}}, r"unknown settings \['max_tokens'\]"),
        ({"judge": "implicit", "implicit_reference": "x", "scoring": {"temperature": 2.0}}, "unknown settings"),
    ],
)
def test_refused(change, message, tiny_model_dir, prompts, tmp_path):
    with pytest.raises(ValueError, match=message):
        run(tiny_model_dir, prompts, tmp_path / "run", **change)
    assert not (tmp_path / "run" / "round-1").exists()


def test_command(tiny_model_dir, prompts, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(Path(__file__).resolve().parents[1])
    path = tmp_path / "rounds.yaml"
    path.write_text(yaml.safe_dump(settings(tiny_model_dir, prompts, tmp_path / "run")))
    assert main(["iterate", str(path), "--rounds", "1", "--training.max_steps", "1"]) == 0
    assert "What the policy wrote" in capsys.readouterr().out
    path.write_text(yaml.safe_dump({**settings(tiny_model_dir, prompts, tmp_path / "run"), "round": 3}))
    assert main(["iterate", str(path)]) == 2
    assert "unknown settings ['round']" in capsys.readouterr().err
    assert main(["iterate", str(tmp_path / "none.yaml")]) == 2
