"""Checks records from their files alone: the logs against themselves and the track's rules, every other file against
what follows from the logs, and the leaderboard against the records.

    python records/verify.py                       # all
    python records/verify.py records/sample/...    # these
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

import leaderboard
from record import Record, Repository, check_names, check_runs, files
from runlog import Refused, read_bytes, sections


@dataclass
class Args:
    """Check that what has landed is what add.py would have written."""
    records: tyro.conf.Positional[tuple[Path, ...]] = ()  # folders of records; by default all, and the leaderboard


def verify(repository: Repository, record: Record):
    """Raises Refused unless every file of the record is what its logs and record.json make it."""
    folder = repository.records / record.track.key / record.folder
    check_names(record.name, record.by, record.text, record.logs, record.script)
    if record.folder != f"{record.date}_{record.name}":
        raise Refused(f"the folder should be {record.date}_{record.name}")
    others = [r for r in repository.landed if r.track == record.track]  # fastest first
    other = repository.find(record.track, record.compared_with)
    if record.compared_with and not other:
        raise Refused(f"it was compared with {record.compared_with}, which is not there")
    line = [r.folder for r in others if (r.hardware, r.script) == (record.hardware, record.script)]
    beaten = next(iter(line[line.index(record.folder) + 1:]), None)
    if record.beats != beaten:  # each record of a script on some hardware was faster than the one before it
        raise Refused(f"by the times it beats {beaten}, and its record.json says {record.beats}")
    if record.beats and record.compared_with != record.beats:
        raise Refused(f"it beats {record.beats}, and was compared with {record.compared_with}")
    check_runs(record.track, record.logs, others)

    there = {path.name: read_bytes(path) for path in folder.iterdir()}  # logs decompressed: versions of xz differ
    same = read_same_diff(there["same.diff"].decode(), record.source) if "same.diff" in there else {}
    if record.same != list(same):
        raise Refused(f"record.json has {record.same} as [same] sections that changed, and same.diff {list(same)}")
    expected = files(record, other, same)
    for name in sorted(expected.keys() | there.keys()):
        if name not in there or name not in expected:
            raise Refused(f"{name} {'is missing' if name in expected else 'is no file of a record'}")
        if there[name] != expected[name]:
            raise Refused(f"{name} is not what the logs make it: it was edited, or a log was")


def read_same_diff(text: str, source: str) -> dict[str, str]:
    """Splits a same.diff by sections. Raises Refused if one does not lead to the section that the script has."""
    changes = {}
    for part in text.split("--- train_gpt.py, ")[1:]:
        title, body = part.split("\n", 1)
        new = "".join(line[1:] for line in body.splitlines(True)[2:] if line[0] in " +")
        if new != sections(source).get(title, ""):
            raise Refused(f"same.diff does not lead to the section {title} of the script")
        changes[title] = f"--- train_gpt.py, {part}"
    return changes


def main(argv: list[str] | None = None, repository: Repository | None = None):
    args, faults = tyro.cli(Args, args=argv, description=__doc__), []
    try:
        repository = repository or Repository()
        records = [repository.load(path.resolve()) for path in args.records] or repository.landed
    except (Refused, OSError) as error:
        print(f"verify.py: {error}", file=sys.stderr)
        sys.exit(2)
    for record in records:
        try:
            verify(repository, record)
            print(f"{record.track.key}/{record.folder}: {len(record.logs)} runs, {record.seconds:.3f} s, good")
        except Refused as error:
            faults.append(f"{record.track.key}/{record.folder}: {error}")
    if not args.records:
        try:
            for track, log in repository.evidence:
                unsealed = "" if log.sealed else ", without log_sha256: edited losses would not show"
                print(f"{track.key}/{log.name}: one run, agrees with itself{unsealed}")
            faults += [f"{name} is stale: run python records/leaderboard.py" for name in leaderboard.stale(repository)]
        except Refused as error:
            faults.append(str(error))
    for fault in faults:
        print(f"verify.py: {fault}", file=sys.stderr)
    sys.exit(2 if faults else 0)


if __name__ == "__main__":
    main()
