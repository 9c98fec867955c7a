"""What surrounds the code: workflows, make targets, release notes, templates, citation, policies."""

import ast
import re
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.version import Version

import trl_ext
from tests import smoke


ROOT = Path(__file__).resolve().parents[1]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
FORMS = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("[!c]*.yml"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
TARGETS = set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(), flags=re.M))


def jobs():
    """Every job of the workflows, by file and name."""
    for path in WORKFLOWS:
        for name, job in yaml.safe_load(path.read_text())["jobs"].items():
            yield path.name, name, job


def called(text):
    """The targets of each `make` in a text of commands."""
    for words in re.findall(
        r"(?:^|[\s`;&])make((?: +(?:--silent|-s|[A-Z_]+=(?:\"[^\"]*\"|\S+)|[a-z][a-z-]*))+)", text
    ):
        yield from re.findall(r"(?<= )[a-z][a-z-]*(?=\s|$)", re.sub(r"\s(?:-\S+|[A-Z_]+=(?:\"[^\"]*\"|\S+))", " ", words) + " ")  # fmt: skip


def test_how_targets_are_found():
    text = 'make lint\nmake --silent notes VERSION="${A#v}" > f\nmake test WORKERS=4 ARGS="a b"\n `make build smoke`'
    assert list(called(text)) == ["lint", "notes", "test", "build", "smoke"]


@pytest.mark.parametrize("name", [*(path.name for path in WORKFLOWS), ".ci/run", "CONTRIBUTING.md", "README.md"])
def test_every_make_target_that_is_called_is_there(name):
    path = ROOT / name if (ROOT / name).exists() else ROOT / ".github" / "workflows" / name
    text = path.read_text()
    if path.suffix == ".md":  # prose has `make` as a verb
        text = "\n".join([*re.findall(r"```bash\n(.*?)```", text, flags=re.S), *re.findall(r"`(make [^`]*)`", text)])
    found = set(called(text))
    assert found <= TARGETS and (found or name == "publish.yml")


def test_a_phony_target_for_each():
    phony = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), flags=re.M)[1].split()
    assert set(phony) == TARGETS


def test_workflows_run_what_a_person_runs():
    """CI lints, tests, builds and tries the wheel, on the oldest and the newest Python that are supported."""
    minors = [each.rsplit(".", 1)[1] for each in PROJECT["classifiers"] if re.search(r":: 3\.\d+$", each)]
    ends = [f"3.{minors[0]}", f"3.{minors[-1]}"]
    commands = {}
    for file, name, job in jobs():
        commands[file, name] = list(called("\n".join(step.get("run", "") for step in job["steps"])))
        if file == "ci.yml":
            assert job["strategy"]["matrix"]["python"] == ends
    assert commands == {
        ("ci.yml", "test"): ["lint", "test"],
        ("ci.yml", "package"): ["build", "smoke"],
        ("publish.yml", "pypi"): [],
        ("release.yml", "draft"): ["notes", "build", "smoke"],
    }
    # The same two, and nothing else, are what a change is checked by elsewhere
    assert list(called((ROOT / ".ci" / "run").read_text())) == ["lint", "test"]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_workflows_are_whole(path):
    said = yaml.safe_load(path.read_text())
    assert {"name", True, "permissions", "jobs"} <= set(said)  # to YAML 1.1, `on` is a boolean
    for job in said["jobs"].values():
        assert job["runs-on"] == "ubuntu-latest" and job["timeout-minutes"] > 0
        for step in job["steps"]:
            assert ("uses" in step) != ("run" in step)
            assert re.fullmatch(r"[\w-]+/[\w-]+@(v\d+|release/v\d+)", step.get("uses", "a/b@v1"))
            # What others choose, such as a branch's name, reaches a shell through the environment alone
            assert "${{" not in step.get("run", "")


def test_only_a_person_publishes():
    """Uploading to PyPI needs a release that someone has published, and no other job may prove who it is."""
    rights = {(file, name): job.get("permissions", {}) for file, name, job in jobs()}
    assert [key for key, value in rights.items() if "id-token" in value] == [("publish.yml", "pypi")]
    publish = yaml.safe_load((ROOT / ".github" / "workflows" / "publish.yml").read_text())
    assert publish[True] == {"release": {"types": ["published"]}}
    release = (ROOT / ".github" / "workflows" / "release.yml").read_text()
    assert "--draft" in release and "twine upload" not in release


# Release notes


def notes(*arguments):
    return subprocess.run(["make", "--silent", "notes", *arguments], capture_output=True, text=True, cwd=ROOT)


def test_notes_of_a_release():
    done = notes(f"VERSION={trl_ext.__version__}")
    (after,) = re.findall(rf"^## {re.escape(trl_ext.__version__)}\n(.*?)(?=^## |\Z)", (ROOT / "CHANGELOG.md").read_text(), flags=re.M | re.S)  # fmt: skip
    assert done.returncode == 0 and done.stdout == after and done.stdout.strip()
    unreleased = notes("VERSION=Unreleased").stdout
    assert unreleased.strip() and after not in unreleased and "## " not in unreleased


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(["VERSION=9.9.9"], 'no section "## 9.9.9"'), ([], "Which release? make notes VERSION=0.1.0")],
)
def test_notes_that_are_not_there(arguments, said):
    done = notes(*arguments)
    assert done.returncode and said in done.stderr and not done.stdout


# Citation, templates, policies


def test_citation():
    said = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors", "type", "license", "version"} <= set(said)
    # The keys of version 1.2.0 that stand here; another would make the file invalid
    assert set(said) <= {"cff-version", "message", "title", "abstract", "type", "authors", "version", "license", "keywords", "date-released",
                         "repository-artifact", "repository-code", "url"}  # fmt: skip
    assert said["cff-version"] == "1.2.0" and said["type"] == "software"
    assert str(said["version"]) == trl_ext.__version__ and said["license"] == PROJECT["license"]
    assert said["authors"] and all("name" in author or "family-names" in author for author in said["authors"])
    assert said["abstract"].rstrip(".") == PROJECT["description"] and said["keywords"] == PROJECT["keywords"]


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.stem)
def test_issue_forms(path):
    said = yaml.safe_load(path.read_text())
    assert {"name", "description", "body"} <= set(said)
    fields = [field for field in said["body"] if field["type"] != "markdown"]
    assert {field["type"] for field in said["body"]} <= {"markdown", "input", "textarea", "checkboxes", "dropdown"}
    ids = [field["id"] for field in fields]
    assert len(ids) == len(set(ids)) and all(field["attributes"]["label"] for field in fields)
    assert any(field.get("validations", {}).get("required") for field in fields)


def test_what_security_promises_of_the_code():
    """No pickle is read or written here, no YAML makes objects, and no text is run."""
    forbidden = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}
    calls = {
        "torch.load",
        "torch.save",
        "yaml.unsafe_load",
        "yaml.full_load",
        "os.system",
        "eval",
        "exec",
        "numpy.load",
    }
    for path in sorted((ROOT / "trl_ext").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                assert not forbidden & {alias.name.split(".")[0] for alias in node.names}, path
            elif isinstance(node, ast.ImportFrom) and node.module:
                assert node.module.split(".")[0] not in forbidden, path
            elif isinstance(node, ast.Call):
                name = ast.unparse(node.func)
                assert name not in calls and not any(word.arg == "shell" for word in node.keywords), (path, name)
                if name == "yaml.load":
                    loader = ast.unparse(node.args[1])
                    safe = (
                        "class _Loader(yaml.SafeLoader)"
                        if loader == "_Loader"
                        else "issubclass(loader, yaml.SafeLoader)"
                    )
                    assert loader in ("_Loader", "loader") and safe in path.read_text(), path


def test_policies_name_what_is_there():
    policy = (ROOT / "CONTRIBUTING.md").read_text().split("## Versions")[1]
    for name in re.findall(r"`((?:trl_ext|\.github)/[\w./-]+|[A-Z]+\.(?:md|cff))`", policy):
        assert (ROOT / name).exists(), name
    security = (ROOT / "SECURITY.md").read_text()
    assert "Report a vulnerability" in security and "`trl_ext.losses`" in security
    assert "@" not in security  # no address that nobody reads


# The smoke test that `make smoke` runs on an installed wheel


def test_the_model_of_the_smoke_test_trains(tmp_path, monkeypatch, trl_as_it_was, capsys):
    import json

    from trl_ext.cli import main

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    smoke.make_model("tiny")
    Path("pairs.jsonl").write_text("\n".join([json.dumps(smoke.PAIR)] * 4))
    assert main(["run", "dpo", *smoke.TRAINING]) == 0
    smoke.check_training(Path("out"))
    state = next(Path("out").glob("checkpoint-2/trainer_state.json"))
    state.write_text(state.read_text().replace('"offset/mean": 0.0', '"offset/mean": 1.0'))
    with pytest.raises(AssertionError):
        smoke.check_training(Path("out"))


def test_a_checkout_is_no_wheel():
    with pytest.raises(AssertionError, match="is a checkout, not the wheel"):
        smoke.check_installation()


def test_the_oldest_versions_are_those_that_are_allowed():
    """CONTRIBUTING.md names a command that tests with the lower bounds."""
    said = re.search(r'VERSIONS="(transformers==[^"]*)"', (ROOT / "CONTRIBUTING.md").read_text())[1]
    oldest = dict(each.split("==") for each in said.split())
    for text in PROJECT["dependencies"]:
        requirement = Requirement(text)
        least = [Version(each.version) for each in requirement.specifier if each.operator == ">="]
        if requirement.name in oldest:
            assert least == [Version(oldest[requirement.name])], requirement.name
    assert {"transformers", "liger-kernel", "torch"} <= {*oldest}
