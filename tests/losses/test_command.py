"""`trl-ext losses` with losses that are not ours."""

from dataclasses import dataclass, field

import pytest
import torch

from tests.losses.conftest import PLUGIN, REGISTERED
from trl_ext import list_losses, register_loss
from trl_ext.cli import main
from trl_ext.losses import Loss, loss_class


@pytest.fixture(autouse=True)
def wide(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")


def test_a_broken_plugin_does_not_empty_the_list(plugin, capsys):
    plugin(code="import no_such_module", broken="plugged:Plugged")
    plugin(
        package="other", code=REGISTERED.replace("'plugged'", "'whole'").replace("'pl'", "'wh'"), whole="other:Plugged"
    )
    plugin(package="third", code=PLUGIN, ipo="third:Plugged")
    names = list_losses()
    assert main(["losses"]) == 0
    table, reasons = capsys.readouterr().out.split("trl-ext losses NAME")
    assert {*names, "wh"} - {"broken"} <= {*table.split()} and "broken" not in table.split()
    assert (
        "plug-in plugged:Plugged that offers the loss 'broken' cannot be loaded: No module named 'no_such_module'"
        in reasons
    )
    assert "'ipo' of the plug-in third:Plugged is taken: TRL has it" in reasons


def test_a_broken_plugin_by_name(plugin, capsys):
    plugin(code="import no_such_module", broken="plugged:Plugged")
    assert main(["losses", "broken"]) == 2
    assert "cannot be loaded: No module" in capsys.readouterr().err


def test_hyperparameters_of_every_kind_are_shown(capsys):
    @register_loss("shown", aliases=["shwn"])
    @dataclass(frozen=True)
    class Shown(Loss):
        """Says what it does."""

        columns = ("score_chosen",)
        optional_columns = ("annotator_id",)
        reads = ("token_logps",)
        takes_groups = True
        scale: float
        names: tuple = (None, "a")
        rates: list[float] = field(default_factory=lambda: [1.0, 2.0])
        derived: float = field(default=0.0, init=False)

        def __call__(self, batch):
            return batch.chosen_logps

    assert main(["losses"]) == 0
    table = capsys.readouterr().out
    for text in ("scale=required", "names=(None, 'a')", "rates=[1.0, 2.0]", "shwn", "(annotator_id)"):
        assert text in table
    assert "derived" not in table
    assert main(["losses", "shwn"]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[0] == "shown  (aliases: shwn)"
    assert "Says what it does." in shown
    assert shown[-6:] == [
        "Hyper-parameters: scale=required, names=(None, 'a'), rates=[1.0, 2.0]",
        "Columns: score_chosen",
        "Optional columns: annotator_id",
        "Reads: policy, token log-probs",
        "State: none",
        "Takes groups of completions: yes",
    ]


@pytest.mark.parametrize(
    ("name", "lines"),
    [
        (
            "gpo",
            [
                "sppo_soft  (aliases: gpo)",
                "How sure: SPPO, with win rates, is the authors' code; GPO, with the scores of a preference model, is recalled.",
                "Hyper-parameters: target='win_rate'",
                "Columns: score_chosen, score_rejected",
                "Optional columns: none",
                "Reads: policy, reference",
                "State: none",
                "Takes groups of completions: no",
            ],
        ),
        (
            "anchored",
            [
                "Hyper-parameters: tau=None, beta_r=1.0, label_smoothing=0.0, standardize=False",
                "Columns: none",
                "Optional columns: preference_prob, score_chosen, score_rejected",
                "Takes groups of completions: yes",
            ],
        ),
        (
            "cpl",
            [
                "step_apo  (aliases: cpl)",
                "Columns: q_chosen, q_rejected",
                "Reads: policy, reference",
            ],
        ),
        (
            "e_dpo",
            [
                "reward_distillation  (aliases: d_dpo, e_dpo)",
                "Columns: score_chosen, score_rejected",
                "Takes groups of completions: no",
                "Takes lists of scores, one number per reward model: yes",
            ],
        ),
        (
            "drpo",
            ["Columns: none", "Reads: policy, behaviour log-probs", "Takes groups of completions: yes, and no pairs"],
        ),
        ("dmpo", ["Hyper-parameters: gamma=0.7", "Columns: none", "Reads: policy, reference, token log-probs"]),
        ("aligndistil", ["Reads: policy, teachers", "State: none", "Takes groups of completions: yes"]),
        ("simpo", ["Hyper-parameters: gamma_beta_ratio=0.5", "Columns: none", "Reads: policy", "State: none"]),
        ("alpha_dpo", ["alpha_dpo  (aliases: none)", "Reads: policy, reference", "State: mean, std"]),
        ("beta_dpo", ["Hyper-parameters: a=0.6, rho=0.2, momentum=0.9", "State: mean, std, batches"]),
        (
            "lcpo",
            [
                "robust_em  (aliases: lcpo, re_po)",
                "Hyper-parameters: base='sigmoid', eta=0.9, rate=0.1, gamma_beta_ratio=0.5, annotators=1",
                "Optional columns: annotator_id",
                "Reads: policy, reference (depends on the hyper-parameters)",
                "State: reliability, pairs",
            ],
        ),
        ("inpo", ["inpo  (aliases: none)", "Hyper-parameters: eta=0.0075, tau=0.0025"]),
        (
            "bvpo",
            [
                "Columns: chosen_empty_trace, rejected_empty_trace",
                "Optional columns: depend on the hyper-parameters",
                "Reads: policy, reference (depends on the hyper-parameters)",
                "State: none",
            ],
        ),
    ],
)
def test_what_one_loss_says(name, lines, capsys):
    assert main(["losses", name]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line not in shown] == []


def test_how_sure_a_formula_is(capsys):
    """Said where it was read neither in the paper nor in its authors' code."""
    unsure = {
        "asft",
        "bias_variance",
        "eurus",
        "inpo",
        "length_regularized",
        "reward_distillation",
        "robust_em",
        "sppo_soft",
        "step_apo",
        "trpa",
    }
    for name in ("offset", "cpo", "dmpo", "simpo", *unsure):
        assert main(["losses", name]) == 0
        said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("How sure: ")]
        assert said == ([f"How sure: {loss_class(name).evidence}"] if name in unsure else [])


def test_what_a_loss_asks_for_is_shown(capsys):
    @register_loss("asking")
    @dataclass(frozen=True)
    class Asking(Loss):
        reads = frozenset({"behaviour_logps", "token_logps", "ref_logps", "teachers"})
        names: tuple[str, ...] = ("mean", "std")

        def init_state(self):
            return dict.fromkeys(self.names, torch.zeros(()))

        def update(self, state, batch, reduce):
            return state

        def __call__(self, batch):
            return batch.delta

    @register_loss("unknown_yet")
    @dataclass(frozen=True)
    class UnknownYet(Asking):
        what: str

        @property
        def reads(self):
            return frozenset({self.what})

        names: tuple[str, ...] = field(kw_only=True)

    @register_loss("forgetful")
    @dataclass(frozen=True)
    class Forgetful(Asking):
        names: tuple[str, ...] = ()
        reads = frozenset()

    for name, *expected in [
        ("asking", "Reads: policy, reference, token log-probs, behaviour log-probs, teachers", "State: mean, std"),
        ("unknown_yet", "Reads: depends on the hyper-parameters", "State: depends on the hyper-parameters"),
        ("forgetful", "Reads: policy", "State: none"),
    ]:
        assert main(["losses", name]) == 0
        assert capsys.readouterr().out.splitlines()[-3:-1] == expected
