"""Tokenise text into training shards: `python data/tokenize_text.py corpus.jsonl.xz --out data/corpus`.

A shard is 256 int32 (20240520, 1, number of tokens, zeros) and then that many uint16 tokens, all little-endian: the
format of llm.c and of the public FineWeb shards. Every document starts with the separator token and may continue in
the next shard. dataset.json beside the shards says how to read them.
"""

import dataclasses
import functools
import gzip
import hashlib
import json
import lzma
import multiprocessing
import os
import re
import sys
import tempfile
import zlib
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tiktoken
import tyro
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
SEPARATOR = "<|endoftext|>"
TOKENIZERS = {
    "bytes": {"vocab_size": 257, "document_separator": 256},
    "gpt2": {"vocab_size": 50257, "document_separator": 50256},
}
CHUNK_CHARS = 1 << 20  # text handed to a worker at once: large enough to hide the cost of the exchange


class InputError(Exception):
    """The user's input is unusable; the message says what is wrong and what to do."""


@dataclasses.dataclass
class Args:
    """Tokenise text, JSON lines or stdin into training shards with a dataset.json."""

    inputs: tyro.conf.Positional[tuple[str, ...]] = ()
    """Files to read, in this order; .xz and .gz are unpacked; "-" is stdin."""
    out: Path | None = None
    """Folder for the shards."""
    format: Literal["auto", "text", "jsonl"] = "auto"
    """text: a file is a document. jsonl: a line is a document, its text in the field "text". auto: jsonl if the file
    name says .jsonl or .ndjson, else text (stdin too)."""
    split_at: str = ""
    """In text files, also end a document at this string within a line, for example "<|endoftext|>", and drop it."""
    tokenizer: Literal["gpt2", "bytes"] = "gpt2"
    """gpt2: GPT-2 byte-pair encoding, 50257 tokens. bytes: UTF-8 bytes and a separator, 257 tokens."""
    val_fraction: float = 0.01
    """Expected fraction of documents that go to validation, between 0 and 1. A hash of text and seed decides: the split
    depends neither on order nor on workers, and copies of a document never fall on both sides."""
    seed: int = 0
    """Another seed is another choice of validation documents."""
    shard_tokens: int = 100_000_000
    """Tokens per shard; the last one of each split is shorter."""
    name: str = ""
    """Name of the dataset and first part of the file names; by default the name of the output folder."""
    licence: str = "unknown"
    """Licence of the text, for dataset.json."""
    source: str = "unknown"
    """Where the text comes from, for dataset.json."""
    workers: int = 0
    """Processes that tokenise; 0 is one for each core."""
    overwrite: bool = False
    """Replace the shards and the dataset.json that are in the output folder, once all new ones are complete."""
    sample: bool = False
    """Make the shards of the embedded sample in data/sample/shards, unless they are there. Ignores all other flags."""


@functools.cache
def gpt2_encoding() -> tiktoken.Encoding:
    """Return OpenAI's GPT-2 encoding from data/gpt2, without a network; equal to tiktoken.get_encoding("gpt2")."""
    with lzma.open(HERE / "gpt2" / "vocab.bpe.xz", "rt", encoding="utf-8") as file:
        merges = [line.split() for line in file.read().splitlines()[1:]]
    # The file writes a byte as its own character if that is printable, else as the next one from U+0100 on.
    printable = [b for b in range(256) if chr(b).isprintable() and chr(b) != " "]
    others = [b for b in range(256) if b not in printable]
    byte_of = {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}
    tokens = [bytes([b]) for b in byte_of.values()]
    tokens += [bytes(byte_of[c] for c in first + second) for first, second in merges]
    return tiktoken.Encoding(
        name="gpt2",
        pat_str=r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s""",
        mergeable_ranks={token: rank for rank, token in enumerate(tokens)},
        special_tokens={SEPARATOR: TOKENIZERS["gpt2"]["document_separator"]},
        explicit_n_vocab=TOKENIZERS["gpt2"]["vocab_size"],
    )


def decode(tokens: Sequence[int] | np.ndarray, dataset: dict[str, Any]) -> str:
    """Return the text of (T,) tokens of a dataset (the content of its dataset.json).

    Separators become "<|endoftext|>", incomplete UTF-8 becomes U+FFFD. Raises ValueError for an unknown token.
    """
    ids, vocab_size = np.asarray(tokens, np.int64), dataset["vocab_size"]
    if ids.size and not 0 <= ids.min() <= ids.max() < vocab_size:
        raise ValueError(f"tokens must be in [0, {vocab_size}), got {ids.min()} to {ids.max()}")
    if dataset["tokenizer"] == "gpt2":
        return gpt2_encoding().decode(ids.tolist())
    first, *rest = np.split(ids, np.flatnonzero(ids == dataset["document_separator"]))
    texts = [first, *(document[1:] for document in rest)]
    return SEPARATOR.join(text.astype(np.uint8).tobytes().decode(errors="replace") for text in texts)


def tokenize_chunk(texts: list[str], tokenizer: str, val_fraction: float, seed: int) -> dict[str, np.ndarray]:
    """Return {"train": (T,) uint16, "val": (T,) uint16}: the documents in order, a separator before each."""
    parts: dict[str, list[np.ndarray]] = {"train": [np.empty(0, np.uint16)], "val": [np.empty(0, np.uint16)]}
    separator = np.array([TOKENIZERS[tokenizer]["document_separator"]], np.uint16)
    for text in texts:
        # JSON can hold half a surrogate pair, which no UTF-8 has: it becomes U+FFFD, as in tiktoken.
        utf8 = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode()
        digest = hashlib.blake2b(f"{seed}:".encode() + utf8, digest_size=8).digest()
        if tokenizer == "gpt2":
            tokens = np.array(gpt2_encoding().encode_ordinary(text), np.uint16)
        else:
            tokens = np.frombuffer(utf8, np.uint8).astype(np.uint16)
        parts["val" if int.from_bytes(digest, "little") < val_fraction * 2**64 else "train"] += [separator, tokens]
    return {split: np.concatenate(arrays) for split, arrays in parts.items()}


def split_documents(file: Iterable[bytes], name: str, jsonl: bool, split_at: str) -> Iterator[str]:
    """Yield the documents of an unpacked file; raises InputError, UnicodeDecodeError or what unpacking raises."""
    held = []  # the lines of a document of plain text that may go on
    for number, line in enumerate(file, 1):
        if not jsonl:
            *complete, rest = line.split(split_at.encode()) if split_at else [line]
            for end in complete:
                yield b"".join([*held, end]).decode()
                held = []
            held.append(rest)
        elif line.strip():
            try:
                text = json.loads(line.decode())["text"]
            except ValueError as error:
                raise InputError(f"{name}, line {number}: not JSON ({error}); is it --format text?") from None
            except (KeyError, TypeError):
                raise InputError(f'{name}, line {number}: no field "text"; write {{"text": "..."}}') from None
            if not isinstance(text, str):
                raise InputError(f'{name}, line {number}: the field "text" is not a string; write {{"text": "..."}}')
            yield text
    yield b"".join(held).decode()


def read_documents(args: Args) -> Iterator[str]:
    """Yield all documents but blank ones, with a progress bar over the bytes read; raises InputError."""
    for name in args.inputs:
        if name != "-" and not Path(name).is_file():
            raise InputError(f"{name}: no such file; give text, .jsonl, .xz or .gz files, or - for stdin")
    size = None if "-" in args.inputs else sum(Path(name).stat().st_size for name in args.inputs)
    with tqdm(total=size, unit="B", unit_scale=True, desc="tokenising", disable=None) as bar:
        for name in args.inputs:
            jsonl = args.format == "jsonl"
            if args.format == "auto":
                jsonl = not {".jsonl", ".ndjson"}.isdisjoint(Path(name).suffixes)
            unpack = {".xz": lzma.open, ".gz": gzip.open}.get(Path(name).suffix, lambda file: file)
            with open(0 if name == "-" else name, "rb", closefd=name != "-") as raw:
                try:
                    position = 0
                    for text in split_documents(unpack(raw), name, jsonl, args.split_at):
                        before, position = position, raw.tell() if raw.seekable() else position + len(text)
                        bar.update(position - before)
                        if text.strip():
                            yield text
                except UnicodeDecodeError as error:
                    raise InputError(f"{name}: not UTF-8 ({error}); convert it, for example with iconv") from None
                except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
                    raise InputError(f"{name}: cannot be read ({error}); make or fetch the file again") from None


def in_chunks(documents: Iterable[str]) -> Iterator[list[str]]:
    """Group documents into lists of about CHUNK_CHARS characters."""
    chunk, chars = [], 0
    for text in documents:
        chunk.append(text)
        chars += len(text)
        if chars >= CHUNK_CHARS:
            yield chunk
            chunk, chars = [], 0
    if chunk:
        yield chunk


def tokenized_chunks(args: Args) -> Iterator[dict[str, np.ndarray]]:
    """Yield what tokenize_chunk returns for all inputs, in their order, whatever the number of workers."""
    task = functools.partial(tokenize_chunk, tokenizer=args.tokenizer, val_fraction=args.val_fraction, seed=args.seed)
    workers = args.workers or os.cpu_count() or 1
    if workers == 1:
        yield from map(task, in_chunks(read_documents(args)))
        return
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        pending = deque()
        for chunk in in_chunks(read_documents(args)):
            pending.append(pool.submit(task, chunk))
            if len(pending) > 2 * workers:  # pool.map would read all input into memory
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


def write_synced(path: Path, data: bytes | np.ndarray) -> None:
    """Write a file and wait until the disk has it."""
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


class ShardWriter:
    """Writes the tokens of one split to folder/{name}_{split}_{index:06d}.bin, at most shard_tokens in each."""

    def __init__(self, folder: Path, name: str, split: str, shard_tokens: int):
        self.path = str(folder / f"{name}_{split}_{{:06d}}.bin")
        self.index = 0 if split == "val" else 1  # as in FineWeb
        self.buffer = np.zeros(512 + shard_tokens, "<u2")  # the header, then the tokens of the shard in the making
        self.end = 512
        self.shards: dict[str, dict[str, Any]] = {}

    def write(self, tokens: np.ndarray) -> None:
        """Append (T,) uint16 tokens."""
        while len(tokens):
            part, tokens = np.split(tokens, [len(self.buffer) - self.end])
            self.buffer[self.end : self.end + len(part)] = part
            self.end += len(part)
            if self.end == len(self.buffer):
                self.close()

    def close(self) -> None:
        """Write the tokens that wait, if any, as a shard."""
        if self.end == 512:
            return
        shard, path = self.buffer[: self.end], Path(self.path.format(self.index))
        shard[:512].view("<i4")[:3] = 20240520, 1, self.end - 512
        write_synced(path, shard)
        self.shards[path.name] = {"tokens": self.end - 512, "sha256": hashlib.sha256(shard).hexdigest()}
        self.index, self.end = self.index + 1, 512


def tokenize(args: Args) -> dict[str, Any]:
    """Write the dataset that args describe into args.out; return the content of its dataset.json. Raises InputError."""
    if not args.inputs or args.out is None:
        raise InputError("give input files and --out DIR, or --sample alone; --help explains all flags")
    name = args.name or args.out.resolve().name
    if not re.fullmatch(r"[\w.-]+", name) or "_train_" in name or "_val_" in name:
        raise InputError(f"--name {name!r}: use letters, digits, '.', '-', '_', and neither _train_ nor _val_")
    if not (0 < args.val_fraction < 1 and 0 < args.shard_tokens < 2**31 and args.workers >= 0):
        raise InputError("need 0 < --val-fraction < 1, 0 < --shard-tokens < 2147483648 and --workers of 0 or more")
    args.out.mkdir(parents=True, exist_ok=True)
    old = [path for pattern in ("dataset.json", "*_train_*.bin", "*_val_*.bin") for path in args.out.glob(pattern)]
    if old and not args.overwrite:
        raise InputError(f"{args.out} holds a dataset ({old[0].name}); choose another --out, or add --overwrite")

    # Nothing gets its final name before everything is complete: a run that dies leaves at most a folder .partial-*.
    with tempfile.TemporaryDirectory(dir=args.out, prefix=".partial-") as partial:
        writers = {split: ShardWriter(Path(partial), name, split, args.shard_tokens) for split in ("train", "val")}
        for chunk in tokenized_chunks(args):
            for split, tokens in chunk.items():
                writers[split].write(tokens)
        for writer in writers.values():
            writer.close()
        train, val = writers["train"].shards, writers["val"].shards
        if not train and not val:
            raise InputError("the input holds no text; give files that are not empty")
        if not train or not val:
            where, change = ("training", "lower") if val else ("validation", "raise")
            raise InputError(f"no document fell into {where}; {change} --val-fraction, change --seed or add documents")
        dataset = {"name": name, "tokenizer": args.tokenizer, **TOKENIZERS[args.tokenizer]}
        dataset |= {"licence": args.licence, "source": args.source, "shards": train | val}
        write_synced(Path(partial, "dataset.json"), (json.dumps(dataset, indent=2) + "\n").encode())
        for file_name in dataset["shards"]:
            os.replace(Path(partial, file_name), args.out / file_name)
        for path in old:
            if path.name not in {*dataset["shards"], "dataset.json"}:
                path.unlink(missing_ok=True)
        os.replace(Path(partial, "dataset.json"), args.out / "dataset.json")
    return dataset


def file_sha256(path: Path) -> str:
    """Return the hexadecimal SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def build_sample() -> Path:
    """Make the shards of the embedded sample unless they are there and match their sums; return their folder."""
    packed, out = HERE / "sample" / "sample.jsonl.xz", HERE / "sample" / "shards"
    seed = 92  # the first one for which validation has 5% of the tokens, and both sources in their proportion
    source = f"data/sample/sample.jsonl.xz, sha256 {file_sha256(packed)}, seed {seed}"
    try:
        dataset = json.loads((out / "dataset.json").read_text(encoding="utf-8"))
        sums = {name: shard["sha256"] for name, shard in dataset["shards"].items()}
        if dataset["source"] == source and sums == {name: file_sha256(out / name) for name in sums}:
            return out
    except (OSError, ValueError, KeyError):
        pass  # none there, or damaged
    licence = "public domain (State of the Union addresses, Moby-Dick); collection PDDL-1.0, CC0-1.0"
    settings = Args((str(packed),), out, tokenizer="bytes", val_fraction=0.05, seed=seed, workers=1, overwrite=True)
    tokenize(dataclasses.replace(settings, name="sample", licence=licence, source=source))
    return out


def main() -> None:
    args = tyro.cli(Args, description=__doc__, config=(tyro.conf.FlagCreatePairsOff,))
    try:
        if args.sample:
            print(f"the sample is in {build_sample()}")
        else:
            dataset = tokenize(args)
            for name, shard in dataset["shards"].items():
                print(f"{args.out / name}: {shard['tokens']:,} tokens")
    except (InputError, OSError) as error:
        print(f"tokenize_text.py: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
