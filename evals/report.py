"""All evaluations of one or several checkpoints: `python -m evals.report CHECKPOINT ... --haystack DIR --long DIR`.

Prints one table, and writes report.json and report.html, a page that holds its pictures, into --out. Differences are to
the first checkpoint, paired over the same examples. What has no data is left out, and said.
"""

import base64
import dataclasses
import html
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, get_args

import tyro

from evals import hellaswag, lambada, mqar, multiple_choice, niah, position_loss, recall
from evals.common import (
    Z95,
    FileFlags,
    Flags,
    InputError,
    LanguageModel,
    Metric,
    Runs,
    checkpoint_paths,
    labels,
    load,
    one_line_errors,
    report_run,
)

Task = Literal["hellaswag", "piqa", "arc_easy", "arc_challenge", "openbook_qa", "winogrande", "lambada", "squad",
               "swde_hazy", "swde_lmeval", "fda_hazy", "fda_lmeval", "mqar", "niah", "position_loss"]
CHANCE = {"hellaswag": 25, "piqa": 50, "arc_easy": 25, "arc_challenge": 25, "openbook_qa": 25, "winogrande": 50}  # %
STYLE = """body { font: 15px/1.5 system-ui, sans-serif; max-width: 75em; margin: 2em auto; padding: 0 1em; color: #222 }
table { border-collapse: collapse; margin: 1em 0 } th, td { padding: .2em .8em; text-align: right; white-space: nowrap }
th:first-child, td:first-child, th:nth-child(2), td:nth-child(2) { text-align: left }
tr { border-bottom: 1px solid #ddd } img { max-width: 100% } td.above { font-weight: bold }"""


LEGEND = ("Accuracies in percent, losses in nats, with 95% intervals: Wilson's for accuracies, else from the standard "
          "error over examples. Differences are paired over examples, ± 1.96 standard errors, of perplexities in nats; "
          "bold ones are larger than that, as one in twenty is by chance. Nothing here tells of other seeds.")


@dataclasses.dataclass
class Args(Flags):
    """All evaluations of one or several checkpoints: a table, JSON, and a page with pictures."""

    tasks: tuple[Task, ...] = get_args(Task)
    """Which evaluations."""
    files: Path | None = None
    """Folder of JSON-lines files, named as the task and any ending (hellaswag_val.jsonl, swde.jsonl.xz); without it
    examples come from the Hugging Face hub."""
    haystack: Path | None = None
    """Folder of shards for niah."""
    long: Path | None = None
    """Folder of shards with long documents for position_loss."""
    lengths: tuple[int, ...] = niah.Args.lengths
    """Prompt lengths of niah, in tokens."""
    trials: int = niah.Args.trials
    """Prompts of niah for each length and depth."""
    long_tokens: int = position_loss.Args.length
    """Tokens of a document in position_loss."""


def plan(args: Args) -> dict[str, tuple[Callable[[LanguageModel, Any], dict[str, Metric]], Flags]]:
    """The function and flags of each task."""
    shared = {field.name: getattr(args, field.name) for field in dataclasses.fields(Flags)}

    def with_file(name: str, kind: type, **flags: Any) -> Flags:
        found = sorted(args.files.glob(f"{name}*.jsonl*")) if args.files else []
        # a file that is not there is refused as any other, with its name
        file = (found or [args.files / f"{name}.jsonl"])[0] if args.files else None
        return kind(**shared, file=file, **flags)

    tasks = {"hellaswag": (hellaswag.evaluate, with_file("hellaswag", FileFlags))}
    for name in multiple_choice.TASKS:
        tasks[name] = multiple_choice.evaluate, with_file(name, multiple_choice.Args, task=name)
    tasks["lambada"] = lambada.evaluate, with_file("lambada", FileFlags)
    for name in ("squad_lmeval", "swde_hazy", "swde_lmeval", "fda_hazy", "fda_lmeval"):
        task, form = name.split("_")
        flags = with_file(task, recall.Args, task=task, format=form)
        tasks[task if task == "squad" else name] = recall.evaluate, flags
    tasks["mqar"] = mqar.evaluate, mqar.Args(**shared)
    tasks["niah"] = niah.evaluate, niah.Args(**shared, haystack=args.haystack, lengths=args.lengths, trials=args.trials)
    flags = position_loss.Args(**shared, data=args.long, length=args.long_tokens)
    tasks["position_loss"] = position_loss.evaluate, flags
    return {name: tasks[name] for name in args.tasks}


def shown(metric: Metric) -> str:
    """The value and its 95% interval; accuracies in percent."""
    scale, form = {"accuracy": (100, ".1f"), "loss": (1, ".3f"), "perplexity": (1, ".4g")}[metric.kind]
    value, low, high = (format(scale * number, form) for number in (metric.value, *metric.interval()))
    return f"{value} [{low}, {high}]"


def difference(metric: Metric, first: Metric) -> tuple[str, bool]:
    """(the paired difference ± 1.96 standard errors, whether it is larger than that); percentage points or nats."""
    scale, digits = (100, 1) if metric.kind == "accuracy" else (1, 3)
    mean, error = metric.difference(first)
    return f"{scale * mean:+.{digits}f} ± {scale * Z95 * error:.{digits}f}", abs(mean) > Z95 * error


def table(results: dict[str, Runs], labels: list[str]) -> tuple[list[str], list[list[str]], list[list[bool]]]:
    """(head, rows of texts, whether each is a difference above noise), for the metrics but the single cells of niah."""
    head = ["task", "metric", "n", "chance"] + [text for i, label in enumerate(labels)
                                                for text in ([label] if i == 0 else [label, f"less {labels[0]}"])]
    rows, marks = [], []
    for task, runs in results.items():
        for name in (name for name in runs[labels[0]][1] if "depth" not in name):
            first = runs[labels[0]][1][name]
            row = [task, name, str(len(first.values)), str(CHANCE.get(task, "")), shown(first)]
            mark = [False] * len(row)
            for label in labels[1:]:
                text, above = difference(runs[label][1][name], first)
                row, mark = row + [shown(runs[label][1][name]), text], mark + [False, above]
            rows.append(row)
            marks.append(mark)
    return head, rows, marks


def markdown(head: list[str], rows: list[list[str]], marks: list[list[bool]]) -> str:
    lines = [head, ["-"] * len(head)]
    lines += [[f"**{text}**" if above else text for text, above in zip(row, mark)] for row, mark in zip(rows, marks)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def page(report: dict[str, Any], head: list[str], rows: list[list[str]], marks: list[list[bool]],
         pictures: dict[str, bytes]) -> str:
    """The report as HTML that needs no other file."""
    def cells(texts: list[str], mark: list[bool] | None = None) -> str:
        kind = "th" if mark is None else "td"
        return "".join(f"<{kind}{' class=above' if above else ''}>{html.escape(text)}</{kind}>"
                       for text, above in zip(texts, mark or [False] * len(texts)))

    facts = ["script", "step", "params", "dataset", "train_tokens", "cache_bytes", "identity"]
    parts = ["<!doctype html><html lang=en><meta charset=utf-8><title>Evaluations</title>",
             f"<style>{STYLE}</style><h1>Evaluations</h1><table><tr>{cells(['checkpoint', *facts])}</tr>"]
    for label, about in report["checkpoints"].items():
        texts = [str(about[fact])[:64] for fact in facts]
        parts.append(f"<tr>{cells([label, *texts], [False] * (1 + len(facts)))}</tr>")
    parts.append(f"</table><p>{html.escape(LEGEND)}</p><table><tr>{cells(head)}</tr>")
    parts += [f"<tr>{cells(row, mark)}</tr>" for row, mark in zip(rows, marks)]
    parts.append("</table>")
    parts += [f"<p>{html.escape(f'Left out, {task}: {reason}')}</p>" for task, reason in report["left_out"].items()]
    parts += [f'<h2>{name}</h2><img alt="{name}" src="data:image/png;base64,{base64.b64encode(picture).decode()}">'
              for name, picture in pictures.items()]
    return "\n".join(parts) + "</html>\n"


def main() -> None:
    with one_line_errors():
        args = tyro.cli(Args, description=__doc__, config=(tyro.conf.FlagCreatePairsOff,))
        paths, tasks = checkpoint_paths(args), plan(args)
        results: dict[str, Runs] = {task: {} for task in tasks}
        report: dict[str, Any] = {"checkpoints": {}, "tasks": {}, "left_out": {}, "seconds": {}}
        for path, label in zip(paths, labels(paths)):
            lm = load(path, args)
            report["checkpoints"][label] = lm.about
            for task, (evaluate, flags) in tasks.items():
                start = time.perf_counter()
                try:
                    results[task][label] = lm.about, evaluate(lm, flags)
                except InputError as error:
                    report["left_out"][task] = str(error)
                    print(f"left out, {task}: {error}", file=sys.stderr)
                report["seconds"].setdefault(label, {})[task] = round(time.perf_counter() - start, 2)
        results = {task: runs for task, runs in results.items() if task not in report["left_out"]}
        if not results:
            raise InputError(next(iter(report["left_out"].values())))
        for task, runs in results.items():
            report["tasks"][task] = [report_run(label, runs) for label in runs]
        pictures = {}
        for task, module, title in (("niah", niah, "Needle in a haystack"),
                                    ("position_loss", position_loss, "Loss by position")):
            try:
                if task in results:
                    pictures[title] = module.picture(results[task], tasks[task][1])
            except InputError as error:
                report["left_out"][f"picture of {task}"] = str(error)
        cells = table(results, list(report["checkpoints"]))
        (args.out / "report.json").write_text(json.dumps(report, indent=1) + "\n")
        (args.out / "report.html").write_text(page(report, *cells, pictures), encoding="utf-8")
        print(f"{markdown(*cells)}\n\n{LEGEND}\n\n{args.out / 'report.html'}")


if __name__ == "__main__":
    main()
