"""What the evaluations share: checkpoints, packed scoring and generation, examples, results on disk, metrics.

A model is used through the contract of the scripts alone: Model(args, vocab_size, device, dtype), hidden(tokens,
cu_seqlens, stage), logits(x), stage_inputs(index, validation=True). So any script's checkpoint can be evaluated.
"""

import dataclasses
import functools
import gc
import gzip
import hashlib
import importlib.util
import io
import itertools
import json
import lzma
import math
import os
import re
import sys
import tempfile
import typing
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, Literal

import numpy as np
import torch
import tyro
from torch import Tensor
from tqdm import tqdm

from data.tokenize_text import decode, gpt2_encoding

REPOSITORY = Path(__file__).resolve().parents[1]
LOGIT_ROWS = 4096  # positions whose logits are held at once: 0.8 GB in fp32 with GPT-2's vocabulary
GUESS = 8  # tokens guessed ahead in generation
Z95 = 1.959964  # half the width of a 95% interval, in standard errors


class InputError(Exception):
    """The user's input is unusable; the message is one line that says what is wrong and what to do."""


# ----------------------------------------------------------------------------------------------------------------------
# Flags
# ----------------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Flags:
    """Flags of every evaluation."""

    checkpoints: tyro.conf.Positional[tuple[Path, ...]]
    """Checkpoints of any script, as --checkpoint writes them."""
    out: Path = Path("logs/evals")
    """Folder for the results, written as they come: the same command goes on where a killed one stopped."""
    limit: int = 0
    """Only the first so many examples, or sequences, documents or trials in a cell (0: all)."""
    bos: bool = False
    """Begin every example with the document separator, as documents do in training. Published numbers of GPT-2's
    tokenizer are without."""
    trust_source: bool = False
    """Run the source in a checkpoint even if it is that of no script in this repository or its records."""
    attention: str = "auto"
    """Attention backend, as the script's flag of this name."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: a GPU (in bfloat16) if there is one, else the CPU (in float32)."""
    pack_tokens: int = 0
    """Most tokens in a forward pass (0: 65,536 on a GPU, 4,096 on a CPU). A longer example passes alone."""


@dataclasses.dataclass
class FileFlags(Flags):
    """Flags of an evaluation with examples."""

    file: Path | None = None
    """Examples as JSON lines (also .xz or .gz), see evals/README.md; by default those on the Hugging Face hub."""


def run_command(flags: type, evaluate: Callable[["LanguageModel", Any], dict[str, "Metric"]], description: str,
                picture: Callable[["Runs", Any], bytes] | None = None) -> None:
    """The command line of an evaluation: a line of JSON for each checkpoint, with paired differences to the first one,
    and a picture in --out; one line and exit code 2 for unusable input."""
    with one_line_errors():
        args = tyro.cli(flags, description=description, config=(tyro.conf.FlagCreatePairsOff,))
        runs = {}
        for path in checkpoint_paths(args):
            lm = load(path, args)
            runs[str(path)] = lm.about, evaluate(lm, args)
            print(json.dumps(report_run(str(path), runs)), flush=True)
        if picture:
            path = args.out / f"{Path(sys.argv[0]).stem}.png"
            path.write_bytes(picture(dict(zip(labels(args.checkpoints), runs.values())), args))
            print(f"picture: {path}", file=sys.stderr)


def report_run(label: str, runs: "Runs") -> dict[str, Any]:
    """What is said of one of the runs: checkpoint, metrics, and of all but the first the paired differences to it."""
    (_, first), (about, metrics) = next(iter(runs.values())), runs[label]
    report = {"checkpoint": label, **about, "metrics": {name: metric.summary() for name, metric in metrics.items()}}
    if metrics is not first:
        differences = {name: metric.difference(first[name]) for name, metric in metrics.items() if name in first}
        report["difference_to_first"] = {name: {"mean": mean, "standard_error": finite(error)}
                                         for name, (mean, error) in differences.items()}
    return report


def checkpoint_paths(args: Flags) -> tuple[Path, ...]:
    """The checkpoints of a command line that makes sense; else InputError."""
    if min(args.limit, args.pack_tokens) < 0:
        raise InputError("--limit and --pack-tokens are 0 or more")
    if not args.checkpoints:
        raise InputError("give a checkpoint: train with --checkpoint DIR to have one; --help explains all flags")
    return args.checkpoints


def labels(paths: tuple[Path, ...]) -> list[str]:
    """What tables and pictures call the checkpoints: the files' names, or where these are alike the paths."""
    stems = [path.stem for path in paths]
    return [path.stem if stems.count(path.stem) == 1 else str(path) for path in paths]


def limited(count: int, limit: int) -> int:
    """The number of examples with --limit."""
    return min(count, limit or count)


class one_line_errors:
    """A context that ends the program on unusable input: one line to stderr, exit code 2."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type | None, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, torch.OutOfMemoryError):
            error = InputError("the GPU's memory is full: try half the --pack-tokens")
        if isinstance(error, InputError) or type(error).__name__ == "UserError":  # UserError: of a script
            print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
            sys.exit(2)


# ----------------------------------------------------------------------------------------------------------------------
# Checkpoints
# ----------------------------------------------------------------------------------------------------------------------

SOURCES = tempfile.TemporaryDirectory(prefix="evals-")  # of executed scripts: compilers read them again


def known_sources(repository: Path = REPOSITORY) -> set[str]:
    """SHA-256 of the scripts in a repository: at its root, in variants/ and records/, and in the logs of records."""
    scripts = itertools.chain(*map(repository.glob, ("train_*.py", "variants/**/*.py", "records/**/*.py")))
    sources = [path.read_bytes() for path in scripts]
    logs = [path.read_bytes() for path in repository.glob("records/**/*.txt")]
    logs += [lzma.decompress(path.read_bytes()) for path in repository.glob("records/**/*.txt.xz")]
    for log in logs:  # a log begins with the source, and a line of = ends it
        source, border, _ = log.partition(b"\n" + b"=" * 100 + b"\n")
        sources += [source + b"\n"] if border else []
    return {hashlib.sha256(source).hexdigest() for source in sources}


def execute(script: str, source: str) -> ModuleType:
    """The source of a script as a module, once a process.

    A script registers operators under its file's name, which can be done but once: so the name holds the hash of the
    source, and several scripts, or versions of one, fit into a process.
    """
    name = re.sub(r"\W", "_", Path(script).stem) + "_" + hashlib.sha256(source.encode()).hexdigest()[:12]
    if name not in sys.modules:
        path = Path(SOURCES.name, f"{name}.py")
        path.write_text(source, encoding="utf-8")
        spec = importlib.util.spec_from_file_location(name, path)
        sys.modules[name] = module = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
        finally:
            gc.enable()  # scripts turn it off while they start
    return sys.modules[name]


def rebuild(hint: Any, value: Any) -> Any:
    """A value that went through JSON as the type `hint`: dataclasses and tuples, nested."""
    if dataclasses.is_dataclass(hint):
        hints = typing.get_type_hints(hint)
        return hint(**{name: rebuild(hints[name], item) for name, item in value.items()})
    if typing.get_origin(hint) is tuple:
        inner = typing.get_args(hint)
        inner = [inner[0]] * len(value) if inner[-1] is Ellipsis else inner
        return tuple(rebuild(*pair) for pair in zip(inner, value))
    return value


def load(path: Path, flags: Flags) -> "LanguageModel":
    """The model in a checkpoint, from the file alone. Its source runs only if it is known, or trusted by a flag."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)  # mmap: not the optimiser's part
        script, source, weights, dataset = (state[key] for key in ("script", "source", "model", "dataset"))
        saved, source_digest = (state["args"], state["step"]), hashlib.sha256(source.encode()).hexdigest()
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; give a checkpoint, as --checkpoint writes it") from None
    except Exception as error:  # torch.load raises anything on a file that is not its own
        raise InputError(f"{path} is no checkpoint of a script of this project ({type(error).__name__})") from error
    if not flags.trust_source and source_digest not in known_sources():
        raise InputError(f"{path} holds a {script} that is neither in this repository nor in its records: read it, and "
                         "add --trust-source to run it")
    module = execute(script, source)
    gpu = torch.cuda.is_available() if flags.device == "auto" else flags.device == "cuda"
    if gpu and not torch.cuda.is_available():
        raise InputError("--device cuda, but torch sees no GPU: leave it at auto")
    device, dtype = (torch.device("cuda"), torch.bfloat16) if gpu else (torch.device("cpu"), torch.float32)
    try:
        args = rebuild(module.Hyperparameters, saved[0])
        args.compile = False  # packs are of many sizes
        model = module.Model(args, dataset["vocab_size"], device, dtype)
        others = {name for name, _ in model.named_parameters()} ^ set(weights)
        if others:
            raise KeyError(*sorted(others))
        model.load_state_dict(weights, strict=False)  # raises where shapes differ
        # the stage of the checkpoint's step: a run may have been stopped in the middle
        index = module.Schedule(args, SimpleNamespace(size=1)).stage(saved[1])[0]
    except (KeyError, TypeError, AttributeError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{path}: its weights or arguments do not fit its source ({reason})") from error
    if flags.attention not in ("auto", *module.ATTENTION_BACKENDS):
        raise InputError(f"--attention {flags.attention} is none of auto, {', '.join(module.ATTENTION_BACKENDS)}")
    module.choose_attention(flags.attention, device)
    identity = hashlib.sha256(json.dumps([source, saved, dataset], sort_keys=True).encode())  # not the optimiser's part
    for name, weight in weights.items():
        identity.update(name.encode())
        identity.update(weight.reshape(-1).view(torch.uint8).numpy())
    about = {"script": script, "step": saved[1], "dataset": dataset["name"], "identity": identity.hexdigest(),
             "params": model.num_params()["total"], "train_tokens": max(row.document_tokens for row in args.stages),
             "cache_bytes": {context: model.cache_bytes(context) for context in (2048, 8192, 32768)}}

    def stage(bound: int) -> Any:
        args.val_row_tokens = bound  # by which scripts bound validation documents: kernels want it tight
        return model.stage_inputs(index, validation=True)

    return LanguageModel(model, stage, dataset, about, device, flags.bos, flags.pack_tokens)


# ----------------------------------------------------------------------------------------------------------------------
# Scoring and generation
# ----------------------------------------------------------------------------------------------------------------------


def packs(lengths: Sequence[int], limit: int) -> Iterator[list[int]]:
    """Indices of examples, the longest first, in packs of at most `limit` tokens, or of one longer example."""
    pack, room = [], limit
    for index in np.argsort(-np.asarray(lengths), kind="stable").tolist():
        if pack and lengths[index] > room:
            yield pack
            pack, room = [], limit
        pack.append(index)
        room -= lengths[index]
    if pack:
        yield pack


def guess(tokens: np.ndarray) -> np.ndarray:
    """What may follow (T,) tokens: what followed where their last three, or two, or one stood before; (GUESS,) or (0,).

    Prompt lookup decoding (github.com/apoorvumang/prompt-lookup-decoding). A copy that reaches the end is a loop: it
    goes round.
    """
    ends = np.flatnonzero(tokens[:-1] == tokens[-1]) + 1
    for back in (2, 3):
        longer = ends[ends >= back]
        longer = longer[tokens[longer - back] == tokens[-back]] if len(tokens) >= back else longer[:0]
        if not len(longer):
            break
        ends = longer
    return np.resize(tokens[ends[-1]:], GUESS) if len(ends) else tokens[:0]


class LanguageModel:
    """A model, its tokenizer, and what it takes to run it on documents packed into full rows."""

    def __init__(self, model: Any, stage: Callable[[int], Any], dataset: dict[str, Any], about: dict[str, Any],
                 device: torch.device, bos: bool = False, pack_tokens: int = 0):
        """stage: the model's stage inputs for documents of so many tokens at most. dataset: what dataset.json says."""
        if dataset["tokenizer"] not in ("gpt2", "bytes"):
            raise InputError(f'the tokenizer "{dataset["tokenizer"]}" of the checkpoint is unknown: gpt2 and bytes are')
        self.model, self.dataset, self.about, self.bos, self.device = model, dataset, about, bos, device
        self.vocab_size, self.separator = dataset["vocab_size"], dataset["document_separator"]
        self.pack_tokens = pack_tokens or (65_536 if device.type == "cuda" else 4096)
        self.stage = functools.cache(stage)

    def encode(self, texts: Iterable[str]) -> dict[str, np.ndarray]:
        """The tokens (T,) int64 of each text, without separators."""
        unique = list(dict.fromkeys(texts))
        if self.dataset["tokenizer"] == "gpt2":
            tokens = gpt2_encoding().encode_ordinary_batch(unique, num_threads=os.cpu_count() or 1)
        else:
            # JSON can hold half a surrogate pair, which no UTF-8 has: it becomes U+FFFD, as in tiktoken
            whole = (text.encode("utf-16", "surrogatepass").decode("utf-16", "replace") for text in unique)
            tokens = [list(text.encode()) for text in whole]
        return {text: np.array(ids, np.int64) for text, ids in zip(unique, tokens)}

    def encode_prompts(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The tokens (T,) of each text; the separator before them with `bos`, or where there are none."""
        encoded, bos = self.encode(texts), np.array([self.separator])
        return [np.concatenate([bos, encoded[text]]) if self.bos or not len(encoded[text]) else encoded[text]
                for text in texts]

    def encode_pairs(self, pairs: Sequence[tuple[str, str]]) -> tuple[list[np.ndarray], list[int]]:
        """(tokens (T,) of context and continuation, where the continuation begins) for each pair.

        As in lm-evaluation-harness (TemplateLM._encode_pair): tokenised together, and split at the context's number
        of tokens; spaces that end the context belong to the continuation; an empty context is the separator.
        """
        contexts = [context.rstrip() for context, _ in pairs]
        wholes = self.encode_prompts([context + continuation for context, continuation in pairs])
        heads = self.encode_prompts(contexts)
        for i, (context, _) in enumerate(pairs):
            if not contexts[i] and not self.bos:
                wholes[i] = np.concatenate([heads[i], wholes[i]])
            if len(heads[i]) >= len(wholes[i]):
                raise InputError(f"nothing to score after {context[-40:]!r}: an example has an empty continuation")
        return wholes, [len(head) for head in heads]

    def decode(self, tokens: np.ndarray) -> str:
        return decode(tokens, self.dataset)

    @torch.inference_mode()
    def logits(self, inputs: list[np.ndarray], positions: list[np.ndarray]) -> Iterator[Tensor]:
        """One forward pass over the documents `inputs`: the logits at each one's `positions`, in order, in parts of
        (LOGIT_ROWS, padded vocabulary) at most, fp32 on the device."""
        lengths = [len(tokens) for tokens in inputs]
        padding = -sum(lengths) % max(1, self.pack_tokens // 64)  # few sizes, for allocators and kernels that tune
        lengths += [padding] if padding else []
        borders = np.cumsum([0, *lengths])
        where = np.concatenate([start + place for start, place in zip(borders, positions)])
        borders = np.pad(borders, (0, -len(borders) % 64), mode="edge")  # empty documents, as in training
        tokens = np.concatenate([*inputs, np.full(padding, self.separator)])
        stage = self.stage(max(16, 1 << (max(lengths) - 1).bit_length()))
        x, _ = self.model.hidden(self.to_device(tokens), self.to_device(borders.astype(np.int32)), stage)
        for part in x[self.to_device(where)].split(LOGIT_ROWS):
            yield self.model.logits(part).float()

    def to_device(self, array: np.ndarray) -> Tensor:
        tensor = torch.from_numpy(array)
        return tensor.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else tensor

    @torch.inference_mode()
    def _score_pack(self, inputs: list[np.ndarray], wanted: list[np.ndarray]) -> Tensor:
        """(2, n): log-probability and rank-one hit of the wanted tokens of all inputs, on the device."""
        targets = self.to_device(np.concatenate([tokens[index] for tokens, index in zip(inputs, wanted)]))
        parts = []
        for logits, target in zip(self.logits([tokens[:-1] for tokens in inputs], [index - 1 for index in wanted]),
                                  targets.split(LOGIT_ROWS)):
            # normalised over the padded vocabulary, as the loss; a prediction is a token that can be decoded
            log_probs = logits.gather(1, target[:, None])[:, 0] - logits.logsumexp(1)
            parts.append(torch.stack([log_probs, (logits[:, :self.vocab_size].argmax(1) == target).float()]))
        return torch.cat(parts, 1)

    def score(self, sequences: list[np.ndarray],
              wanted: list[np.ndarray]) -> Iterator[dict[int, tuple[np.ndarray, np.ndarray]]]:
        """Scores the tokens sequences[i][wanted[i]], each given all before it; sequences (T,), wanted (n,), from 1 on.

        Yields, pack by pack, the longest sequences first, {i: (log-probabilities, nats (n,) float64; whether each was
        the most probable token (n,) bool)}.
        """
        sequences = [tokens[:index[-1] + 1] for tokens, index in zip(sequences, wanted)]

        def read(pack: list[int], scores: Tensor):
            ends = np.cumsum([len(wanted[i]) for i in pack])[:-1]
            log_probs, hits = scores.cpu().double().numpy()
            return dict(zip(pack, zip(np.split(log_probs, ends), np.split(hits > 0, ends))))

        waiting = None
        for pack in packs([len(tokens) - 1 for tokens in sequences], self.pack_tokens):
            launched = pack, self._score_pack([sequences[i] for i in pack], [wanted[i] for i in pack])
            if waiting:  # read a pack while the next one runs
                yield read(*waiting)
            waiting = launched
        if waiting:
            yield read(*waiting)

    def generate(self, prompts: list[np.ndarray], max_tokens: int,
                 stops: Sequence[str] = ()) -> Iterator[dict[int, str]]:
        """Greedy continuations of prompts (T,): {index: text} as they finish, at a stop string or separator (neither is
        part of the text) or after max_tokens.

        Each pass runs all unfinished prompts that fit into a pack over again, because the contract has no cache. It
        also checks a guess at the next tokens: as many of them as the model would have chosen are kept, so that texts
        that repeat something, as recall does, need few passes, and the result is that of one token at a time.
        """
        queue = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))[::-1]
        active: dict[int, np.ndarray] = {}  # prompt and what was generated
        room = self.pack_tokens
        while queue or active:
            while queue and (not active or len(prompts[queue[-1]]) + max_tokens + GUESS <= room):
                index = queue.pop()
                active[index] = prompts[index]
                room -= len(prompts[index]) + max_tokens + GUESS
            guesses = [guess(tokens) for tokens in active.values()]
            inputs = [np.concatenate(pair) for pair in zip(active.values(), guesses)]
            positions = [np.arange(len(tokens) - len(ahead) - 1, len(tokens)) for tokens, ahead in zip(inputs, guesses)]
            best = [logits[:, :self.vocab_size].argmax(1) for logits in self.logits(inputs, positions)]
            best = np.split(torch.cat(best).cpu().numpy(), np.cumsum([len(place) for place in positions])[:-1])
            finished = {}
            for index, ahead, chosen in zip(list(active), guesses, best):
                right = int(np.cumprod(chosen[:-1] == ahead).sum())
                active[index] = np.concatenate([active[index], chosen[:right + 1]])
                new = active[index][len(prompts[index]):][:max_tokens]
                ended = np.flatnonzero(new == self.separator)
                text = self.decode(new[:ended[0]] if len(ended) else new)
                cuts = [text.index(stop) for stop in stops if stop in text]
                if cuts or len(ended) or len(new) == max_tokens:
                    finished[index] = text[:min(cuts, default=None)]
                    del active[index]
                    room += len(prompts[index]) + max_tokens + GUESS
            if finished:
                yield finished


# ----------------------------------------------------------------------------------------------------------------------
# Examples
# ----------------------------------------------------------------------------------------------------------------------

UNPACK = {".xz": lzma.open, ".gz": gzip.open}


def read_examples(convert: Callable[[dict], Any], file: Path | None, hub: tuple[str, str | None, str] | None,
                  limit: int = 0) -> list[Any]:
    """`convert` of each example of a file of JSON lines, or else of a (dataset, configuration, split) of the hub."""
    if file is None and hub is None:
        raise InputError("these examples are on no hub: give --file FILE.jsonl")
    if file is not None:
        source = str(file)
        try:
            with UNPACK.get(file.suffix, open)(file, "rt", encoding="utf-8") as lines:
                rows = [json.loads(line) for line in lines if line.strip()]
        except (OSError, EOFError, ValueError, lzma.LZMAError) as error:
            reason = getattr(error, "strerror", None) or error
            raise InputError(f"{file} cannot be read as JSON lines ({reason})") from None
    else:
        source, config, split = hub
        try:
            rows = importlib.import_module("datasets").load_dataset(source, config, split=split)
        except Exception as error:  # no package, no network, no such dataset: many kinds
            reason = " ".join(str(error).split())[:200]
            raise InputError(f"no {source} from the Hugging Face hub ({type(error).__name__}: {reason}): give --file "
                             "FILE.jsonl, or have a network and `pip install -r requirements-evals.txt`") from None
    examples = []
    for number, row in enumerate(itertools.islice(rows, limit or None), 1):
        try:
            examples.append(convert(row))
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            raise InputError(f"{source}, example {number} is not of the format in evals/README.md "
                             f"({type(error).__name__}: {error})") from None
    if not examples:
        raise InputError(f"{source} holds no examples")
    return examples


def shard_documents(folder: Path, lm: LanguageModel, split: str = "val") -> list[np.ndarray]:
    """The documents, (T,) uint16 each, without their separators, of the shards of one split of a dataset."""
    paths = sorted(folder.glob(f"*_{split}_*.bin"))
    if not paths:
        raise InputError(f"no {split} shards in {folder}: give the folder of a dataset, such as data/fineweb10B")
    described = folder / "dataset.json"
    try:
        tokenizer = json.loads(described.read_text()).get("tokenizer", "gpt2") if described.exists() else "gpt2"
    except ValueError as error:
        raise InputError(f"{described} is damaged ({error}): make the dataset again") from None
    if tokenizer != lm.dataset["tokenizer"]:
        raise InputError(f"{folder} is of the tokenizer {tokenizer}, the checkpoint of {lm.dataset['tokenizer']}: "
                         "give shards of the same")
    tokens = np.concatenate([np.fromfile(path, "<u2", offset=1024) for path in paths])
    if len(tokens) and tokens.max() >= lm.vocab_size:
        raise InputError(f"the shards in {folder} have tokens outside the checkpoint's vocabulary: give others")
    first, *documents = np.split(tokens, np.flatnonzero(tokens == lm.separator))
    return [part for part in (first, *(document[1:] for document in documents)) if len(part)]


# ----------------------------------------------------------------------------------------------------------------------
# Results
# ----------------------------------------------------------------------------------------------------------------------


def digest(value: Any) -> str:
    """A hash of anything that JSON can hold."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


@functools.cache
def code_digest() -> str:
    """A hash of these programs: results of others are not taken up."""
    return digest([path.read_text() for path in sorted(Path(__file__).parent.glob("*.py"))])


class Results:
    """The results of one task on one checkpoint, on disk as they come: a JSON line for each example, after a head.

    The file's name holds a hash of the head (task, checkpoint, examples, settings, code), so anything else that is
    evaluated has a file of its own, and an evaluation that was killed goes on with what is missing.
    """

    def __init__(self, folder: Path, task: str, lm: LanguageModel, examples: Any, **settings: Any):
        head = {"task": task, "checkpoint": lm.about["identity"], "examples": digest(examples), "settings": settings,
                "bos": lm.bos, "device": lm.device.type, "code": code_digest()}
        self.task, self.rows = task, {}
        self.path = folder / f"{task}_{digest(head)[:16]}.jsonl"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            kept = self.path.read_bytes() if self.path.exists() else b""
            kept = kept[:kept.rfind(b"\n") + 1]  # a kill may have left half a line
            for line in kept.splitlines()[1:]:
                index, row = json.loads(line)
                self.rows[index] = row
            self.file = open(self.path, "ab")
        except (OSError, ValueError, TypeError) as error:
            raise InputError(f"{self.path} cannot be used for results ({error}): remove it or give --out") from None
        self.file.truncate(len(kept))
        if not kept:
            self._write([head])

    def _write(self, lines: Iterable[Any]) -> None:
        self.file.write(b"".join(json.dumps(line).encode() + b"\n" for line in lines))
        self.file.flush()
        os.fsync(self.file.fileno())

    def collect(self, total: int, compute: Callable[[list[int]], Iterator[dict[int, Any]]]) -> list[Any]:
        """The rows 0 to total - 1: those on disk, and the others from `compute`, which yields them in any order."""
        missing = [index for index in range(total) if index not in self.rows]
        with tqdm(total=total, initial=total - len(missing), desc=self.task, disable=None) as bar:
            for part in compute(missing) if missing else ():
                rows = {missing[i]: row for i, row in part.items()}
                self._write(rows.items())
                self.rows |= rows
                bar.update(len(rows))
        self.file.close()
        return [self.rows[index] for index in range(total)]


def log_likelihoods(lm: LanguageModel, pairs: list[tuple[str, str]], results: Results) -> np.ndarray:
    """(n, 2): the log-likelihood of each continuation given its context, nats, and whether it is the greedy one."""
    def compute(missing: list[int]) -> Iterator[dict[int, Any]]:
        sequences, starts = lm.encode_pairs([pairs[i] for i in missing])
        wanted = [np.arange(start, len(tokens)) for start, tokens in zip(starts, sequences)]
        for scores in lm.score(sequences, wanted):
            yield {i: (log_probs.sum(), bool(hits.all())) for i, (log_probs, hits) in scores.items()}

    return np.array(results.collect(len(pairs), compute), np.float64)


def generations(lm: LanguageModel, prompts: list[np.ndarray], results: Results, max_tokens: int,
                stops: Sequence[str] = ()) -> list[str]:
    """The greedy continuation of each prompt (T,), see LanguageModel.generate."""
    return results.collect(len(prompts), lambda missing: lm.generate([prompts[i] for i in missing], max_tokens, stops))


# ----------------------------------------------------------------------------------------------------------------------
# Metrics
# ----------------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Metric:
    """What was measured on each example, (n,): 0 or 1 for an accuracy, nats for a loss or perplexity."""

    values: np.ndarray
    kind: Literal["accuracy", "loss", "perplexity"] = "accuracy"

    @property
    def value(self) -> float:
        mean = sum(self.values.tolist()) / len(self.values)  # in order, as lm-evaluation-harness adds
        return math.exp(mean) if self.kind == "perplexity" else mean

    def interval(self) -> tuple[float, float]:
        """95%: Wilson's for an accuracy (binomial), else from the standard error over examples."""
        count, mean = len(self.values), float(self.values.mean())
        if self.kind == "accuracy":
            center, scale = mean + Z95**2 / (2 * count), 1 + Z95**2 / count
            half = Z95 * math.sqrt(mean * (1 - mean) / count + Z95**2 / (4 * count**2))
            return max(0.0, (center - half) / scale), min(1.0, (center + half) / scale)
        half = Z95 * self.standard_error()
        low, high = mean - half, mean + half
        return (math.exp(low), math.exp(min(high, 700))) if self.kind == "perplexity" else (low, high)

    def standard_error(self) -> float:
        return standard_error(self.values)

    def summary(self) -> dict[str, Any]:
        """As JSON has it; n: examples. An interval that cannot be told is null."""
        return {"value": self.value, "interval95": [finite(bound) for bound in self.interval()], "n": len(self.values)}

    def difference(self, other: "Metric") -> tuple[float, float]:
        """(mean, standard error) of this less `other`'s on the same examples, paired; nats for perplexity."""
        paired = self.values - other.values
        return float(paired.mean()), standard_error(paired)


def standard_error(values: np.ndarray) -> float:
    """Of the mean of (n,) values; infinite for one value alone."""
    return float(values.std(ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else math.inf


def finite(number: float) -> float | None:
    """The number, or None for one that JSON cannot hold."""
    return number if math.isfinite(number) else None


Runs = dict[str, tuple[dict[str, Any], dict[str, Metric]]]  # label of a checkpoint -> what it is, its metrics


def png(draw: Callable[[Any], None], width: float, height: float) -> bytes:
    """The picture that `draw` makes on a figure of so many inches."""
    try:
        figure = importlib.import_module("matplotlib.figure").Figure(figsize=(width, height), layout="constrained")
    except ImportError:
        raise InputError("pictures need matplotlib: pip install -r requirements-evals.txt") from None
    draw(figure)
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110)
    return file.getvalue()
