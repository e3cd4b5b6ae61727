"""Any notebook on a user's own data and network: one line of its second cell is another."""

import json
import re

import matplotlib.pyplot as plt
import pytest
from helpers import SmallNet, small_data

from paper_lib import presets
from paper_lib.results import claims
from scripts import ROOT

STUDY = re.compile(r"^study = presets\.study\(.*\)$", flags=re.M)


@pytest.mark.parametrize("name", ["03_one_step", "07_ellipsoid", "08_two_points"])
def test_a_notebook_reaches_its_verdict_on_your_own_network(name, tmp_path, monkeypatch):
    for kind in ("RUNS", "RESULTS"):
        monkeypatch.setenv(f"PAPER_{kind}", str(tmp_path / kind.lower()))
    monkeypatch.setattr(plt, "show", lambda: None)
    settings = {"lr": 0.1, "steps": 80, "seeds": [0, 1], "batch_size": 16}
    own = presets.own(small_data(600), SmallNet, **settings)
    cells = json.loads((ROOT / "notebooks" / f"{name}.ipynb").read_text())["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    assert sum(len(STUDY.findall(cell)) for cell in code) == 1
    namespace = {"own": own, "display": print}
    for cell in code:
        exec(STUDY.sub("study = own", cell), namespace)
    plt.close("all")
    assert list(own.results.glob("figures/*.csv"))
    verdicts = claims.table(own.results)
    assert len(verdicts) > 3 and verdicts.measured.notna().any()
