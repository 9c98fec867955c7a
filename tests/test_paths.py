"""What is taken for a path on this machine, and what is left to the hub."""

import pytest

from trl_ext.data.paths import refuse_missing_path


@pytest.mark.parametrize(
    "name", ["./out", "../out", "/no/such", "~/no-such-folder", "a/b/c", "pairs.jsonl", "owner/pairs.JSON", "C:\\data"]
)
def test_a_path_that_is_not_there_is_refused(name, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(ValueError, match=r"There is no model .* looks like a path on this machine"):
        refuse_missing_path(name, "model")


@pytest.mark.parametrize("name", ["gpt2", "Qwen/Qwen2.5-0.5B", "trl-lib/ultrafeedback_binarized", None, object()])
def test_hub_names_and_objects_pass(name):
    refuse_missing_path(name, "model")


def test_a_name_that_begins_with_a_local_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refuse_missing_path("out/model", "model")  # could be a hub name
    (tmp_path / "out").mkdir()
    with pytest.raises(ValueError, match="There is no tokenizer 'out/model'"):
        refuse_missing_path("out/model", "tokenizer")
    (tmp_path / "out" / "model").mkdir()
    refuse_missing_path("out/model", "tokenizer")
