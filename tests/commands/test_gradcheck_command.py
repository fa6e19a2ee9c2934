"""`ris-fast gradcheck`: its table says what failed and its exit code says that something did."""

from __future__ import annotations

import json

import pytest

from ris_fast import gradcheck
from ris_fast.commands.cli import main
from ris_fast.gradcheck import Row

GOOD = Row("cov_nmse", "cpp avx2", "float64", 1e-15, 2e-13, 3e-15, 2e-13, "pass", "pass")
BAD = Row("cov_nmse", "cpp avx2", "float32", 3e-3, 1e-6, passed=False, note="small: value error 3.0e-03 > 1.0e-06")


@pytest.mark.parametrize("rows, code", [([GOOD], 0), ([GOOD, BAD], 1)])
def test_gradcheck_exit_code_agrees_with_json_and_table(rows: list[Row], code: int, monkeypatch, capsys) -> None:
    monkeypatch.setattr(gradcheck, "run_gradcheck", lambda device, interpreter: rows)
    assert main(["gradcheck", "--json", "--device", "cpu"]) == code
    found = json.loads(capsys.readouterr().out)
    assert found["passed"] == (code == 0) and [row["dtype"] for row in found["rows"]] == [row.dtype for row in rows]
    assert main(["gradcheck", "--device", "cpu"]) == code
    text = capsys.readouterr().out
    assert ("value error 3.0e-03 > 1.0e-06" in text) == ("1 of 2 checks failed" in text) == (code == 1)


def test_gradcheck_passes_its_flags_on(monkeypatch, capsys) -> None:
    seen: list[tuple[str, bool]] = []
    monkeypatch.setattr(
        gradcheck, "run_gradcheck", lambda device, interpreter: seen.append((str(device), interpreter)) or [GOOD]
    )
    assert (
        main(["gradcheck", "--device", "cpu", "--no-interpreter"]) == 0 and main(["gradcheck", "--device", "cpu"]) == 0
    )
    assert seen == [("cpu", False), ("cpu", True)]
