"""Appends a record: checks the logs of all seeds of one script, and either refuses with the reason or writes
records/<track>/<date>_<name>/ and rebuilds the leaderboard.

    python records/add.py logs/*_train_gpt_*.txt --name LongerWindows --by "Your Name" --readme "What and why"
"""

import lzma
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

import leaderboard
from record import Record, Repository, Track, check_names, check_runs, files, same_changes
from runlog import FILE_NAME, Log, Refused, read_log


@dataclass
class Args:
    """Check the logs of all seeds of one script and append them as a record."""
    logs: tyro.conf.Positional[tuple[Path, ...]]  # one log per seed, all seeds that were run; .txt or .txt.xz
    name: str  # of the record, a word: it names the folder
    by: str  # whose record it is
    track: str | None = None  # of tracks.toml; by default the one that has the logs' dataset
    readme: str = ""  # the mechanism, in Markdown; by default the first paragraph of the script's docstring
    script: Path | None = None  # refuse unless this file is the source in the logs


def choose_track(repository: Repository, key: str | None, logs: list[Log]) -> Track:
    dataset, ranked = logs[0].result["dataset"], [track for track in repository.tracks.values() if track.ranked]
    names = ", ".join(track.key for track in ranked)
    if key:
        if key not in (track.key for track in ranked):
            raise Refused(f"--track {key} is no ranked track; there are: {names}")
        return repository.tracks[key]
    fitting = [track for track in ranked if track.dataset == dataset]
    if len(fitting) != 1:
        raise Refused(f"{len(fitting)} tracks have the dataset {dataset!r}: choose --track; there are: {names}")
    return fitting[0]


def add(repository: Repository, args: Args) -> Record:
    """Checks and writes a record. Raises Refused, and then leaves nothing behind."""
    if len({path.name.removesuffix(".xz") for path in args.logs}) < len(args.logs) or not args.logs:
        raise Refused("a log is given twice" if args.logs else "give the logs of all seeds")
    logs = sorted(map(read_log, args.logs), key=lambda log: log.seed)
    script = logs[0].result["script"]
    check_names(args.name, args.by, args.readme, logs, script)
    if args.script and args.script.read_bytes() != logs[0].source.encode():
        raise Refused(f"--script {args.script} is not the source in {logs[0].name}")
    track = choose_track(repository, args.track, logs)
    known = {log.sha256: record for record in repository.landed for log in record.logs}
    if twice := [log for log in logs if log.sha256 in known]:
        other = known[twice[0].sha256]
        raise Refused(f"{twice[0].name} is in a record already: {other.track.key}/{other.folder}")
    others = [record for record in repository.landed if record.track == track]  # fastest first
    check_runs(track, logs, others)

    date = max(FILE_NAME.fullmatch(log.name)[1] for log in logs)
    on_same = [record for record in others if record.hardware == logs[0].hardware]
    rival = next((record for record in on_same if record.script == script), None)
    compared = rival or next(iter(on_same + others), None)
    same = same_changes(logs[0].source, (repository.root / "train_gpt.py").read_text())
    record = Record(track, f"{date}_{args.name}", args.name, args.by, date, args.readme.strip(),
                    compared.folder if compared else None, rival.folder if rival else None, list(same), logs)
    if rival and record.seconds >= rival.seconds:
        raise Refused(f"{record.seconds:.3f} s is not faster than the record of {script} on {record.hardware}: "
                      f"{rival.seconds:.3f} s, {rival.folder}")
    folder = repository.records / track.key / record.folder
    if folder.exists():
        raise Refused(f"{folder} exists already: choose another --name")

    content = files(record, compared, same)
    repository.landed = sorted([*repository.landed, record], key=lambda record: record.seconds)
    generated = leaderboard.generate(repository)  # before anything is written: it may refuse
    write(folder, content)
    leaderboard.write(generated)
    return record


def write(folder: Path, content: dict[str, bytes]):
    """Writes a folder, .xz files compressed, under a temporary name and renames it: it is there whole or not at all."""
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        for name, data in content.items():
            with open(partial / name, "wb") as file:
                file.write(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME) if name.endswith(".xz") else data)
                file.flush()
                os.fsync(file.fileno())
        os.rename(partial, folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def main(argv: list[str] | None = None, repository: Repository | None = None):
    try:
        repository = repository or Repository()
        record = add(repository, tyro.cli(Args, args=argv, description=__doc__))
    except (Refused, OSError) as error:
        print(f"add.py: refused: {error}", file=sys.stderr)
        sys.exit(2)
    s = record.summary
    print(f"records/{record.track.key}/{record.folder}: {s['seconds_mean']:.3f} s on {record.hardware}, "
          f"loss {s['loss_mean']:.4f}, p = {s['p']:.2g}")
    if record.same:
        print(f"note: it changes sections marked [same]: {', '.join(record.same)}; see its same.diff")


if __name__ == "__main__":
    main()
