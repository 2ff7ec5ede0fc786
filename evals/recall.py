"""Recall from the prompt: `python -m evals.recall --task swde CHECKPOINT` (arXiv 2402.18668).

swde and fda: a web page or document, then "Key:"; the value stood in it. squad: a passage, then a question or the
beginning of a sentence that answers it. Greedy, 48 tokens at most, up to the first line break; right if the text holds
an answer, in whatever case. Two prompt formats are published, whose numbers differ:

hazy    prefix-linear-attention, the harness of the authors: the page is cut to context_length - 50 tokens around the
        first mention of key or value, SWDE loses its summary, and the key follows on the page's last line.
lmeval  lm-evaluation-harness 0.4.13: the text as it is in the dataset, which ends with the key.
"""

import dataclasses
import re
from typing import Any, Literal

import numpy as np

from evals.common import FileFlags, InputError, LanguageModel, Metric, Results, generations, read_examples, run_command

SUMMARY = "Summary of information above..."
MAX_TOKENS = 48
ANSWER_TOKENS = 50  # that the hazy format leaves room for
HUB = {"swde": "hazyresearch/based-swde-v2", "fda": "hazyresearch/based-fda", "squad": "hazyresearch/based-squad"}


@dataclasses.dataclass
class Args(FileFlags):
    """How often a value from the prompt is in what the model goes on with."""

    task: Literal["swde", "fda", "squad"] = "swde"
    """Which examples."""
    format: Literal["hazy", "lmeval"] = "hazy"
    """Prompt format of swde and fda."""
    context_length: int = 2048
    """Tokens of prompt and answer in the format hazy; published numbers are for 512, 1024 and 2048."""


@dataclasses.dataclass
class Page:
    """One example: a text with an answer in it, and the key that asks for it; SQuAD's text ends with its question."""

    text: str
    key: str
    answers: list[str]


def convert(row: dict[str, Any]) -> Page:
    """An example of the published fields (text, key, value), or of SQuAD's own (context, question, answers)."""
    if "value" not in row:
        answers = row["answers"]["text"] if isinstance(row["answers"], dict) else row["answers"]
        if not answers:
            raise ValueError("no answers")
        return Page(f"{row['context'].strip()}\nQuestion: {row['question'].strip()}\nAnswer:", "", answers)
    return Page(row["text"].strip(), row.get("key", ""), [row["value"].strip()])


def cut(lm: LanguageModel, pages: list[Page], context_length: int) -> list[str]:
    """The text of each page, cut to context_length - 50 tokens around the first mention of its key or value."""
    room = context_length - ANSWER_TOKENS

    def before(page: Page) -> str:
        matches = [re.search(re.escape(word), page.text, re.IGNORECASE) for word in (page.key, page.answers[0])]
        return page.text[:min((match.start() for match in matches if match), default=-1)]

    tokens = lm.encode([page.text for page in pages] + [before(page) for page in pages])
    texts = []
    for page in pages:
        position, own = len(tokens[before(page)]), tokens[page.text]
        start = max(0, position - room // 2)
        texts.append(lm.decode(own[start:start + room]))  # as published, this also shortens a page that would fit
    return texts


def hazy_prompt(task: str, text: str, key: str) -> str:
    if task == "swde":
        text = text.split(SUMMARY)[0]
    while text.lower().endswith(f"{key}:".lower()):
        text = text[:-len(key) - 1]
    text = text.strip("\n").strip().strip("\n").strip() if task == "swde" else text.strip("\n")
    return f"{text.strip('.')}. {key[0].upper()}{key[1:]}:"


def lmeval_prompt(task: str, page: Page) -> str:
    """The text as it is; where it does not end with its key, as in pages of another source, an end like SWDE's."""
    if task == "squad" or page.text.endswith(f"{page.key}:"):
        return page.text
    return f"{page.text}\n\n{SUMMARY}\n{page.key}:" if task == "swde" else f"{page.text}\n{page.key}:"


def contains(text: str, answers: list[str]) -> bool:
    return any(re.search(re.escape(answer), text, re.IGNORECASE) for answer in answers)


def evaluate(lm: LanguageModel, args: Args) -> dict[str, Metric]:
    """contains, and the same apart for prompts up to and beyond the length of the documents in training."""
    if args.context_length <= ANSWER_TOKENS:
        raise InputError(f"--context-length {args.context_length} leaves no room beside the answer's {ANSWER_TOKENS}")
    pages = read_examples(convert, args.file, (HUB[args.task], None, "validation"), args.limit)
    if args.task != "squad":
        if not all(page.key for page in pages):
            raise InputError(f'examples of --task {args.task} need the fields "text", "key" and "value"')
        if args.format == "hazy":
            pages = [page for page in pages if min(len(page.key), len(page.answers[0])) > 1]
    if args.task == "squad" or args.format == "lmeval":
        texts = [lmeval_prompt(args.task, page) for page in pages]
    else:
        texts = cut(lm, pages, args.context_length)
        texts = [hazy_prompt(args.task, text, page.key) for text, page in zip(texts, pages)]
    prompts = lm.encode_prompts(texts)
    name = args.task if args.task == "squad" else f"{args.task}_{args.format}"
    written = generations(lm, prompts, Results(args.out, name, lm, texts), MAX_TOKENS, ["\n"])
    right = np.array([contains(text, page.answers) for text, page in zip(written, pages)], np.float64)
    beyond = np.array([len(prompt) > lm.about["train_tokens"] for prompt in prompts])
    metrics = {"contains": Metric(right)}
    if beyond.any() and not beyond.all():
        metrics |= {"contains, prompts within the training length": Metric(right[~beyond]),
                    "contains, prompts beyond the training length": Metric(right[beyond])}
    return metrics


if __name__ == "__main__":
    run_command(Args, evaluate, __doc__)
