"""benchmarks/metric_choice.py in its quick form: the long tail, and the figures that it writes."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.slow
def test_two_draws_give_both_arms(tmp_path: Path) -> None:
    out = tmp_path / "metric_choice.json"
    command = [sys.executable, "benchmarks/metric_choice.py", "--quick", "--out", str(out)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=600)
    rows = json.loads(out.read_text())["rows"]
    assert [row["arm"] for row in rows] == ["selection", "selection and rule"]
    for row in rows:
        assert row["part"] == "digits, 2 draws" and 0.5 < row["macro_f1_log_loss"] < 1
        assert abs(row["gain"]) < 0.2 and math.isfinite(row["se_draws"])
        assert 0 <= row["kept"] <= 1 and row["se_images"] >= 0
        assert row["crossfitted"] >= 0  # nothing is kept that does not promise a gain
