"""The site of docs/, where MkDocs is installed; and what its hooks make of links and docstrings, everywhere."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest


ROOT = Path(__file__).resolve().parents[1]


def load(name: str):
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def built(folder: Path, **environment: str) -> Path:
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        capture_output=True, text=True, cwd=ROOT, env={**os.environ, "NO_MKDOCS_2_WARNING": "1", **environment},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.slow
def test_the_site_is_built(tmp_path):
    for name in ("mkdocs", "material", "mkdocstrings"):
        pytest.importorskip(name)
    site = built(tmp_path / "site", REPOSITORY_URL="https://example.org/owner/trl-ext")
    pages = {path.parent.name: path.read_text() for path in site.glob("*/index.html")}
    assert {path.stem for path in (ROOT / "docs").glob("*.md")} - {"index"} <= set(pages)
    assert not list(site.glob("*.py"))
    assert 'href="../catalogue/"' in pages["metrics"]
    assert "https://example.org/owner/trl-ext/blob/main/examples/accelerate/ddp.yaml" in pages["several-gpus"]
    # Every name of the reference has its description and its arguments
    for name in re.findall(r"^::: ([\w.]+)$", (ROOT / "docs" / "api.md").read_text(), flags=re.MULTILINE):
        assert f'id="{name}"' in pages["api"] or name.rpartition(".")[2][0].islower(), name
    assert "*optional*" not in pages["api"] and "[<code>" not in pages["api"]


@pytest.mark.parametrize(
    ("given", "page", "address", "expected"),
    [
        ("[a](../trl_ext/losses/README.md#trpa)", "online.md", "", "[a](catalogue.md#trpa)"),
        ("[a](../../docs/papers.md)", "catalogue.md", "", "[a](papers.md)"),
        ("[a](../../docs/metrics.md#online)", "catalogue.md", "", "[a](metrics.md#online)"),
        ("[`x.py`](../examples/offset.py)", "online.md", "", "`x.py`"),
        ("[`x.py`](../examples/offset.py)", "online.md", "https://e.org/t/", "[`x.py`](https://e.org/t/blob/main/examples/offset.py)"),
        ("[a](metrics.md#online)", "online.md", "", "[a](metrics.md#online)"),
        ("[a](../nothing.md)", "online.md", "", "[a](../nothing.md)"),
        ("[a](https://e.org) [b](#memory)", "online.md", "", "[a](https://e.org) [b](#memory)"),
        ("[a](../README.md#online)", "online.md", "", "[a](about.md#online)"),
        ("[a](docs/papers.md)", "about.md", "", "[a](papers.md)"),
        ("```\n[a](../README.md)\n```", "online.md", "", "```\n[a](../README.md)\n```"),
    ],
)  # fmt: skip
def test_links(given, page, address, expected):
    pytest.importorskip("mkdocs")
    here = SimpleNamespace(file=SimpleNamespace(src_uri=page))
    hook = load("site_hooks").on_page_markdown
    assert hook(given, here, SimpleNamespace(repo_url=address), None) == expected


def test_docstrings():
    pytest.importorskip("griffe")
    text = """A loss of [`~trl_ext.losses.Loss`].

    Args:
        first (`int`, *optional*, defaults to `1`):
            Of [`trl.DPOConfig`].
        second, third (`str` or [`~x.Model`], *optional*):
            Two.
        given (*optional*):
            Any.
        fourth,
        fifth:
            Others.

    Class attributes:
        title (`tuple[str, ...]`): Of the paper (if any).

    Raises:
        `ValueError`: For nothing.
    """
    obj = SimpleNamespace(docstring=SimpleNamespace(value=text))
    load("site_docstrings").TRLDocstrings().on_instance(obj=obj)
    assert (
        obj.docstring.value
        == """A loss of `Loss`.

    Args:
        first (int):
            Of `trl.DPOConfig`.
        second (str or Model):
            Two.
        third (str or Model):
            Two.
        given:
            Any.
        fourth:
            Others.
        fifth:
            Others.

    Attributes:
        title (tuple[str, ...]): Of the paper (if any).

    Raises:
        ValueError: For nothing.
    """
    )
