"""A needle in a haystack: `python -m evals.niah --haystack data/fineweb10B CHECKPOINT`.

"The special magic {city} number is: {seven digits}" stands on a line of its own at some depth of other text, and the
prompt ends "the special magic {city} number is:". It repeats the needle word for word, as small models need it; text
and scoring are those of github.com/itsnamgyu/block-transformer. Right if the first ten tokens hold the number. The
result is a grid of lengths and depths, also as a picture.
"""

import dataclasses
import hashlib
import itertools
from pathlib import Path

import numpy as np

from evals.common import (
    Flags,
    InputError,
    LanguageModel,
    Metric,
    Results,
    Runs,
    generations,
    limited,
    png,
    run_command,
    shard_documents,
)

MAX_TOKENS = 10
CITIES = (
    "Accra Algiers Amman Amsterdam Ankara Athens Auckland Baghdad Bangkok Barcelona Beijing Beirut Belgrade Berlin "
    "Bogota Boston Brussels Bucharest Budapest Cairo Caracas Chicago Copenhagen Dakar Dallas Damascus Delhi Denver "
    "Dhaka Dubai Dublin Geneva Hamburg Hanoi Harare Havana Helsinki Houston Istanbul Jakarta Kabul Karachi Kiev "
    "Lagos Lima Lisbon London Luanda Madrid Manila Melbourne Miami Milan Montreal Moscow Mumbai Munich Nairobi "
    "Naples Osaka Oslo Ottawa Paris Prague Quito Rabat Riga Rome Santiago Seattle Seoul Shanghai Singapore Sofia "
    "Stockholm Sydney Taipei Tehran Tokyo Toronto Tripoli Tunis Vienna Warsaw Zagreb Zurich").split()


@dataclasses.dataclass
class Args(Flags):
    """How often a number is found again, by the length of the context and the depth at which the number stands."""

    haystack: Path | None = None
    """Folder of shards whose validation text is the haystack, of the checkpoint's tokenizer."""
    lengths: tuple[int, ...] = (1024, 2048, 4096, 8192)
    """Lengths of the whole prompt, in tokens."""
    depths: tuple[int, ...] = tuple(range(0, 101, 10))
    """Where the needle stands, in percent of the haystack; less or more by up to ten tokens, but at 0 and 100."""
    trials: int = 20
    """Prompts for each length and depth."""
    seed: int = 0
    """Of cities, numbers and places."""


def cell(length: int, depth: int) -> str:
    """The name of the metric of one length and depth."""
    return f"{length} tokens, depth {depth}%"


def build_prompts(lm: LanguageModel, haystack: np.ndarray, args: Args) -> tuple[list[np.ndarray], list[str]]:
    """(prompts (length,), the number in each), for each length, depth and trial in this order."""
    rng = np.random.default_rng(args.seed)
    cells = list(itertools.product(args.lengths, args.depths, range(limited(args.trials, args.limit))))
    cities, numbers = rng.choice(CITIES, len(cells)), [str(number) for number in rng.integers(10**6, 10**7, len(cells))]
    needles = [f"\nThe special magic {city} number is: {number}\n" for city, number in zip(cities, numbers)]
    tails = [f"\n</context>\n\nWhat is the special magic {city} number?\n\nthe special magic {city} number is:"
             for city in cities]
    tokens, (head,) = lm.encode(needles + tails), lm.encode_prompts(["<context>\n"])
    prompts = []
    for i, (length, depth, _) in enumerate(cells):
        needle, tail = tokens[needles[i]], tokens[tails[i]]
        room = length - len(head) - len(needle) - len(tail)
        if not 0 < room <= len(haystack):
            raise InputError(f"a prompt of {length} tokens has room for {room} of the haystack's {len(haystack)}: "
                             "change --lengths or --haystack")
        offset = rng.integers(len(haystack) - room + 1)
        place = room * depth // 100 + (rng.integers(-10, 11) if 0 < depth < 100 else 0)
        before, after = np.split(haystack[offset:offset + room], [min(max(place, 0), room)])
        prompts.append(np.concatenate([head, before, needle, after, tail]))
    return prompts, numbers


def evaluate(lm: LanguageModel, args: Args) -> dict[str, Metric]:
    """The accuracy for each length, and for each length and depth."""
    if args.haystack is None:
        raise InputError("give --haystack DIR, a folder of shards of the checkpoint's tokenizer")
    if min(*args.lengths, args.trials) < 1 or not 0 <= min(args.depths) <= max(args.depths) <= 100:
        raise InputError("--lengths and --trials are 1 or more, --depths are percent")
    haystack = np.concatenate(shard_documents(args.haystack, lm)).astype(np.int64)
    prompts, numbers = build_prompts(lm, haystack, args)
    identity = [hashlib.sha256(prompt.tobytes()).hexdigest() for prompt in prompts]
    written = generations(lm, prompts, Results(args.out, "niah", lm, identity), MAX_TOKENS)
    right = np.array([number in text for number, text in zip(numbers, written)], np.float64)
    right = right.reshape(len(args.lengths), len(args.depths), -1)
    metrics = {f"{length} tokens": Metric(row.reshape(-1)) for length, row in zip(args.lengths, right)}
    return metrics | {cell(length, depth): Metric(row[j]) for length, row in zip(args.lengths, right)
                      for j, depth in enumerate(args.depths)}


def picture(runs: Runs, args: Args) -> bytes:
    """A heat map for each checkpoint, side by side: lengths by depths; a line where the documents of training end."""
    def draw(figure):
        axes = figure.subplots(1, len(runs), squeeze=False, sharey=True)[0]
        for axis, (label, (about, metrics)) in zip(axes, runs.items()):
            grid = [[metrics[cell(length, depth)].value for length in args.lengths] for depth in args.depths]
            image = axis.imshow(grid, vmin=0, vmax=1, cmap="viridis", aspect="auto")
            for (i, j), value in np.ndenumerate(grid):
                color = "black" if value > 0.5 else "white"
                axis.text(j, i, f"{100 * value:.0f}", ha="center", va="center", color=color)
            trained = sum(length <= about["train_tokens"] for length in args.lengths)
            axis.axvline(trained - 0.5, color="red", ls="--")
            axis.set(title=label, xlabel="prompt, tokens (dashed: longest document in training)", ylabel="depth, %",
                     xticks=range(len(args.lengths)), yticks=range(len(args.depths)))
            axis.set_xticklabels(args.lengths)
            axis.set_yticklabels(args.depths)
        figure.colorbar(image, ax=axes, label="accuracy")
    return png(draw, 1 + 5 * len(runs), 5)


if __name__ == "__main__":
    run_command(Args, evaluate, __doc__, picture)
