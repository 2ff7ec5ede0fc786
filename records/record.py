"""What a record is: the rules that its runs must keep, and the files that follow from its logs.

Every file of a record but the logs is computed from them and from record.json's few entries (name, author, text, date,
what it was compared with), so that verify.py can compute it again and compare byte by byte.
"""

import ast
import difflib
import functools
import json
import re
import shlex
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean, stdev

from runlog import FILE_NAME, Log, Refused, logs_in, read_log, sections
from significance import p_value

try:
    import tomllib
except ImportError:  # Python 3.10
    import tomli as tomllib

SAME_IN_ALL_RUNS = ("script", "device", "world_size", "threads", "attention", "torch", "cuda", "triton", "numpy",
                    "python", "dataset", "fingerprint", "params", "kernels")
FREE_ARGS = {"seed", "data", "out", "checkpoint", "save_every"}  # in which the runs of a record may differ
SETTING_MODULE = re.compile(
    r"torch\.((_inductor|_dynamo|_functorch|compiler)\.config|_inductor\.compile_fx)\b|triton\.knobs\b")
SETTING_VARIABLE = re.compile(r"(TORCHINDUCTOR|TORCHDYNAMO|TORCH_COMPILE|FUNCTORCH|AOTINDUCTOR|TRITON)_\w+")


@dataclass(frozen=True)
class Track:
    """A table of tracks.toml, where each entry is explained."""
    key: str
    title: str
    about: str
    runs: int
    p: float
    compile_settings: list[str]
    ranked: bool = True
    dataset: str = ""
    fingerprints: list[str] = field(default_factory=list)
    val_tokens: int = 0
    val_row_tokens: int = 0
    target: float = 0.0
    headline: str = ""


class Repository:
    """The folder that holds records/ and the scripts; by default this one."""

    def __init__(self, root: Path | None = None):
        root = root or Path(__file__).resolve().parents[1]
        self.root, self.records = root, root / "records"
        described = tomllib.loads((self.records / "tracks.toml").read_text())
        self.tracks = {key: Track(key, **described["defaults"] | table) for key, table in described["tracks"].items()}

    @functools.cached_property
    def landed(self) -> "list[Record]":
        """All records, fastest first. Raises Refused if one cannot be read."""
        folders = [folder for key, track in self.tracks.items() if track.ranked
                   for folder in (self.records / key).glob("[!.]*") if folder.is_dir()]
        return sorted(map(self.load, sorted(folders)), key=lambda record: record.seconds)

    @functools.cached_property
    def evidence(self) -> list[tuple[Track, Log]]:
        """The logs of the unranked tracks."""
        return [(track, read_log(path)) for key, track in self.tracks.items() if not track.ranked
                for path in logs_in(self.records / key)]

    def load(self, folder: Path) -> "Record":
        """The record in `folder`, its logs read and checked one by one."""
        track = self.tracks.get(folder.parent.name)
        if track is None or not track.ranked:
            raise Refused(f"{folder} is in no ranked track of tracks.toml")
        try:
            about = json.loads((folder / "record.json").read_text())
            logs = [read_log(folder / run["log"]) for run in about["runs"]]
            if not logs:
                raise Refused("record.json has no runs")
            return Record(track, folder.name, about["name"], about["by"], about["date"], about["text"],
                          about["compared_with"], about["beats"], about["same_sections_changed"], logs)
        except Refused as error:
            raise Refused(f"{track.key}/{folder.name}: {error}") from error
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise Refused(f"{track.key}/{folder.name}: record.json cannot be used ({error})") from error

    def find(self, track: Track, folder: str | None) -> "Record | None":
        return next((record for record in self.landed if (record.track, record.folder) == (track, folder)), None)


@dataclass
class Record:
    """Runs of one script with all their seeds, first seed first.

    `compared_with`, `beats`: folders in its track, or None; `same`: the [same] sections that it changed, by title.
    """
    track: Track
    folder: str
    name: str
    by: str
    date: str
    text: str
    compared_with: str | None
    beats: str | None
    same: list[str]
    logs: list[Log]  # under the names that they have in the record

    def __post_init__(self):
        self.logs = [replace(log, name=f"{log.name.removesuffix('.xz')}.xz") for log in self.logs]

    @property
    def source(self) -> str:
        return self.logs[0].source

    @property
    def script(self) -> str:
        return self.logs[0].result["script"]

    @property
    def hardware(self) -> str:
        return self.logs[0].hardware

    @property
    def seconds(self) -> float:
        """Mean training time, by which records are ranked."""
        return fmean(log.seconds for log in self.logs)

    @functools.cached_property
    def summary(self) -> dict:
        """The figures of the record. Losses in nats, times in seconds, standard deviations with n - 1."""
        first = self.logs[0].result
        losses, times = [log.loss for log in self.logs], [log.seconds for log in self.logs]
        memory = [log.result["peak_memory_mib"] for log in self.logs]
        return {
            "script": self.script, "hardware": self.hardware,
            "kernels": {"attention": first["attention"]} | first.get("kernels", {}),
            "versions": {key: first[key] for key in ("python", "torch", "cuda", "triton", "numpy")},
            "source_sha256": first["source_sha256"], "fingerprint": first["fingerprint"], "target": first["target"],
            "params": first["params"]["total"], "steps": first["steps"], "tokens": first["tokens"],
            # rounded: another version of scipy may differ in the last digit, and verify.py compares bytes
            "loss_mean": round(fmean(losses), 6), "loss_sd": round(stdev(losses), 6),
            "p": float(f"{p_value(losses, first['target']):.3g}"),
            "seconds_mean": round(fmean(times), 3), "seconds_sd": round(stdev(times), 3),
            "startup_seconds_mean": round(fmean(log.result["startup_seconds"] for log in self.logs), 3),
            "total_seconds_mean": round(fmean(log.result["total_seconds"] for log in self.logs), 3),
            "peak_memory_mib": None if None in memory else max(memory),
        }


# --- Rules


def check_runs(track: Track, logs: list[Log], others: list[Record]):
    """Raises Refused unless the runs keep the track's rules. `others`: the records that the track has."""
    first, seeds = logs[0], sorted(log.seed for log in logs)
    for log in logs:
        if not log.sealed:
            raise Refused(f"{log.name} has no log_sha256: it is of an older script, run it again")
        if log.source != first.source:
            raise Refused(f"{log.name} and {first.name} are of different sources")
        switches = [name for name in log.result.get("variables", {})
                    if SETTING_VARIABLE.fullmatch(name) and not name.endswith("_CACHE_DIR")]
        if switches:
            raise Refused(f"{', '.join(switches)} was set when {log.name} was run: run it again without")
        for key in SAME_IN_ALL_RUNS:
            mine, its = log.result.get(key), first.result.get(key)
            if mine != its:
                raise Refused(f"{key} is {its} in {first.name} and {mine} in {log.name}")
        for key in sorted(set(first.args) | set(log.args)):
            if key not in FREE_ARGS and log.args.get(key) != first.args.get(key):
                raise Refused(f"--{key.replace('_', '-')} is {first.args.get(key)} in {first.name} and "
                              f"{log.args.get(key)} in {log.name}")
    if len(set(seeds)) < len(seeds):
        raise Refused(f"two logs are of one seed: {seeds}")
    missing = sorted(set(range(max(track.runs, seeds[-1] + 1))) - set(seeds))
    if missing or seeds[0] < 0:
        raise Refused(f"the seeds are {seeds}: a record holds all from 0 on, {track.runs} at the least"
                      + (f", and {len(missing)} are missing, first seed {missing[0]}" if missing else ""))

    expected = {"dataset": track.dataset, "val_tokens": track.val_tokens, "target": track.target}
    for key, value in expected.items():
        if first.result[key] != value:
            raise Refused(f"{key} is {first.result[key]}, and track {track.key} has {value}")
    if first.args["val_row_tokens"] != track.val_row_tokens:
        raise Refused(f"--val-row-tokens is {first.args['val_row_tokens']}, and track {track.key} has "
                      f"{track.val_row_tokens}")
    known = track.fingerprints or sorted({record.logs[0].result["fingerprint"] for record in others})
    if known and first.result["fingerprint"] not in known:
        raise Refused(f"the shards are not those of track {track.key}: fingerprint {first.result['fingerprint']}, "
                      f"expected {' or '.join(known)}")
    if extra := sorted(compile_settings(first.source) - set(track.compile_settings)):
        raise Refused(f"the source sets {', '.join(extra)}, and of the compiler's settings track {track.key} allows "
                      f"only {', '.join(track.compile_settings)}")

    losses = [log.loss for log in logs]
    if len(set(losses)) == 1:
        raise Refused(f"all runs end in the loss {losses[0]}: the seed changes nothing, and there is no test")
    if not (p := p_value(losses, track.target)) < track.p:
        raise Refused(f"mean loss {fmean(losses):.4f} of {len(losses)} runs is not below {track.target} at "
                      f"p < {track.p}: p = {p:.2g}")


def compile_settings(source: str) -> set[str]:
    """What a script sets of torch.compile, dynamo, inductor or Triton: keywords, config entries, variables."""
    try:
        tree = ast.parse(source)
    except SyntaxError as error:
        raise Refused(f"the source is no Python (line {error.lineno}: {error.msg})") from error
    found, inner = set(), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node not in inner:  # the longest dotted name only
            inner.update(n for n in ast.walk(node.value) if isinstance(n, ast.Attribute))
            if SETTING_MODULE.match(ast.unparse(node)):
                found.add(ast.unparse(node))
        elif isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names if SETTING_MODULE.match(alias.name))
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            found.update(name for name in names if SETTING_MODULE.match(name))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            if SETTING_MODULE.fullmatch(node.value) or SETTING_VARIABLE.fullmatch(node.value):
                found.add(node.value)
        elif isinstance(node, ast.Call):
            function = ast.unparse(node.func)
            if function.split(".")[-1] == "compile" and not function.startswith("re."):
                if function.endswith("_inductor.compile") and len(node.args) > 2:
                    found.add("options")
                for keyword in node.keywords:
                    value, name = ast.unparse(keyword.value), keyword.arg
                    found.add(f"{name}={value}" if name == "backend" else name or f"**{value}")
    return found


def same_changes(source: str, reference: str) -> dict[str, str]:
    """{title: full diff} of the reference's [same] sections that `source` has otherwise, or does not have."""
    mine, its = sections(source), sections(reference)
    return {title: unified(its[title], mine.get(title, ""), f"train_gpt.py, {title}", f"this script, {title}", 10**6)
            for title in its if title.endswith("[same]") and mine.get(title) != its[title]}


def unified(old: str, new: str, old_name: str, new_name: str, context: int = 3) -> str:
    lines = difflib.unified_diff(old.splitlines(True), new.splitlines(True), old_name, new_name, n=context)
    return "".join(line if line.endswith("\n") else f"{line}\n\\ No newline at end of file\n" for line in lines)


def diff_size(diff: str) -> tuple[int, int]:
    """(lines added, lines removed)"""
    lines = [line for line in diff.splitlines() if not line.startswith(("+++ ", "--- "))]
    return sum(line[:1] == "+" for line in lines), sum(line[:1] == "-" for line in lines)


def argument_changes(record: Record, other: Record | None) -> dict[str, list]:
    """{flag: [value in `other`, value in `record`]} of the arguments in which their runs differ."""
    mine, its = record.logs[0].args, other.logs[0].args if other else record.logs[0].args
    return {key: [its.get(key), mine.get(key)] for key in sorted(mine.keys() | its.keys())
            if key not in FREE_ARGS and mine.get(key) != its.get(key)}


# --- Files


def files(record: Record, other: Record | None, same: dict[str, str]) -> dict[str, bytes]:
    """{name: content} of a record's folder, logs not yet compressed.

    `other`: the record of `compared_with`; `same`: see same_changes.
    """
    change = ""
    if other:
        change = unified(other.source, record.source, *(f"{r.folder}/{r.script}" for r in (other, record)))
    about = {
        "name": record.name, "by": record.by, "date": record.date, "track": record.track.key, "text": record.text,
        "compared_with": record.compared_with, "beats": record.beats, "same_sections_changed": record.same,
        "lines_added_and_removed": diff_size(change), "arguments_changed": argument_changes(record, other),
        **record.summary,
        "runs": [{"seed": log.seed, "val_loss": log.loss, "train_seconds": log.seconds,
                  "startup_seconds": log.result["startup_seconds"], "total_seconds": log.result["total_seconds"],
                  "log": log.name, "sha256": log.sha256} for log in record.logs],
    }
    texts = {
        record.script: record.source, "change.diff": change, "README.md": readme(record, other, change, same),
        "record.json": json.dumps(about, indent=1, ensure_ascii=False) + "\n",
        **{log.name: log.text for log in record.logs},
    }
    if same:
        texts["same.diff"] = "".join(same.values())
    return {name: text.encode() for name, text in texts.items()}


def readme(record: Record, other: Record | None, change: str, same: dict[str, str]) -> str:
    """The record told to a reader."""
    s, track, first = record.summary, record.track, record.logs[0].result
    beats = f"It beats [{record.beats}](../{record.beats}) ({other.seconds:.3f} s)." if record.beats else (
        f"The first entry of {record.script} on this hardware.")
    mechanism = record.text or (ast.get_docstring(ast.parse(record.source)) or "").split("\n\n")[0] or "Not described."
    rows = [f"| {log.seed} | {log.loss:.4f} | {log.seconds:.3f} | {log.result['startup_seconds']:.1f} | "
            f"{log.result['total_seconds']:.1f} | {log.result['tokens_per_second']:,.0f} | [{log.name}]({log.name}) |"
            for log in record.logs]
    kept = "The `[same]` sections are those that train_gpt.py had."
    if same:
        kept = f"**Changes sections marked `[same]`**: {', '.join(same)}. See [same.diff](same.diff)."
    size = "Nothing to compare with: the first record of the track."
    if other:
        added, removed = diff_size(change)
        flags = [f"`--{key.replace('_', '-')}` from `{json.dumps(old)}` to `{json.dumps(new)}`"
                 for key, (old, new) in argument_changes(record, other).items()]
        size = (f"Against [{other.folder}](../{other.folder}): {added} lines added, {removed} removed "
                f"([change.diff](change.diff)); arguments changed: {', '.join(flags) or 'none'}.")
    memory = "not measured" if s["peak_memory_mib"] is None else f"{s['peak_memory_mib']:,.0f} MiB"
    kernels = ", ".join(f"{key} {value}" for key, value in s["kernels"].items())
    versions = ", ".join(f"{key} {value}" for key, value in s["versions"].items() if value)
    return f"""# {record.name}

{track.title} in **{s['seconds_mean']:.3f} s** on {record.hardware}, by {record.by}, {record.date}.

## Claim

Mean validation loss {s['loss_mean']:.4f} over {len(record.logs)} runs, below {track.target} with p = {s['p']:.2g} \
(one-sided t-test), after a mean training time of {s['seconds_mean']:.3f} s. {beats}

## Mechanism

{mechanism}

## Runs

| seed | val loss | training s | start-up s | whole process s | tokens/s | log |
|-|-|-|-|-|-|-|
{chr(10).join(rows)}
| mean | {s['loss_mean']:.4f} | {s['seconds_mean']:.3f} | {s['startup_seconds_mean']:.1f} | \
{s['total_seconds_mean']:.1f} | | |
| sd | {s['loss_sd']:.4f} | {s['seconds_sd']:.3f} | | | | |

## Set-up

| | |
|-|-|
| script | [{record.script}]({record.script}), {len(record.source.splitlines())} lines, \
{s['params']:,} parameters |
| command | `{shlex.join(first['command'])}` |
| budget | {s['steps']:,} steps, {s['tokens']:,} tokens |
| hardware | {record.hardware}, peak memory {memory} |
| kernels | {kernels}, {'torch.compile' if first['args']['compile'] else 'not compiled'} |
| versions | {versions} |
| data | {first['dataset']}, fingerprint {s['fingerprint'][:16]}; first {first['val_tokens']:,} validation tokens |

## Change

{size} {kept}
"""


def check_names(name: str, by: str, text: str, logs: list[Log], script: str):
    """Raises Refused for names that would break a folder, a table or a line."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,59}", name):
        raise Refused(f"--name {name!r} must be up to 60 letters, digits, _, . or -: it names a folder")
    if not re.fullmatch(r"[^\n\r|<>\[\]`]{1,100}", by) or not by.strip():
        raise Refused("--by must be one line of up to 100 characters without | < > [ ] `")
    if any(line.startswith("#") for line in text.splitlines()):
        raise Refused("--readme has a heading of its own (a line that begins with #): it is one section of a README")
    if not re.fullmatch(r"\w+\.py", script):
        raise Refused(f"the logs name a script {script!r}, which is no file of a repository")
    for log in logs:
        if not FILE_NAME.fullmatch(log.name):
            raise Refused(f"{log.name} is not named as the script named it (<UTC time>_<script>_<id>.txt)")
