"""The log of a run as train_*.py writes it, read back and held against itself.

A log is the script's source, a line of 100 "=", one line of JSON (the environment), another such line, and then the
report: headline, start-up, a line per step and per validation, result, and one closing line of JSON. In older logs a
line of text from the model follows the result. Whatever follows from something else in the log is computed anew and
compared, so that an edited log contradicts itself; and `log_sha256`, the last entry of the closing line, is the digest
of every byte before it.
"""

import hashlib
import json
import lzma
import math
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np

RULE = "=" * 100
SEAL = ', "log_sha256": "'
NUMBER = r"(-?\d+\.\d{4}|nan|-?inf)"
STEP = re.compile(rf"step:(\d+)/(\d+) train_loss:{NUMBER} train_time:(\d+\.\d{{3}})s step_time:(\d+\.\d)ms "
                  r"tokens:(\d+) tokens/s:(\d+)(?: mfu:\d+\.\d{3})? ends_in:(\d+)s")
VAL = re.compile(rf"step:(\d+)/(\d+) val_loss:{NUMBER} train_time:(\d+\.\d{{3}})s")
NEEDED = {"script", "source_sha256", "python", "torch", "cuda", "triton", "numpy", "device", "threads", "world_size",
          "attention", "dataset", "fingerprint", "params", "args", "startup_seconds", "total_seconds",
          "peak_memory_mib"}
# lines that may stand anywhere among the steps
UNCLAIMED = re.compile(r"checkpoint:.+|epoch:\d+ begins, all \d+ training tokens have been read")
FILE_NAME = re.compile(r"(\d{4}-\d\d-\d\d)T\d\d-\d\d-\d\dZ_\w+_[0-9a-f]{8}\.txt(\.xz)?")
BANNER = re.compile(r"^# -{20,}\n# (.+)\n# -{20,}\n", re.M)


class Refused(Exception):
    """Why a log, a record or a command is not accepted, in one line."""


class Step(NamedTuple):
    """A step's line: training loss (nats), training time so far (seconds) and tokens trained on so far."""
    loss: float
    seconds: float
    tokens: int


class Validation(NamedTuple):
    """A validation's line: after how many steps and tokens, loss (nats), training time (seconds)."""
    step: int
    loss: float
    seconds: float
    tokens: int


def schedule(args: dict) -> np.ndarray:
    """Tokens trained on after 1, 2, ... steps, (steps,), by the stage table and the budget, as the scripts count."""
    parts, batches = (np.array([stage[key] for stage in args["stages"]]) for key in ("steps", "batch_tokens"))
    steps = int(args["max_tokens"] / (parts @ batches))
    if not 0 < steps < 10**7:
        raise ValueError(f"{steps} steps")
    ends = np.round(np.cumsum(parts) * steps).astype(int)
    return np.cumsum(np.repeat(batches, np.diff(ends, prepend=0)))[:steps]


def sections(source: str) -> dict[str, str]:
    """{title: text} of a script's sections, banners left off; what stands above the first one is "docstring"."""
    parts = BANNER.split(source)
    return dict(zip(["docstring", *parts[1::2]], parts[::2]))


@dataclass
class Log:
    """A complete run whose log agrees with itself. `sealed`: it ends in the digest of all that it says."""
    name: str
    text: str
    source: str
    result: dict
    steps: list[Step]
    validations: list[Validation]
    sealed: bool

    @property
    def args(self) -> dict:
        return self.result["args"]

    @property
    def seed(self) -> int:
        return self.result["seed"]

    @property
    def loss(self) -> float:
        """The last validation loss."""
        return self.result["val_loss"]

    @property
    def seconds(self) -> float:
        """Training time."""
        return self.result["train_seconds"]

    @property
    def hardware(self) -> str:
        """What times may be compared on: number and kind of GPUs; of a CPU (no GPU memory) its threads."""
        result, threads = self.result, self.result["threads"]
        shared = f", {threads} thread{'s' if threads > 1 else ''}" if result["peak_memory_mib"] is None else ""
        return f"{result['world_size']} x {result['device']}{shared}"

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.text.encode()).hexdigest()


def logs_in(folder: Path) -> list[Path]:
    """The files in a folder that are named like logs, compressed or not."""
    return sorted(path for path in folder.glob("*") if path.name.endswith((".txt", ".txt.xz")))


def read_bytes(path: Path) -> bytes:
    """What a file holds, an .xz file decompressed. Raises Refused unless that is one whole xz stream, nothing after."""
    data = path.read_bytes()
    if path.suffix != ".xz":
        return data
    stream = lzma.LZMADecompressor(lzma.FORMAT_XZ)  # lzma.decompress takes several streams, and garbage after them
    try:
        data = stream.decompress(data)
    except lzma.LZMAError as error:
        raise Refused(f"{path.name} is damaged or no xz file ({error})") from error
    if not stream.eof:
        raise Refused(f"{path.name} is cut off: its xz stream has no end")
    if stream.unused_data:
        raise Refused(f"{path.name} has {len(stream.unused_data)} bytes after the end of its xz stream")
    return data


def read_log(path: Path) -> Log:
    """Reads the log at `path`, .txt or .txt.xz. Raises Refused if it is cut off, edited or not of a whole run."""
    try:
        return parse(path.name, read_bytes(path).decode())
    except OSError as error:
        raise Refused(f"{path} cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise Refused(f"{path.name} is no log (not UTF-8 at byte {error.start})") from error


def parse(name: str, text: str) -> Log:
    """The log `text`, named `name` in refusals."""
    try:
        return _parse(name, text)
    except Refused as error:
        raise Refused(f"{name}: {error}") from error
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, OverflowError, ArithmeticError) as error:
        raise Refused(f"{name}: its JSON or arguments are damaged ({type(error).__name__}: {error})") from error


def _parse(name: str, text: str) -> Log:
    lines = text.split("\n")
    rules = [i for i, line in enumerate(lines) if line == RULE]
    if len(rules) < 2 or rules[1] != rules[0] + 2:
        raise Refused("is no log: source, line of =, environment, line of =, report")
    source, first = "\n".join(lines[:rules[0]]) + "\n", rules[1] + 1  # first: index of the report's first line
    if resumed := [line for line in lines[first:] if line.startswith("resumed:")]:
        raise Refused(f"is of a resumed run ({resumed[0]}): its first steps are in another log. Train in one go")
    if stopped := [line for line in lines[first:] if line.startswith("stopped by SIGTERM")]:
        raise Refused(f"is of a run that did not end ({stopped[0]})")
    if lines[-1] or not lines[-2].startswith('{"val_loss"') or not lines[-2].endswith("}"):
        raise Refused("ends before its closing line of JSON: the run or the file was cut off")
    head, seal, digest = text.rpartition(SEAL)
    if seal and digest != hashlib.sha256(head.encode()).hexdigest() + '"}\n':
        raise Refused("log_sha256 is not the digest of what it says: it was edited after the run")

    environment, result = json.loads(lines[rules[0] + 1]), json.loads(lines[-2])
    if hashlib.sha256(source.encode()).hexdigest() != environment["source_sha256"]:
        raise Refused("its source is not the one that ran (source_sha256 differs)")
    for key, value in environment.items():
        if key not in result or result[key] != value:
            raise Refused(f"{key} is {value} at its head and {result.get(key)} in its closing line")
    if missing := sorted(NEEDED - result.keys()):
        raise Refused(f"its closing line has no {', '.join(missing)}")
    args, tokens = environment["args"], schedule(environment["args"]).tolist()
    expected = {"seed": args["seed"], "target": args["target"], "val_tokens": args["val_tokens"], "steps": len(tokens),
                "tokens": tokens[-1], "reached": result["val_loss"] <= args["target"]}
    for key, value in expected.items():
        if result[key] != value:
            raise Refused(f"{key} is {result[key]} in its closing line, and by its arguments {value}")

    report = Report(lines, first, tokens)
    report.exactly(f"{result['script']} on {result['world_size']} x {result['device']}, attention "
                   f"{result['attention']}, data {result['dataset']}: {result['params']['total'] / 1e6:.1f}M "
                   f"parameters, {len(tokens)} steps, {tokens[-1] / 1e6:.1f}M tokens, target {args['target']}")
    report.exactly(f"startup:{result['startup_seconds']:.1f}s")
    every = args["val_every"]
    for step in range(1, len(tokens) + 1):
        report.step(step)
        if step == len(tokens) or (every and step % every == 0):
            report.validation(step)
    report.skip_unclaimed()
    report.totals(result)
    report.exactly(f"{'reached' if result['reached'] else 'missed'} the target: val_loss {result['val_loss']:.4f}, "
                   f"target {args['target']}, in {result['train_seconds']:.1f} s of training "
                   f"({result['tokens_per_second']:.0f} tokens/s)")
    report.at += lines[report.at].startswith("sample: ")  # in older logs
    if report.at + 2 != len(lines):
        raise Refused(f"line {report.at + 1} is none that a run writes: {lines[report.at][:80]!r}")
    return Log(name, text, source, result, report.steps, report.validations, bool(seal))


class Report:
    """Reads a report line by line; `at` is the next line, `tokens` what the schedule says for each step."""

    def __init__(self, lines: list[str], at: int, tokens: list[int]):
        self.lines, self.at, self.tokens = lines, at, tokens
        self.steps: list[Step] = []
        self.validations: list[Validation] = []

    def refusal(self, expected: str) -> Refused:
        return Refused(f"line {self.at + 1} is {self.lines[self.at][:110]!r}, expected {expected!r}")

    def exactly(self, expected: str):
        if self.lines[self.at] != expected:
            raise self.refusal(expected)
        self.at += 1

    def skip_unclaimed(self):
        while UNCLAIMED.fullmatch(self.lines[self.at]):
            self.at += 1

    def match(self, pattern: re.Pattern, step: int, kind: str) -> list[str]:
        """The values in the next line, which must be of `kind` and of `step`."""
        self.skip_unclaimed()
        match = pattern.fullmatch(self.lines[self.at])
        if not match or (int(match[1]), int(match[2])) != (step, len(self.tokens)):
            raise self.refusal(f"step:{step}/{len(self.tokens)} {kind}:...")
        if not math.isfinite(float(match[3])):
            raise Refused(f"line {self.at + 1}: the {kind} of step {step} is {match[3]}")
        self.at += 1
        return list(match.groups()[2:])

    def step(self, step: int):
        loss, time, step_time, tokens, speed, left = self.match(STEP, step, "train_loss")
        where, before = f"line {self.at}: step {step}", self.steps[-1].seconds if self.steps else 0.0
        batch = self.tokens[step - 1] - (self.tokens[step - 2] if step > 1 else 0)
        time, seconds, total = float(time), float(step_time) / 1000, self.tokens[-1]
        if int(tokens) != self.tokens[step - 1]:
            raise Refused(f"{where} has tokens:{tokens}, and its stage table gives {self.tokens[step - 1]}")
        if time < max(before, self.validations[-1].seconds if self.validations else 0.0):
            raise Refused(f"{where} has train_time:{time:.3f}s, less than the line before")
        if abs(time - before - seconds) > 0.0011:  # both times are rounded to a millisecond
            raise Refused(f"{where} took {step_time} ms, but its train_time grew by {1000 * (time - before):.1f} ms")
        fastest = batch / (seconds - 5.1e-5) if seconds > 5.1e-5 else math.inf
        if not batch / (seconds + 5.1e-5) - 1 <= int(speed) <= fastest + 1:
            raise Refused(f"{where} has tokens/s:{speed}, and {batch} tokens in {step_time} ms are not")
        if abs((total / self.tokens[step - 1] - 1) * time - int(left)) > 0.51 + 0.0005 * total / self.tokens[step - 1]:
            raise Refused(f"{where} has ends_in:{left}s, which does not follow from its time and tokens")
        self.steps.append(Step(float(loss), time, int(tokens)))

    def validation(self, step: int):
        loss, time = self.match(VAL, step, "val_loss")
        if float(time) < self.steps[-1].seconds:
            raise Refused(f"line {self.at}: the validation has train_time:{time}s, less than the line before")
        self.validations.append(Validation(step, float(loss), float(time), self.tokens[step - 1]))

    def totals(self, result: dict):
        """The closing JSON says what the last validation says."""
        last = self.validations[-1]
        for key, digits, value in (("val_loss", 4, last.loss), ("train_seconds", 3, last.seconds)):
            if f"{result[key]:.{digits}f}" != f"{value:.{digits}f}":
                raise Refused(f"{key} is {result[key]} in its closing line, and {value} in the last validation")
        if not math.isclose(result["tokens_per_second"], result["tokens"] / result["train_seconds"], rel_tol=1e-9):
            raise Refused("tokens_per_second is not tokens / train_seconds in its closing line")
        if not result["startup_seconds"] + result["train_seconds"] <= result["total_seconds"] < math.inf:
            raise Refused("total_seconds is less than start-up and training in its closing line")
