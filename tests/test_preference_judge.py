"""General preference models as judges of two: in `score_preferences`, both trainers and rounds."""

import json
import math

import pytest
import torch
from datasets import Dataset
from transformers import AutoConfig, AutoTokenizer, Qwen3ForSequenceClassification

import trl_ext
from tests.conftest import preference_rows
from tests.helpers import build, history
from tests.online.runs import Scripted, conversations, online, prompts
from tests.test_rounds import prompts_file, settings
from trl_ext.data import Ensemble, PreferenceModel, RewardModel, score_preferences
from trl_ext.rounds import IterativeDPO, RoundsConfig
from trl_ext.rounds.rewards import build_scorer


PAIRS = Dataset.from_list([{k: row[k] for k in ("prompt", "chosen", "rejected")} for row in preference_rows(6)])
GROUPS = Dataset.from_list([{"prompt": "what", "completions": [" good", " bad story", " a great film"]}])
TAU = 0.5


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TRL_EXT_CACHE", str(tmp_path / "cache"))


def config_of(folder, labels, temperature=None):
    config = AutoConfig.from_pretrained(folder, num_labels=labels)
    if temperature is not None:
        config.preference_temperature = temperature
    return config


def saved(tiny_model_dir, path, *settings):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    torch.manual_seed(1)
    config = config_of(tiny_model_dir, *settings)
    Qwen3ForSequenceClassification(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def gpm_dir(tiny_model_dir, tmp_path_factory):
    return saved(tiny_model_dir, tmp_path_factory.mktemp("gpm"), 4, TAU)


@pytest.fixture(scope="module")
def reward_dir(tiny_model_dir, tmp_path_factory):
    return saved(tiny_model_dir, tmp_path_factory.mktemp("rm"), 1)


def logit(folder, first, second, tau=TAU):
    """s / tau of two texts, each embedded alone, without padding."""
    model, tokenizer = Qwen3ForSequenceClassification.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        a, b = (
            model(**tokenizer(text + "<|eos|>", return_tensors="pt")).logits[0].double().tolist()
            for text in (first, second)
        )
    return (a[0] * b[1] - a[1] * b[0] + a[2] * b[3] - a[3] * b[2]) / tau


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def probability(folder, row, first="chosen", second="rejected"):
    return sigmoid(logit(folder, row["prompt"] + row[first], row["prompt"] + row[second]))


def test_probabilities_by_hand(gpm_dir):
    judge = PreferenceModel(gpm_dir)
    prompts, chosen, rejected = (list(PAIRS[name]) for name in ("prompt", "chosen", "rejected"))
    found = judge(prompts, chosen, rejected)
    assert found == pytest.approx([probability(gpm_dir, row) for row in PAIRS], abs=1e-4)
    assert len(set(found)) == 6 and max(abs(p - 0.5) for p in found) > 0.05
    assert judge.compare(prompts, rejected, chosen) == pytest.approx(
        [-x for x in judge.compare(prompts, chosen, rejected)]
    )
    together = judge.compare(prompts * 2, chosen + rejected, rejected + chosen)
    assert together[:6] == [-x for x in together[6:]]  # to the bit
    assert judge(prompts, chosen, chosen) == [0.5] * 6


def test_each_completion_is_embedded_once_per_call(gpm_dir):
    judge = PreferenceModel(gpm_dir)
    judge.load()
    rows = []
    judge.model.register_forward_hook(lambda module, args, kwargs, output: rows.append(len(kwargs["input_ids"])), with_kwargs=True)  # fmt: skip
    three = GROUPS[0]["completions"]
    judge(["what"] * 4 + ["how"], [three[0], three[0], three[1], three[2], three[0]], [three[1], three[2], three[2], three[0], three[1]])  # fmt: skip
    assert rows == [5]  # three of one prompt and two of the other


def test_scores_of_pairs_and_groups(gpm_dir):
    scored = score_preferences(PAIRS, judge=PreferenceModel(gpm_dir), batch_size=4)
    assert scored["preference_prob"] == pytest.approx([probability(gpm_dir, row) for row in PAIRS], abs=1e-4)
    a, b, c = ("what" + text for text in GROUPS[0]["completions"])
    ab, ac, bc = logit(gpm_dir, a, b), logit(gpm_dir, a, c), logit(gpm_dir, b, c)
    [wins] = score_preferences(GROUPS, judge=PreferenceModel(gpm_dir))["scores"]
    expected = [sigmoid(ab) + sigmoid(ac), sigmoid(-ab) + sigmoid(bc), sigmoid(-ac) + sigmoid(-bc)]
    assert wins == pytest.approx([value / 2 for value in expected], abs=1e-4)
    [scores] = score_preferences(GROUPS, judge=PreferenceModel(gpm_dir, scores="score"))["scores"]
    # The mean over three completions, itself included, of s(i, j) - s(j, i)
    assert scores == pytest.approx([2 * (ab + ac) / 3, 2 * (bc - ab) / 3, 2 * (-ac - bc) / 3], abs=1e-3)
    alone = Dataset.from_list([{"prompt": "what", "completions": [" good"]}, GROUPS[0]])
    assert score_preferences(alone, judge=PreferenceModel(gpm_dir))["scores"][0] == [0.0]


def test_what_is_kept_belongs_to_the_model(gpm_dir, tiny_model_dir, tmp_path):
    judge = PreferenceModel(gpm_dir)
    first = score_preferences(PAIRS, judge=judge)["preference_prob"]
    calls = []
    judge.model.register_forward_hook(lambda *args: calls.append(1))
    assert score_preferences(PAIRS, judge=judge)["preference_prob"] == first and not calls
    # Win rates and scores of GPO are made of the same comparisons
    score_preferences(GROUPS, judge=judge)
    again = PreferenceModel(judge.model, judge.processing_class, scores="score")
    before = len(calls)
    score_preferences(GROUPS, judge=again)
    assert len(calls) == before == 1
    seen = [first]

    def differs(judge):
        found = score_preferences(PAIRS, judge=judge)["preference_prob"]
        fresh = all(found != other for other in seen)
        seen.append(found)
        return fresh

    assert not differs(PreferenceModel(gpm_dir))
    assert differs(PreferenceModel(gpm_dir, max_length=4))
    other = PreferenceModel(gpm_dir)
    other.load()
    other.model.config.preference_temperature = 0.25
    assert differs(other)
    other.model.score.weight.data[0, 0] += 1.0
    assert differs(other)
    other.processing_class.chat_template += " "
    assert other.key() != PreferenceModel(other.model, AutoTokenizer.from_pretrained(gpm_dir)).key()


def test_tools_reach_its_template(gpm_dir):
    tokenizer = AutoTokenizer.from_pretrained(gpm_dir)
    tokenizer.chat_template = "{%- for t in tools or [] %}{{- t.name }}{%- endfor %}{{- mood }}{%- for m in messages %}{{- m.content }}{%- endfor %}<|eos|>"
    message = lambda text: [{"role": "user", "content": text}]  # noqa: E731
    row = {
        "prompt": message("what"),
        "chosen": message(" good"),
        "rejected": message(" bad"),
        "tools": '[{"name": "clock"}]',
    }
    rows = [{**row, "chat_template_kwargs": {"mood": mood}} for mood in ("fast", "slow")]
    scored = score_preferences(Dataset.from_list(rows), judge=PreferenceModel(gpm_dir, tokenizer))
    expected = [sigmoid(logit(gpm_dir, f"clock{mood}what good", f"clock{mood}what bad")) for mood in ("fast", "slow")]
    assert scored["preference_prob"] == pytest.approx(expected, abs=1e-4) and abs(expected[0] - expected[1]) > 1e-3
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="has no chat template"):
        score_preferences(Dataset.from_list(rows), judge=PreferenceModel(gpm_dir, tokenizer))


def test_what_is_no_preference_model(gpm_dir, reward_dir, tiny_model_dir, tmp_path):
    with pytest.raises(ValueError, match=r"is no general preference model: .*reward model is given as `reward_funcs`"):
        score_preferences(PAIRS, judge=PreferenceModel(reward_dir))
    model = Qwen3ForSequenceClassification.from_pretrained(reward_dir)
    with pytest.raises(ValueError, match="is no general preference model"):
        score_preferences(PAIRS, judge=PreferenceModel(model, AutoTokenizer.from_pretrained(reward_dir)))
    with pytest.raises(ValueError, match="There is no preference model '/no/such'"):
        score_preferences(PAIRS, judge=PreferenceModel("/no/such"))
    for name in ("model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((tiny_model_dir / name).read_bytes())
    config_of(tiny_model_dir, 4, 0.1).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"has no weights for \['score.weight'\].*trained with `preference_dim`"):
        score_preferences(PAIRS, judge=PreferenceModel(str(tmp_path)))
    for labels, tau in ((3, 0.1), (4, 0.0), (4, "hot"), (4, -1.0)):
        config_of(gpm_dir, labels, tau).save_pretrained(tmp_path)
        with pytest.raises(
            ValueError, match=f"has {labels} outputs and `preference_temperature={tau!r}`; expected an even number"
        ):
            score_preferences(PAIRS, judge=PreferenceModel(str(tmp_path)))


def test_where_it_is_refused(gpm_dir, tiny_model_dir, tmp_path):
    model, tokenizer = Qwen3ForSequenceClassification.from_pretrained(gpm_dir), AutoTokenizer.from_pretrained(gpm_dir)
    for reward in (gpm_dir, RewardModel(gpm_dir), RewardModel(model, tokenizer), [model]):
        with pytest.raises(ValueError, match=r"is a general preference model: .* Give it as `judge`: PreferenceModel"):
            score_preferences(PAIRS, reward)
    for reward in (PreferenceModel(gpm_dir), Ensemble):
        with pytest.raises(ValueError, match="give it alone, as `judge`"):
            score_preferences(
                PAIRS, PreferenceModel(gpm_dir) if reward is not Ensemble else [PreferenceModel(gpm_dir)]
            )
    with pytest.raises(ValueError, match=r"or a PreferenceModel\. What scores one completion"):
        score_preferences(PAIRS, judge=gpm_dir)
    with pytest.raises(ValueError, match="`temperature` has no meaning for a judge"):
        score_preferences(PAIRS, judge=PreferenceModel(gpm_dir), temperature=2.0)
    with pytest.raises(ValueError, match="`scores='mean'` is unknown"):
        PreferenceModel(gpm_dir, scores="mean")
    with pytest.raises(ValueError, match="`max_length=0` must be a whole number"):
        PreferenceModel(gpm_dir, max_length=0)
    with pytest.raises(ValueError, match="`scores='score'` is of groups of completions"):
        score_preferences(PAIRS, judge=PreferenceModel(gpm_dir, scores="score"))
    with torch.no_grad():
        model.score.weight.fill_(math.nan)
    with pytest.raises(ValueError, match="The preference model returned nan for the completions"):
        score_preferences(PAIRS, judge=PreferenceModel(model, tokenizer))
    online_with = lambda **kwargs: online(tiny_model_dir, tmp_path, loss_type="ipo", trainer_kwargs=kwargs)  # noqa: E731
    for kwargs, message in (
        ({"reward_funcs": gpm_dir}, "is a general preference model: .*Give it as `judge`"),
        ({"reward_funcs": model, "reward_processing_classes": tokenizer}, "is a general preference model: .*Give it as `judge`"),
        ({"reward_funcs": PreferenceModel(gpm_dir)}, "has a PreferenceModel, which compares two completions: give it as `judge`"),
        ({"reward_funcs": None, "judge": model}, r"`judge` is a Qwen3ForSequenceClassification, .*`judge=PreferenceModel\(model\)`"),
        ({"reward_funcs": None, "judge": RewardModel("some/model")}, "`judge` is a RewardModel"),
        ({"reward_funcs": None, "judge": PreferenceModel(gpm_dir, scores="score")}, "leave `scores` out"),
        ({"reward_funcs": None, "judge": PreferenceModel("/no/such")}, "There is no preference model '/no/such'"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            online_with(**kwargs)
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="has no chat template"):
        online_with(reward_funcs=None, judge=PreferenceModel(gpm_dir, tokenizer), train_dataset=conversations())


def test_in_the_offline_trainer(gpm_dir, tiny_model_dir, tmp_path):
    trainer = build(
        trl_ext.DPOTrainer, trl_ext.DPOConfig, tiny_model_dir, tmp_path, dataset=PAIRS, loss_type="anchored",
        trainer_kwargs={"judge": PreferenceModel(gpm_dir)}, max_steps=1, per_device_train_batch_size=6,
    )  # fmt: skip
    assert trainer.train_dataset["preference_prob"] == pytest.approx(
        [probability(gpm_dir, row) for row in PAIRS], abs=1e-4
    )
    trainer.train()
    assert "target/mean" in history(trainer)[0]


@pytest.mark.parametrize("loss_type", ["anchored", "sppo_soft"])
def test_in_the_online_trainer(loss_type, gpm_dir, tiny_model_dir, tmp_path):
    judge, seen = PreferenceModel(gpm_dir), []
    trainer = online(
        tiny_model_dir, tmp_path, cls=Scripted, loss_type=loss_type, num_generations=3, max_steps=1,
        trainer_kwargs={"reward_funcs": None, "judge": judge},
    )  # fmt: skip
    score = trainer.score
    trainer.score = lambda *args: seen.append((args[1], found := score(*args))) or found
    trainer.train()
    assert math.isfinite(trainer.evaluate(prompts(4))["eval_win_rate"])
    completions, scores = seen[0]
    b = len(completions.prompts)
    for row, prompt in enumerate(completions.prompts):
        texts = [prompt + completions.texts[k * b + row] for k in range(3)]
        for i, j in ((0, 1), (0, 2), (1, 2)):
            expected = sigmoid(logit(gpm_dir, texts[i], texts[j]))
            assert scores.probabilities[row, i, j].item() == pytest.approx(expected, abs=1e-4)
            assert scores.probabilities[row, j, i].item() == pytest.approx(1 - expected, abs=1e-4)


def test_online_its_template_is_told_of_tools(gpm_dir, tiny_model_dir, tmp_path, monkeypatch):
    tokenizer = AutoTokenizer.from_pretrained(gpm_dir)
    judge, seen = PreferenceModel(gpm_dir, tokenizer), []
    compare = judge.compare
    judge.compare = lambda prompts, first, second, templates: (
        seen.extend(templates) or compare(prompts, first, second, templates)
    )
    data = conversations(chat_template_kwargs={"mood": "slow"}, tools='[{"name": "clock"}]')
    trainer = online(
        tiny_model_dir, tmp_path, loss_type="anchored", max_steps=1, num_generations=3,
        trainer_kwargs={"reward_funcs": None, "judge": judge, "train_dataset": data},
    )  # fmt: skip
    trainer.train()
    assert len(seen) == 3 * 4 and all(each["chat_template_kwargs"] == {"mood": "slow"} for each in seen)
    assert all(each["tools"] == [{"name": "clock"}] for each in seen)
    before = len(seen)
    trainer.evaluate(data.select(range(4)))
    assert len(seen) - before == (3 + 3) * 4  # the policy's own, and each against the reference's


# Rounds


def test_named_in_a_config(gpm_dir, reward_dir, tiny_model_dir, tmp_path):
    assert build_scorer(None, None, {"preference_model": "some/model"}) == PreferenceModel("some/model")
    given = {"preference_model": "some/model", "scores": "score", "max_length": 7}
    assert build_scorer(None, None, given) == PreferenceModel("some/model", max_length=7, scores="score")
    few = prompts_file(tmp_path)
    for judge, training, message in (
        ({"preference_model": "./nowhere"}, {}, "There is no preference model './nowhere'"),
        ({"preference_model": "nothing"}, {}, "The preference model 'nothing' cannot be loaded"),
        ({"preference_model": reward_dir}, {}, "is no general preference model"),
        ({"preference_model": 3}, {}, "names no model; expected"),
        ({"scores": "score"}, {}, "names no model; expected"),
        ({"preference_mdel": "x"}, {}, "Did you mean 'preference_model' for 'preference_mdel'"),
        ({"preference_model": gpm_dir, "scores": "best"}, {}, "`scores='best'` is unknown"),
        ({"preference_model": gpm_dir, "scores": "score"}, {"loss_type": "sppo_soft"}, "`target='win_rate'`, and .* `scores='score'`: the two must be"),
        ({"preference_model": gpm_dir}, {"loss_type": "sppo_soft", "loss_kwargs": {"target": "score"}}, "`target='score'`, and .* `scores='win_rate'`"),
        (gpm_dir, {}, r"a general preference model is \{preference_model: NAME OR FOLDER\}"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            IterativeDPO(
                RoundsConfig(**settings(tiny_model_dir, few, tmp_path / "run", judge=judge, training=training))
            )
    with pytest.raises(ValueError, match=r"is a general preference model: .*Give it as `judge`"):
        IterativeDPO(RoundsConfig(**settings(tiny_model_dir, few, tmp_path / "run", reward_funcs=gpm_dir)))


@pytest.mark.parametrize("target", ["win_rate", "score"])
def test_sppo_and_gpo(target, gpm_dir, tiny_model_dir, tmp_path):
    training = {"loss_type": "sppo_soft", "loss_kwargs": {"target": target}, "loss_weights": [0.5], "max_steps": 1}
    judge = {"preference_model": gpm_dir, "scores": target}
    config = settings(
        tiny_model_dir, prompts_file(tmp_path, 2), tmp_path / "run", judge=judge, training=training, rounds=1
    )
    metrics = IterativeDPO(RoundsConfig(**config)).run()
    assert metrics[0]["mean_score"] == pytest.approx({"win_rate": 0.5, "score": 0.0}[target], abs=1e-9)
    log = json.loads((tmp_path / "run" / "round-1" / "log.json").read_text())
    logged = {name for row in log for name in row}
    assert {"target/chosen", "target/rejected"} <= logged
