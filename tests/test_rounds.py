"""Rounds: stages done once, killed runs, recipes."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from datasets import load_from_disk
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.conftest import preference_rows
from trl_ext.cli import main
from trl_ext.rounds import IterativeDPO, RoundsConfig


RECIPES = sorted((Path(__file__).resolve().parents[1] / "examples" / "rounds").glob("*.yaml"))
TRAINING = {"max_steps": 2, "use_cpu": True, "bf16": False, "report_to": "none", "per_device_train_batch_size": 2,
            "learning_rate": 1e-2, "save_strategy": "no", "disable_tqdm": True}  # fmt: skip


def length(prompts, completions):
    return [float(len(completion)) for completion in completions]


def longer(prompts, first, second):
    return [1.0 if len(a) > len(b) else 0.0 if len(a) < len(b) else 0.5 for a, b in zip(first, second, strict=True)]


def prompts_file(folder, rows=4):
    path = folder / "prompts.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": row["prompt"]}) for row in preference_rows(rows)))
    return str(path)


@pytest.fixture
def prompts(tmp_path):
    return prompts_file(tmp_path)


def settings(model_dir, prompts, folder, **overrides):
    training = {**TRAINING, **overrides.pop("training", {})}
    return {
        "model": str(model_dir),
        "prompts": prompts,
        **({} if "judge" in overrides else {"reward_funcs": "tests.test_rounds:length"}),
        "output_dir": str(folder),
        "rounds": 2,
        "num_generations": 3,
        "sampling": {"max_new_tokens": 6, "batch_size": 2},
        "training": training,
        **overrides,
    }


def run(*args, **kwargs):
    return IterativeDPO(RoundsConfig(**settings(*args, **kwargs))).run()


def test_rounds_without_a_reference(tiny_model_dir, prompts, tmp_path):
    assert len(run(tiny_model_dir, prompts, tmp_path / "run", training={"loss_type": "simpo"})) == 3


@pytest.mark.parametrize(
    ("loss_type", "expected"), [("simpo", False), ("anchored", True), ("sigmoid", True), (["simpo", "sigmoid"], True)]
)
def test_which_rounds_have_a_reference(loss_type, expected, tiny_model_dir, prompts, tmp_path):
    config = RoundsConfig(**settings(tiny_model_dir, prompts, tmp_path / "run", training={"loss_type": loss_type}))
    assert IterativeDPO(config)._reads_reference == expected


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
    with pytest.raises(ValueError, match=r"other settings: \['num_generations'\] differ"):
        run(tiny_model_dir, prompts, tmp_path / "run", num_generations=4)


@pytest.fixture(scope="module")
def one_round(tiny_model_dir, tmp_path_factory):
    """A finished run of one round, its prompts and its metrics."""
    folder = tmp_path_factory.mktemp("one-round")
    path = prompts_file(folder)
    return folder / "run", path, run(tiny_model_dir, path, folder / "run", rounds=1)


@pytest.mark.parametrize("stage", ["samples", "scored", "pairs", "model"])
def test_a_stage_that_fails_half_way(stage, one_round, tiny_model_dir, tmp_path):
    whole, path, metrics = one_round
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    # as it is left by a kill in the middle: a folder that is begun and not done
    order = ["samples", "scored", "pairs", "model"]
    for later in order[order.index(stage) :]:
        (folder / "round-1" / f"{later}.done").unlink()
    next((folder / "round-1" / stage).iterdir()).unlink()
    (folder / "round-1" / stage / "left-over").write_text("half")
    assert run(tiny_model_dir, path, folder, rounds=1) == metrics
    assert not (folder / "round-1" / stage / "left-over").exists()
    weights = [load_file(each / "round-1" / "model" / "model.safetensors") for each in (whole, folder)]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


# Recipes


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe(path, tiny_model_dir, prompts, tmp_path):
    replay = tmp_path / "replay.jsonl"
    replay.write_text(
        "\n".join(json.dumps({k: row[k] for k in ("prompt", "chosen", "rejected")}) for row in preference_rows(30))
    )
    recipe = yaml.safe_load(path.read_text())
    overrides = {
        "model": str(tiny_model_dir),
        "prompts": prompts,
        "output_dir": str(tmp_path / "run"),
        "rounds": 2,
        "num_generations": 4,
        "drop_truncated": False,
        "sampling.max_new_tokens": 8,
        **{f"training.{name}": value for name, value in TRAINING.items()},
    }
    if "judge" in recipe:
        overrides["judge"] = "tests.test_rounds:longer"
    elif recipe["reward_funcs"] != "implicit":
        overrides["reward_funcs"] = "tests.test_rounds:length"
    if recipe.get("implicit_reference"):
        changed = tmp_path / "other"
        model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
        with torch.no_grad():
            for value in model.parameters():
                value.mul_(0.9)
        model.save_pretrained(changed)
        AutoTokenizer.from_pretrained(tiny_model_dir).save_pretrained(changed)
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
