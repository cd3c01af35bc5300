"""docs/first_experiment.ipynb: its code cells run from top to bottom in one namespace, as a kernel would run them."""

import json
from pathlib import Path

NOTEBOOK = Path(__file__).resolve().parents[2] / "docs" / "first_experiment.ipynb"


def test_the_notebook_runs_and_ends_with_a_report(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("tempfile.mkdtemp", lambda: str(tmp_path))
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    namespace: dict[str, object] = {"__name__": "__main__"}
    for number, cell in enumerate(cells):
        assert cell["source"], f"cell {number} is empty"
        if cell["cell_type"] == "code":
            assert not cell["outputs"], "commit the notebook without outputs"
            exec(compile("".join(cell["source"]), f"{NOTEBOOK.name}, cell {number}", "exec"), namespace)
    runs = namespace["runs"]
    assert all((run / "report.html").is_file() for run in runs.values())
    text = capsys.readouterr().out
    assert text.count("psnr_rgb") == 2 and "mix " in text
    assert namespace["picture"].size == (4 * 64, 2 * 64)
