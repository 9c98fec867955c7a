"""The measured weight of `bias_variance`."""

import json
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset

import trl_ext
from tests.conftest import preference_rows
from tests.helpers import assert_same_parameters, build, history, parameters
from trl_ext.trainers import mixing
from trl_ext.trainers.mixing import MixingEstimate, estimate_alpha
from trl_ext.trainers.terms import Terms


def trainer(model_dir, tmp_path, rows=None, **kwargs):
    dataset = Dataset.from_list(rows or preference_rows(8))
    options = {"loss_type": "bias_variance", "loss_kwargs": {"alpha": "auto"}, **kwargs}
    return build(trl_ext.DPOTrainer, trl_ext.DPOConfig, model_dir, tmp_path, dataset=dataset, **options)


def by_definition(ours, rows):
    """From the gradients of each row, all kept."""
    gradients = []
    for alpha in (1.0, 0.0):
        side = []
        ours._terms = Terms({"bias_variance": trl_ext.get_loss("bias_variance", alpha=alpha)}, {"bias_variance": 1.0})
        for example in list(ours.train_dataset)[:rows]:
            ours.model.zero_grad()
            ours.compute_loss(ours.model, ours._prepare_inputs(ours.data_collator([example]))).backward()
            side.append(torch.cat([p.grad.flatten() for p in ours.model.parameters() if p.grad is not None]).double())
        gradients.append(torch.stack(side))
    return gradients


def test_moments_are_those_of_the_rows(tiny_model_dir, tmp_path):
    ours = trainer(tiny_model_dir, tmp_path)
    estimate = estimate_alpha(ours, rows=6)
    traced, empty = by_definition(ours, 6)
    batch = ours.args.train_batch_size
    centered = [g - g.mean(0) for g in (traced, empty)]
    s_t, s_e, s_te = ((a * b).sum().item() / 5 for a, b in ((centered[0],) * 2, (centered[1],) * 2, centered))
    bias = max(((empty.mean(0) - traced.mean(0)) ** 2).sum().item() - (s_t + s_e - 2 * s_te) / 6, 0.0)
    assert estimate.traced_variance == pytest.approx(s_t / batch, rel=1e-3)
    assert estimate.empty_variance == pytest.approx(s_e / batch, rel=1e-3)
    assert estimate.covariance == pytest.approx(s_te / batch, rel=1e-2, abs=1e-6)
    assert estimate.empty_bias == pytest.approx(bias, rel=1e-2, abs=1e-6)
    assert not estimate.within_prompts and estimate.rows == 6


class Linear(torch.nn.Module):
    """A loss that is linear in the weights, so that its gradients are the rows' own numbers."""

    def __init__(self):
        super().__init__()
        self.weights = torch.nn.Parameter(torch.tensor([0.3, -0.2]))


class Toy(SimpleNamespace):
    """What `estimate_alpha` reads of a trainer."""

    def compute_loss(self, model, inputs):
        alpha = self._terms.losses["bias_variance"].alpha
        traced, empty = (torch.tensor(inputs[name], dtype=torch.float32) for name in ("traced", "empty"))
        return (model.weights * (alpha * traced + (1 - alpha) * empty)).sum()


def measured(rows: list[tuple], prompts: list[int] | None = None, batch=2, steps=3, processes=1) -> MixingEstimate:
    """The estimate for rows of (traced gradient, empty gradient)."""
    prompts = prompts or list(range(len(rows)))
    dataset = [
        {
            "prompt_ids": [prompt],
            "chosen_ids": [1],
            "further_pairs": [{"chosen_ids": [1]}],
            "traced": traced,
            "empty": empty,
        }
        for prompt, (traced, empty) in zip(prompts, rows, strict=True)
    ]
    toy = Toy(
        model=Linear(),
        train_dataset=dataset,
        data_collator=lambda examples: examples[0],
        args=SimpleNamespace(train_batch_size=batch, gradient_accumulation_steps=steps, world_size=processes),
        is_world_process_zero=lambda: False,
        is_deepspeed_enabled=False,
        is_fsdp_enabled=False,
        _terms=Terms({"bias_variance": trl_ext.get_loss("bias_variance", alpha="auto")}, {"bias_variance": 1.0}),
        _means={},
        _metrics={},
        _prepare_inputs=lambda inputs: inputs,
        _total_train_tokens=0,
        loss_types=[],
        loss_weights=[],
    )
    return estimate_alpha(toy)


# Mean traced gradient (2, 1) with deviations (+-1, +-1); mean empty gradient (0, 2) with deviations (0, +-1)
FOUR = [((1, 0), (0, 1)), ((3, 0), (0, 1)), ((1, 2), (0, 3)), ((3, 2), (0, 3))]


def smallest(a: float, b: float, c: float) -> float:
    """The weight with the smallest a x^2 + b (1 - x)^2 + 2 c x (1 - x), by looking at all of them."""
    grid = torch.linspace(0, 1, 100_001, dtype=torch.float64)
    return grid[(a * grid**2 + b * (1 - grid) ** 2 + 2 * c * grid * (1 - grid)).argmin()].item()


def test_alpha_of_known_gradients():
    estimate = measured(FOUR)
    # Of single rows: tr S_t = 4 * 2 / 3, tr S_e = 4 * 1 / 3, tr S_te = 4 * 1 / 3; a step is the mean of 2 * 3 rows
    assert estimate.traced_variance == pytest.approx(8 / 3 / 6)
    assert estimate.empty_variance == pytest.approx(4 / 3 / 6)
    assert estimate.covariance == pytest.approx(4 / 3 / 6)
    # |(0, 2) - (2, 1)|^2 = 5, less (8 + 4 - 2 * 4) / 3 / 4 that noise adds to the square of a mean of four
    assert estimate.empty_bias == pytest.approx(5 - 1 / 3)
    a, b, c = 4 / 9, 44 / 9, 2 / 9
    assert estimate.alpha == pytest.approx(21 / 22)
    assert estimate.alpha == pytest.approx(smallest(a, b, c), abs=1e-5)
    assert estimate.error(0.0) == pytest.approx(b) and estimate.error(1.0) == pytest.approx(a)
    assert estimate.error(0.5) == pytest.approx((a + b + 2 * c) / 4)
    assert estimate.variance(0.5) == pytest.approx((4 / 9 + 2 / 9 + 4 / 9) / 4)
    x, y = 21 / 22, 1 / 22
    assert estimate.variance_ratio == pytest.approx((x * x * 4 + 2 * x * y * 2 + y * y * 2) / 4)
    assert (estimate.rows, estimate.parameters, estimate.within_prompts) == (4, 2, False)


@pytest.mark.parametrize("step", [{"batch": 12}, {"steps": 18}, {"processes": 6}], ids=str)
def test_a_step_is_the_mean_of_all_its_rows(step):
    estimate = measured(FOUR, **step)
    assert estimate.traced_variance == pytest.approx(8 / 3 / 36)
    assert estimate.empty_bias == pytest.approx(14 / 3)  # which no number of rows makes smaller
    assert estimate.alpha == pytest.approx((14 / 3) / (4 / 3 / 36 + 14 / 3))


def test_variances_within_prompts():
    estimate = measured(FOUR, prompts=[1, 1, 2, 2])
    # Of each prompt: traced (+-1, 0) around its mean, empty all alike
    assert estimate.within_prompts
    assert estimate.traced_variance == pytest.approx(2 / 6)
    assert estimate.empty_variance == estimate.covariance == 0
    assert estimate.alpha == pytest.approx((14 / 3) / (1 / 3 + 14 / 3))


@pytest.mark.parametrize(
    ("rows", "alpha"),
    [
        ([((1, 0), (2, 0)), ((-1, 0), (-2, 0))], 1.0),  # A = 2, B = 8, C = 4: (8 - 4) / (2 + 8 - 8) = 2
        ([((2, 0), (1, 0)), ((-2, 0), (-1, 0))], 0.0),  # the other way round: -1
        ([((1, 0), (1, 0)), ((2, 0), (2, 0))], 0.5),  # the same gradients: any weight
    ],
)
def test_alpha_lies_between_0_and_1(rows, alpha):
    assert measured(rows, batch=1, steps=1).alpha == alpha


def test_evaluation_before_training_measures_first(tiny_model_dir, tmp_path):
    ours = trainer(tiny_model_dir, tmp_path)
    metrics = ours.evaluate()
    fixed = trainer(tiny_model_dir, tmp_path, loss_kwargs={"alpha": metrics["eval_mixing/alpha"]})
    assert metrics["eval_mixing/alpha"] == pytest.approx(estimate_alpha(fixed).alpha)
    assert metrics["eval_loss"] == pytest.approx(fixed.evaluate()["eval_loss"], rel=1e-6)
    ours.train()
    fixed.train()
    assert_same_parameters(parameters(ours), parameters(fixed))


def test_several_traces_of_a_prompt(tiny_model_dir, tmp_path):
    first = preference_rows(8)
    rows = [{**row, "prompt": first[i // 4]["prompt"]} for i, row in enumerate(first)]
    ours = trainer(tiny_model_dir, tmp_path, rows)
    estimate = estimate_alpha(ours, rows=8)
    assert estimate.within_prompts
    traced, _ = by_definition(ours, 8)
    prompts = [tuple(example["prompt_ids"]) for example in ours.train_dataset]
    variances = []
    for prompt in dict.fromkeys(prompts):
        group = traced[torch.tensor([p == prompt for p in prompts])]
        if len(group) > 1:
            variances.append(((group - group.mean(0)) ** 2).sum().item() / (len(group) - 1))
    expected = sum(variances) / len(variances) / ours.args.train_batch_size
    assert estimate.traced_variance == pytest.approx(expected, rel=1e-3)


def test_auto_is_used_logged_and_leaves_no_trace(tiny_model_dir, tmp_path):
    ours = trainer(tiny_model_dir, tmp_path)
    before = parameters(ours)
    estimate = estimate_alpha(ours)
    assert_same_parameters(parameters(ours), before)
    assert not any(ours._metrics["train"].values()) and not ours._means["train"].over_processes()
    assert ours.model.lm_head.weight.grad is None
    ours.train()
    entry = history(ours)[0]
    assert entry["mixing/alpha"] == pytest.approx(estimate.alpha) and 0 <= entry["mixing/variance_ratio"] < 2
    fixed = trainer(tiny_model_dir, tmp_path, loss_kwargs={"alpha": estimate.alpha})
    fixed.train()
    assert_same_parameters(parameters(ours), parameters(fixed))


def test_a_resumed_run_keeps_its_alpha(tiny_model_dir, tmp_path):
    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    whole = trainer(tiny_model_dir, tmp_path / "run", **options)
    whole.train()
    again = trainer(tiny_model_dir, tmp_path / "again", **options)
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert_same_parameters(parameters(again), parameters(whole))


def test_refused(tiny_model_dir, tmp_path):
    with pytest.raises(ValueError, match="or 'auto'"):
        trl_ext.get_loss("bias_variance", alpha="best")
    plain = build(trl_ext.DPOTrainer, trl_ext.DPOConfig, tiny_model_dir, tmp_path)
    with pytest.raises(ValueError, match="needs a trainer with"):
        estimate_alpha(plain)
    rows = [
        {**row, "chosen_empty_trace": None, "rejected_empty_trace": None} if i else row
        for i, row in enumerate(preference_rows(4))
    ]
    with pytest.raises(ValueError, match="at least two rows"):
        estimate_alpha(trainer(tiny_model_dir, tmp_path, rows))
    with pytest.raises(ValueError, match="picked none"):
        estimate_alpha(trainer(tiny_model_dir, tmp_path), parameters=lambda name: False)


def test_large_models_are_measured_in_their_last_layer(tiny_model_dir, tmp_path, monkeypatch):
    ours = trainer(tiny_model_dir, tmp_path)
    ours.model.model.layers[0].mlp.up_proj.weight.requires_grad_(False)  # or all layers would be of one size
    named = {name: value.numel() for name, value in ours.model.named_parameters() if value.requires_grad}
    assert "model.layers.0.mlp.up_proj.weight" not in named
    monkeypatch.setattr(mixing, "MANY", sum(named.values()))  # not more than that
    assert estimate_alpha(ours, rows=2).parameters == sum(named.values())
    monkeypatch.setattr(mixing, "MANY", sum(named.values()) - 1)
    first, last = (
        sum(size for name, size in named.items() if name.startswith(f"model.layers.{layer}.")) for layer in (0, 1)
    )
    assert 0 < first < last < sum(named.values()) and estimate_alpha(ours, rows=2).parameters == last
    # What was picked by name counts, whatever its number
    assert estimate_alpha(ours, rows=2, parameters=lambda name: "norm" in name).parameters == sum(
        size for name, size in named.items() if "norm" in name
    )


@pytest.mark.parametrize("kind", ["deepspeed", "fsdp"])
def test_sharded_models_are_not_measured(kind):
    placed = SimpleNamespace(is_deepspeed_enabled=kind == "deepspeed", is_fsdp_enabled=kind == "fsdp")
    with pytest.raises(ValueError, match=f"when {'DeepSpeed' if kind == 'deepspeed' else 'FSDP'} has not placed"):
        mixing.check_measurable(placed)


def test_what_an_estimate_says_of_itself():
    estimate = MixingEstimate(0.25, 8.0, 4.0, 2.0, 3.0, 6, True, 10)
    # 1/16 * 8 + 2 * 3/16 * 2 + 9/16 * 4 = 0.5 + 0.75 + 2.25, and 9/16 * 3 of bias
    assert estimate.variance(0.25) == 3.5 and estimate.error(0.25) == 3.5 + 27 / 16
    assert estimate.variance_ratio == 3.5 / 8
    assert MixingEstimate(0.25, 0.0, 4.0, 2.0, 3.0, 6, True, 10).variance_ratio == 1.0
    assert MixingEstimate(**json.loads(estimate.to_json())) == estimate and estimate.to_json().endswith("}\n")


def test_what_a_run_began_with_is_read_from_its_checkpoint(tiny_model_dir, tmp_path):
    first = MixingEstimate(0.25, 8.0, 4.0, 2.0, 3.0, 6, True, 10)
    own = MixingEstimate(0.75, 8.0, 4.0, 2.0, 3.0, 6, True, 10)
    ours = trainer(tiny_model_dir, tmp_path)
    for step, text in ((1, own.to_json()), (2, first.to_json())):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "bias_variance_mixing.json").write_text(text)
    measured = ours._mixing
    for step, expected in ((2, first), (1, own)):
        measured.before_training(str(tmp_path / f"checkpoint-{step}"))
        assert measured.estimate == expected and ours._terms.losses["bias_variance"].alpha == expected.alpha
    measured.estimate = own
    for nothing in (None, str(tmp_path)):  # measured before, such as by an evaluation
        ours._terms.losses["bias_variance"] = trl_ext.get_loss("bias_variance", alpha=0.5)
        measured.before_training(nothing)
        assert measured.estimate is own and ours._terms.losses["bias_variance"].alpha == 0.75
    measured.before_evaluation()  # measures nothing again
    assert measured.estimate is own


def test_a_weight_that_was_given_is_not_measured(tiny_model_dir, tmp_path):
    ours = trainer(tiny_model_dir, tmp_path, loss_kwargs={"alpha": 0.25})
    ours._mixing.before_training(None)
    ours._mixing.before_evaluation()
    assert ours._mixing.estimate is None and ours._mixing.metrics == {}
    ours._mixing.save(str(tmp_path))
    assert not (tmp_path / "bias_variance_mixing.json").exists()
