"""What a model card says of the losses and of the model that was trained."""

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pytest
import trl

import trl_ext
from tests.helpers import build
from trl_ext.trainers.dpo import DPOTrainer
from trl_ext.trainers.model_card import complete_model_card, describe_losses


def test_a_card_names_the_first_paper_and_the_losses(tiny_model_dir, tmp_path):
    trainer = build(
        DPOTrainer, trl_ext.DPOConfig, tiny_model_dir, tmp_path, loss_type=["sigmoid", "offset", "length_regularized"]
    )
    trainer.create_model_card(model_name="mine")
    card = (tmp_path / "README.md").read_text()
    assert "trained with sigmoid + offset + length_regularized, a method introduced in [Direct Preference" in card
    assert "Optimization with an Offset](https://huggingface.co/papers/2402.10571)." in card
    assert "\n- trl-ext\n" in card and "\n- offset\n" in card and "\n- length_regularized\n" in card
    assert "\n- trl\n" in card and "\n- sigmoid\n" not in card


def test_the_table_of_losses():
    @dataclass(frozen=True)
    class Two:
        paper: ClassVar[str] = "2401.00001, 2402.00002"
        where: Path = Path("a/b")
        alpha: float = 0.5

    first, second = (f"[{each}](https://huggingface.co/papers/{each})" for each in ("2401.00001", "2402.00002"))
    assert describe_losses({"sigmoid": 1.0, "two": 0.25}, {"two": Two()}, 0.3) == (
        "### Loss\n\n| loss | weight | hyper-parameters | paper |\n| --- | --- | --- | --- |\n| `sigmoid` | 1.0 |  |  |\n"
        f'| `two` | 0.25 | `{{"where": "a/b", "alpha": 0.5}}` | {first}, {second} |\n\n'
        "With [trl_ext](https://pypi.org/project/trl-ext/), `beta=0.3`."
    )


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("/data/models/mine", "the local model `mine`"),
        ("", "a model that has no name"),
        (None, "a model that has no name"),
    ],
)
def test_the_name_of_the_base_model(name, said, tmp_path):
    unnamed = "of [None](https://huggingface.co/None)"
    text = (
        f"---\ntags: []\n---\n\nA version {unnamed}. {unnamed}\n\n### Framework versions\n\n### Framework versions\n"
    )
    config = SimpleNamespace() if name is None else SimpleNamespace(_name_or_path=name)
    for losses, table in (("", ""), ("TABLE", "TABLE\n\n")):
        (tmp_path / "README.md").write_text(text)
        complete_model_card(str(tmp_path), SimpleNamespace(config=config), losses)
        body = (tmp_path / "README.md").read_text().split("---\n")[2]
        assert body == (
            f"\nA version of {said}. {unnamed}\n\n{table}### Framework versions\n\n### Framework versions\n"
        )


def test_model_card(tiny_model_dir, tmp_path):
    trainer = build(
        trl_ext.DPOTrainer, trl_ext.DPOConfig, tiny_model_dir, tmp_path, loss_type=["sigmoid", "offset", "bias_variance"],
        loss_weights=[1.0, 0.5, 0.25], loss_kwargs={"offset": {"alpha": 0.5}},
    )  # fmt: skip
    trainer.train()
    trainer.create_model_card(model_name="mine")
    card = (tmp_path / "README.md").read_text()
    assert "https://huggingface.co/papers/2402.10571" in card
    assert "https://huggingface.co/papers/2510.05095" in card
    assert '| `offset` | 0.5 | `{"alpha": 0.5, "scaling": "log", "margin_floor": null}` |' in card
    assert '| `bias_variance` | 0.25 | `{"alpha": 0.5, "base": "sigmoid", "base_kwargs": {}}` |' in card
    assert "amini2024direct" in card

    plain = build(trl_ext.DPOTrainer, trl_ext.DPOConfig, tiny_model_dir, tmp_path / "plain")
    plain.create_model_card(model_name="mine")
    theirs = build(trl.DPOTrainer, trl.DPOConfig, tiny_model_dir, tmp_path / "trl")
    theirs.create_model_card(model_name="mine")
    # TRL calls a model from a folder "None", and links to it
    name = f"the local model `{tiny_model_dir.name}`"
    assert f"fine-tuned version of {name}." in _body(tmp_path / "plain" / "README.md")
    unnamed = _body(tmp_path / "trl" / "README.md").replace("[None](https://huggingface.co/None)", name)
    assert _body(tmp_path / "plain" / "README.md") == unnamed


def _body(path):
    return path.read_text().split("# Model Card")[1]
