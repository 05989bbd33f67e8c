"""The guard tells a regression from noise, on made-up figures: nothing is timed here."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import typer
from paths import ROOT

from benchmarks.cpu import guard
from benchmarks.report.records import benchmarks


def result(ratio: float, spread: float = 0.0, baseline: str = "hf-sdpa") -> dict[str, Any]:
    paired = {"median": ratio, "quartile_1": ratio - spread / 2, "quartile_3": ratio + spread / 2}
    return {
        "options": {"batch": 1, "prompt_tokens": 512, "new_tokens": 32, "dtype": "float32", "runs": 7},
        "ratios": [{"workload": "decode", "baseline": baseline, "paired": paired}],
        "results": [],
    }


@pytest.mark.parametrize(
    ("then", "now", "fallen"),
    [
        (result(1.40), result(1.40), False),
        (result(1.40), result(1.90), False),
        (result(1.40), result(1.37), False),  # within 3%
        (result(1.40), result(1.35), True),
        (result(1.40, spread=0.04), result(1.35, spread=0.04), False),
        (result(1.40, spread=0.02), result(1.35, spread=0.02), True),
        (result(1.40, spread=0.10), result(1.31, spread=0.0), False),
        (result(1.40), result(1.40, baseline="hf-eager"), True),  # no longer measured
    ],
)
def test_a_ratio_falls_when_it_loses_more_than_its_spread(
    then: dict[str, Any], now: dict[str, Any], fallen: bool
) -> None:
    verdicts = list(guard.compare(then, now))
    assert [verdict.has_fallen for verdict in verdicts] == [fallen]


def test_only_ratios_to_transformers_are_guarded() -> None:
    assert list(guard.compare(result(2.0, baseline="ctranslate2"), result(1.0, baseline="ctranslate2"))) == []


def test_the_committed_results_can_be_measured_again() -> None:
    files = sorted((ROOT / guard.RESULTS / "cpu").glob("*.json"))
    assert files
    committed = [then for file in files for then in benchmarks(json.loads(file.read_text())).values()]
    assert committed
    for then in committed:
        guard.BenchmarkOptions(**then["options"])
        verdicts = list(guard.compare(then, then))
        assert verdicts
        assert not any(verdict.has_fallen for verdict in verdicts)


def test_the_command_exits_1_on_a_fallen_ratio(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "then.json"
    file.write_text(json.dumps(result(1.5)))
    now = result(1.5)
    monkeypatch.setattr(guard, "measure_again", lambda then, console: now)
    guard.main([file])
    assert "holds" in capsys.readouterr().out

    now = copy.deepcopy(now)
    now["ratios"][0]["paired"]["median"] = 1.2
    with pytest.raises(typer.Exit) as ended:
        guard.main([file])
    assert ended.value.exit_code == 1
    assert "has fallen" in capsys.readouterr().out


def test_results_without_a_ratio_are_wrong_usage(tmp_path: Path) -> None:
    file = tmp_path / "curves.json"
    file.write_text(json.dumps({"environment": {}}))
    with pytest.raises(typer.BadParameter, match="no ratio to transformers"):
        guard.main([file])
