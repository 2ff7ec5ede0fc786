"""Tests of records/: reading logs, adding, verifying and comparing. Only the last ones read what has landed."""

import hashlib
import json
import lzma
import math
import os
import re
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

import add as add_program
import compare
import leaderboard
import record
import runlog
import significance
import verify as verify_program
from data import tokenize_text
from fabricate import LINE, ROOT, SOURCE, Site, compressed, log_text, seal, sub
from record import Repository
from runlog import Refused

TEXT, OLDER = log_text(), log_text(older=True)


@pytest.fixture
def site(tmp_path):
    return Site(tmp_path)


# Reading a log -------------------------------------------------------------------------------------------------------


def test_a_good_log_is_read():
    log = runlog.parse("log", TEXT)
    assert log.sealed and log.source == SOURCE and log.seed == 0 and log.hardware == "1 x x86_64 CPU, 1 thread"
    assert len(log.steps) == 26 and [v.step for v in log.validations] == [10, 20, 26]
    assert log.steps[-1].tokens == log.result["tokens"] == log.validations[-1].tokens
    assert f"{log.loss:.4f}" == f"{log.validations[-1].loss:.4f}"
    assert f"{log.seconds:.3f}" == f"{log.validations[-1].seconds:.3f}"


def test_an_older_log_is_read():
    """Its steps say what share of the GPU's peak they reach, and a text by the model follows its result."""
    log, older = runlog.parse("log", TEXT), runlog.parse("log", OLDER)
    assert " mfu:0.412 ends_in:" in OLDER and "\nsample: 'The whale'\n{" in OLDER and "sample: '" not in TEXT
    assert (older.steps, older.validations, older.loss, older.sealed) == (log.steps, log.validations, log.loss, True)


def test_a_real_run_is_read(tmp_path):
    """The scripts write what the programs here read."""
    tokenize_text.build_sample()
    small = ["--model-dim", "48", "--layers", "sv l", "--max-tokens", "8192", "--val-tokens", "4096",
             "--val-row-tokens", "1024", "--val-every", "2", "--save-every", "1",
             "--checkpoint", str(tmp_path / "checkpoints")]
    for i in range(4):
        small += [f"--stages.{i}.batch-tokens", "2048"]
    subprocess.run([sys.executable, ROOT / "train_gpt.py", "--preset", "sample", "--data", ROOT / "data/sample/shards",
                    *small, "--out", tmp_path], check=True, capture_output=True,
                   env=os.environ | {"OMP_NUM_THREADS": "1"})
    (path,) = tmp_path.glob("*.txt")
    log = runlog.read_log(path)
    assert log.sealed and len(log.steps) == 4 and runlog.FILE_NAME.fullmatch(path.name)
    assert log.source == (ROOT / "train_gpt.py").read_text()
    assert log.result["fingerprint"] in Repository().tracks["sample"].fingerprints  # the embedded sample, as it is
    track = Repository().tracks["sample"]
    assert record.compile_settings(log.source) <= set(track.compile_settings)


def test_checkpoints_and_epochs_may_stand_among_the_steps():
    lines = "checkpoint:logs/train_gpt_step000005.pt\nepoch:2 begins, all 1200 training tokens have been read\n"
    assert runlog.parse("log", seal(sub("^step:5/", lines + "step:5/", TEXT))).loss == runlog.parse("log", TEXT).loss


def put(pattern: str, replacement: str):
    """An edit that replaces the one place that matches."""
    return lambda text: sub(pattern, replacement, text)


def move(line: str, before: str):
    """An edit that moves one line before another."""
    def edit(text: str) -> str:
        (moved,) = re.findall(rf"^{line}.*\n", text, re.M)
        return sub(f"^{before}", moved + before, text.replace(moved, ""))
    return edit


def shift_time(text: str) -> str:
    """Takes 0.4 s off all training times from step 12 on, as if that step had been faster."""
    def earlier(match):
        return f"step:{match[1]}{match[2]}train_time:{float(match[3]) - 0.4:.3f}s" if int(match[1]) >= 12 else match[0]
    return re.sub(r"^step:(\d+)(.*)train_time:([\d.]+)s", earlier, text, flags=re.M)


FAULTS = {  # name: (edit of a good log, what the refusal says); all end in a fitting digest
    "no log": (lambda t: "step:1/2\n", "is no log"),
    "only a head": (lambda t: t.split(runlog.RULE)[0] + runlog.RULE, "is no log"),
    "a script that did not run": (lambda t: t.replace("nn.Linear(8, 8)", "nn.Linear(8, 9)"), "not the one that ran"),
    "resumed": (put("^startup:", "resumed:logs/x.pt step:7\nstartup:"), "of a resumed run .resumed:logs/x.pt"),
    "stopped": (put("^reached the", "stopped by SIGTERM: go on\nreached the"), "a run that did not end"),
    "head and end differ": (lambda t: t.replace('"threads": 1,', '"threads": 2,', 1),
                            "threads is 2 at its head and 1 in its"),
    "entry lost": (lambda t: t.replace('"triton": null, ', ""), "its closing line has no triton"),
    "another seed": (put('"seed": 0, "steps"', '"seed": 1, "steps"'), "seed is 1 in its closing line.*value|by"),
    "fewer steps": (put('"steps": 26,', '"steps": 25,'), "steps is 25 in its closing line, and by its arguments 26"),
    "other tokens": (put('"tokens": (\\d+), "train', '"tokens": 1, "train'), "tokens is 1 in its closing line"),
    "easier target": (put('"target": 1.8, "reached"', '"target": 1.9, "reached"'), "target is 1.9 in its closing"),
    "fewer validation tokens": (put('"val_tokens": 2048, "scr', '"val_tokens": 1024, "scr'), "val_tokens is 1024"),
    "not reached": (put('"reached": true', '"reached": false'), "reached is False"),
    "broken JSON": (put('"val_loss": ', '"val_loss": ,'), "JSON or arguments are damaged"),
    "endless": (lambda t: t.replace('"max_tokens": 60000', '"max_tokens": 6e99'), "JSON or arguments are damaged"),
    "other headline": (put("2.4M parameters", "2.3M parameters"), "expected 'train_gpt.py on 1 x"),
    "other start-up": (put("^startup:2.3s", "startup:1.3s"), "expected 'startup:2.3s'"),
    "step missing": (put(r"^step:7/26 .*\n", ""), "'step:8/26 .*expected 'step:7/26 train_loss"),
    "step twice": (put(r"^(step:7/26 .*\n)", r"\1\1"), "'step:7/26 .*expected 'step:8/26 train_loss"),
    "steps swapped": (move("step:8/26 train_", "step:7/26 train_"), "'step:8/26 .*expected 'step:7/26 train_loss"),
    "last step missing": (put(r"^step:26/26 train_loss.*\n", ""), "expected 'step:26/26 train_loss"),
    "another number of steps": (put("^step:7/26", "step:7/27"), "expected 'step:7/26 train_loss"),
    "validation missing": (put(r"^step:10/26 val_loss.*\n", ""), "expected 'step:10/26 val_loss"),
    "last validation missing": (put(r"^step:26/26 val_loss.*\n", ""), "expected 'step:26/26 val_loss"),
    "validation before its step": (move("step:10/26 val_", "step:10/26 train_"), "expected 'step:10/26 train_loss"),
    "loss not finite": (put(r"^(step:9/26 train_loss:)\S+", r"\1nan"), "the train_loss of step 9 is nan"),
    "validation infinite": (put(r"^(step:10/26 val_loss:)\S+", r"\1inf"), "the val_loss of step 10 is inf"),
    "tokens off": (put(r"^(step:5/26 .*tokens:)\d+", r"\g<1>5000"), "step 5 has tokens:5000, and its stage table"),
    "time runs back": (put(r"^(step:9/26 .*train_time:)[\d.]+", r"\g<1>1.000"), "step 9 has train_time:1.000s"),
    "time after a validation": (put(r"^(step:10/26 val_.*time:)[\d.]+", r"\g<1>99.000"), "step 11 .* less than"),
    "validation runs back": (put(r"^(step:10/26 val_.*time:)[\d.]+", r"\g<1>1.000"), "the validation has train_"),
    "faster from a step on": (shift_time, "step 12 took .* but its train_time grew by"),
    "speed off": (put(r"^(step:5/26 .*tokens/s:)\d+", r"\g<1>9999"), "step 5 has tokens/s:9999"),
    "ends_in off": (put(r"^(step:5/26 .*ends_in:)\d+", r"\g<1>999"), "step 5 has ends_in:999s"),
    "lower loss at the end": (put('"val_loss": 1', '"val_loss": 0'), "in its closing line, and 1"),
    "loss NaN at the end": (put('"val_loss": [^,]+, (.*)"reached": true', r'"val_loss": NaN, \1"reached": false'),
                            "val_loss is nan"),
    "less time at the end": (put('"train_seconds": 1', '"train_seconds": '), "train_seconds is .* the last val"),
    "speed at the end": (put('"tokens_per_second": ', '"tokens_per_second": 1'), "is not tokens / train_seconds"),
    "total too small": (put('"total_seconds": [^,]+', '"total_seconds": 3.0'), "less than start-up and training"),
    "result missing": (put(r"^reached the target.*\n", ""), "expected 'reached the target"),
    "result differs": (put("^reached the target", "missed the target"), "expected 'reached the target"),
    "line of somebody's": (put("^step:7/26", "hello\nstep:7/26"), "is 'hello', expected 'step:7/26"),
    "line after the result": (put("^(reached the .*)", r"\1\nhello"), "is none that a run writes: 'hello'"),
    "a step after the result": (put("^(reached the .*)", r"\1\nstep:26/26"), "is none that a run writes: 'step:26"),
}
OLDER_FAULTS = {  # of the line after the result
    "line after it": (put("^(sample: .*)", r"\1\nhello"), "is none that a run writes: 'hello'"),
    "line before it": (put("^sample: ", "hello\nsample: "), "is none that a run writes: 'hello'"),
    "twice": (put("^(sample: .*)", r"\1\n\1"), 'is none that a run writes: "sample: '),
    "before the result": (move("sample: ", "reached the "), "is \"sample: .*expected 'reached the target"),
}


@pytest.mark.parametrize("good, edit, reason", [
    *(pytest.param(TEXT, *fault, id=name) for name, fault in FAULTS.items()),
    *(pytest.param(OLDER, *fault, id=f"sample, {name}") for name, fault in OLDER_FAULTS.items())])
def test_fault_is_named(good, edit, reason):
    text = edit(good)
    assert text != good
    with pytest.raises(Refused, match=f"^log: .*(?:{reason})"):
        runlog.parse("log", seal(text) if runlog.SEAL in text else text)


@pytest.mark.parametrize("end", [0.2, 0.6, 0.99])
def test_truncated_log(end):
    with pytest.raises(Refused, match="is no log|ends before its closing line"):
        runlog.parse("log", TEXT[:int(end * len(TEXT))])


def test_a_digest_shows_any_edit():
    for text in (sub(r"^(step:7/26 train_loss:)\S+", r"\g<1>2.0000", TEXT), OLDER.replace("The whale", "The white")):
        with pytest.raises(Refused, match="edited after the run"):
            runlog.parse("log", text)


def test_files_that_are_no_logs(tmp_path):
    (tmp_path / "log.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(Refused, match="not UTF-8 at byte 0"):
        runlog.read_log(tmp_path / "log.txt")
    with pytest.raises(Refused, match="none.txt cannot be read .No such file"):
        runlog.read_log(tmp_path / "none.txt")
    with pytest.raises(Refused, match="cannot be read .Is a directory"):
        runlog.read_log(tmp_path)


PACKED = lzma.compress(TEXT.encode())
DAMAGE = {  # name: (bytes of an .xz file, what the refusal says)
    "trailing byte": (PACKED + b"x", "has 1 bytes after the end of its xz stream"),
    "padding": (PACKED + bytes(4), "has 4 bytes after the end"),
    "second stream": (PACKED * 2, f"has {len(PACKED)} bytes after the end"),
    "truncated": (PACKED[:-1], "is cut off: its xz stream has no end"),
    "half": (PACKED[:len(PACKED) // 2], "is cut off"),
    "empty": (b"", "is cut off"),
    "flipped bit": (PACKED[:999] + bytes([PACKED[999] ^ 1]) + PACKED[1000:], "is damaged or no xz file"),
    "not compressed": (TEXT.encode(), "is damaged or no xz file"),
    "older format": (lzma.compress(TEXT.encode(), lzma.FORMAT_ALONE), "is damaged or no xz file"),
    "edited text": (lzma.compress(TEXT.replace("2.4.6", "2.4.7").encode()), "edited after the run"),
    "not UTF-8": (lzma.compress(b"\xff"), "is no log .not UTF-8"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_compressed_logs_are_read_strictly(tmp_path, damage):
    data, reason = DAMAGE[damage]
    path = tmp_path / "log.txt.xz"
    path.write_bytes(PACKED)
    assert runlog.read_log(path).text == TEXT
    path.write_bytes(data)
    with pytest.raises(Refused, match=f"^log.txt.xz.* {reason}"):
        runlog.read_log(path)


BYTES, LINES = TEXT.encode(), TEXT.split("\n")


@st.composite
def edited_bytes(draw) -> bytes:
    """A log with one byte changed, taken out or put in; more often in the report than in the source."""
    report = BYTES.index(b"startup:")
    at = draw(st.one_of(st.integers(0, len(BYTES) - 1), st.integers(report, len(BYTES) - 1)))
    byte = bytes([draw(st.one_of(st.integers(0, 255), st.sampled_from(b"0123456789.,:\n")))])
    return BYTES[:at] + draw(st.sampled_from([byte, b"", byte + BYTES[at:at + 1]])) + BYTES[at + 1:]


@st.composite
def edited_lines(draw) -> bytes:
    """A log with one line taken out, doubled or moved."""
    lines = list(LINES)
    line = lines.pop(draw(st.integers(0, len(lines) - 1)))
    if draw(st.booleans()):
        lines.insert(draw(st.integers(0, len(lines))), line)
        if draw(st.booleans()):
            lines.insert(draw(st.integers(0, len(lines))), line)
    return "\n".join(lines).encode()


def claims(log: runlog.Log) -> dict:
    """What a record says of a run: the result to the digits that it prints, the source, and the environment.

    An edit that leaves this alone is harmless. Training losses and earlier validations draw the curves, and the whole
    process's seconds and the peak memory are told but not ranked: nothing else in the log confirms them.
    """
    told = {"peak_memory_mib", "total_seconds", "startup_seconds", "tokens_per_second", "log_sha256"}
    result = {key: log.result[key] for key in json.loads(LINES[-2]).keys() - told}
    return result | {"val_loss": f"{log.loss:.4f}", "train_seconds": f"{log.seconds:.3f}", "source": log.source,
                     "steps": len(log.steps), "curve": [step.tokens for step in log.steps]}


@settings(max_examples=300, deadline=None)
@given(st.one_of(edited_bytes(), edited_lines()))
def test_any_edit_is_refused(data):
    """Byte or line: without a new digest the log is not accepted, or seen to be without one (which add.py refuses)."""
    try:
        accepted = runlog.parse("log", data.decode()).sealed
    except (Refused, UnicodeDecodeError):
        return
    assert not accepted or data == BYTES


@settings(max_examples=500, deadline=None)
@given(st.one_of(edited_bytes(), edited_lines()))
def test_an_edit_with_a_new_digest_is_refused_or_harmless(data):
    """A log contradicts itself where one place was changed that matters, even if its digest was made anew."""
    try:
        text = data.decode()
        log = runlog.parse("log", seal(text) if runlog.SEAL in text else text)
    except (Refused, UnicodeDecodeError):
        return
    assert not log.sealed or claims(log) == claims(runlog.parse("log", TEXT))


# Adding a record ------------------------------------------------------------------------------------------------------


def test_add_writes_a_whole_record_and_rebuilds_the_leaderboard(site, capsys):
    paths = site.logs()
    words = ["--name", "First", "--by", "Somebody", "--readme", "Because.", "--script", str(site.root / "train_gpt.py")]
    add_program.main([*map(str, paths), *words], site.repository)
    assert capsys.readouterr().out.startswith("records/sample/2026-11-01_First: 1")
    folder = site.records / "sample" / "2026-11-01_First"
    assert {path.name for path in folder.iterdir()} == {
        "README.md", "record.json", "train_gpt.py", "change.diff", *(f"{path.name}.xz" for path in paths)}
    assert (folder / "train_gpt.py").read_text() == SOURCE and (folder / "change.diff").read_text() == ""
    assert all(runlog.read_bytes(folder / f"{path.name}.xz") == path.read_bytes() for path in paths)

    about, logs = json.loads((folder / "record.json").read_text()), [runlog.read_log(path) for path in paths]
    assert about["loss_mean"] == pytest.approx(sum(log.loss for log in logs) / 3, abs=1e-6)
    p = stats.ttest_1samp([log.loss for log in logs], 1.8, alternative="less").pvalue
    assert about["p"] == pytest.approx(p, rel=0.01)
    assert [run["seed"] for run in about["runs"]] == [0, 1, 2] and about["compared_with"] is None
    assert [(run["log"], run["sha256"]) for run in about["runs"]] == [
        (f"{path.name}.xz", hashlib.sha256(path.read_bytes()).hexdigest()) for path in paths]
    text = (folder / "README.md").read_text()
    for words in ("# First", "Because.", f"{about['seconds_mean']:.3f} s", f"{about['loss_mean']:.4f}",
                  "attention reference, not compiled", "by Somebody, 2026-11-01", "Nothing to compare with",
                  "sections are those that train_gpt.py had"):
        assert words in text, words
    for name, base in (("README.md", "records/"), ("records/README.md", "")):
        text = (site.root / name).read_text()
        assert f"[First]({base}sample/2026-11-01_First)" in text
        assert text.startswith("Above.") and text.endswith("Below.\n")
    assert leaderboard.stale(site.repository) == []


def test_logs_land_the_same_compressed_or_not(site, tmp_path_factory):
    other = Site(tmp_path_factory.mktemp("other"))
    paths = other.logs()
    record = other.add([compressed(paths[0]), paths[1], compressed(paths[2])])
    assert site.add(site.logs()).summary == record.summary and site.files() == other.files()
    assert all(f'"sample/{record.folder}/{log.name}"' in (site.records / "index.html").read_text()
               and f"[{log.name}]({log.name})" in (site.records / "sample" / record.folder / "README.md").read_text()
               for log in record.logs)


def test_add_orders_the_logs_by_seed(site):
    assert [log.seed for log in site.add(site.logs()[::-1]).logs] == [0, 1, 2]


def test_a_faster_record_shows_its_change(site):
    first = site.add(site.logs(), name="First")
    source = SOURCE.replace("nn.Linear(8, 8)", "nn.Linear(8, 9)")
    second = site.add(site.logs(day=2, source=source, step_seconds=0.4, args={"layers": "s s"}), name="Second")
    assert second.beats == second.compared_with == first.folder
    folder = site.records / "sample" / second.folder
    diff = (folder / "change.diff").read_text()
    assert re.search(r"^-.*Linear\(8, 8\)", diff, re.M) and re.search(r"^\+.*Linear\(8, 9\)", diff, re.M)
    about = json.loads((folder / "record.json").read_text())
    assert about["lines_added_and_removed"] == [1, 1] and about["arguments_changed"] == {"layers": ["s l", "s s"]}
    assert "It beats [2026-11-01_First]" in (folder / "README.md").read_text()
    table = (site.records / "README.md").read_text()
    assert table.index("| 1 | ") < table.index("[Second]") < table.index("| 2 | ") < table.index("[First]")


def test_first_entries_need_not_be_fastest(site):
    """Of another script, and on other hardware; they are compared with the fastest on theirs, or of the track."""
    first = site.add(name="First")
    hybrid = site.add(site.logs(step_seconds=0.9, script="train_hybrid.py"), name="Hybrid")
    assert (hybrid.beats, hybrid.compared_with) == (None, first.folder)
    other = site.add(site.logs(step_seconds=0.9, device="arm64 CPU", threads=4), name="Arm")
    assert (other.beats, other.compared_with, other.hardware) == (None, first.folder, "1 x arm64 CPU, 4 threads")
    assert (site.records / "README.md").read_text().count("**On 1 x") == 2


def test_a_change_of_a_same_section_is_flagged(site, capsys):
    source = SOURCE.replace("recompile_limit = 64", "recompile_limit = 99")
    changed = site.logs(source=source)
    add_program.main([*map(str, changed), "--name", "Changed", "--by", "Somebody"], site.repository)
    assert "note: it changes sections marked [same]: Setup [same]" in capsys.readouterr().out
    folder = site.records / "sample" / "2026-11-01_Changed"
    assert "**Changes sections marked `[same]`**: Setup [same]." in (folder / "README.md").read_text()
    assert "+torch._dynamo.config.recompile_limit = 99" in (folder / "same.diff").read_text()
    verify_program.verify(site.repository, site.repository.landed[0])

    text = (folder / "same.diff").read_text()
    (folder / "same.diff").write_text(text.replace("= 99", "= 65"))
    with pytest.raises(Refused, match="same.diff does not lead to the section Setup"):
        verify_program.verify(site.repository, site.repository.landed[0])
    (folder / "same.diff").unlink()
    with pytest.raises(Refused, match="record.json has .'Setup .same.'. as .same. sections that changed"):
        verify_program.verify(site.repository, site.repository.landed[0])


def test_a_lost_same_section_is_flagged():
    changes = record.same_changes(SOURCE.split(f"{LINE}\n# Training")[0], SOURCE)
    assert list(changes) == ["Training [same]"] and record.diff_size(changes["Training [same]"]) == (0, 22)


@pytest.mark.parametrize("line, setting", [
    ("torch._inductor.config.coordinate_descent_tuning = True", "torch._inductor.config.coordinate_descent_tuning"),
    ("torch._dynamo.config.optimize_ddp = False", "torch._dynamo.config.optimize_ddp"),
    ("import torch._inductor.config as c", "torch._inductor.config"),
    ("from torch._inductor import config", "torch._inductor.config"),
    ("setattr(torch._inductor.config, name, True)", "torch._inductor.config"),
    ("importlib.import_module('torch._inductor.config')", "torch._inductor.config"),
    ("os.environ['TORCHINDUCTOR_MAX_AUTOTUNE'] = '1'", "TORCHINDUCTOR_MAX_AUTOTUNE"),
    ("os.environ['TRITON_F32_DEFAULT'] = 'tf32'", "TRITON_F32_DEFAULT"),
    ("model.compile(mode='max-autotune')", "mode"),
    ("torch.compile(f, dynamic=True, options={})", "options"),
    ("torch.compile(f, **switches)", r"\*\*switches"),
    ("torch.compile(f, backend=own)", "backend=own"),
    ("torch._inductor.compile(graph, inputs, {'max_autotune': True})", "options"),
    ("from torch._inductor.compile_fx import compile_fx", "torch._inductor.compile_fx.compile_fx"),
])
def test_compiler_settings_are_refused(site, line, setting):
    with pytest.raises(Refused, match=f"the source sets {setting}, and of the compiler's settings track sample allows"):
        site.add(site.logs(source=f"{SOURCE}{line}\n"))


def test_what_is_no_compiler_setting():
    harmless = "re.compile('a', flags=1)\nload('torch._inductor.async_compile')\ntorch._dynamo.mark_dynamic(x, 0)"
    assert record.compile_settings(harmless) == set()
    with pytest.raises(Refused, match="no Python .line 1"):
        record.compile_settings("def")


H100 = {"device": "NVIDIA H100 80GB HBM3", "cuda": "13.0", "world_size": 8}
BIG = {"args": {"val_tokens": 4096, "val_row_tokens": 1024, "target": 3.28}, "dataset": "big", "loss": 3.2}


def three(**last) -> list[str]:
    """Logs of seeds 0 and 1, and one of seed 2 that differs in `last`."""
    return [log_text(0), log_text(1), log_text(**{"seed": 2, **last})]


REFUSALS = {  # name: (logs, what the refusal says)
    "edited": (lambda: three()[:2] + [log_text(2).replace("2.4.6", "2.4.7")], "edited after the run"),
    "truncated": (lambda: three()[:2] + [log_text(2)[:-300]], "ends before its closing line"),
    "no digest": (lambda: three()[:2] + [log_text(2).rpartition(runlog.SEAL)[0] + "}\n"], "has no log_sha256"),
    "another source": (lambda: three(source=SOURCE + "#\n"), "are of different sources"),
    "another script": (lambda: three(script="train_hybrid.py"), "script is train_gpt.py in .* and train_hybrid.py in"),
    "another device": (lambda: three(device="arm64 CPU"), "device is x86_64 CPU in .* and arm64 CPU in"),
    "other threads": (lambda: three(threads=2), "threads is 1 in .* and 2 in"),
    "other ranks": (lambda: three(world_size=2), "world_size is 1 in .* and 2 in"),
    "other kernels": (lambda: three(attention="torch"), "attention is reference in .* and torch in"),
    "another torch": (lambda: three(torch="2.12.0"), "torch is 2.13.0 in .* and 2.12.0 in"),
    "other shards": (lambda: three(fingerprint="beef"), "fingerprint is f00d in .* and beef in"),
    "other parameters": (lambda: three(params=1000), "params is .* in .* and .*1000.* in"),
    "another flag": (lambda: three(args={"model_dim": 96}), "--model-dim is 192 in .* and 96 in"),
    "seed twice": (lambda: [*three(), log_text(2, loss=1.69)], "two logs are of one seed: .0, 1, 2, 2."),
    "seed missing": (lambda: [log_text(seed) for seed in (0, 1, 3)], "are .0, 1, 3.: .* 1 are missing, first seed 2"),
    "first seed missing": (lambda: [log_text(seed) for seed in (1, 2, 3)], "1 are missing, first seed 0"),
    "too few": (lambda: three()[:2], "3 at the least, and 1 are missing, first seed 2"),
    "validation tokens": (lambda: [log_text(s, args={"val_tokens": 1024}) for s in range(3)],
                          "val_tokens is 1024, and track"),
    "target": (lambda: [log_text(s, args={"target": 1.9}) for s in range(3)],
               "target is 1.9, and track sample has 1.8"),
    "validation rows": (lambda: [log_text(s, args={"val_row_tokens": 256}) for s in range(3)],
                        "--val-row-tokens is 256, and"),
    "other data": (lambda: [log_text(s, fingerprint="beef") for s in range(3)],
                   "not those of track sample: fingerprint beef"),
    "no track": (lambda: [log_text(s, dataset="wiki") for s in range(3)],
                 "0 tracks have the dataset 'wiki': choose --track"),
    "loss too high": (lambda: [log_text(s, loss=1.8) for s in range(3)], r"is not below 1.8 at p < 0.01: p = 0\."),
    "loss barely low": (lambda: [log_text(s, loss=1.7995) for s in range(3)],
                        "mean loss 1.79.. of 3 runs is not below 1.8"),
    "compiler switched from outside": (lambda: three(variables={"TORCHINDUCTOR_MAX_AUTOTUNE": "1"}),
                                       "TORCHINDUCTOR_MAX_AUTOTUNE was set when"),
    "no noise": (lambda: same_losses(), "all runs end in the loss 1.7: the seed changes"),
}


def same_losses() -> list[str]:
    """Logs of three seeds with one final loss."""
    texts = []
    for seed in range(3):
        text = log_text(seed)
        loss = json.loads(text.splitlines()[-1])["val_loss"]
        text = text.replace(repr(loss), "1.7").replace(f"val_loss {loss:.4f}", "val_loss 1.7000")
        texts.append(seal(sub(r"^(step:26/26 val_loss:)\S+", r"\g<1>1.7000", text)))
    return texts


@pytest.mark.parametrize("case", REFUSALS)
def test_refusal(site, capsys, case):
    """One clear line, exit code 2, and nothing is written."""
    texts, reason = REFUSALS[case]
    paths, before = site.logs(texts()), site.files()
    with pytest.raises(SystemExit) as end:
        add_program.main([*map(str, paths), "--name", "Name", "--by", "Somebody"], site.repository)
    out, error = capsys.readouterr()
    assert end.value.code == 2 and out == "" and re.fullmatch(f"add.py: refused: .*(?:{reason}).*\n", error), error
    assert site.files() == before and not list(site.records.glob("*/.*"))


@pytest.mark.parametrize("options, reason", [
    ({"name": "a/b"}, "--name 'a/b' must be up to 60 letters"),
    ({"name": ".hidden"}, "--name '.hidden' must be"),
    ({"name": ""}, "--name '' must be"),
    ({"by": "a\nb"}, "--by must be one line"),
    ({"by": "a | b"}, "--by must be one line"),
    ({"by": " "}, "--by must be one line"),
    ({"readme": "text\n# Heading"}, "--readme has a heading"),
    ({"track": "none"}, "--track none is no ranked track; there are: big, sample"),
    ({"track": "evidence"}, "--track evidence is no ranked track"),
    ({"track": "big"}, "dataset is sample, and track big has big"),
])
def test_refused_words(site, options, reason):
    paths, before = site.logs(), site.files()
    with pytest.raises(Refused, match=reason):
        site.add(paths, **options)
    assert site.files() == before


def test_refused_files(site):
    paths = site.logs()
    with pytest.raises(Refused, match="a log is given twice"):
        site.add([*paths, paths[0]])
    twin = paths[0].with_name(f"{paths[0].name}.xz")
    twin.write_bytes(lzma.compress(paths[0].read_bytes()))
    with pytest.raises(Refused, match="a log is given twice"):
        site.add([*paths, twin])
    twin.write_bytes(twin.read_bytes() + b"x")
    before = site.files()
    with pytest.raises(Refused, match="has 1 bytes after the end of its xz stream"):
        site.add([twin, *paths[1:]])
    assert site.files() == before
    (site.root / "other.py").write_text(SOURCE + "#")
    with pytest.raises(Refused, match="--script .*other.py is not the source in"):
        site.add(paths, script=site.root / "other.py")
    renamed = paths[0].rename(paths[0].with_name("best.txt"))
    with pytest.raises(Refused, match="best.txt is not named as the script named it"):
        site.add([renamed, *paths[1:]])
    with pytest.raises(Refused, match="a script '../x.py', which is no file"):
        site.add(site.logs(script="../x.py"))


def test_adding_twice_is_refused(site):
    paths = site.logs()
    site.add(paths, name="First")
    with pytest.raises(Refused, match="is in a record already: sample/2026-11-01_First"):
        site.add(paths, name="Again")
    with pytest.raises(Refused, match="is in a record already"):  # nor one of them among new ones
        site.add([paths[0], *site.logs(step_seconds=0.1)[1:]], name="Again")
    with pytest.raises(Refused, match="2026-11-01_First exists already"):
        site.add(site.logs(step_seconds=0.1), name="First")


def test_slower_is_refused(site):
    site.add(name="First")
    with pytest.raises(Refused, match="s is not faster than the record of train_gpt.py on 1 x x86_64 CPU, 1 thread: 1"):
        site.add(site.logs(step_seconds=0.6), name="Slower")


def test_a_track_without_a_fingerprint_takes_that_of_its_first_record(site):
    site.add(site.logs(**BIG, **H100, fingerprint="abc"), name="First")
    with pytest.raises(Refused, match="the shards are not those of track big: fingerprint def, expected abc"):
        site.add(site.logs(**BIG, **H100, fingerprint="def", step_seconds=0.1), name="Second")
    site.add(site.logs(**BIG, fingerprint="abc"), name="Cpu")
    text = (site.records / "README.md").read_text()
    assert text.index("8 x NVIDIA H100") < text.index("1 x x86_64 CPU")  # the track's headline first
    assert "fingerprint of its shards is not pinned" in text


@pytest.mark.parametrize("function", ["fsync", "rename"])
def test_nothing_is_left_half_written(site, monkeypatch, function):
    paths, before = site.logs(), site.files()

    def fails(*_):
        raise OSError(28, "No space left on device")
    with monkeypatch.context() as patch, pytest.raises(OSError):
        patch.setattr(add_program.os, function, fails)
        site.add(paths)
    assert site.files() == before and not any((site.records / "sample").iterdir())
    site.add(paths)


def test_a_readme_without_marks_is_refused(site):
    (site.root / "README.md").write_text("Nothing here.")
    before = site.files()
    with pytest.raises(Refused, match="README.md has lost the marks"):
        site.add()
    assert site.files() == before


def test_p_value_on_known_numbers():
    """Student's t with two degrees of freedom has a closed form."""
    losses, target = [3.270, 3.272, 3.275], 3.28
    mean, t = sum(losses) / 3, 0.0
    deviation = math.sqrt(sum((x - mean) ** 2 for x in losses) / 2)
    t = (mean - target) / (deviation / math.sqrt(3))
    assert significance.p_value(losses, target) == pytest.approx(0.5 + t / (2 * math.sqrt(2 + t * t)), rel=1e-9)
    assert significance.p_value([3.281, 3.282, 3.283], target) > 0.5


# Verifying ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def landed(site):
    site.add(name="First")
    site.add(site.logs(day=2, step_seconds=0.4), name="Second")
    (site.records / "evidence").mkdir()
    (site.records / "evidence" / "2026-11-03T00-00-00Z_train_gpt_00000000.txt").write_text(
        log_text(dataset="wiki").rpartition(runlog.SEAL)[0] + "}\n")
    leaderboard.write(leaderboard.generate(site.repository))
    return site


def verdict(site, capsys, *words, code=2) -> str:
    with pytest.raises(SystemExit) as end:
        verify_program.main(list(map(str, words)), site.repository)
    out, error = capsys.readouterr()
    assert end.value.code == code, error
    return error or out


def test_verify_passes_what_add_wrote(landed, capsys):
    lines = verdict(landed, capsys, code=0).splitlines()
    assert [line.split(":")[0] for line in lines] == [
        "sample/2026-11-02_Second", "sample/2026-11-01_First", "evidence/2026-11-03T00-00-00Z_train_gpt_00000000.txt"]
    assert "without log_sha256" in lines[-1]
    one = verdict(landed, capsys, landed.records / "sample" / "2026-11-01_First", code=0)
    assert one == "sample/2026-11-01_First: 3 runs, " + one.split(", ")[1] + ", good\n"


@pytest.mark.parametrize("name", ["README.md", "record.json", "train_gpt.py", "change.diff", "2026-11-02*.txt.xz"])
@pytest.mark.parametrize("edit", ["append", "remove"])
def test_verify_finds_an_edited_file(landed, capsys, name, edit):
    path = next((landed.records / "sample" / "2026-11-02_Second").glob(name))
    path.unlink() if edit == "remove" else path.write_bytes(path.read_bytes() + b" ")
    assert "verify.py: sample/2026-11-02_Second: " in verdict(landed, capsys)


def test_verify_reads_logs_by_their_text(landed, capsys):
    """However they were compressed, but compressed, whole, and with nothing else in the file."""
    path = next((landed.records / "sample" / "2026-11-02_Second").glob("*.txt.xz"))
    text, about = runlog.read_bytes(path), path.with_name("record.json")
    path.write_bytes(lzma.compress(text, preset=0))
    verdict(landed, capsys, code=0)
    edited = sub(r"^(step:7/26 train_loss:)\S+", r"\g<1>2.0000", text.decode())
    for data, reason in ((lzma.compress(text) + b"x", "has 1 bytes after the end of its xz stream"),
                         (lzma.compress(text) * 2, "bytes after the end of its xz stream"),
                         (lzma.compress(text)[:-9], "is cut off: its xz stream has no end"),
                         (lzma.compress(edited.encode()), "edited after the run"),
                         (lzma.compress(seal(edited).encode()), "not what the logs"),
                         (text, "is damaged or no xz file")):
        path.write_bytes(data)
        error = verdict(landed, capsys)
        assert re.search(f"^verify.py: sample/2026-11-02_Second: .*{reason}", error) and len(error.splitlines()) < 3
    path.unlink()
    path.with_suffix("").write_bytes(text)
    about.write_text(about.read_text().replace(path.name, path.stem))
    assert f"{path.stem} is no file of a record" in verdict(landed, capsys)


@pytest.mark.parametrize("entry, value, reason", [
    ("beats", None, "by the times it beats 2026-11-01_First, and its record.json says None"),
    ("beats", "2026-11-02_Second", "by the times it beats 2026-11-01_First"),
    ("compared_with", "2026-11-09_None", "compared with 2026-11-09_None, which is not there"),
    ("compared_with", None, "it beats 2026-11-01_First, and was compared with None"),
    ("date", "2026-11-09", "the folder should be 2026-11-09_Second"),
    ("p", 0.0, "record.json is not what the logs make it"),
    ("by", "a\nb", "--by must be one line"),
    ("runs", [], "record.json has no runs"),
    ("same_sections_changed", ["Setup [same]"], "record.json has .'Setup .same.'."),
])
def test_verify_checks_record_json(landed, capsys, entry, value, reason):
    path = landed.records / "sample" / "2026-11-02_Second" / "record.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {entry: value}))
    assert re.search(reason, verdict(landed, capsys))


def test_verify_finds_what_is_wrong_around_a_record(landed, capsys):
    extra = landed.records / "sample" / "2026-11-02_Second" / "weights.pt"
    extra.touch()
    assert "weights.pt is no file of a record" in verdict(landed, capsys)
    extra.unlink()
    page = landed.records / "index.html"
    page.write_text(page.read_text() + " ")
    assert "verify.py: records/index.html is stale: run python records/leaderboard.py" in verdict(landed, capsys)
    leaderboard.write(leaderboard.generate(landed.repository))
    (log,) = runlog.logs_in(landed.records / "evidence")
    log.write_text(log.read_text().replace("step:7/", "step:8/"))
    assert "expected 'step:7/26" in verdict(landed, capsys)
    assert "is in no ranked track" in verdict(landed, capsys, landed.records / "evidence")


def test_evidence_may_be_compressed(landed, capsys):
    (log,) = runlog.logs_in(landed.records / "evidence")
    log = compressed(log)
    assert "verify.py: records/index.html is stale" in verdict(landed, capsys)  # the page links to the file
    leaderboard.write(leaderboard.generate(landed.repository))
    assert f"evidence/{log.name}: one run" in verdict(landed, capsys, code=0)
    assert f'"evidence/{log.name}"' in (landed.records / "index.html").read_text()
    log.write_bytes(log.read_bytes() + b"x")
    assert verdict(landed, capsys) == f"verify.py: {log.name} has 1 bytes after the end of its xz stream\n"


def test_rules_hold_for_what_has_landed(landed, capsys):
    tracks = landed.records / "tracks.toml"
    tracks.write_text(tracks.read_text().replace("target = 1.8", "target = 1.6"))
    assert "target is 1.8, and track sample has 1.6" in verdict(landed, capsys)


# Comparing ------------------------------------------------------------------------------------------------------------


def test_welch_on_known_numbers():
    """Against the textbook's formulas: Welch's t, Satterthwaite's degrees of freedom, and the interval from them."""
    a, b = [3.281, 3.279, 3.284, 3.280], [3.276, 3.271, 3.278]
    means, spreads = zip(*((sum(x) / len(x), sum((v - sum(x) / len(x)) ** 2 for v in x) / (len(x) - 1) / len(x))
                           for x in (a, b)))
    error = math.sqrt(sum(spreads))
    freedom = sum(spreads) ** 2 / (spreads[0] ** 2 / 3 + spreads[1] ** 2 / 2)
    half = error * stats.t.ppf(0.975, freedom)
    change = means[1] - means[0]
    assert significance.difference(a, b, 0.95) == pytest.approx(
        (change, change - half, change + half, 2 * stats.t.sf(abs(change) / error, freedom)), rel=1e-9)
    assert significance.ratio([2.0, 2.2, 2.4], [1.0, 1.1, 1.2], 0.95)[0] == pytest.approx(0.5)


def sets(tmp_path, a: dict, b: dict) -> list[str]:
    for name, fields in (("a", a), ("b", b)):
        (tmp_path / name).mkdir()
        for seed in range(fields.pop("first", 0), fields.pop("last", 3)):
            (tmp_path / name / f"{seed}.txt").write_text(log_text(seed + 10 * (name == "b"), **fields))
    return [str(tmp_path / "a"), str(tmp_path / "b")]


def test_compare_tells_differences_from_noise(tmp_path, capsys):
    a, b = sets(tmp_path, {}, {"loss": 1.65, "step_seconds": 0.25})
    compare.main([a, b])
    text = capsys.readouterr().out
    assert re.search(r"B's loss is lower by 0\.0[45]", text) and "B is faster" in text
    assert "A: 3 runs of train_gpt.py" in text
    assert len(re.findall(r"^ +[\d,]+ +\d\.\d{4} +\d\.\d{4} +[-+]\d\.\d{4}   [-+]\d\.\d{4} to", text, re.M)) == 3
    compare.main([b, a])
    assert "B's loss is higher by 0.0" in (text := capsys.readouterr().out) and "B is slower" in text


def test_compare_calls_noise_noise(tmp_path, capsys):
    compare.main([*sets(tmp_path, {}, {})])
    text = capsys.readouterr().out
    assert "inside the noise between seeds: no difference shown" in text and "inside the noise between runs" in text


def test_compare_takes_patterns_and_other_hardware_and_budgets(tmp_path, capsys):
    a, b = sets(tmp_path, {"args": {"val_every": 5}},
                {"device": "arm64 CPU", "args": {"max_tokens": 46_000, "val_every": 5}})
    compare.main([f"{a}/*.txt", b])
    text = capsys.readouterr().out
    assert "time: not compared, A ran on 1 x x86_64 CPU, 1 thread and B on 1 x arm64 CPU" in text
    assert "loss at 5,120 tokens" in text


def test_compare_reads_compressed_logs(tmp_path, capsys):
    a, b = sets(tmp_path, {}, {"loss": 1.65})
    compare.main([a, b])
    plain = capsys.readouterr().out
    for path in [*runlog.logs_in(tmp_path / "a"), tmp_path / "b" / "1.txt"]:
        compressed(path)
    (tmp_path / "b" / "README.md").touch()
    for words in ([a, b], [f"{a}/*.txt.xz", f"{b}/*.txt*"]):
        compare.main(words)
        assert capsys.readouterr().out == plain


@pytest.mark.parametrize("b, reason", [
    ({"last": 1}, "b: 1 logs; the noise between seeds takes two"),
    ({"last": 0}, "b: 0 logs"),
    ({"fingerprint": "beef"}, "fingerprint is f00d in A and beef in B"),
    ({"args": {"val_row_tokens": 256}}, "other --val-row-tokens"),
    ({"args": {"val_every": 0, "max_tokens": 50_000}}, "never validated after equal tokens"),
])
def test_compare_refuses(tmp_path, capsys, b, reason):
    words = sets(tmp_path, {}, b)
    with pytest.raises(SystemExit) as end:
        compare.main(words)
    error = capsys.readouterr().err
    assert end.value.code == 2 and re.fullmatch(f"compare.py: .*{reason}.*\n", error), error


def test_compare_refuses_mixed_sets_and_bad_levels(tmp_path, capsys):
    a, b = sets(tmp_path, {}, {})
    for name, text, reason in (
            ("source", log_text(9, source=SOURCE + "#\n"), "has another source or hardware"),
            ("budget", log_text(9, args={"max_tokens": 50_000}), "has another budget or stage table"),
            ("seed", log_text(0, loss=1.6), "two logs are of one seed")):
        (tmp_path / "a" / f"x{name}.txt").write_text(text)
        with pytest.raises(SystemExit):
            compare.main([a, b])
        assert reason in capsys.readouterr().err
        (tmp_path / "a" / f"x{name}.txt").unlink()
    with pytest.raises(SystemExit):
        compare.main([a, b, "--confidence", "2"])
    assert "--confidence 2.0 must be" in capsys.readouterr().err
    with pytest.raises(Refused, match="without any noise"):
        significance.difference([1.0, 1.0], [2.0, 2.0], 0.95)


# What has landed ------------------------------------------------------------------------------------------------------


def test_landed_records_and_leaderboard_are_good():
    done = subprocess.run([sys.executable, ROOT / "records" / "verify.py"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("program", [add_program, verify_program, compare])
def test_help(program, capsys):
    with pytest.raises(SystemExit) as end:
        program.main(["--help"])
    assert end.value.code == 0 and "usage" in capsys.readouterr().out
