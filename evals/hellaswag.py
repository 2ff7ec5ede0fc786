"""HellaSwag, the sensible one of four endings: `python -m evals.hellaswag CHECKPOINT` (arXiv 1905.07830).

Text and scores are those of lm-evaluation-harness 0.4.13 with no examples in the prompt: acc by log-likelihood,
acc_norm by log-likelihood per character of the ending, acc_bytes per UTF-8 byte. 10,042 examples: the standard error is
half a point.
"""

import re
from typing import Any

from evals.common import FileFlags, LanguageModel, Metric, read_examples, run_command
from evals.multiple_choice import Choice, accuracies, question


def clean(text: str) -> str:
    """Text without the marks of its WikiHow part."""
    return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")


def convert(row: dict[str, Any]) -> Choice:
    """An example of the published fields, or of those made of them: query, choices, gold."""
    if "query" in row:
        return question(row["query"], row["choices"], row["gold"])
    query = f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"
    return question(clean(query), [clean(ending) for ending in row["endings"]], int(row["label"]))


def evaluate(lm: LanguageModel, args: FileFlags) -> dict[str, Metric]:
    examples = read_examples(convert, args.file, ("Rowan/hellaswag", None, "validation"), args.limit)
    return accuracies(lm, args, "hellaswag", examples)


if __name__ == "__main__":
    run_command(FileFlags, evaluate, __doc__)
