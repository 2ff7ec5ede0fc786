"""LAMBADA, the last word of a passage: `python -m evals.lambada CHECKPOINT` (arXiv 1606.06031).

The text of EleutherAI/lambada_openai (5,153 passages) and the scores of lm-evaluation-harness 0.4.13: acc, whether
greedy decoding gives the whole last word, and the perplexity of that word (of words, not of tokens).
"""

from typing import Any

from evals.common import FileFlags, LanguageModel, Metric, Results, log_likelihoods, read_examples, run_command


def convert(row: dict[str, Any]) -> tuple[str, str]:
    """(the passage but for its last word, a space and the last word) from `text`, or from context and continuation."""
    context, word = (row["context"], row["continuation"]) if "context" in row else row["text"].rsplit(" ", 1)
    return context, " " + word.removeprefix(" ")


def evaluate(lm: LanguageModel, args: FileFlags) -> dict[str, Metric]:
    pairs = read_examples(convert, args.file, ("EleutherAI/lambada_openai", "default", "test"), args.limit)
    scores = log_likelihoods(lm, pairs, Results(args.out, "lambada", lm, pairs))
    return {"acc": Metric(scores[:, 1]), "perplexity": Metric(-scores[:, 0], "perplexity")}


if __name__ == "__main__":
    run_command(FileFlags, evaluate, __doc__)
