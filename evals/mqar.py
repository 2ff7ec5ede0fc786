"""Multi-query associative recall: `python -m evals.mqar CHECKPOINT` (Zoology, arXiv 2312.04927). Needs no data.

A sequence of `length` random tokens begins with pairs of a key and a value, k1 v1 k2 v2 ..., all keys different. Each
key comes again later, once, at places drawn by a power law as in the paper's code, with other tokens in between: right
if the value is the most probable token there. (Here the value then follows; in the paper's code, another random token.)
Keys are of one random half of the vocabulary and values of the other: chance is 1 or 2 / vocabulary.
"""

import dataclasses

import numpy as np

from evals.common import Flags, InputError, LanguageModel, Metric, Results, limited, run_command


@dataclasses.dataclass
class Args(Flags):
    """How often the value of a key is recalled, by the number of pairs to keep in mind."""

    pairs: tuple[int, ...] = (4, 8, 16, 32, 64)
    """Numbers of pairs."""
    length: int = 512
    """Tokens of a sequence: four or more for each pair."""
    examples: int = 64
    """Sequences for each number of pairs."""
    power: float = 0.01
    """Exponent of the power law of the distances: small ones are the most frequent."""
    seed: int = 0
    """Of the tokens and places."""


def build(lm: LanguageModel, pairs: int, args: Args, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """(tokens (length,), places of the values to recall (pairs,))"""
    keys, values = np.array_split(rng.permutation(np.delete(np.arange(lm.vocab_size), lm.separator)), 2)
    slots = (args.length - 2 * pairs) // 2
    weights = args.power * np.arange(1, slots + 1) ** (args.power - 1)
    places = 2 * pairs + 2 * rng.choice(slots, pairs, replace=False, p=weights / weights.sum())
    tokens = rng.choice(np.concatenate([keys[pairs:], values]), args.length)
    tokens[:2 * pairs:2] = tokens[places] = keys[:pairs]
    tokens[1:2 * pairs:2] = tokens[places + 1] = rng.choice(values, pairs)
    return tokens, np.sort(places) + 1


def evaluate(lm: LanguageModel, args: Args) -> dict[str, Metric]:
    """The accuracy for each number of pairs, over all queries."""
    if min(*args.pairs, args.examples) < 1 or 4 * max(args.pairs) > min(args.length, lm.vocab_size):
        raise InputError(f"{max(args.pairs)} pairs need a --length and a vocabulary of {4 * max(args.pairs)} or more")
    rng, examples = np.random.default_rng(args.seed), limited(args.examples, args.limit)
    built = [build(lm, pairs, args, rng) for pairs in args.pairs for _ in range(examples)]
    sequences, places = [tokens for tokens, _ in built], [place for _, place in built]
    if lm.bos:
        sequences = [np.insert(tokens, 0, lm.separator) for tokens in sequences]
        places = [place + 1 for place in places]

    def compute(missing: list[int]):
        for scores in lm.score([sequences[i] for i in missing], [places[i] for i in missing]):
            yield {i: hits.tolist() for i, (_, hits) in scores.items()}

    settings = {"pairs": args.pairs, "length": args.length, "power": args.power, "seed": args.seed}
    rows = Results(args.out, "mqar", lm, examples, **settings).collect(len(built), compute)
    return {f"{pairs} pairs": Metric(np.concatenate(rows[i * examples:(i + 1) * examples]).astype(np.float64))
            for i, pairs in enumerate(args.pairs)}


if __name__ == "__main__":
    run_command(Args, evaluate, __doc__)
