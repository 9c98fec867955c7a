"""The notebook: its cells are Python, hold no old output, and run from top to bottom."""

import ast
import csv
import json
from pathlib import Path

import pytest


PATH = Path(__file__).resolve().parents[1] / "examples" / "from_prompts_to_runs.ipynb"
CELLS = json.loads(PATH.read_text())["cells"]
# In place of the sizes of its second cell
SMALL = "SEEDS = (0, 1)\nPROMPTS, HELD_OUT, COMPLETIONS = 16, 8, 3\nFINE_TUNING, STEPS = 10, 4\n"


def test_it_is_whole_and_has_no_output():
    notebook = json.loads(PATH.read_text())
    assert notebook["nbformat"] == 4 and notebook["metadata"]["kernelspec"]["name"] == "python3"
    assert len({cell["id"] for cell in CELLS}) == len(CELLS)
    for cell in CELLS:
        if cell["cell_type"] == "code":
            ast.parse("".join(cell["source"]))
            assert cell["outputs"] == [] and cell["execution_count"] is None


def test_the_small_sizes_replace_those_of_the_notebook():
    (first,) = [cell for cell in CELLS if "parameters" in cell["metadata"].get("tags", [])]

    def names(source):
        targets = [node.targets[0] for node in ast.parse(source).body if isinstance(node, ast.Assign)]
        return {name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)}

    assert names(SMALL) < names("".join(first["source"]))


@pytest.mark.slow
def test_it_runs(tmp_path, monkeypatch):
    pytest.importorskip("ipykernel")
    nbclient = pytest.importorskip("nbclient")
    import nbformat

    monkeypatch.setenv("TRL_EXT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    notebook = nbformat.read(PATH, as_version=4)
    nbformat.validate(notebook)
    at = next(i for i, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", []))
    notebook.cells.insert(at + 1, nbformat.v4.new_code_cell(SMALL))
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()

    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    said = "".join(output.get("text") or output.get("data", {}).get("text/plain", "") for output in outputs)
    for words in (
        "nats per token",
        "length_regularized",
        "eval_samples/mean_reward",
        "mean ± standard deviation over seeds",
    ):
        assert words in said, words
    assert any("image/png" in output.get("data", {}) for output in outputs)
    with open(tmp_path / "from-prompts-to-runs" / "runs.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    found = {(row["run"], row["metric"].removeprefix("eval_samples/"), row["seeds"]) for row in rows}
    losses, metrics = ("sigmoid", "offset", "anchored"), ("mean_reward", "kl_to_reference", "mean_length")
    assert found == {(loss, metric, "2") for loss in losses for metric in metrics}
    assert "Warning" not in said and "'loss':" not in said
    # Three prompts, each answered by the start and the three policies
    assert all(said.count(f"\n  {name:<9} ") == 3 for name in ("start", *losses))
