"""Tests of evals/common.py and of the evaluations by likelihood, on tiny models with random weights."""

import dataclasses
import json
import lzma
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import train_gpt as gpt
from evals import common, hellaswag, lambada, multiple_choice
from evals import sample as sample_program

REPOSITORY = Path(gpt.__file__).parent
CPU = torch.device("cpu")
BYTES = {"name": "tiny", "tokenizer": "bytes", "vocab_size": 257, "document_separator": 256}
GPT2 = {"name": "tiny", "tokenizer": "gpt2", "vocab_size": 50257, "document_separator": 50256}

HELLASWAG = [
    {"activity_label": "Washing a window", "ctx_a": "[header] How to wash [title] A man fills a bucket.", "ctx_b": "he",
     "endings": ["dips a cloth  into it.", "sails away in it [step] at night.", "Paints — a café.", "sings to it."],
     "label": "0"},
    {"activity_label": "Baking", "ctx_a": "A girl cracks two eggs over a bowl.", "ctx_b": "",
     "endings": ["She whisks them.", "She rows them over to the far shore.", "She is an egg.", "It rains eggs."],
     "label": "0"},
    {"activity_label": "Chess", "ctx_a": "Two players sit down. One of them", "ctx_b": "then",
     "endings": ["eats the board.", "moves a pawn.", "moves a pawn to the fourth row of the board.", "melts."],
     "label": "2"},
]
LAMBADA = [
    {"text": "The dog ran after the ball, and when it came back, the ball was in the mouth of the dog"},
    {"text": "\"Open the gate,\" said Anna. Nobody moved. So it was left to Tom to go and open the gate"},
    {"text": "He had one wish: a ship. He drew ships, dreamt of ships, and one day he would build a ship"},
]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def tiny_args() -> gpt.Hyperparameters:
    return dataclasses.replace(gpt.PRESETS["sample"], layers="sev= le -e levh", model_dim=32, num_heads=2,
                               val_windows=(16, 48), bigram_rows=301, tied_until=0.5)


def random_model(args: gpt.Hyperparameters, vocab_size: int) -> gpt.Model:
    """A model in which everything has an effect, and whose predictions vary."""
    model = gpt.Model(args, vocab_size, CPU, torch.float32)
    torch.manual_seed(1)
    with torch.no_grad():
        for param in model.parameters():
            std = 1 / math.sqrt(param.size(-1)) if param.ndim > 1 else 0.5
            param.copy_(std * torch.randn(param.shape) + (1 if param.ndim == 0 else 0))
        model.head.mul_(8)
    return model


def language_model(dataset=BYTES, **options) -> common.LanguageModel:
    args = tiny_args()
    model = random_model(args, dataset["vocab_size"])
    gpt.choose_attention("reference", CPU)

    def stage(bound):
        args.val_row_tokens = bound
        return model.stage_inputs(3, validation=True)
    return common.LanguageModel(model, stage, dataset, {"identity": "random"}, CPU, **options)


@pytest.fixture(scope="module", params=[BYTES, GPT2], ids=["bytes", "gpt2"])
def lm(request):
    return language_model(request.param)


def plain(args) -> dict:
    """Hyperparameters as a checkpoint has them."""
    return json.loads(json.dumps(dataclasses.asdict(args)))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """As Run.save writes it, less what an evaluation does not need."""
    args, path = tiny_args(), tmp_path_factory.mktemp("checkpoint") / "tiny.pt"
    weights = {name: param.detach() for name, param in random_model(args, 257).named_parameters()}
    torch.save({"script": "train_gpt.py", "source": Path(gpt.__file__).read_text(), "args": plain(args),
                "step": 146, "dataset": BYTES | {"fingerprint": "0"}, "model": weights}, path)
    return path


def flags(**changes) -> common.FileFlags:
    return dataclasses.replace(common.FileFlags((), device="cpu", attention="reference"), **changes)


def write_lines(path: Path, rows: list) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def words(count: int, seed: int) -> list[str]:
    """Texts of many lengths, with repeats in them, as bytes and GPT-2 tokens alike."""
    rng = np.random.default_rng(seed)
    vocabulary = ["the", "ship", "gate", "é", "opened", "42", "Anna's", "dog,"]
    return [" ".join(rng.choice(vocabulary, rng.integers(1, 40))) for _ in range(count)]


def naive_scores(lm: common.LanguageModel, tokens: np.ndarray, start: int) -> tuple[float, bool]:
    """One example alone, with the whole distribution at every position."""
    with torch.no_grad():
        x, _ = lm.model.hidden(torch.from_numpy(tokens), torch.tensor([0, len(tokens)], dtype=torch.int32),
                               lm.stage(1024))
        log_probs = lm.model.logits(x).log_softmax(1)
    targets = torch.from_numpy(tokens[start:])
    chosen = log_probs[start - 1:-1].gather(1, targets[:, None]).double().sum().item()
    return chosen, bool((log_probs[start - 1:-1, :lm.vocab_size].argmax(1) == targets).all())


def naive_generation(lm: common.LanguageModel, prompt: np.ndarray, count: int) -> np.ndarray:
    """One token at a time, one prompt alone."""
    tokens = prompt
    with torch.no_grad():
        for _ in range(count):
            borders = torch.tensor([0, len(tokens)], dtype=torch.int32)
            x, _ = lm.model.hidden(torch.from_numpy(tokens), borders, lm.stage(1024))
            tokens = np.append(tokens, lm.model.logits(x[-1:])[0, :lm.vocab_size].argmax().item())
    return tokens[len(prompt):]


# ----------------------------------------------------------------------------------------------------------------------
# Checkpoints
# ----------------------------------------------------------------------------------------------------------------------


def test_a_checkpoint_is_rebuilt_from_its_file_alone(checkpoint):
    rebuilt, original = common.load(checkpoint, flags()), language_model()
    assert rebuilt.about["train_tokens"] == 512 and rebuilt.about["script"] == "train_gpt.py"
    assert type(rebuilt.model).__module__ != gpt.__name__  # its own source, although the same script is imported here
    sequences, starts = original.encode_pairs([("A dog", " runs home"), ("", "abc")])
    wanted = [np.arange(start, len(tokens)) for start, tokens in zip(starts, sequences)]
    (ours,), (theirs,) = list(original.score(sequences, wanted)), list(rebuilt.score(sequences, wanted))
    assert all(np.array_equal(ours[i][0], theirs[i][0]) for i in ours)


@pytest.mark.parametrize("script", sorted(REPOSITORY.glob("train_*.py")), ids=lambda path: path.stem)
def test_every_script_is_evaluated_through_the_contract(script, tmp_path):
    """A small model of each script, from its checkpoint: packed scores are those of one example at a time."""
    module = common.execute(script.name, script.read_text())
    args = dataclasses.replace(module.PRESETS["sample"], bigram_rows=301)
    model = module.Model(args, 257, CPU, torch.float32)
    model.initialise(0)
    weights = {name: param.detach() + 0.02 * torch.randn(param.shape) for name, param in model.named_parameters()}
    torch.save({"script": script.name, "source": script.read_text(), "args": plain(args), "step": 10**6,
                "dataset": BYTES, "model": weights}, tmp_path / "small.pt")
    lm = common.load(tmp_path / "small.pt", flags())
    sequences, starts = lm.encode_pairs([*zip(words(4, 6), words(4, 7)), ("", "x")])
    for part in lm.score(sequences, [np.arange(start, len(tokens)) for start, tokens in zip(starts, sequences)]):
        for i, (log_probs, _) in part.items():
            alone, _ = naive_scores(lm, sequences[i], starts[i])
            assert log_probs.sum() == pytest.approx(alone, abs=1e-4)


def test_a_run_that_was_stopped_is_evaluated_in_its_stage(checkpoint, tmp_path):
    state = torch.load(checkpoint, weights_only=True)
    stages = {}
    for state["step"] in (3, 146):
        torch.save(state, tmp_path / "stopped.pt")
        stages[state["step"]] = common.load(tmp_path / "stopped.pt", flags()).stage(128)
    assert stages[3].scale < stages[146].scale and stages[3].max_seqlen == 128


def test_two_versions_of_a_script_fit_into_one_process(checkpoint, tmp_path):
    state = torch.load(checkpoint, weights_only=True)
    state["source"] += "# another version\n"
    torch.save(state, tmp_path / "other.pt")
    first, other = common.load(checkpoint, flags()), common.load(tmp_path / "other.pt", flags(trust_source=True))
    assert type(first.model) is not type(other.model)
    assert type(first.model) is type(common.load(checkpoint, flags()).model)
    assert first.about["identity"] != other.about["identity"]


def test_an_unknown_source_is_refused_before_it_runs(checkpoint, tmp_path):
    state = torch.load(checkpoint, weights_only=True)
    state["source"] = f"open({str(tmp_path / 'ran')!r}, 'w')\n"
    torch.save(state, tmp_path / "evil.pt")
    with pytest.raises(common.InputError, match="--trust-source"):
        common.load(tmp_path / "evil.pt", flags())
    assert not (tmp_path / "ran").exists()


def test_sources_of_records_are_known(tmp_path):
    (tmp_path / "records" / "a").mkdir(parents=True)
    (tmp_path / "records" / "a" / "log.txt").write_text("print(1)\n" + "=" * 100 + "\n{}\n")
    (tmp_path / "records" / "a" / "train_x.py").write_text("print(2)\n")
    (tmp_path / "records" / "a" / "notes.txt").write_text("print(3)\n")
    (tmp_path / "records" / "a" / "b.txt.xz").write_bytes(lzma.compress(b"print(4)\n" + b"=" * 100 + b"\n{}\n"))
    digests = {common.hashlib.sha256(f"print({i})\n".encode()).hexdigest() for i in (1, 2, 4)}
    assert common.known_sources(tmp_path) == digests


@pytest.mark.parametrize("spoil", ["missing", "text", "other pickle", "weights", "shape", "argument"])
def test_what_is_no_checkpoint_is_refused_in_one_line(checkpoint, tmp_path, spoil):
    path, state = tmp_path / "bad.pt", torch.load(checkpoint, weights_only=True)
    if spoil == "text":
        path.write_text("not a checkpoint")
    elif spoil == "other pickle":
        torch.save({"model": {}}, path)
    elif spoil != "missing":
        if spoil == "weights":
            del state["model"]["embedding"]
        elif spoil == "shape":
            state["model"]["embedding"] = torch.zeros(2, 2)
        else:
            state["args"]["new_flag"] = 1
        torch.save(state, path)
    with pytest.raises(common.InputError) as refused:
        common.load(path, flags())
    assert "\n" not in str(refused.value) and str(path) in str(refused.value)


# ----------------------------------------------------------------------------------------------------------------------
# Scoring and generation
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("pack_tokens", [64, 4096])
def test_packed_scores_are_those_of_one_example_at_a_time(lm, bos, pack_tokens):
    lm = language_model(lm.dataset, bos=bos, pack_tokens=pack_tokens)
    pairs = [*zip(words(12, 0), [" " + text for text in words(12, 1)]), ("", "no context"), ("ends with spaces  ", "x")]
    sequences, starts = lm.encode_pairs(pairs)
    scores = {}
    for part in lm.score(sequences, [np.arange(start, len(tokens)) for start, tokens in zip(starts, sequences)]):
        scores |= part
    assert sorted(scores) == list(range(len(pairs)))
    for i, (tokens, start) in enumerate(zip(sequences, starts)):
        assert (tokens[0] == lm.separator) == (bos or not pairs[i][0])
        log_prob, greedy = naive_scores(lm, tokens, start)
        assert scores[i][0].sum() == pytest.approx(log_prob, abs=1e-4)
        assert scores[i][1].all() == greedy


def test_pairs_are_split_as_the_harness_does(lm):
    (tokens,), (start,) = lm.encode_pairs([("He said  ", "yes")])
    assert lm.decode(tokens[:start]) == "He said" and lm.decode(tokens[start:]) == "  yes"
    with pytest.raises(common.InputError, match="empty"):
        lm.encode_pairs([("He said", "")])


@pytest.mark.parametrize("pack_tokens", [96, 4096])
def test_packed_generation_is_that_of_one_prompt_and_token_at_a_time(lm, pack_tokens):
    lm = language_model(lm.dataset, pack_tokens=pack_tokens)
    prompts, count = lm.encode_prompts(words(9, 2)), 24
    texts = {}
    for part in lm.generate(prompts, count):
        texts |= part
    for i, prompt in enumerate(prompts):
        alone = naive_generation(lm, prompt, count)
        ended = np.flatnonzero(alone == lm.separator)
        assert texts[i] == lm.decode(alone[:ended[0]] if len(ended) else alone)


def test_generation_stops_at_strings_and_at_the_separator(lm):
    prompts = lm.encode_prompts(words(6, 3))
    whole = dict(pair for part in lm.generate(prompts, 24) for pair in part.items())
    stop = whole[0][3:5]
    cut = dict(pair for part in lm.generate(prompts, 24, [stop, "never"]) for pair in part.items())
    assert cut == {i: text.split(stop)[0] for i, text in whole.items()}


def test_guesses_need_few_passes_where_a_text_repeats():
    assert common.guess(np.array([5, 1, 2, 3, 9, 8, 7, 1, 2, 3])).tolist()[:4] == [9, 8, 7, 1]
    assert common.guess(np.array([7, 8, 9, 8, 9])).tolist() == [8, 9] * 4  # a loop goes round
    assert common.guess(np.array([1, 2, 3])).tolist() == []
    assert common.guess(np.array([1])).tolist() == []


def test_packs_are_full_and_hold_everything_once():
    lengths = [5, 100, 7, 7, 30, 1, 60]
    packs = list(common.packs(lengths, 64))
    assert sorted(sum(packs, [])) == list(range(7)) and packs[0] == [1]
    assert all(sum(lengths[i] for i in pack) <= 64 for pack in packs[1:]) and len(packs) == 3


def test_scores_add_up_to_the_loss_of_the_script(lm):
    """On one packed row, the mean negative log-probability is what validation in the script gives."""
    tokens = [np.concatenate([[lm.separator], part]) for part in lm.encode(words(5, 5)).values()]
    total = sum(-log_probs.sum() for part in lm.score(tokens, [np.arange(1, len(part)) for part in tokens])
                for log_probs, _ in part.values())
    row = torch.from_numpy(np.concatenate([part[:-1] for part in tokens]))
    targets = torch.from_numpy(np.concatenate([part[1:] for part in tokens]))
    borders = torch.tensor(np.cumsum([0, *(len(part) - 1 for part in tokens)]), dtype=torch.int32)
    with torch.no_grad():
        loss = lm.model(row, targets, borders, lm.stage(1024))
    assert total == pytest.approx(loss.item(), rel=1e-6)


# ----------------------------------------------------------------------------------------------------------------------
# Results, examples, metrics
# ----------------------------------------------------------------------------------------------------------------------


def test_a_killed_evaluation_goes_on(tmp_path):
    lm = language_model(pack_tokens=64)
    pairs = [(text, " and so on") for text in words(10, 4)]
    whole = common.log_likelihoods(lm, pairs, common.Results(tmp_path / "whole", "task", lm, pairs))
    results = common.Results(tmp_path, "task", lm, pairs)
    lines = next((tmp_path / "whole").glob("*")).read_bytes().splitlines(keepends=True)
    results.file.write(b"".join(lines[1:4]) + lines[4][:7])  # killed in the middle of a line
    results.file.close()
    scored = []
    lm.score = lambda sequences, wanted: scored.append(len(sequences)) or type(lm).score(lm, sequences, wanted)
    again = common.log_likelihoods(lm, pairs, common.Results(tmp_path, "task", lm, pairs))
    assert scored == [7] and np.allclose(again, whole, atol=1e-4) and np.array_equal(again[:3, 1], whole[:3, 1])
    common.log_likelihoods(lm, pairs, common.Results(tmp_path, "task", lm, pairs))
    assert scored == [7]  # all was there
    common.log_likelihoods(lm, pairs[:5], common.Results(tmp_path, "task", lm, pairs[:5]))
    assert scored == [7, 5]  # other examples


@pytest.mark.parametrize("text", ["", "{", '{"context": "no continuation"}', '{"text": "word"}'])
def test_bad_examples_are_refused_in_one_line(tmp_path, text):
    path = tmp_path / "bad.jsonl"
    path.write_text(text)
    with pytest.raises(common.InputError, match="bad.jsonl"):
        common.read_examples(lambada.convert, path, None)


def test_intervals():
    low, high = common.Metric(np.array([1.0] * 50 + [0.0] * 50)).interval()
    assert (low, high) == (pytest.approx(0.4038, abs=1e-4), pytest.approx(0.5962, abs=1e-4))  # Wilson, tabulated
    assert common.Metric(np.zeros(10)).interval() == (0.0, pytest.approx(0.2775, abs=1e-4))
    loss = common.Metric(np.array([1.0, 2.0, 3.0]), "perplexity")
    assert loss.value == pytest.approx(math.exp(2)) and loss.interval()[0] < loss.value < loss.interval()[1]
    assert common.Metric(np.array([1.0, 0.0, 1.0])).difference(common.Metric(np.array([0.0, 0.0, 0.0]))) == (
        pytest.approx(2 / 3), pytest.approx(1 / 3))


# ----------------------------------------------------------------------------------------------------------------------
# HellaSwag, LAMBADA, multiple choice
# ----------------------------------------------------------------------------------------------------------------------


def test_hellaswag_text():
    example = hellaswag.convert(HELLASWAG[0])
    assert example.pairs[0] == ("Washing a window: How to wash. A man fills a bucket. He", " dips a cloth into it.")
    prepared = {"query": example.pairs[0][0], "choices": example.texts, "gold": example.gold}
    assert hellaswag.convert(prepared) == example


def test_multiple_choice_formats():
    gold = multiple_choice.question("Question: Why?\nAnswer:", ["a", "b"], 1)
    assert multiple_choice.piqa({"goal": "Why?", "sol1": "a", "sol2": "b", "label": 1}) == gold
    assert multiple_choice.piqa({"query": "Question: Why?\n", "choices": ["a", "b"], "gold": 1}) == gold
    arc = {"question": "Why?", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": "B"}
    assert multiple_choice.arc(arc) == gold
    assert multiple_choice.arc({"query": "Question: Why?", "choices": ["a", "b"], "gold": 1}) == gold
    book = {"question_stem": "Fog is", "choices": arc["choices"], "answerKey": "B"}
    assert multiple_choice.openbook_qa(book).pairs == [("Fog is", " a"), ("Fog is", " b")]
    sentence = {"sentence": "Ann met Sue because _ was late.", "option1": "Ann", "option2": "Sue", "answer": "2"}
    options = {"context_options": ["Ann met Sue because Ann", "Ann met Sue because Sue"],
               "continuation": "was late.", "gold": 1}
    assert multiple_choice.winogrande(sentence) == multiple_choice.winogrande(options)
    assert multiple_choice.winogrande(options).pairs[1] == ("Ann met Sue because Sue", " was late.")
    with pytest.raises(ValueError):
        multiple_choice.piqa({"query": "Why?", "choices": ["a", "b"], "gold": 2})


def test_normalised_accuracies(tmp_path, monkeypatch):
    """acc, acc_norm and acc_bytes each choose another ending of log-likelihoods made for it."""
    examples = [multiple_choice.question("q", ["no", "four", "ééé"], gold) for gold in (0, 1, 2)]
    scores = np.array([[-2.0, -3.0, -2.5]] * 3).reshape(-1, 1)  # per character -1, -3/4, -5/6; per byte -1, -3/4, -5/12
    monkeypatch.setattr(multiple_choice, "log_likelihoods", lambda lm, pairs, results: scores)
    metrics = multiple_choice.accuracies(language_model(), flags(out=tmp_path), "piqa", examples)
    assert {name: metric.values.tolist() for name, metric in metrics.items()} == {
        "acc": [1, 0, 0], "acc_norm": [0, 1, 0], "acc_bytes": [0, 0, 1]}


def test_a_command(checkpoint, tmp_path):
    file = write_lines(tmp_path / "lambada.jsonl", LAMBADA)
    command = [sys.executable, "-m", "evals.lambada", str(checkpoint), "--out", str(tmp_path), "--file", str(file)]
    run = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    line = json.loads(run.stdout)
    assert line["metrics"]["acc"]["n"] == 3 and line["metrics"]["perplexity"]["value"] > 1


@pytest.mark.parametrize("wrong", [["missing.pt"], [], ["CHECKPOINT", "--file", "missing.jsonl"],
                                   ["CHECKPOINT", "--limit", "-1"], ["CHECKPOINT", "--attention", "none"]])
def test_a_wrong_command_ends_in_one_line_and_exit_code_2(checkpoint, tmp_path, monkeypatch, capsys, wrong):
    words = [str(checkpoint) if word == "CHECKPOINT" else word for word in wrong]
    monkeypatch.setattr(sys, "argv", ["lambada.py", *words, "--out", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        common.run_command(common.FileFlags, lambada.evaluate, lambada.__doc__)
    out, err = capsys.readouterr()
    assert ended.value.code == 2 and out == "" and err.startswith("lambada.py: ") and err.count("\n") == 1


def test_examples_that_no_hub_gives(monkeypatch):
    """No package, no network, no dataset: the line says what to do."""
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(common.InputError, match="--file FILE.jsonl"):
        common.read_examples(lambada.convert, None, ("EleutherAI/lambada_openai", "default", "test"))


# ----------------------------------------------------------------------------------------------------------------------
# Text from the model
# ----------------------------------------------------------------------------------------------------------------------


def naive_sample(lm: common.LanguageModel, prompt: str, count: int, temperature: float, seed: int) -> str:
    """One token at a time, without packs."""
    tokens = start = lm.encode_prompts([prompt])[0]
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        borders = torch.tensor([0, len(tokens)], dtype=torch.int32)
        with torch.no_grad():
            logits = lm.model.logits(lm.model.hidden(torch.from_numpy(tokens), borders, lm.stage(1024))[0][-1:])
        probs = (logits[0, :lm.vocab_size] / temperature).softmax(0)
        tokens = np.append(tokens, torch.multinomial(probs, 1, generator=generator))
    return prompt + lm.decode(tokens[len(start):])


@pytest.mark.parametrize("prompt", ["", "The dog é", "ship " * 20])
def test_a_sample_is_drawn_from_what_the_model_says_after_the_prompt(lm, prompt):
    drawn = [sample_program.sample(lm, sample_program.Args((), prompt=prompt, length=12, temperature=t, seed=seed))
             for t, seed in ((0.8, 3), (0.8, 3), (0.8, 4), (5.0, 3))]
    assert drawn[0] == drawn[1] and len(set(drawn)) == 3
    assert all(text.startswith(prompt) and 0 < len(text) - len(prompt) <= 12 for text in drawn)
    assert all(naive_sample(lm, prompt, 12, t, seed).startswith(text)
               for text, t, seed in zip(drawn[1:], (0.8, 0.8, 5.0), (3, 4, 3)))


def test_a_sample_of_no_temperature_is_what_is_most_likely():
    lm = language_model()
    text = sample_program.sample(lm, sample_program.Args((), prompt="The gate", length=10, temperature=1e-4))
    tokens = naive_generation(lm, lm.encode_prompts(["The gate"])[0], 10)
    assert ("The gate" + lm.decode(tokens)).startswith(text) and len(text) > len("The gate")


def test_the_sample_s_command(checkpoint):
    command = [sys.executable, "-m", "evals.sample", str(checkpoint), "--prompt", "A ship", "--length", "7"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    expected = sample_program.sample(common.load(checkpoint, flags()),
                                     sample_program.Args((), prompt="A ship", length=7))
    assert done.returncode == 0 and done.stdout == expected + "\n", done.stderr


@pytest.mark.parametrize("wrong, message", [
    (["missing.pt"], "no such file"), ([], "give a checkpoint"), (["CHECKPOINT", "--length", "0"], "--length"),
    (["CHECKPOINT", "--temperature", "0"], "--temperature"), (["CHECKPOINT", "--limit", "1"], "nrecognized")])
def test_a_wrong_command_of_the_sample_ends_with_exit_code_2(checkpoint, monkeypatch, capsys, wrong, message):
    words = [str(checkpoint) if word == "CHECKPOINT" else word for word in wrong]
    monkeypatch.setattr(sys, "argv", ["sample.py", *words])
    with pytest.raises(SystemExit) as ended:
        sample_program.main()
    out, err = capsys.readouterr()
    assert ended.value.code == 2 and out == "" and message in err
    assert "--limit" in wrong or (err.startswith("sample.py: ") and err.count("\n") == 1)
