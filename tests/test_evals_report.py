"""Tests of the report: a table, JSON, and a page with its pictures, from two checkpoints and local files."""

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("matplotlib", reason="needs matplotlib (requirements-evals.txt)")

from evals import report
from test_evals import BYTES, HELLASWAG, LAMBADA, checkpoint, one_thread, write_lines  # noqa: F401
from test_evals_recall import PAGES, SQUAD


@pytest.fixture
def command(checkpoint, tmp_path, write_folder, monkeypatch, capsys):  # noqa: F811
    """Runs the report with these flags: (exit code, stdout, stderr)."""
    state = torch.load(checkpoint, weights_only=True)
    state["model"]["head"] *= 0.5
    torch.save(state, tmp_path / "other.pt")
    files = tmp_path / "files"
    files.mkdir()
    write_lines(files / "hellaswag_val.jsonl", HELLASWAG)
    write_lines(files / "lambada_openai.jsonl", LAMBADA)
    write_lines(files / "swde.jsonl", PAGES)
    write_lines(files / "squad.jsonl", SQUAD)
    rng = np.random.default_rng(0)
    documents = sum(([256, *rng.integers(32, 127, 1100)] for _ in range(3)), [])
    shards = write_folder(tmp_path / "shards", [documents], [documents], **BYTES)

    def run(*flags: str) -> tuple[int, str, str]:
        argv = ["report.py", str(checkpoint), str(tmp_path / "other.pt"), "--out", str(tmp_path / "out"), "--files",
                str(files), "--haystack", str(shards), "--long", str(shards), "--lengths", "192", "256", "--trials",
                "1", "--long-tokens", "1100", "--limit", "3", "--attention", "reference", "--device", "cpu", *flags]
        monkeypatch.setattr(sys, "argv", argv)
        try:
            report.main()
            code = 0
        except SystemExit as error:
            code = error.code
        return code, *capsys.readouterr()
    return run


def test_a_report(command, tmp_path):
    tasks = "hellaswag lambada squad swde_hazy swde_lmeval fda_hazy mqar niah position_loss".split()
    code, out, err = command("--tasks", *tasks)
    assert code == 0, err
    rows = [line.split(" | ") for line in out.splitlines() if line.startswith("| ")]
    assert {len(row) for row in rows} == {7} and {row[0].strip("| ") for row in rows[2:]} == set(tasks) - {"fda_hazy"}
    assert "left out, fda_hazy" in err and "fda.jsonl" in err
    saved = json.loads((tmp_path / "out" / "report.json").read_text())
    assert list(saved["checkpoints"]) == ["tiny", "other"] and list(saved["left_out"]) == ["fda_hazy"]
    first, second = saved["tasks"]["position_loss"]
    loss = "positions 0-1023"
    difference = second["difference_to_first"][loss]["mean"]
    assert difference == pytest.approx(second["metrics"][loss]["value"] - first["metrics"][loss]["value"])
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 2 and not re.search(r"(src|href)=.?(?!.?data:)\w", page)


def test_a_report_that_was_made_is_not_computed_again(command, monkeypatch):
    flags = ["--tasks", "lambada", "position_loss"]
    code, first, _ = command(*flags)
    monkeypatch.setattr("evals.common.LanguageModel.logits", None)
    assert command(*flags)[:2] == (code, first) == (0, first)


def test_a_report_of_nothing_says_what_is_missing(command):
    code, out, err = command("--tasks", "fda_hazy")
    assert code == 2 and out == "" and "fda.jsonl" in err.splitlines()[-1]


def test_differences_above_noise_are_marked():
    same, better = report.Metric(np.array([0.0, 1.0] * 50)), report.Metric(np.array([1.0, 1.0] * 50))
    head, rows, marks = report.table({"piqa": {"a": ({}, {"acc": same}), "b": ({}, {"acc": better})}}, ["a", "b"])
    assert rows[0] == ["piqa", "acc", "100", "50", "50.0 [40.4, 59.6]", "100.0 [96.3, 100.0]", "+50.0 ± 9.8"]
    assert marks == [[False] * 6 + [True]] and "**+50.0 ± 9.8**" in report.markdown(head, rows, marks)


@pytest.mark.parametrize("module", [path.stem for path in Path(report.__file__).parent.glob("[!_]*.py")
                                    if path.stem not in ("common", "lm_eval_adapter")])
def test_help_explains_every_flag(module, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [module, "--help"])
    source = Path(report.__file__).with_name(f"{module}.py")
    with pytest.raises(SystemExit) as ended:
        exec(compile(source.read_text(), source, "exec"), {"__name__": "__main__"})
    text = capsys.readouterr().out
    assert ended.value.code in (0, None) and "--trust-source" in text and "CHECKPOINT" in text.upper()
