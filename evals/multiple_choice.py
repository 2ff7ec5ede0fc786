"""Multiple choice by likelihood: `python -m evals.multiple_choice --task piqa CHECKPOINT`.

PIQA, ARC easy and challenge, OpenBookQA and WinoGrande with no examples in the prompt, in the formats of
lm-evaluation-harness 0.4.13. The answer is the choice with the highest log-likelihood (acc), or the highest per
character (acc_norm) or UTF-8 byte (acc_bytes) of the choice. WinoGrande's choices are contexts of one continuation.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import numpy as np

from evals.common import FileFlags, LanguageModel, Metric, Results, log_likelihoods, read_examples, run_command


@dataclasses.dataclass
class Choice:
    """One example: (context, continuation) for each choice, the index of the right one, and the choices' texts, whose
    lengths normalise; None where lengths say nothing."""

    pairs: list[tuple[str, str]]
    gold: int
    texts: list[str] | None

    def __post_init__(self):
        if not 0 <= self.gold < len(self.pairs):
            raise ValueError(f"the right one of {len(self.pairs)} choices is said to be {self.gold}")


def question(query: str, choices: list[str], gold: int) -> Choice:
    return Choice([(query, " " + choice) for choice in choices], gold, choices)


def prompt(query: str) -> str:
    """A question as lm-evaluation-harness asks it, from one with or without its "Question:" and "Answer:"."""
    query = query.strip().removeprefix("Question:").removesuffix("Answer:").strip()
    return f"Question: {query}\nAnswer:"


def piqa(row: dict[str, Any]) -> Choice:
    if "query" in row:
        return question(prompt(row["query"]), row["choices"], row["gold"])
    return question(f"Question: {row['goal']}\nAnswer:", [row["sol1"], row["sol2"]], row["label"])


def arc(row: dict[str, Any]) -> Choice:
    if "query" in row:
        return question(prompt(row["query"]), row["choices"], row["gold"])
    gold = row["choices"]["label"].index(row["answerKey"])
    return question(f"Question: {row['question']}\nAnswer:", row["choices"]["text"], gold)


def openbook_qa(row: dict[str, Any]) -> Choice:
    if "query" in row:
        return question(row["query"], row["choices"], row["gold"])
    gold = row["choices"]["label"].index(row["answerKey"].strip())
    return question(row["question_stem"], row["choices"]["text"], gold)


def winogrande(row: dict[str, Any]) -> Choice:
    if "context_options" in row:
        contexts, rest, gold = row["context_options"], row["continuation"], row["gold"]
    else:
        before, rest = row["sentence"].split("_", 1)
        contexts, gold = [before + row["option1"], before + row["option2"]], int(row["answer"]) - 1
    return Choice([(context, " " + rest.strip()) for context in contexts], gold, None)


TASKS: dict[str, tuple[Callable[[dict[str, Any]], Choice], tuple[str, str | None, str]]] = {
    "piqa": (piqa, ("baber/piqa", None, "validation")),
    "arc_easy": (arc, ("allenai/ai2_arc", "ARC-Easy", "test")),
    "arc_challenge": (arc, ("allenai/ai2_arc", "ARC-Challenge", "test")),
    "openbook_qa": (openbook_qa, ("allenai/openbookqa", "main", "test")),
    "winogrande": (winogrande, ("allenai/winogrande", "winogrande_xl", "validation")),
}


@dataclasses.dataclass
class Args(FileFlags):
    """Accuracy on multiple-choice questions, from likelihoods."""

    task: Literal["piqa", "arc_easy", "arc_challenge", "openbook_qa", "winogrande"] = "piqa"
    """Which questions."""


def accuracies(lm: LanguageModel, args: FileFlags, task: str, examples: list[Choice]) -> dict[str, Metric]:
    """acc and, where the choices' lengths differ, acc_norm and acc_bytes; ties go to the first choice."""
    pairs = [pair for example in examples for pair in example.pairs]
    scores = log_likelihoods(lm, pairs, Results(args.out, task, lm, pairs))[:, 0]
    by_example = np.split(scores, np.cumsum([len(example.pairs) for example in examples])[:-1])
    lengths = {"acc": lambda text: 1, "acc_norm": len, "acc_bytes": lambda text: len(text.encode())}

    def accuracy(length: Callable[[Any], int]) -> Metric:
        chosen = [np.argmax(own / [float(length(text)) for text in example.texts or example.pairs])
                  for own, example in zip(by_example, examples)]
        return Metric(np.array([choice == example.gold for choice, example in zip(chosen, examples)], np.float64))

    return {name: accuracy(lengths[name]) for name in (lengths if examples[0].texts else ["acc"])}


def evaluate(lm: LanguageModel, args: Args) -> dict[str, Metric]:
    convert, hub = TASKS[args.task]
    return accuracies(lm, args, args.task, read_examples(convert, args.file, hub, args.limit))


if __name__ == "__main__":
    run_command(Args, evaluate, __doc__)
