"""index.html: leaderboard, curves, history, evidence and scripts on one page that opens from disk without a network.

page.html holds layout and behaviour. Here the data are put in, and uPlot and jsdiff from vendor/.
"""

import json
from statistics import fmean

from record import argument_changes
from runlog import Log

POINTS = 160  # of a curve; a longer run is averaged over as many spans of steps


class Lines:
    """Texts that have most lines in common, each line kept once: a text is a list of [first line, number of lines]."""

    def __init__(self):
        self.lines: list[str] = []
        self.places: dict[str, int] = {}

    def add(self, text: str) -> list[list[int]]:
        spans: list[list[int]] = []
        for line in text.split("\n"):
            if (place := self.places.setdefault(line, len(self.lines))) == len(self.lines):
                self.lines.append(line)
            if spans and sum(spans[-1]) == place:
                spans[-1][1] += 1
            else:
                spans.append([place, 1])
        return spans


def curves(logs: list[Log]) -> dict:
    """Means over the runs, at equal steps: training loss over spans of steps, and the validations."""
    count = len(logs[0].steps)
    borders = sorted({round((i + 1) * count / min(count, POINTS)) for i in range(min(count, POINTS))})
    train, start = [], 0
    for end in borders:
        losses = [step.loss for log in logs for step in log.steps[start:end]]
        train.append((logs[0].steps[end - 1].tokens, fmean(log.steps[end - 1].seconds for log in logs), fmean(losses)))
        start = end
    validations = [(same[0].tokens, fmean(v.seconds for v in same), fmean(v.loss for v in same))
                   for same in zip(*(log.validations for log in logs))]

    def columns(rows: list[tuple]) -> dict:
        return {"tokens": [tokens for tokens, _, _ in rows], "seconds": [round(seconds, 2) for _, seconds, _ in rows],
                "loss": [round(loss, 4) for _, _, loss in rows]}
    return {"train": columns(train), "val": columns(validations)}


def run_data(log: Log, folder: str) -> dict:
    return {"seed": log.seed, "loss": round(log.loss, 4), "seconds": round(log.seconds, 3),
            "startup": round(log.result["startup_seconds"], 1), "total": round(log.result["total_seconds"], 1),
            "log": f"{folder}/{log.name}"}


def entry(track: str, name: str, logs: list[Log], lines: Lines, place: str, **more) -> dict:
    """What the page knows of a record, or of one log of an unranked track. `place`: its folder, from the page's."""
    first = logs[0].result
    return {"id": f"{track}/{more.get('folder', name)}", "track": track, "name": name, "script": first["script"],
            "hardware": logs[0].hardware, "torch": first["torch"],
            "kernels": [first["attention"], *first.get("kernels", {}).values()],
            "tokens": first["tokens"], "steps": first["steps"], "params": first["params"]["total"],
            "target": first["target"], "loss": round(fmean(log.loss for log in logs), 4),
            "seconds": round(fmean(log.seconds for log in logs), 3),
            "runs": [run_data(log, place) for log in logs], "curves": curves(logs),
            "source": lines.add(logs[0].source), **more}


def reference(repository) -> dict:
    """The public speedrun's history, from modded_nanogpt.tsv."""
    text = (repository.records / "modded_nanogpt.tsv").read_text()
    comment = " ".join(line[2:] for line in text.splitlines() if line.startswith("#"))
    rows = [line.split("\t") for line in text.splitlines() if not line.startswith("#")]
    return {"track": "fineweb", "about": comment,
            "rows": [[int(number), float(minutes), what] for number, minutes, what in rows]}


def render(repository, rankings) -> str:
    """The page. `rankings`: leaderboard.rankings."""
    lines, entries, tracks = Lines(), [], []
    for key, track in repository.tracks.items():
        ranked = rankings(repository, key)
        tracks.append({"key": key, "title": track.title, "about": track.about, "ranked": track.ranked,
                       "target": track.target or None, "rankings": [
                           {"hardware": hardware, "records": [f"{key}/{record.folder}" for record in records]}
                           for hardware, records in ranked.items()]})
    # oldest first: a script's lines then follow those of the one before
    for record in sorted(repository.landed, key=lambda record: (record.date, -record.seconds)):
        s, folder = record.summary, f"{record.track.key}/{record.folder}"
        other = repository.find(record.track, record.compared_with)
        entries.append(entry(
            record.track.key, record.name, record.logs, lines, folder, folder=record.folder, by=record.by,
            date=record.date, text=record.text, p=s["p"], loss_sd=s["loss_sd"], seconds_sd=s["seconds_sd"],
            beats=record.beats, arguments=argument_changes(record, other), same=record.same,
            compared_with=record.compared_with and f"{record.track.key}/{record.compared_with}"))
    for track, log in repository.evidence:
        entries.append(entry(track.key, log.name.split(".")[0], [log], lines, track.key, date=log.name[:10]))
    data = {"tracks": tracks, "entries": entries, "lines": lines.lines, "reference": reference(repository)}

    vendor, page = repository.records / "vendor", (repository.records / "page.html").read_text()
    parts = {"uplot_css": (vendor / "uPlot-1.6.32.min.css").read_text(),
             "uplot_js": (vendor / "uPlot-1.6.32.iife.min.js").read_text(),
             "diff_js": (vendor / "diff-9.0.0.min.js").read_text(),
             "data": json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")}
    for name, text in parts.items():  # data last, which may hold anything
        page = page.replace("{{" + name + "}}", text)
    return page
