"""Which head runs where, which batches share prompts, and what becomes of token log-probabilities."""

import os
import warnings
from pathlib import Path
from types import SimpleNamespace

import liger_kernel.ops.cross_entropy  # noqa: F401  before a test turns Triton's interpreter off
import pytest
import torch
import trl
from accelerate import PartialState
from peft import LoraConfig
from transformers import AutoModelForCausalLM

import trl_ext
from tests.helpers import build, history
from tests.logprobs.families import tiny
from trl_ext.logprobs import Sharing, TokenLogProbs, Transform, liger_head, varlen
from trl_ext.rows import Rows
from trl_ext.trainers import scoring, shared_prompts
from trl_ext.trainers.scoring import Scorer


@pytest.fixture(autouse=True)
def state():
    """The logger asks which process this is."""
    PartialState()


def ours(tiny_model_dir, tmp_path, **kwargs):
    return build(trl_ext.DPOTrainer, trl_ext.DPOConfig, tiny_model_dir, tmp_path, **kwargs)


# Backends


def test_auto_on_a_cpu_is_torch(tiny_model_dir, tmp_path):
    assert ours(tiny_model_dir, tmp_path)._scorer.head.backend == "torch"


def test_auto_leaves_wpo_to_trl(tiny_model_dir, tmp_path):
    assert ours(tiny_model_dir, tmp_path, use_weighting=True)._scorer.head is None


def test_liger_needs_a_gpu(tiny_model_dir, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(ValueError, match="its Triton kernels need a GPU"):
        ours(tiny_model_dir, tmp_path, logprob_backend="liger")


def test_liger_of_an_old_version(tiny_model_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(scoring.importlib.metadata, "version", lambda name: "0.8.1")
    with pytest.raises(ValueError, match=r"liger-kernel 0.8.1 is older than 0.8.4, which the head needs"):
        ours(tiny_model_dir, tmp_path, logprob_backend="liger")


def test_wpo_is_refused(tiny_model_dir, tmp_path):
    with pytest.raises(ValueError, match="use_weighting"):
        ours(tiny_model_dir, tmp_path, logprob_backend="torch", use_weighting=True)


def test_an_adapter_on_the_head_is_refused(tiny_model_dir, tmp_path):
    peft = {"peft_config": LoraConfig(r=2, target_modules=["lm_head"], task_type="CAUSAL_LM")}
    with pytest.raises(ValueError, match="lm_head"):
        ours(tiny_model_dir, tmp_path, trainer_kwargs=peft)


@pytest.mark.gpu
def test_auto_on_a_gpu_is_liger(tiny_model_dir, tmp_path):
    trainer = ours(tiny_model_dir, tmp_path, use_cpu=False)
    assert trainer._scorer.head.backend == "liger"
    assert os.environ.get("TRITON_INTERPRET") != "1"
    trainer.train()
    theirs = build(trl.DPOTrainer, trl.DPOConfig, tiny_model_dir, tmp_path, use_cpu=False)
    theirs.train()
    assert history(trainer)[0]["loss"] == pytest.approx(history(theirs)[0]["loss"], rel=1e-3)


@pytest.mark.gpu
def test_a_step_on_a_gpu(tiny_model_dir, tmp_path, caplog):
    """Unpadded rows that pass the first batch's check; afterwards nothing is compiled, and the host waits five times at most."""
    trainer = ours(tiny_model_dir, tmp_path, use_cpu=False, bf16=True, loss_type="offset", logging_steps=100)
    batches = [trainer._prepare_inputs(batch) for batch in trainer.get_train_dataloader()]
    assert trainer._scorer.sharing.unpadded
    trainer.model.train()

    def step(batch):
        with trainer.accelerator.autocast():
            loss = trainer.compute_loss(trainer.model, batch)
        loss.backward()

    for batch in batches[:2]:
        step(batch)
    assert trainer._scorer.sharing is not None, caplog.text
    compiled = torch._dynamo.utils.counters["frames"]["total"]
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as waits:
            warnings.simplefilter("always")
            step(batches[2])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch._dynamo.utils.counters["frames"]["total"] == compiled
    package = f"{Path(trl_ext.__file__).parent}/"
    ours_alone = [wait for wait in waits if wait.filename.startswith(package) and "synchroniz" in str(wait.message)]
    assert len(ours_alone) <= 5, ours_alone


# By hand


def wanted(device="cpu", **kwargs):
    """What a config says of log-probabilities; without fields, as TRL's own class."""
    fields = {"device": SimpleNamespace(type=device), "torch_compile": False, "n_gpu": 1, "bf16": False, "fp16": False}
    return SimpleNamespace(**fields, **kwargs)


def kernel_with(parameters):
    """A kernel with these parameters, wrapped twice as Triton wraps one that is tuned."""
    function = eval(f"lambda {', '.join(parameters)}: None")
    return SimpleNamespace(fn=SimpleNamespace(fn=function))


def test_liger_whose_kernel_has_changed(monkeypatch, caplog):
    """What the kernel is launched with is looked up, so that the first step on a GPU does not find out."""
    from liger_kernel.ops import cross_entropy

    PartialState()  # the logger asks which process this is
    assert scoring.resolve_backend(wanted("cuda")) == "liger" and not caplog.text
    ours = list(liger_head.ARGUMENTS)
    changes = [
        (
            [name for name in ours if name not in ("softcap", "HAS_GRADIENTS")],
            r"takes no \['softcap', 'HAS_GRADIENTS'\]",
        ),
        ([*ours, "tile_ptr", "tuned=1"], r"wants \['tile_ptr'\] in its cross-entropy kernel too"),
    ]
    for parameters, reason in changes:
        monkeypatch.setattr(cross_entropy, "liger_cross_entropy_kernel", kernel_with(parameters))
        with pytest.raises(ValueError, match=rf"cannot run: liger-kernel \S+ {reason}"):
            scoring.resolve_backend(wanted("cuda", logprob_backend="liger"))
        assert scoring.resolve_backend(wanted("cuda")) == "torch"
        assert "computed in torch, which is slower: liger-kernel" in caplog.text
        caplog.clear()
    monkeypatch.setattr(cross_entropy, "liger_cross_entropy_kernel", kernel_with([*ours, "tuned=1"]))
    assert scoring.resolve_backend(wanted("cuda")) == "liger"
    monkeypatch.delattr(cross_entropy, "liger_cross_entropy_kernel")
    with pytest.raises(ValueError, match="has no cross-entropy kernel that can be imported"):
        scoring.resolve_backend(wanted("cuda", logprob_backend="liger"))


def test_what_ligers_kernel_is_launched_with(monkeypatch):
    """It is what is looked up."""
    from liger_kernel.ops import cross_entropy

    launches = []

    class Kernel:
        def __getitem__(self, grid):
            return lambda **arguments: launches.append((grid, arguments))

    hidden, weight, targets = torch.zeros(2, 4), torch.zeros(9, 4), torch.zeros(2, dtype=torch.long)
    inputs = (torch.empty(2, 9), hidden, weight, None, targets, Transform())
    monkeypatch.setattr(cross_entropy, "liger_cross_entropy_kernel", Kernel())
    liger_head.forward_tile(*inputs, TokenLogProbs(torch.empty(2), is_top1=torch.empty(2).bool()), gradient=False)
    liger_head.gradient_tile(*inputs, torch.empty(2))
    for (grid, arguments), gradient in zip(launches, (False, True), strict=True):
        assert grid == (2,) and arguments.pop("num_warps") == 32
        assert set(arguments) == set(liger_head.ARGUMENTS)
        assert (arguments["BLOCK_SIZE"], arguments["n_cols"], arguments["HAS_GRADIENTS"]) == (16, 9, gradient)
        assert arguments["RETURN_TOKEN_ACCURACY"] is not gradient


def test_auto_says_why_it_is_not_liger(monkeypatch, caplog):
    monkeypatch.setattr(scoring.importlib.metadata, "version", lambda name: "0.8.2")
    with caplog.at_level("WARNING"):
        assert scoring.resolve_backend(wanted("cuda")) == "torch"
    assert "computed in torch, which is slower: liger-kernel 0.8.2 is older than 0.8.4" in caplog.text


@pytest.mark.parametrize("version", ["0.8.4", "0.8.3", None])
def test_what_auto_stands_for(version, monkeypatch):
    def installed(name):
        assert name == "liger-kernel"
        if version is None:
            raise scoring.importlib.metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(scoring.importlib.metadata, "version", installed)
    fastest = "liger" if version == "0.8.4" else "torch"
    for fields in ({}, {"logprob_backend": "auto"}, {"logprob_backend": "auto", "use_weighting": False}):
        backends = [scoring.resolve_backend(wanted(device, **fields)) for device in ("cuda", "xpu", "cpu", "mps")]
        assert backends == [fastest, fastest, "torch", "torch"]
    assert scoring.resolve_backend(wanted("cuda", use_weighting=True)) == "trl"
    assert scoring.resolve_backend(wanted("cuda", use_weighting=True, logprob_backend="trl")) == "trl"
    assert scoring.resolve_backend(wanted("cuda", logprob_backend="torch")) == "torch"
    liger = {"logprob_backend": "liger"}
    for interpreted in ("0", "1"):
        monkeypatch.setenv("TRITON_INTERPRET", interpreted)
        for device in ("cuda", "cpu"):
            if fastest == "liger" and (device == "cuda" or interpreted == "1"):
                assert scoring.resolve_backend(wanted(device, **liger)) == "liger"
                continue
            reason = {"0.8.4": "need a GPU", "0.8.3": "is older than 0.8.4", None: "is not installed"}[version]
            with pytest.raises(ValueError, match=f"`logprob_backend='liger'` cannot run: .*{reason}"):
                scoring.resolve_backend(wanted(device, **liger))


@pytest.fixture
def served(monkeypatch):
    """Attention implementations that are made to take sequences."""
    names = []
    monkeypatch.setattr(shared_prompts, "serve_sequences", names.append)
    return names


@pytest.mark.parametrize(
    ("fields", "aux_loss", "reason"),
    [
        ({}, False, None),
        ({"torch_compile": True}, False, "the model is compiled"),
        ({"n_gpu": 2}, False, "`DataParallel` splits batches by row"),
        ({}, True, "the auxiliary loss of a mixture of experts counts tokens"),
    ],
)
def test_when_prompts_are_shared(fields, aux_loss, reason, tiny_model_dir, caplog, served):
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)

    def built(device="cpu", **kwargs):
        args = wanted(device, logprob_backend="torch", logprob_memory_mb=3.0, **kwargs)
        vars(args).update(fields)
        caplog.clear()
        return scoring.build_scorer(model, args, aux_loss), "do not share the row" in caplog.text

    for options in ({}, {"share_prefix": "auto"}):
        scorer, warned = built(**options)
        assert scorer.sharing == (Sharing(32, unpadded=True) if reason is None else None) and warned is (
            reason is not None
        )
        assert (scorer.head.backend, scorer.head.memory_mb) == ("torch", 3.0)
    scorer, warned = built(share_prefix=False)
    assert scorer.sharing is None and not warned
    if reason is None:
        scorer, warned = built(share_prefix=True)
        assert scorer.sharing == Sharing(32, always=True, unpadded=True) and not warned
    else:
        with pytest.raises(ValueError, match=f"would not be exact for this model: {reason}"):
            built(share_prefix=True)
    assert set(served) == ({"sdpa"} if reason is None else set()) and "dense mask" not in caplog.text
    if reason is None:
        model.config._attn_implementation = "eager"
        scorer, warned = built()
        assert scorer.sharing == Sharing(32) and not warned and "dense mask" not in caplog.text


def model_of(attention="sdpa", dtype=torch.bfloat16, **options):
    model = tiny("llama", {"head_dim": 16, **options}).to(dtype)
    model.config._attn_implementation = attention
    return model


@pytest.fixture
def hopper(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")


UNPADDED, MASKED = Sharing(32, unpadded=True, bounded=True), Sharing(32, bounded=True)


@pytest.mark.parametrize(
    ("attention", "dtype", "fields", "expected"),
    [
        ("sdpa", torch.bfloat16, {}, UNPADDED),
        ("sdpa", torch.float16, {}, UNPADDED),
        ("sdpa", torch.float32, {"bf16": True}, UNPADDED),
        ("sdpa", torch.float32, {"fp16": True}, UNPADDED),
        ("flash_attention_2", torch.bfloat16, {}, UNPADDED),
        ("flash_attention_3", torch.float32, {"bf16": True}, UNPADDED),
        ("sdpa", torch.float32, {}, "it computes in torch.float32, and FlashAttention in half precision only"),
        ("eager", torch.bfloat16, {}, "`attn_implementation='eager'` attends through masks"),
    ],
)
def test_how_a_gpu_attends(attention, dtype, fields, expected, caplog, served, hopper):
    args = wanted("cuda", logprob_backend="torch")
    vars(args).update(fields)
    scorer = scoring.build_scorer(model_of(attention, dtype), args, aux_loss=False)
    if isinstance(expected, str):
        assert scorer.sharing == MASKED and served == []
        assert f"by a dense mask, and only while it is no larger than those of plain rows: {expected}." in caplog.text
    else:
        assert scorer.sharing == expected and served == [attention] and not caplog.text


@pytest.mark.parametrize(
    ("patch", "options", "reason"),
    [
        (
            (torch.cuda, "get_device_capability", lambda device: (7, 5)),
            {},
            "NVIDIA H200 is older than what FlashAttention",
        ),
        ((varlen, "varlen_attn", None), {}, "has no attention over sequences of any length with windows"),
        ((torch.version, "hip", "6.4"), {}, "the attention of cuda devices takes no sequences of varying length"),
        (None, {"head_dim": 264}, "its attention heads of size 264 are not what FlashAttention takes"),
        (None, {"head_dim": 12}, "its attention heads of size 12 are not what FlashAttention takes"),
        (None, {"v_head_dim": 8}, "its attention heads of size 16 are not what FlashAttention takes"),
    ],
)
def test_where_the_kernel_cannot_serve(patch, options, reason, caplog, served, hopper, monkeypatch):
    if patch is not None:
        monkeypatch.setattr(*patch)
    scorer = scoring.build_scorer(model_of(**options), wanted("cuda", logprob_backend="torch"), aux_loss=False)
    assert scorer.sharing == MASKED and reason in caplog.text and not served


@pytest.mark.parametrize(
    ("policy", "reference", "expected"),
    [
        ({}, {}, UNPADDED),
        ({"attention": "flash_attention_2"}, {}, UNPADDED),
        ({}, {"dtype": torch.float32}, "of the reference model, it computes in torch.float32"),
        ({"attention": "eager"}, {}, "`attn_implementation='eager'` attends through masks"),
        (
            {"attention": "flash_attention_2"},
            {"attention": "eager"},
            "of the reference model, `attn_implementation='eager'` attends through masks, and the other model takes no mask",
        ),
    ],
)
def test_both_models_read_the_same_rows(policy, reference, expected, caplog, served, hopper):
    args = wanted("cuda", logprob_backend="torch")
    scorer = scoring.build_scorer(model_of(**policy), args, False, model_of(**reference))
    if expected is UNPADDED:
        assert scorer.sharing == UNPADDED and served == [policy.get("attention", "sdpa"), "sdpa"]
    else:
        plain = expected.endswith("takes no mask")
        assert scorer.sharing == (None if plain else MASKED) and expected in caplog.text and not served
        if plain:
            with pytest.raises(ValueError, match=r"share_prefix=True.* would not be exact"):
                scoring.build_scorer(
                    model_of(**policy), wanted("cuda", share_prefix=True), False, model_of(**reference)
                )


def test_flash_attention_in_float32_has_plain_rows(caplog, served, hopper):
    scorer = scoring.build_scorer(
        model_of("flash_attention_2", torch.float32), wanted("cuda", logprob_backend="torch"), False
    )
    assert scorer.sharing is None and not served
    assert "do not share the row of their prompt: it computes in torch.float32, and FlashAttention" in caplog.text


def test_batches_that_cannot_share_their_prompts():
    ids = torch.tensor([[5, 6, 7, 8], [5, 6, 9, 3]])
    mask, prompt = torch.tensor([[0, 0, 1, 1], [0, 0, 1, 1]]), torch.zeros(2)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    left = {**inputs, "attention_mask": torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])}
    more = {**inputs, "token_type_ids": torch.zeros_like(ids)}
    auto, always = Sharing(32), Sharing(32, always=True)
    # The first token once; then the prompt's last token and the first of the completion, of each of the two
    for sharing in (auto, always):
        assert sharing.layout(inputs, mask, prompt).tokens.shape == (1, 5)
    assert auto.layout(left, mask, prompt) is None and auto.layout(more, mask, prompt) is None
    with pytest.raises(ValueError, match="cannot share prompts: it is not padded on the right"):
        always.layout(left, mask, prompt)
    with pytest.raises(ValueError, match=r"cannot share prompts: the model is given \['token_type_ids'\] too"):
        always.layout(more, mask, prompt)


def test_shared_rows_that_cost_more():
    """A prompt of one token and completions of ten: one row of 20 tokens, whose attention costs more than it saves."""
    ids = torch.arange(22).view(2, 11) + 5
    ids[1, 0] = ids[0, 0]
    completion = torch.ones_like(ids)
    completion[:, 0] = 0
    batch = ({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, completion, torch.zeros(2))
    # 20 (6 H + 20) < 22 (6 H + 11) where 12 H > 158: at H = 14, not at H = 13
    assert Sharing(13).layout(*batch) is None
    assert Sharing(14).layout(*batch).tokens.shape == (1, 20)
    assert Sharing(1, always=True).layout(*batch).tokens.shape == (1, 20)
    # 20 tokens in one row cost less than 22 in two, whatever the model, where no mask is as wide as the row
    assert Sharing(1, unpadded=True).layout(*batch).sequences.key_lengths == [10, 10]
    assert Sharing(13, unpadded=True, bounded=True).layout(*batch).tokens.shape == (1, 20)
    # A mask of 20 x 20 is larger than two of 11 x 11
    assert Sharing(14, bounded=True).layout(*batch) is None
    assert Sharing(14, bounded=True, always=True).layout(*batch).tokens.shape == (1, 20)


def test_what_a_mask_leaves_out_is_not_scored():
    """Sums, lengths, and where a loss reads them tokens with their turn: one assistant turn, so 0, and -1 elsewhere."""
    mask = torch.tensor([[0, 0, 1, 1, 1], [0, 1, 1, 0, 0], [0, 0, 1, 0, 0]])
    logps = -torch.tensor([[64.0, 1, 2, 4], [8, 16, 64, 64], [64, 32, 64, 64]])
    ref = -torch.tensor([[128.0, 2, 4, 8], [16, 32, 128, 128], [128, 64, 128, 128]])
    partner = torch.tensor([2, 1, 0])  # the second row is nobody's
    rows = Rows({}, mask, torch.zeros(3), partner, ref_logps=torch.tensor([5.0, 6, 7]))
    scorer = Scorer(None)
    plain = scorer.scored(rows, logps, ref, {"ref_logps"})
    assert plain.logps.tolist() == [-7, -24, -32] and plain.ref_logps.tolist() == [-14, -48, -64]
    assert plain.lengths.tolist() == [3, 2, 1]
    assert plain.token_logps is plain.ref_token_logps is plain.turns is plain.behaviour_logps is None
    # What was precomputed, where the reference was not run
    assert scorer.scored(rows, logps, None, {"ref_logps"}).ref_logps.tolist() == [5, 6, 7]
    tokens = scorer.scored(rows, logps, ref, {"token_logps", "ref_logps"}, ld_alpha=0.5)
    # LD-DPO: what goes beyond the one token of the partner counts a half, in the sums and not in the tokens
    assert tokens.logps.tolist() == [-1 - 3, -24, -32] and tokens.ref_logps.tolist() == [-2 - 6, -48, -64]
    assert tokens.token_logps.tolist() == [[0, -1, -2, -4], [-8, -16, 0, 0], [0, -32, 0, 0]]
    assert tokens.ref_token_logps.tolist() == [[0, -2, -4, -8], [-16, -32, 0, 0], [0, -64, 0, 0]]
    assert tokens.turns.tolist() == [[-1, 0, 0, 0], [0, 0, -1, -1], [-1, 0, -1, -1]]
    assert tokens.turns.dtype == torch.int64
    alone = scorer.scored(rows, logps, None, {"token_logps"})
    assert alone.ref_token_logps is None and alone.turns is not None
