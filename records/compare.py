"""Compares two sets of runs: is the difference larger than that between seeds?

    python records/compare.py logs/before logs/after
    python records/compare.py 'logs/*_train_gpt_*.txt' 'logs/*_train_hybrid_*.txt'
"""

import glob
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

from runlog import Log, Refused, logs_in, read_log
from significance import difference, ratio


@dataclass
class Args:
    """Mean loss of B minus that of A at equal tokens, and their ratio of training times, with confidence intervals."""
    a: tyro.conf.Positional[str]  # logs: a folder, a file or a quoted pattern
    b: tyro.conf.Positional[str]  # logs to compare with them
    confidence: float = 0.95  # of the intervals, and of the verdict


def read_set(where: str) -> list[Log]:
    """The logs of a folder, a file or a pattern: at least two, which do not differ but in the seed."""
    paths = logs_in(Path(where)) if Path(where).is_dir() else sorted(map(Path, glob.glob(where)))
    logs = [read_log(path) for path in paths]
    if len(logs) < 2:
        raise Refused(f"{where}: {len(logs)} logs; the noise between seeds takes two at the least")
    if len({log.seed for log in logs}) < len(logs):
        raise Refused(f"{where}: two logs are of one seed, {sorted(log.seed for log in logs)}: no two samples")
    for log in logs[1:]:
        if (log.source, log.hardware) != (logs[0].source, logs[0].hardware):
            raise Refused(f"{where}: {log.name} has another source or hardware than {logs[0].name}")
        if [step.tokens for step in log.steps] != [step.tokens for step in logs[0].steps]:
            raise Refused(f"{where}: {log.name} has another budget or stage table than {logs[0].name}")
    return logs


def compare(a: list[Log], b: list[Log], confidence: float) -> str:
    """The comparison as text. Raises Refused for runs on other data, or that never validated at equal tokens."""
    for key in ("fingerprint", "val_tokens"):
        if a[0].result[key] != b[0].result[key]:
            raise Refused(f"{key} is {a[0].result[key]} in A and {b[0].result[key]} in B: losses of other text")
    if a[0].args["val_row_tokens"] != b[0].args["val_row_tokens"]:
        raise Refused("A and B have other --val-row-tokens, which cut other documents: their losses are not comparable")
    common = sorted(set.intersection(*({v.tokens for v in log.validations} for log in a + b)))
    if not common:
        raise Refused("A and B never validated after equal tokens: give both the same --max-tokens or --val-every")

    level = f"{100 * confidence:g}%"
    text = f"A: {len(a)} runs of {a[0].result['script']}, B: {len(b)} runs of {b[0].result['script']}\n\n"
    text += f"{'tokens':>12} {'loss A':>8} {'loss B':>8} {'B - A':>8}   {level} interval\n"
    for tokens in common:
        at = [[next(v.loss for v in log.validations if v.tokens == tokens) for log in logs] for logs in (a, b)]
        if tokens == common[-1] == a[0].steps[-1].tokens == b[0].steps[-1].tokens:
            at = [[log.loss for log in logs] for logs in (a, b)]  # the closing line has all digits
        change, low, high, p = difference(*at, confidence)
        text += (f"{tokens:>12,} {np.mean(at[0]):>8.4f} {np.mean(at[1]):>8.4f} {change:>+8.4f}   "
                 f"{low:+.4f} to {high:+.4f} (p = {p:.2g})\n")
    verdict = "inside the noise between seeds: no difference shown" if p > 1 - confidence else (
        f"B's loss is {'lower' if change < 0 else 'higher'} by {abs(change):.4f}, more than the noise between seeds")
    text += f"\nloss at {common[-1]:,} tokens: {verdict} (Welch's t-test, {level})\n"

    if a[0].hardware != b[0].hardware:
        return f"{text}time: not compared, A ran on {a[0].hardware} and B on {b[0].hardware}\n"
    until = [[next(v.seconds for v in log.validations if v.tokens == common[-1]) for log in logs] for logs in (a, b)]
    middle, low, high = ratio(*until, confidence)
    verdict = "inside the noise between runs" if low <= 1 <= high else f"B is {'faster' if middle < 1 else 'slower'}"
    return (f"{text}time to {common[-1]:,} tokens: {np.mean(until[0]):.3f} s in A, {np.mean(until[1]):.3f} s in B, "
            f"ratio B / A {middle:.4f} ({low:.4f} to {high:.4f}): {verdict}\n")


def main(argv: list[str] | None = None):
    try:
        args = tyro.cli(Args, args=argv, description=__doc__)
        if not 0.5 <= args.confidence < 1:
            raise Refused(f"--confidence {args.confidence} must be from 0.5 to less than 1")
        print(compare(read_set(args.a), read_set(args.b), args.confidence), end="")
    except Refused as error:
        print(f"compare.py: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
