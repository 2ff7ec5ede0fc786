"""Tests of whole runs on a CPU: learning, log, checkpoints, resumption, signals, errors, ranks, compilation."""

import functools
import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch._dynamo import lookup_backend

import train_gpt as gpt
from data import tokenize_text

SCRIPT = Path(gpt.__file__)
STEPS = 21  # an odd number: Adam, whose turn is every second step, ends with gradients that wait
# Four stages, so that the batch, the longest document, the windows and the loss change during a run.
STAGES = [(256, 32, (8, 16), (1.0, 0.5)), (512, 48, (16, 32), (1.0,)), (512, 64, (16, 32), (1.0,)),
          (512, 64, (16, 48), (1.0,))]
TINY = ["--preset", "sample", "--row-tokens", "128", "--micro-batch-tokens", "256", "--val-tokens", "2048",
        "--val-row-tokens", "512", "--val-windows", "16", "32", "--val-every", "0", "--model-dim", "32",
        "--num-heads", "2", "--layers", "sev= le -e levh", "--head-lr", "0.05", "--bigram-rows", "301",
        "--tied-until", "0.5"]
for i, (batch, longest, windows, weights) in enumerate(STAGES):
    TINY += [f"--stages.{i}.batch-tokens", str(batch), f"--stages.{i}.document-tokens", str(longest),
             f"--stages.{i}.windows", *map(str, windows), f"--stages.{i}.loss-weights", *map(str, weights)]
STEP_TOKENS = sum(stage[0] for stage in STAGES) / len(STAGES)
SHARDS = (1200, 1500)  # training tokens: few, so that there are several epochs


def pattern(tokens: int, seed: int) -> list[int]:
    """Documents K x y K x y ... with a letter K of their own: all but the first K follow from what is two tokens back.

    A model that sees the last token alone cannot tell K, after y.
    """
    rng, stream = np.random.default_rng(seed), []
    while len(stream) < tokens:
        stream += [256] + [int(rng.integers(65, 81)), 120, 121] * int(rng.integers(5, 20))
    return stream[:tokens]


def bigram_loss(stream: list[int]) -> float:
    """The loss, in nats, of the best prediction from the last token alone."""
    pairs = np.zeros((257, 257))
    np.add.at(pairs, (stream[:-1], stream[1:]), 1)
    with np.errstate(divide="ignore", invalid="ignore"):
        return -np.nansum(pairs * np.log(pairs / pairs.sum(1, keepdims=True))) / pairs.sum()


@pytest.fixture(scope="module")
def data(tmp_path_factory, write_folder) -> Path:
    shards = [pattern(tokens, seed) for seed, tokens in enumerate(SHARDS)]
    return write_folder(tmp_path_factory.mktemp("pattern"), shards, [pattern(3000, 2)],
                        name="pattern", tokenizer="bytes", vocab_size=257, document_separator=256)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """One thread here as in the subprocesses, for equal sums."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def sigterm_as_it_was():
    handler = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, handler)


class Log:
    """The one log file in a folder."""

    def __init__(self, folder: Path):
        (self.path,) = folder.glob("*.txt")
        self.text = self.path.read_text()
        self.train, self.val = self.losses("train"), self.losses("val")

    def losses(self, split: str) -> dict[int, str]:
        """{step: loss}, as it is printed."""
        pairs = re.findall(rf"^step:(\d+)/\d+ {split}_loss:(\S+) ", self.text, re.M)
        return {int(step): loss for step, loss in pairs}

    @property
    def result(self) -> dict:
        return json.loads(self.text.splitlines()[-1])


@pytest.fixture(scope="module")
def flags(data):
    """Makes the flags of a tiny run that writes all it has to write into a folder. The last of equal flags counts."""
    def make(folder: Path, *others, steps: int = STEPS) -> list[str]:
        return [*TINY, "--data", str(data), "--max-tokens", str(math.ceil(steps * STEP_TOKENS)), "--out", str(folder),
                "--checkpoint", str(folder), *map(str, others)]
    return make


@pytest.fixture(scope="module")
def train(flags):
    """Trains in this process."""
    def run(folder: Path, *others, steps: int = STEPS) -> Log:
        gpt.Run(gpt.parse_args(flags(folder, *others, steps=steps)), gpt.World()).train()
        return Log(folder)
    return run


@pytest.fixture(scope="module")
def whole(tmp_path_factory, train) -> Path:
    """The folder of a run that nothing interrupted."""
    train(folder := tmp_path_factory.mktemp("whole"))
    return folder


class PowerCut(BaseException):
    pass


@pytest.fixture
def train_until(train, monkeypatch):
    """Trains in this process, and breaks off after step `last` as if the power had gone."""
    def run(last: int, folder: Path, *others):
        def step(self, step=gpt.Run.train_step):
            step(self)
            if self.step == last:
                raise PowerCut
        with monkeypatch.context() as patch, pytest.raises(PowerCut):
            patch.setattr(gpt.Run, "train_step", step)
            train(folder, *others)
        return Log(folder)
    return run


@pytest.fixture
def refusal(flags, monkeypatch, capsys, tmp_path):
    """Runs main() with flags that it must refuse. Returns its one line on stderr."""
    def run(*others, code: int = 2, steps: int = STEPS) -> str:
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *flags(tmp_path, *others, steps=steps)])
        with pytest.raises(SystemExit) as end:
            gpt.main()
        error = capsys.readouterr().err
        assert end.value.code == code and re.fullmatch(r"train_gpt\.py: .+\n", error), error
        return error
    return run


def checkpoints(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*.pt"))


def load(folder: Path, name: str = "train_gpt_final.pt") -> dict:
    return torch.load(folder / name, weights_only=True)


def tensors(state: dict) -> dict[str, torch.Tensor]:
    """The weights and the optimiser's state in a checkpoint."""
    return state["model"] | {f"{bank} {name}": tensor for bank, whole in state["optimizer"].items()
                             for name, tensor in whole.items()}


def assert_same_end(a: Path, b: Path):
    """Two runs ended with the same bits in their weights and optimisers, and at the same place in the data."""
    a, b = load(a), load(b)
    assert (a["step"], a["position"]) == (b["step"], b["position"])
    assert torch.equal(a["rng"], b["rng"])
    a, b = tensors(a), tensors(b)
    assert a.keys() == b.keys() and [name for name in a if not torch.equal(a[name], b[name])] == []


def assert_close(log: Log, expected: Log, tolerance: float):
    """All steps of a run have about the losses that the same steps of another have."""
    steps = log.train.keys()
    assert steps and [float(log.train[i]) for i in steps] == pytest.approx(
        [float(expected.train[i]) for i in steps], abs=tolerance)


def launch(argv: list, *prefix: str, **environment: str) -> subprocess.Popen:
    """Starts the script in a process of its own, which dies after 90 seconds if it hangs."""
    process = subprocess.Popen([sys.executable, *prefix, str(SCRIPT), *argv], text=True, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, env=os.environ | {"OMP_NUM_THREADS": "1"} | environment)
    timer = threading.Timer(90, process.kill)
    timer.daemon = True
    timer.start()
    return process


def read_until(process: subprocess.Popen, *patterns: str):
    """Reads the output until a line matches the first pattern, then one that matches the second, and so on."""
    for pattern in patterns:
        assert any(re.match(pattern, line) for line in process.stdout), process.communicate()


# Logs ----------------------------------------------------------------------------------------------------------------


def test_sample_preset_trains_and_its_log_holds_everything(tmp_path):
    tokenize_text.build_sample()
    small = ["--model-dim", "48", "--layers", "sv= lh", "--max-tokens", "6144", "--val-tokens", "4096",
             "--val-row-tokens", "1024", "--val-every", "2", "--bigram-rows", "301", "--tied-until", "0.667"]
    for i in range(4):
        small += [f"--stages.{i}.batch-tokens", "2048"]
    data = ["--data", str(SCRIPT.parent / "data" / "sample" / "shards")]
    process = launch(["--preset", "sample", *data, *small, "--seed", "7", "--target", "9", "--out", str(tmp_path)])
    output, errors = process.communicate()
    assert process.returncode == 0, errors
    assert [path.suffix for path in tmp_path.iterdir()] == [".txt"]  # and no checkpoint, which nobody asked for

    source, log = SCRIPT.read_bytes(), Log(tmp_path)
    assert log.path.read_bytes().startswith(source)
    environment, report = log.text[len(source.decode()):].strip("=\n").split("\n" + "=" * 100 + "\n")
    assert report.strip() == output.strip()
    assert list(log.train) == [1, 2, 3] and list(log.val) == [2, 3]
    assert float(log.val[3]) < float(log.val[2]) < math.log(384)  # of the first loss: all tokens alike

    environment, result = json.loads(environment), log.result
    assert environment["torch"] == torch.__version__ and environment["world_size"] == 1
    assert environment["dataset"] == "sample" and environment["attention"] == "reference"
    assert "--seed" in environment["command"] and environment["args"]["model_dim"] == 48
    assert result | environment == result  # the last line is enough to know all
    assert f"{result['val_loss']:.4f}" == log.val[3]
    assert (result["seed"], result["steps"], result["tokens"], result["val_tokens"]) == (7, 3, 6144, 4096)
    assert (result["target"], result["reached"]) == (9, True)
    assert 0 < result["startup_seconds"] < result["total_seconds"] > result["train_seconds"] > 0


@pytest.fixture(scope="module")
def plenty(tmp_path_factory, write_folder) -> Path:
    """As much of the pattern as a run of 60 steps can read."""
    return write_folder(tmp_path_factory.mktemp("plenty"), [pattern(30_000, 0)], [pattern(3000, 2)],
                        name="pattern", tokenizer="bytes", vocab_size=257, document_separator=256)


def test_run_learns_what_a_bigram_model_cannot(tmp_path, train, plenty):
    bigram = bigram_loss(pattern(3000, 2)[:2049])
    result = train(tmp_path, "--data", plenty, "--layers", "sv", "--head-lr", "0.1", "--tied-until", "0",
                   "--target", "0.5", steps=60).result
    assert bigram > 0.9 and result["val_loss"] < 0.4 * bigram and result["reached"]


def test_run_does_not_learn_it_without_attention(tmp_path, train, plenty):
    result = train(tmp_path, "--data", plenty, "--layers", "-", "--head-lr", "0.1", "--tied-until", "0",
                   "--target", "0.5", steps=60).result
    assert 0.9 < result["val_loss"] < 2 and not result["reached"]


def test_log_says_when_an_epoch_begins(whole):
    used, said = 0, {}
    for line in Log(whole).text.splitlines():
        if match := re.match(r"step:\d+/.* tokens:(\d+) ", line):
            used = int(match[1])
        elif match := re.match(r"epoch:(\d+) ", line):
            said[int(match[1])] = used
    epoch_tokens = sum(SHARDS)
    assert list(said) == list(range(2, used // epoch_tokens + 2)) and len(said) == 3
    for epoch, used in said.items():  # right after the step that used the last token
        assert (epoch - 1) * epoch_tokens <= used < (epoch - 1) * epoch_tokens + 512


def test_val_every_validates_and_does_not_change_training(tmp_path, train, whole):
    log = train(tmp_path, "--val-every", "10")
    assert list(log.val) == [10, 20, STEPS] and log.train == Log(whole).train
    assert_same_end(tmp_path, whole)


def test_seed_alone_decides_the_run(tmp_path, train_until, whole):
    expected = list(Log(whole).train.values())[:4]
    assert list(train_until(4, tmp_path / "same", "--seed", "0").train.values()) == expected
    assert list(train_until(4, tmp_path / "other", "--seed", "1").train.values()) != expected


def test_micro_batches_do_not_change_the_losses(tmp_path, train_until, whole):
    log = train_until(8, tmp_path, "--micro-batch-tokens", "128")
    assert_close(log, Log(whole), 2e-4)


# Checkpoints ---------------------------------------------------------------------------------------------------------


def test_checkpoint_holds_all_that_a_reader_needs(whole, data):
    assert checkpoints(whole) == ["train_gpt_final.pt"]
    state = load(whole)  # weights_only: a checkpoint from somewhere else cannot run code
    assert state["source"] == SCRIPT.read_text() and state["script"] == "train_gpt.py" and state["step"] == STEPS
    assert state["args"]["model_dim"] == 32 and state["args"]["stages"][1]["batch_tokens"] == 512
    assert state["dataset"]["name"] == "pattern" and state["dataset"]["document_separator"] == 256
    assert state["position"] == Log(whole).result["tokens"] and state["rng"].dtype == torch.uint8
    table = state["optimizer"]["bigram_table"]
    assert table["second"].any() and table["master"].any() and not table["grads"].numel()  # which learns by rows
    assert all(state["optimizer"].values()) and all(tensor.isfinite().all() for tensor in tensors(state).values())
    waiting = [bank for bank in state["optimizer"].values() if bank["grads"].any()]
    assert waiting and len(waiting) < len(state["optimizer"])  # Adam's gradients, and none of Muon's
    model = gpt.Model(gpt.parse_args([*TINY]), 257, torch.device("cpu"), torch.float32)
    model.load_state_dict(state["model"])


def test_head_and_embedding_are_one_in_the_tied_part_of_a_run_and_part_after_it(tmp_path, train_until, whole):
    """Tied until step 10.5 of 21: Adam's update in step 12 is the first that takes each its own gradients."""
    for last, every in ((11, 10), (13, 12)):
        train_until(last, folder := tmp_path / str(every), "--save-every", every)
        state = load(folder, *checkpoints(folder))
        head, embedding = state["optimizer"]["head"], state["optimizer"]["embedding"]
        same = [torch.equal(head[part], embedding[part]) for part in ("master", "first", "second")]
        assert same == [every == 10] * 3 and torch.equal(state["model"]["head"], state["model"]["embedding"]) == same[0]
    assert Log(tmp_path / "12").train.items() <= Log(whole).train.items()


def test_checkpoint_of_the_last_step_can_be_validated_again(tmp_path, train, whole):
    log = train(tmp_path, "--resume", whole / "train_gpt_final.pt")
    assert not log.train and log.result["val_loss"] == Log(whole).result["val_loss"]
    assert_same_end(tmp_path, whole)


@pytest.mark.parametrize("others, every, epoch", [
    pytest.param([], 5, 1, id="muon, gradients wait, first epoch"),
    pytest.param([], 12, 2, id="muon, no gradients wait, second epoch"),
    pytest.param(["--document-tails", "drop"], 11, 3, id="dropped tails, gradients wait, third epoch"),
    pytest.param(["--optimizer", "adamw"], 7, 1, id="adamw"),
])
def test_resumed_run_is_the_uninterrupted_run(others, every, epoch, tmp_path, train, train_until, whole):
    if others:
        train(whole := tmp_path / "whole", *others)
    expected, first, second = Log(whole), tmp_path / "first", tmp_path / "second"
    train_until(every + 2, first, "--save-every", every, *others)
    assert checkpoints(first) == [f"train_gpt_step{every:06d}.pt"]
    state = load(first, *checkpoints(first))
    assert state["position"] // sum(SHARDS) + 1 == epoch
    if "adamw" not in others:
        assert any(bank["grads"].any() for bank in state["optimizer"].values()) == (every % 2 == 1)
    torch.manual_seed(99)
    log = train(second, "--resume", first / checkpoints(first)[0], *others)
    assert log.train == {step: loss for step, loss in expected.train.items() if step > every}
    assert log.result["val_loss"] == expected.result["val_loss"]
    assert log.result["train_seconds"] > state["seconds"] > 0  # the time before counts too
    assert_same_end(second, whole)
    assert float(expected.train[STEPS]) < float(expected.train[1]) - 0.5  # it did learn something
    assert checkpoints(first)  # what was resumed from stays


@pytest.mark.parametrize("optimizer, kind", [("muon", gpt.RowBank), ("adamw", gpt.AdamBank)])
def test_the_table_of_bigrams_learns_by_rows_but_with_adamw_densely(optimizer, kind, flags, tmp_path):
    run = gpt.Run(gpt.parse_args(flags(tmp_path, "--optimizer", optimizer)), gpt.World())
    (bank,) = (bank for name, bank in run.optimizer.banks.items() if "bigram_table" in name.split())
    table = run.model.bigram_table
    assert type(bank) is kind and (table.grad is None) == hasattr(table, "looked_up") == (optimizer == "muon")
    for _ in range(2):  # before the first one the head is zero, and passes no gradient on
        run.train_step()
    assert table.any() and not table.any(1).all()


def test_loss_weights_move_on_to_the_next_stage_s_during_a_stage(flags, tmp_path, monkeypatch):
    """Also to fewer of them; those of the last stage stay. The model sees them, and every graph of a stage."""
    run = gpt.Run(gpt.parse_args(flags(tmp_path)), gpt.World())
    table = [replace(row, loss_weights=weights) for row, weights in
             zip(run.args.stages, ((1.0, 0.5, 0.25), (1.0, 0.4), (1.0,), (1.0,)))]
    run.args.stages = tuple(table)
    run.stages = [run.model.stage_inputs(index) for index in range(4)]
    first, seen = [stage.loss_weights for stage in run.stages], []
    monkeypatch.setattr(run, "gradients", lambda *x: seen.append(x[-1].loss_weights.tolist()) or torch.ones(()))
    monkeypatch.setattr(run.optimizer, "step", lambda *args, **kwargs: None)
    for step, (index, progress) in enumerate([(0, 0.0), (0, 0.5), (0, 0.9), (1, 0.25), (2, 0.5), (3, 0.5)]):
        monkeypatch.setattr(run.schedule, "stage", lambda _, at=(index, progress): at)
        run.step = step
        seen.clear()
        run.train_step()
        own, later = table[index].loss_weights, (*table[min(index + 1, 3)].loss_weights, 0.0, 0.0)
        assert seen and all(x == pytest.approx([(1 - progress) * a + progress * b for a, b in zip(own, later)])
                            for x in seen)
    assert all(stage.loss_weights is weights for stage, weights in zip(run.stages, first))  # where graphs read them


def test_newest_checkpoint_alone_is_kept(tmp_path, train_until):
    train_until(11, tmp_path, "--save-every", 3)
    assert checkpoints(tmp_path) == ["train_gpt_step000009.pt"]


def test_checkpoint_survives_a_failure_to_write_the_next(tmp_path, train, whole, monkeypatch):
    def disk_full(state, file, save=torch.save):
        if state["step"] < 6:
            return save(state, file)
        file.write(b"PK and then some bytes")
        file.flush()
        raise OSError("no space left")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="no space left"):
        patch.setattr(torch, "save", disk_full)
        train(tmp_path / "first", "--save-every", 3)
    assert checkpoints(tmp_path / "first") == ["train_gpt_step000003.pt"]
    train(tmp_path / "second", "--resume", tmp_path / "first" / "train_gpt_step000003.pt")
    assert_same_end(tmp_path / "second", whole)


def test_file_of_the_same_name_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "state.pt"
    gpt.atomic_save({"old": 1}, path)

    def power_cut(state, file):
        file.write(b"half")
        raise PowerCut

    with monkeypatch.context() as patch, pytest.raises(PowerCut):
        patch.setattr(torch, "save", power_cut)
        gpt.atomic_save({"new": 2}, path)
    assert torch.load(path) == {"old": 1}
    gpt.atomic_save({"new": 2}, path)
    assert torch.load(path) == {"new": 2} and [p.name for p in tmp_path.iterdir()] == ["state.pt"]


@pytest.mark.parametrize("others, named", [
    (["--muon-lr", "0.5"], ["muon_lr", "0.5", "0.023"]),
    (["--seed", "3", "--layers", "s s"], ["seed", "layers"]),
    (["--max-tokens", "99999"], ["max_tokens", "99999"]),
    (["--stages.2.lr", "0.5"], ["stages"]),
])
def test_resuming_with_other_flags_is_refused_and_they_are_named(others, named, refusal, whole):
    error = refusal("--resume", whole / "train_gpt_final.pt", *others)
    assert all(word in error for word in [*named, "train_gpt_final.pt", "another run"])
    assert "model_dim" not in error  # which is the same


def test_resuming_with_flags_that_change_nothing_is_allowed(tmp_path, train, whole):
    log = train(tmp_path, "--resume", whole / "train_gpt_final.pt", "--val-every", 3, "--save-every", 2,
                "--micro-batch-tokens", 128, "--attention", "reference")
    assert log.result["val_loss"] == Log(whole).result["val_loss"]


def test_resuming_on_other_data_is_refused_and_on_moved_data_is_not(tmp_path, train, refusal, whole, data, write_shard):
    shutil.copytree(data, moved := tmp_path / "moved")
    train(tmp_path / "second", "--resume", whole / "train_gpt_final.pt", "--data", moved)
    write_shard(moved / "tiny_train_000001.bin", pattern(SHARDS[1], 5))
    assert "shards" in refusal("--resume", whole / "train_gpt_final.pt", "--data", moved)


def test_resuming_a_checkpoint_of_another_script_is_refused(tmp_path, refusal, whole):
    torch.save(load(whole) | {"script": "train_other.py"}, path := tmp_path / "other.pt")
    assert "train_other.py" in refusal("--resume", path)


@pytest.mark.parametrize("content", ["missing", "empty", "truncated", "no pickle", "other pickle", "code"])
def test_resuming_what_is_no_checkpoint_is_refused(content, tmp_path, refusal, whole):
    path, good = tmp_path / "bad.pt", (whole / "train_gpt_final.pt").read_bytes()
    if content == "other pickle":
        torch.save([1, 2], path)
    elif content == "code":
        torch.save({"script": PowerCut}, path)
    elif content != "missing":
        path.write_bytes({"empty": b"", "truncated": good[:len(good) // 2], "no pickle": b"hello\n" * 999}[content])
    assert f"--resume {path}" in refusal("--resume", path)


# Signals and failures ------------------------------------------------------------------------------------------------


def test_killed_run_goes_on_from_its_newest_checkpoint(tmp_path, flags, train, whole):
    process = launch(flags(first := tmp_path / "first", "--save-every", 3))
    read_until(process, "checkpoint:", "step:")
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    newest = max(checkpoints(first))
    assert newest != "train_gpt_final.pt"
    train(tmp_path / "second", "--resume", first / newest)
    assert_same_end(tmp_path / "second", whole)


def test_sigterm_saves_and_the_run_goes_on_from_there(tmp_path, flags, train, whole):
    arguments = flags(first := tmp_path / "first")
    arguments.remove("--checkpoint")  # it is saved all the same, beside the log
    arguments.remove(str(first))
    process = launch([*arguments, "--out", str(first)])
    read_until(process, "step:4/")
    process.terminate()
    output, errors = process.communicate()
    assert process.returncode == 0, errors
    (name,) = checkpoints(first)
    assert output.splitlines()[-1].endswith(f"--resume {first / name}")  # and it says how
    log = train(tmp_path / "second", "--resume", first / name)
    assert Log(first).train | log.train == Log(whole).train
    assert not Log(first).train.keys() & log.train.keys()
    assert_same_end(tmp_path / "second", whole)


def test_loss_that_is_not_finite_ends_the_run_and_leaves_the_last_checkpoint(tmp_path, refusal):
    error = refusal("--scalar-lr", "1e38", "--save-every", "2", code=1)
    step, loss = re.search(r"step (\d+): the training loss is (\S+)\.", error).groups()
    assert loss in ("nan", "inf") and "lower" in error and "--muon-lr" in error
    saved = f"train_gpt_step{(int(step) - 1) // 2 * 2:06d}.pt"
    assert int(step) > 2 and checkpoints(tmp_path) == [saved] and str(tmp_path / saved) in error
    assert load(tmp_path, saved)["step"] == (int(step) - 1) // 2 * 2
    assert int(step) not in Log(tmp_path).train


def test_validation_loss_that_is_not_finite_ends_the_run(refusal):
    assert "nan" in refusal("--muon-lr", "1e30", code=1, steps=1)  # the only step breaks the weights


def test_data_that_is_not_there_is_refused(tmp_path, refusal):
    assert "data/fineweb.py" in refusal("--data", tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert "data/fineweb.py" in refusal("--data", tmp_path / "empty")


@pytest.mark.parametrize("others, named", [
    (["--max-tokens", "447"], ["--max-tokens 447", "448"]),
    (["--val-tokens", "4096"], ["--val-tokens 4096", "3000"]),
    (["--val-row-tokens", "1000"], ["--val-tokens 2048", "--val-row-tokens 1000"]),
    (["--stages.1.steps", "0.5"], ["stages", "1.25"]),
    (["--row-tokens", "100"], ["--row-tokens", "100"]),
    (["--layers", "s x"], ["--layers", "s x"]),
    (["--num-heads", "3"], ["--num-heads", "3"]),
    (["--attention", "flash-attn-4"], ["--attention flash-attn-4"]),
])
def test_flags_that_cannot_be_are_refused(others, named, refusal):
    error = refusal(*others)
    assert all(word in error for word in named), error


def test_a_batch_that_ranks_cannot_share_is_refused_by_rank_0_alone(refusal, monkeypatch, flags, tmp_path, capsys):
    world = SimpleNamespace(rank=0, size=3, device=torch.device("cpu"), dtype=torch.float32, gpu=False)
    monkeypatch.setattr(gpt, "World", lambda: world)
    assert "3 ranks" in (error := refusal()) and "256" in error and "--row-tokens" in error
    world.rank = 1
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit) as end:
        gpt.main()
    assert end.value.code == 2 and capsys.readouterr() == ("", "")
    assert list(tmp_path.iterdir()) == []


# Several ranks, and compilation --------------------------------------------------------------------------------------


def test_two_ranks_train_like_one(tmp_path, flags, train):
    expected = train(one := tmp_path / "one", steps=13)
    process = launch(flags(two := tmp_path / "two", steps=13), "-m", "torch.distributed.run", "--standalone",
                     "--nproc_per_node=2")
    output, errors = process.communicate()
    assert process.returncode == 0, errors
    log = Log(two)  # one file for both
    assert output.count("step:5/13 ") == 1 and output.strip().splitlines()[-1] == log.text.splitlines()[-1]
    assert list(log.train) == list(expected.train) and log.result["world_size"] == 2
    assert_close(log, expected, 1.01e-4)
    a, b = load(one), load(two)
    assert (a["step"], a["position"]) == (b["step"], b["position"])
    a, b = tensors(a), tensors(b)
    assert {name: x.shape for name, x in a.items()} == {name: x.shape for name, x in b.items()}
    for name in a:  # the gradients that wait among them
        assert torch.allclose(a[name], b[name], atol=1e-3, rtol=1e-2), name
    again = train(tmp_path / "again", "--resume", two / "train_gpt_final.pt", steps=13)
    assert again.result["val_loss"] == pytest.approx(log.result["val_loss"], abs=1e-6)


def test_two_ranks_go_on_from_one_and_stop_when_one_of_them_gets_sigterm(tmp_path, flags, train, train_until, whole):
    train_until(6, one := tmp_path / "one", "--save-every", 5)  # gradients wait in step 5
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    arguments = flags(two := tmp_path / "two", "--resume", one / "train_gpt_step000005.pt")
    ranks = [launch(arguments, RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
             for rank in range(2)]
    read_until(ranks[0], "step:8/")
    ranks[1].terminate()
    outputs = [rank.communicate() for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], outputs
    assert outputs[1][0] == ""  # rank 0 speaks for all
    (name,) = checkpoints(two)
    assert_close(Log(two), Log(whole), 1.01e-4)
    log = train(three := tmp_path / "three", "--resume", two / name)
    assert list({**Log(two).train, **log.train}) == list(range(6, STEPS + 1)) and Log(three).result["world_size"] == 1
    assert_close(log, Log(whole), 2e-3)


def test_compiled_run_is_the_eager_run_and_compiles_nothing_after_its_warm_up(tmp_path, train, monkeypatch):
    small = ["--layers", "sv", "--val-tokens", "512", "--micro-batch-tokens", "512"]
    expected = train(tmp_path / "eager", *small, steps=8)
    compiled, warm = [], []

    def backend(graph, inputs):  # all of torch.compile but Inductor, whose C++ takes a minute to compile
        compiled.append(graph)
        return lookup_backend("aot_eager")(graph, inputs)

    def warm_up(self, warm_up=gpt.Run.warm_up):
        warm_up(self)
        warm.append(len(compiled))
        fresh = gpt.Model(self.args, 257, torch.device("cpu"), torch.float32)
        fresh.initialise(self.args.seed)
        assert all(torch.equal(param, self.model.get_parameter(name)) for name, param in fresh.named_parameters())
        assert isinstance(self.optimizer.banks["bigram_table"], gpt.RowBank) and not self.model.bigram_table.looked_up
        assert not any(x.any() for bank in self.optimizer.banks.values() for x in (bank.grads, *bank.state.values()))

    torch.compiler.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    monkeypatch.setattr(gpt.Run, "warm_up", warm_up)
    log = train(tmp_path / "compiled", *small, "--compile", steps=8)
    torch.compiler.reset()
    assert len(log.train) == 8 and warm == [len(compiled)] and warm[0] > 3
    assert_close(log, expected, 1e-3)
    assert log.result["val_loss"] == pytest.approx(expected.result["val_loss"], abs=1e-3)


# The bench of a step ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [1, 2])
def test_bench_of_a_step_measures_every_part(ranks, flags, tmp_path):
    several = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else []
    bench = subprocess.run(
        [sys.executable, *several, SCRIPT.parent / "tests" / "bench_step.py", SCRIPT, *flags(tmp_path)],
        capture_output=True, text=True, timeout=120)
    assert bench.returncode == 0, bench.stderr
    times = dict(re.findall(r"^(\S.*?) {2,}(\d+\.\d)$", bench.stdout, re.M))
    assert list(times) == ["layers and embedding", "head and loss", "optimiser", "data, if nothing hid it",
                           *["communication not hidden"][:ranks - 1]]
    assert float(times["layers and embedding"]) > 0 and float(times["head and loss"]) > 0
