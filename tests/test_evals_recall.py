"""Tests of the evaluations of recall: an oracle that copies is always right, a uniform model is at chance."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from evals import common, mqar, niah, position_loss, recall

CPU = torch.device("cpu")
BYTES = {"name": "tiny", "tokenizer": "bytes", "vocab_size": 257, "document_separator": 256}
GPT2 = {"name": "tiny", "tokenizer": "gpt2", "vocab_size": 50257, "document_separator": 50256}
# keys stand at the beginning of a line and within one, which are different tokens of GPT-2
BOOK = "Home\nShop\nAuthor: Ada Lovelace\nYear: 1843\nOf the Author: Ada Lovelace\nOf the Year: 1843\nPrice: free\n"
PAGES = [
    {"key": "Author", "value": "Ada Lovelace", "text": BOOK},
    {"key": "Year", "value": "1843", "text": BOOK},
    {"key": "price", "value": "3 pounds", "text": "price: 3 pounds\nNow Price: 3 pounds\n" + "A long text. " * 10},
]
SQUAD = [
    {"title": "Tea", "context": "Tea is grown in Assam.\nAnswer: Assam\n", "question": "Where is tea grown?",
     "answers": ["India", "Assam"]},
]


class Oracle:
    """The contract of a model. It says what followed the longest copy of the document's last tokens, up to 24."""

    def __init__(self, vocab_size: int):
        self.vocab_size = vocab_size

    def hidden(self, tokens: Tensor, cu_seqlens: Tensor, stage) -> tuple[Tensor, Tensor]:
        chosen = []
        for start, end in zip(cu_seqlens.tolist(), cu_seqlens.tolist()[1:]):
            document = tokens[start:end].numpy()
            copied = np.zeros((len(document), len(document)), int)  # length of the common end of two prefixes
            for i in range(1, len(document)):
                same = document[:i] == document[i]
                copied[i, :i] = np.where(same, 1 + np.pad(copied[i - 1], (1, 0))[:i], 0)
                copied[i, :i] = np.minimum(copied[i, :i], 24)
            chosen += [int(document[copied[i, :i].argmax() + 1]) if copied[i, :i].any() else 0
                       for i in range(len(document))]
        return torch.tensor(chosen)[:, None], torch.arange(len(tokens))

    def logits(self, x: Tensor) -> Tensor:
        return 50 * torch.nn.functional.one_hot(x[:, 0], self.vocab_size + 7).float()  # as if padded


class Uniform(Oracle):
    def hidden(self, tokens: Tensor, cu_seqlens: Tensor, stage) -> tuple[Tensor, Tensor]:
        return torch.zeros(len(tokens), 1), torch.arange(len(tokens))

    def logits(self, x: Tensor) -> Tensor:
        return torch.zeros(len(x), self.vocab_size)


def language_model(kind: type, dataset: dict = BYTES, **options) -> common.LanguageModel:
    about = {"identity": kind.__name__, "train_tokens": 512}
    return common.LanguageModel(kind(dataset["vocab_size"]), lambda bound: None, dataset, about, CPU, **options)


def write_lines(path: Path, rows: list) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def haystack(tmp_path, write_folder) -> Path:
    """Text without repeats that could mislead a copier."""
    rng = np.random.default_rng(0)
    document = [256, *rng.integers(128, 256, 3000).tolist()]
    return write_folder(tmp_path / "shards", [document], [document], **BYTES)


@pytest.mark.parametrize("dataset", [BYTES, GPT2], ids=["bytes", "gpt2"])
@pytest.mark.parametrize("task, form", [("swde", "hazy"), ("swde", "lmeval"), ("fda", "hazy"), ("fda", "lmeval"),
                                        ("squad", "lmeval")])
def test_the_oracle_recalls_everything_and_a_uniform_model_nothing(tmp_path, dataset, task, form):
    file = write_lines(tmp_path / "pages.jsonl", SQUAD if task == "squad" else PAGES)
    args = recall.Args((), file=file, out=tmp_path, task=task, format=form)
    assert recall.evaluate(language_model(Oracle, dataset), args)["contains"].value == 1
    assert recall.evaluate(language_model(Uniform, dataset), args)["contains"].value == 0


def test_prompts_of_both_formats():
    text = "Home\nAuthor: Ada\n\nSummary of information above...\nyear: 1843\nauthor:"
    assert recall.hazy_prompt("swde", text, "author") == "Home\nAuthor: Ada. Author:"
    assert recall.hazy_prompt("fda", "A device. \nname:Name:", "name") == "A device. . Name:"
    assert recall.hazy_prompt("fda", "A device.\nname:", "name") == "A device. Name:"
    page = recall.convert({"text": f" {text}\n", "key": "author", "value": " Ada "})
    assert page.answers == ["Ada"] and recall.lmeval_prompt("swde", page) == text
    page.text = "Home"
    assert recall.lmeval_prompt("swde", page) == "Home\n\nSummary of information above...\nauthor:"
    assert recall.lmeval_prompt("fda", page) == "Home\nauthor:"
    hub = recall.convert({"text": "Tea grows in", "value": "Assam", "question": "Where?", "key": "x"})
    assert recall.lmeval_prompt("squad", hub) == "Tea grows in"


def test_contains_ignores_case_and_takes_any_answer():
    assert recall.contains("it was ADA (1843).", ["nobody", "Ada (1843)"])
    assert not recall.contains("Ada x1843)", ["Ada (1843)"])


def test_long_pages_are_cut_around_the_first_mention():
    lm = language_model(Oracle)
    text = "a" * 300 + "Key" + "b" * 100 + "value" + "c" * 300
    (short,) = recall.cut(lm, [recall.Page(text, "key", ["value"])], 150)
    assert short == "a" * 50 + "Key" + "b" * 47  # 100 tokens, half of them before the key
    (short,) = recall.cut(lm, [recall.Page("a" * 90 + "key", "key", ["value"])], 150)
    assert short == "a" * 50 + "key"  # as published: cut in front though all of it would fit
    assert recall.cut(lm, [recall.Page("key" + "a" * 200, "key", ["value"])], 150) == ["key" + "a" * 97]


def test_short_keys_are_left_out_and_long_prompts_counted_apart(tmp_path):
    rows = [*PAGES, {"key": "N", "value": "three", "text": "N: three"}]
    file = write_lines(tmp_path / "pages.jsonl", rows)
    lm = language_model(Oracle)
    lm.about["train_tokens"] = 140
    metrics = recall.evaluate(lm, recall.Args((), file=file, out=tmp_path))
    assert {name: len(metric.values) for name, metric in metrics.items()} == {
        "contains": 3, "contains, prompts within the training length": 2,
        "contains, prompts beyond the training length": 1}


def niah_args(tmp_path, shards, **changes) -> niah.Args:
    args = niah.Args((), out=tmp_path, haystack=shards, lengths=(256, 512), depths=(0, 50, 100), trials=2)
    return dataclasses.replace(args, **changes)


def test_needles(tmp_path, haystack):
    args = niah_args(tmp_path, haystack)
    metrics = niah.evaluate(language_model(Oracle), args)
    assert len(metrics) == 2 + 2 * 3 and all(metric.value == 1 for metric in metrics.values())
    chance = niah.evaluate(language_model(Uniform), args)
    assert all(metric.value == 0 for metric in chance.values())


def test_needle_prompts(tmp_path, haystack):
    lm = language_model(Oracle)
    text = np.concatenate(common.shard_documents(haystack, lm)).astype(np.int64)
    prompts, numbers = niah.build_prompts(lm, text, niah_args(tmp_path, haystack))
    places = []
    for i, (prompt, number) in enumerate(zip(prompts, numbers)):
        shown = bytes(prompt.astype(np.uint8)).decode(errors="replace")
        assert len(prompt) == (256, 512)[i // 6] and len(number) == 7
        assert shown.startswith("<context>\n") and shown.endswith(" number is:") and shown.count(number) == 1
        places.append(bytes(prompt.astype(np.uint8)).index(b"\nThe special magic"))
    assert places[:2] == [10, 10] and 30 <= places[2] <= 90 and places[4] > 90  # depths 0, 50 and 100
    again, _ = niah.build_prompts(lm, text, niah_args(tmp_path, haystack))
    assert all(np.array_equal(*pair) for pair in zip(prompts, again))


@pytest.mark.parametrize("changes", [{"haystack": None}, {"haystack": Path("nowhere")}, {"lengths": (50,)},
                                     {"lengths": (10_000,)}, {"depths": (101,)}])
def test_needles_without_what_they_need(tmp_path, haystack, changes):
    with pytest.raises(common.InputError):
        niah.evaluate(language_model(Oracle), niah_args(tmp_path, haystack, **changes))


@pytest.mark.parametrize("bos", [False, True])
def test_associative_recall(tmp_path, bos):
    args = mqar.Args((), out=tmp_path, pairs=(2, 8), length=64, examples=4)
    metrics = mqar.evaluate(language_model(Oracle, bos=bos), args)
    assert {name: len(metric.values) for name, metric in metrics.items()} == {"2 pairs": 8, "8 pairs": 32}
    assert all(metric.value == 1 for metric in metrics.values())
    assert all(metric.value <= 0.2 for metric in mqar.evaluate(language_model(Uniform), args).values())
    with pytest.raises(common.InputError, match="length"):
        mqar.evaluate(language_model(Oracle), dataclasses.replace(args, pairs=(64,)))


def test_associative_recall_sequences():
    args = mqar.Args((), pairs=(8,), length=64)
    tokens, places = mqar.build(language_model(Oracle), 8, args, np.random.default_rng(0))
    pairs = dict(zip(tokens[:16:2], tokens[1:16:2]))
    assert len(pairs) == 8 and len(places) == 8 and places.min() > 16 and 256 not in tokens
    assert sorted(tokens[places - 1]) == sorted(pairs) and all(pairs[tokens[i - 1]] == tokens[i] for i in places)


def test_loss_by_position(tmp_path, write_folder):
    """A copier's loss on a document that repeats itself is that of a uniform choice, near its start, and then zero."""
    rng = np.random.default_rng(0)
    documents = [[256, *np.tile(rng.permutation(250), 10)[:length]] for length in (1300, 1500, 100, 1400)]
    folder = write_folder(tmp_path / "shards", [sum(documents, [])], [sum(documents, [])], **BYTES)
    args = position_loss.Args((), out=tmp_path, data=folder, length=1300)
    oracle = position_loss.evaluate(language_model(Oracle), args)
    uniform = position_loss.evaluate(language_model(Uniform), args)
    assert [len(metric.values) for metric in oracle.values()] == [3] * 3  # one document is too short
    assert list(oracle) == ["all positions", "positions 0-1023", "positions 1024-1299"]
    assert oracle["positions 1024-1299"].value < 1e-6 < 1 < oracle["positions 0-1023"].value
    assert all(metric.value == pytest.approx(np.log(257)) for metric in uniform.values())
    mean, error = oracle["positions 1024-1299"].difference(uniform["positions 1024-1299"])
    assert mean == pytest.approx(-np.log(257)) and error < 1e-6
    about = language_model(Oracle).about
    runs = {"oracle": (about, oracle), "uniform": (about, uniform)}
    report = common.report_run("uniform", runs)
    assert report["difference_to_first"]["positions 1024-1299"]["mean"] == -mean
    for changes in ({"length": 2000}, {"data": None}, {"data": Path("nowhere")}):
        with pytest.raises(common.InputError):
            position_loss.evaluate(language_model(Oracle), dataclasses.replace(args, **changes))


def test_shards_of_another_tokenizer_are_refused(haystack):
    with pytest.raises(common.InputError, match="tokenizer"):
        common.shard_documents(haystack, language_model(Oracle, GPT2))


def test_chance_on_multiple_choice(tmp_path):
    """A uniform model's log-likelihood is -log(vocabulary) a token."""
    lm = language_model(Uniform)
    pairs = [("Question", " four"), ("", "x")]
    scores = common.log_likelihoods(lm, pairs, common.Results(tmp_path, "task", lm, pairs))
    assert scores[:, 0] == pytest.approx([-5 * np.log(257), -np.log(257)])
