"""Nothing that is data is run: no pickle is read, no model's own code without `trust_remote_code`, which nobody but the user sets."""

import ast
import json
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from datasets import Dataset

import trl_ext
from tests.hostile.refusal import contents, refused
from trl_ext.data.classifier import Classifier
from trl_ext.data.load import load_preferences, load_tokenizer
from trl_ext.data.sampling import sample_completions
from trl_ext.rounds.checks import refuse_unloadable_model


SOURCES = sorted(Path(trl_ext.__file__).parent.rglob("*.py"))
PICKLES = {"pickle", "_pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "jsonpickle"}
READS_CODE = {
    "eval", "exec", "compile", "os.system", "os.popen", "torch.load", "torch.jit.load", "torch.package.PackageImporter", "numpy.load", "np.load",
    "pandas.read_pickle", "pd.read_pickle", "yaml.unsafe_load", "yaml.full_load", "yaml.load_all", "yaml.unsafe_load_all",
}  # fmt: skip


def calls(tree: ast.Module) -> Iterator[tuple[str, ast.Call]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_sources(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert not {name.partition(".")[0] for name in imported} & PICKLES
    for name, call in calls(tree):
        assert name not in READS_CODE, f"line {call.lineno}: {name}"
        given = {each.arg: each.value for each in call.keywords}
        assert "allow_pickle" not in given and "weights_only" not in given, f"line {call.lineno}"
        if name == "yaml.load":  # with a loader that is checked to be safe, or is derived from one that is
            assert ast.unparse(call.args[1]) in ("loader", "_Loader"), f"line {call.lineno}"
        assert_the_users(given.get("trust_remote_code"), call.lineno)
    for node in ast.walk(tree):
        if isinstance(node, ast.Dict):
            for key, value in zip(node.keys, node.values, strict=True):
                if isinstance(key, ast.Constant) and key.value == "trust_remote_code":
                    assert_the_users(value, node.lineno)


def assert_the_users(value: ast.expr | None, line: int) -> None:
    """`trust_remote_code` is handed on from the user's config, and is no constant."""
    assert value is None or ast.unparse(value) == "args.trust_remote_code", f"line {line}: {ast.unparse(value)}"


class Payload:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


@pytest.mark.parametrize(
    "name", ["data.json", "data.jsonl", "data.csv", "data.parquet", "data.pkl", "data.pickle", "data.pt", "data.npy"]
)
def test_a_pickle_is_no_data(name, tmp_path):
    pwned = tmp_path / "pwned"
    content = pickle.dumps(Payload(pwned))
    pickle.loads(content)  # such a file does what it says where somebody unpickles it
    pwned.unlink()
    (tmp_path / name).write_bytes(content)
    refused(lambda: load_preferences(str(tmp_path / name)), name, tmp_path)


@pytest.fixture
def model_with_code(tmp_path) -> Path:
    """A model that brings its own classes, as on the hub; importing them leaves a file."""
    folder = tmp_path / "model"
    folder.mkdir()
    code = f"from transformers import PreTrainedConfig\nopen({str(tmp_path / 'pwned')!r}, 'w')\nclass Mine(PreTrainedConfig): model_type = 'mine'\n"
    (folder / "code_of_mine.py").write_text(code)
    classes = ("AutoConfig", "AutoModelForCausalLM", "AutoModelForSequenceClassification", "AutoModel")
    own = dict.fromkeys(classes, "code_of_mine.Mine") | {"AutoTokenizer": ["code_of_mine.Mine", None]}
    (folder / "config.json").write_text(json.dumps({"model_type": "mine", "auto_map": own}))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "Mine", "auto_map": own}))
    return folder


def trained(name: str) -> None:
    options = {"output_dir": str(Path(name).parent / "out"), "use_cpu": True, "bf16": False}
    rows = Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}])
    trl_ext.DPOTrainer(model=name, args=trl_ext.DPOConfig(**options), train_dataset=rows)


LOADS: dict[str, Callable[[str], object]] = {
    "a tokenizer": load_tokenizer,
    "a model of rounds": lambda name: refuse_unloadable_model(name, "model"),
    "a classifier": lambda name: Classifier(name).load(),
    "what is sampled from": lambda name: sample_completions(Dataset.from_list([{"prompt": "a"}]), name),
    "a policy": trained,
}


@pytest.mark.parametrize("name", LOADS)
def test_a_model_with_code_of_its_own(name, model_with_code, tmp_path):
    before = contents(tmp_path)
    with pytest.raises((ValueError, NotImplementedError), match=r"trust_remote_code|custom code"):
        LOADS[name](str(model_with_code))
    assert not (tmp_path / "pwned").exists()
    assert contents(tmp_path) == before


def test_that_code_would_run_if_the_user_said_so(model_with_code, tmp_path):
    from transformers import AutoConfig

    AutoConfig.from_pretrained(model_with_code, trust_remote_code=True)
    assert (tmp_path / "pwned").exists()


def test_a_chat_template_is_rendered_in_a_sandbox(tmp_path):
    from tests.conftest import build_tokenizer
    from trl_ext.data.tokens import reward_ids

    tokenizer = build_tokenizer()
    tokenizer.chat_template = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
    with pytest.raises(Exception, match="unsafe"):
        reward_ids([{"role": "user", "content": "a"}], [{"role": "assistant", "content": "b"}], tokenizer)
