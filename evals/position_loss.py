"""Loss by position, also beyond the training length: `python -m evals.position_loss --data DIR CHECKPOINT ...`.

The first `length` tokens of each validation document that has so many, in one forward pass each; the mean loss in bins
of 1,024 positions with the standard error over documents. Of several checkpoints, the difference to the first one is
paired: document by document, so that what makes a document hard falls away.
"""

import dataclasses
import hashlib
from pathlib import Path

import numpy as np

from evals.common import (
    Flags,
    InputError,
    LanguageModel,
    Metric,
    Results,
    Runs,
    limited,
    png,
    run_command,
    shard_documents,
)

BIN = 1024


@dataclasses.dataclass
class Args(Flags):
    """The mean loss of a token, in nats, by its position in its document."""

    data: Path | None = None
    """Folder of shards with long documents in validation, of the checkpoint's tokenizer."""
    length: int = 8192
    """Tokens of a document; shorter documents are left out."""
    documents: int = 200
    """At most so many documents, the first ones."""


def bins(length: int) -> dict[str, slice]:
    """Names of the metrics, and the positions that each stands for."""
    return {f"positions {start}-{min(start + BIN, length) - 1}": slice(start, start + BIN)
            for start in range(0, length, BIN)}


def evaluate(lm: LanguageModel, args: Args) -> dict[str, Metric]:
    """The loss over all positions and in each bin."""
    if args.data is None:
        raise InputError("give --data DIR, a folder of shards with long documents")
    if min(args.length, args.documents) < 1:
        raise InputError("--length and --documents are 1 or more")
    long = [tokens[:args.length] for tokens in shard_documents(args.data, lm) if len(tokens) >= args.length]
    if not long:
        raise InputError(f"no validation document in {args.data} has {args.length} tokens: lower --length")
    long = long[:limited(args.documents, args.limit)]
    sequences = [np.insert(tokens.astype(np.int64), 0, lm.separator) for tokens in long]

    def compute(missing: list[int]):
        wanted = [np.arange(1, args.length + 1)] * len(missing)
        for scores in lm.score([sequences[i] for i in missing], wanted):
            yield {i: [-log_probs[part].mean() for part in (slice(None), *bins(args.length).values())]
                   for i, (log_probs, _) in scores.items()}

    identity = [hashlib.sha256(tokens.tobytes()).hexdigest() for tokens in sequences]
    rows = np.array(Results(args.out, "position_loss", lm, identity).collect(len(sequences), compute))
    return {name: Metric(values, "loss") for name, values in zip(("all positions", *bins(args.length)), rows.T)}


def picture(runs: Runs, args: Args) -> bytes:
    """Loss by position of each checkpoint and, of several, its paired difference to the first; bars: one standard
    error over documents."""
    def draw(figure):
        axes = figure.subplots(1, 1 if len(runs) == 1 else 2, squeeze=False)[0]
        middles = [(part.start + min(part.stop, args.length)) / 2 for part in bins(args.length).values()]
        first_label, (about, first) = next(iter(runs.items()))
        for label, (_, metrics) in runs.items():
            own = [(metrics[name], metrics[name].difference(first[name])) for name in bins(args.length)]
            errors = [metric.standard_error() for metric, _ in own]
            line = axes[0].errorbar(middles, [metric.value for metric, _ in own], errors, marker="o", label=label)
            if metrics is not first:
                means, errors = zip(*(difference for _, difference in own))
                axes[-1].errorbar(middles, means, errors, marker="o", color=line[0].get_color(), label=label)
        for axis, title in zip(axes, ("loss, nats per token", f"difference to {first_label}, paired")):
            axis.axvline(about["train_tokens"], color="black", ls="--", label="longest document in training")
            axis.set(xlabel="position in the document, tokens", title=title)
            axis.legend()
    return png(draw, 7 * min(2, len(runs)), 5)


if __name__ == "__main__":
    run_command(Args, evaluate, __doc__, picture)
