"""Tests of data/: the tokeniser and its shards, the embedded sample, and the download from a stand-in for the hub."""

import gzip
import hashlib
import json
import lzma
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from data import fineweb, tokenize_text
from data.tokenize_text import Args, InputError, decode, gpt2_encoding, tokenize, tokenize_chunk

DATA = Path(tokenize_text.__file__).parent
DATASETS = {name: {"tokenizer": name, **sizes} for name, sizes in tokenize_text.TOKENIZERS.items()}
WORDS = "the whale and a ship sail on over seas of état, naïve 鯨 🐳 and none".split()


def corpus(count: int) -> list[str]:
    """Return documents that all differ, of 3 to 42 words, a few of which have line ends and odd characters."""
    rng = np.random.default_rng(0)
    return [f"{i}\n" + " ".join(rng.choice(WORDS, rng.integers(2, 42))) for i in range(count)]


def write_jsonl(path: Path, documents: list[str]) -> str:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    return str(path)


def read_tokens(folder: Path, split: str) -> np.ndarray:
    """Return the (T,) tokens of all shards of a split, with their headers checked."""
    parts = []
    for path in sorted(folder.glob(f"*_{split}_*.bin")):
        header, tokens = np.fromfile(path, "<i4", count=256), np.fromfile(path, "<u2", offset=1024)
        assert header[:3].tolist() == [20240520, 1, len(tokens)] and not header[3:].any()
        parts.append(tokens)
    return np.concatenate(parts)


def read_documents(folder: Path) -> dict[str, list[str]]:
    """Return the documents of each split, from the shards alone."""
    dataset = json.loads((folder / "dataset.json").read_text())
    documents = {}
    for split in ("train", "val"):
        empty, *texts = decode(read_tokens(folder, split), dataset).split("<|endoftext|>")
        assert empty == ""  # a split starts with a separator
        documents[split] = texts
    return documents


def run_script(script: str, *args: str, **kwargs) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, DATA / script, *args], capture_output=True, text=True, timeout=60, **kwargs)


def assert_one_line(done: subprocess.CompletedProcess, *parts: str) -> None:
    assert done.returncode == 2, done
    assert done.stderr.count("\n") == 1 and all(part in done.stderr for part in parts), done.stderr


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizers


@pytest.mark.parametrize("tokenizer", ["bytes", "gpt2"])
@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(texts=st.lists(st.text(), max_size=4))
@example(texts=["", "plain", "tabs\t\r\n\x00", "é 鯨 🐳 \u0301 \U0010ffff", "<|endoftext|>", " " * 300])
def test_round_trip(tokenizer, texts):
    tokens = tokenize_chunk(texts, tokenizer, val_fraction=0.0, seed=0)["train"]
    assert tokens.dtype == np.uint16
    assert decode(tokens, DATASETS[tokenizer]) == "".join("<|endoftext|>" + text for text in texts)
    if texts:
        assert tokens[0] == DATASETS[tokenizer]["document_separator"]


@pytest.mark.parametrize(
    "text, ids",
    [
        ("Hello world", [15496, 995]),
        ("The quick brown fox jumps over the lazy dog", [464, 2068, 7586, 21831, 18045, 625, 262, 16931, 3290]),
        ("\n", [198]),
        ("don't  stop", [9099, 470, 220, 2245]),
        ("<|endoftext|>", [27, 91, 437, 1659, 5239, 91, 29]),  # in a text it is text, never the separator
    ],
)
def test_known_gpt2_ids_without_a_network(text, ids, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("the network was used")

    monkeypatch.delenv("TIKTOKEN_CACHE_DIR", raising=False)
    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    gpt2_encoding.cache_clear()
    assert gpt2_encoding().encode_ordinary(text) == ids
    assert gpt2_encoding().n_vocab == 50257 and gpt2_encoding().eot_token == 50256


def test_gpt2_merges_are_the_published_ones():
    merges = lzma.decompress((DATA / "gpt2" / "vocab.bpe.xz").read_bytes())
    digest = hashlib.sha256(merges).hexdigest()  # the one that tiktoken pins
    assert digest == "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"


@pytest.mark.parametrize("tokenizer", ["bytes", "gpt2"])
def test_decode_is_safe(tokenizer):
    dataset = DATASETS[tokenizer]
    cut = tokenize_chunk(["🐳"], tokenizer, 0.0, 0)["train"][:-1]
    assert decode(cut, dataset) == "<|endoftext|>\ufffd"
    for token in (-1, dataset["vocab_size"]):
        with pytest.raises(ValueError, match="tokens must be in"):
            decode([token], dataset)


@pytest.mark.parametrize("tokenizer", ["bytes", "gpt2"])
def test_half_a_surrogate_pair_is_replaced(tokenizer):
    tokens = tokenize_chunk([json.loads('"a\\ud800b"')], tokenizer, 0.0, 0)["train"]
    assert decode(tokens, DATASETS[tokenizer]) == "<|endoftext|>a\ufffdb"


# ---------------------------------------------------------------------------------------------------------------------
# Shards


@pytest.mark.parametrize("tokenizer", ["bytes", "gpt2"])
def test_split_loses_nothing_and_dataset_json_is_right(tokenizer, tmp_path):
    documents = corpus(300)
    source = write_jsonl(tmp_path / "in.jsonl", documents)
    out = tmp_path / "out"
    args = Args((source,), out, tokenizer=tokenizer, val_fraction=0.2, shard_tokens=1000, workers=1)
    returned = tokenize(Args(**{**vars(args), "name": "tales", "licence": "CC0-1.0", "source": "here"}))

    dataset = json.loads((out / "dataset.json").read_text())
    shards = dataset.pop("shards")
    assert dataset == {**DATASETS[tokenizer], "name": "tales", "licence": "CC0-1.0", "source": "here"}
    assert returned == {**dataset, "shards": shards}
    assert {path.name for path in out.iterdir()} == {*shards, "dataset.json"}
    for name, shard in shards.items():
        assert hashlib.sha256((out / name).read_bytes()).hexdigest() == shard["sha256"]
        assert (out / name).stat().st_size == 1024 + 2 * shard["tokens"]

    found = read_documents(out)
    assert Counter(found["train"] + found["val"]) == Counter(documents)
    assert 30 <= len(found["val"]) <= 90
    order = {text: i for i, text in enumerate(documents)}
    assert all(texts == sorted(texts, key=order.get) for texts in found.values())

    # Every shard but the last is full, and a document goes on across the boundary.
    train = sorted(name for name in shards if "_train_" in name)
    assert train[:2] == ["tales_train_000001.bin", "tales_train_000002.bin"] and "tales_val_000000.bin" in shards
    assert {shards[name]["tokens"] for name in train[:-1]} == {1000}
    assert read_tokens(out, "train")[1000] != dataset["document_separator"]


def test_split_depends_on_seed_and_text_alone():
    documents = corpus(200)

    def validation(texts, seed):
        tokens = tokenize_chunk(texts, "bytes", 0.3, seed)["val"]
        return set(decode(tokens, DATASETS["bytes"]).split("<|endoftext|>")) - {""}

    assert validation(documents, 0) == validation(documents[::-1], 0) != validation(documents, 1)
    assert validation(documents[:50], 0) == validation(documents, 0) & set(documents[:50])


def test_workers_do_not_change_the_result(tmp_path, monkeypatch):
    monkeypatch.setattr(tokenize_text, "CHUNK_CHARS", 2000)  # many chunks, more than may wait at once
    source = write_jsonl(tmp_path / "in.jsonl", corpus(400))
    one, two = (
        tokenize(Args((source,), tmp_path / str(n), name="x", val_fraction=0.2, shard_tokens=1500, workers=n))
        for n in (1, 2)
    )
    assert one == two and len(one["shards"]) > 2


@pytest.mark.parametrize("kind", ["txt", "jsonl", "txt.xz", "jsonl.gz", "split"])
def test_input_formats(kind, tmp_path):
    documents, inputs = corpus(40), []
    if kind == "split":
        path = tmp_path / "all.txt"
        path.write_text("<|endoftext|>".join(documents) + "<|endoftext|>\n")  # the blank rest is no document
        inputs = [str(path)]
    elif kind.startswith("jsonl"):
        inputs = [write_jsonl(tmp_path / "in.jsonl", documents)]
    else:
        for i, text in enumerate(documents):
            (tmp_path / f"{i}.txt").write_text(text)
            inputs.append(str(tmp_path / f"{i}.txt"))
    packer = {".xz": lzma.compress, ".gz": gzip.compress}.get(Path(kind).suffix)
    if packer:
        for name in inputs:
            Path(name + Path(kind).suffix).write_bytes(packer(Path(name).read_bytes()))
        inputs = [name + Path(kind).suffix for name in inputs]
    split_at = "<|endoftext|>" if kind == "split" else ""
    args = Args(tuple(inputs), tmp_path / "out", tokenizer="bytes", val_fraction=0.3, workers=1, split_at=split_at)
    tokenize(args)
    found = read_documents(tmp_path / "out")
    assert Counter(found["train"] + found["val"]) == Counter(documents)


def test_killed_run_leaves_nothing_under_a_final_name(tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, DATA / "tokenize_text.py", "-", "--format", "jsonl", "--out", out, "--workers", "1"]
    command += ["--tokenizer", "bytes", "--shard-tokens", "100000", "--val-fraction", "0.3"]
    lines = "".join(json.dumps({"text": f"{i} " * 500}) + "\n" for i in range(800)).encode()
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL) as process:
        process.stdin.write(lines)  # more than one chunk, and standard input stays open
        process.stdin.flush()
        deadline = time.monotonic() + 30
        while not list(out.glob(".partial-*/*_train_*.bin")) and time.monotonic() < deadline:
            time.sleep(0.02)
        assert list(out.glob(".partial-*/*_train_*.bin")), "no shard was written before the end of input"
        process.send_signal(signal.SIGKILL)
    assert [path for path in out.iterdir() if not path.name.startswith(".partial-")] == []
    assert run_script("tokenize_text.py", *command[2:], input=lines.decode()).returncode == 0
    assert len(sum(read_documents(out).values(), [])) == 800


def test_overwrite_replaces_all_or_nothing(tmp_path):
    out, source = tmp_path / "out", write_jsonl(tmp_path / "in.jsonl", corpus(100))
    first = Args((source,), out, name="x", tokenizer="bytes", val_fraction=0.3, shard_tokens=500, workers=1)
    tokenize(first)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(InputError, match="holds a dataset.*--overwrite"):
        tokenize(first)

    bad = tmp_path / "bad.jsonl"
    bad.write_text(Path(source).read_text() + "not JSON\n")
    with pytest.raises(InputError, match="line 101"):
        tokenize(Args((str(bad),), out, name="x", tokenizer="bytes", val_fraction=0.3, workers=1, overwrite=True))
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before

    second = tokenize(Args((source,), out, name="x", tokenizer="bytes", val_fraction=0.3, workers=1, overwrite=True))
    assert {path.name for path in out.iterdir()} == {*second["shards"], "dataset.json"}  # no shard of the first is left
    assert set(before) > set(second["shards"])


BAD_INPUTS = {  # content of the file, flags, what the line says
    "bad JSON": (b'{"text": "a"}\n{"text": \n', {}, "in.jsonl, line 2: not JSON"),
    "bad UTF-8": (b'{"text": "a"}\n{"text": "\xff"}\n', {}, "in.jsonl, line 2: not JSON"),
    "bad UTF-8 text": (b"ab\xff", {"format": "text"}, "in.jsonl: not UTF-8"),
    "no field": (b'{"text": "a"}\n\n{"body": "a"}\n', {}, 'in.jsonl, line 3: no field "text"'),
    "no object": (b"[1]\n", {}, 'in.jsonl, line 1: no field "text"'),
    "no string": (b'{"text": 1}\n', {}, 'in.jsonl, line 1: the field "text" is not a string'),
    "empty": (b"", {}, "holds no text"),
    "blank documents": (b'{"text": ""}\n{"text": " "}\n', {}, "holds no text"),
    "no validation": (b'{"text": "a"}\n', {"val_fraction": 1e-9}, "no document fell into validation; raise"),
    "no training": (b'{"text": "a"}\n', {"val_fraction": 1 - 1e-9}, "no document fell into training; lower"),
    "fraction": (b'{"text": "a"}\n', {"val_fraction": 1.0}, "need 0 < --val-fraction < 1"),
    "shard tokens": (b'{"text": "a"}\n', {"shard_tokens": 0}, "0 < --shard-tokens"),
    "workers": (b'{"text": "a"}\n', {"workers": -1}, "--workers of 0 or more"),
    "name": (b'{"text": "a"}\n', {"name": "a_train_b"}, "--name 'a_train_b'"),
    "no out": (b'{"text": "a"}\n', {"out": None}, "--out DIR"),
    "no inputs": (b'{"text": "a"}\n', {"inputs": ()}, "give input files"),
    "missing file": (b"", {"inputs": ("nowhere.txt",)}, "nowhere.txt: no such file"),
}


@pytest.mark.parametrize("case", BAD_INPUTS)
def test_bad_input_is_one_line(case, tmp_path, monkeypatch, capsys):
    content, flags, message = BAD_INPUTS[case]
    (tmp_path / "in.jsonl").write_bytes(content)
    out = tmp_path / "out"
    flags = {"inputs": (str(tmp_path / "in.jsonl"),), "out": out, "workers": 1, "tokenizer": "bytes", **flags}
    monkeypatch.setattr(tokenize_text.tyro, "cli", lambda *args, **kwargs: Args(**flags))
    with pytest.raises(SystemExit) as exit:
        tokenize_text.main()
    error = capsys.readouterr().err
    assert exit.value.code == 2 and message in error and error.count("\n") == 1
    assert not out.exists() or not list(out.iterdir())


@pytest.mark.parametrize("pack, suffix", [(lzma.compress, ".xz"), (gzip.compress, ".gz")])
def test_damaged_archive_is_one_line(pack, suffix, tmp_path):
    path = tmp_path / f"in.jsonl{suffix}"
    path.write_bytes(pack(b'{"text": "a"}\n' * 10000)[:-20])
    with pytest.raises(InputError, match=f"in.jsonl{suffix}: cannot be read"):
        tokenize(Args((str(path),), tmp_path / "out", tokenizer="bytes", val_fraction=0.5, workers=1))


def test_command_line(tmp_path):
    assert_one_line(run_script("tokenize_text.py", "nowhere.txt", "--out", str(tmp_path)), "nowhere.txt: no such file")
    taken = tmp_path / "taken.txt"
    taken.write_text("text")
    assert_one_line(run_script("tokenize_text.py", str(taken), "--out", str(taken)), "File exists")
    usage = run_script("tokenize_text.py", "--help").stdout
    for flag in Args.__dataclass_fields__:
        assert flag == "inputs" or f"--{flag.replace('_', '-')}" in usage


# ---------------------------------------------------------------------------------------------------------------------
# The embedded sample


def test_sample(tmp_path, monkeypatch):
    """The sample builds in about a second, is what its README says, and is built again only if it is damaged."""
    (tmp_path / "sample").mkdir()
    (tmp_path / "sample" / "sample.jsonl.xz").symlink_to(DATA / "sample" / "sample.jsonl.xz")
    monkeypatch.setattr(tokenize_text, "HERE", tmp_path)
    start = time.monotonic()
    out = tokenize_text.build_sample()
    assert time.monotonic() - start < 6  # 0.3 s on an idle core
    assert out == tmp_path / "sample" / "shards"

    lines = lzma.decompress((DATA / "sample" / "sample.jsonl.xz").read_bytes()).decode().splitlines()
    documents = {entry["text"]: entry["source"] for entry in map(json.loads, lines)}
    found = read_documents(out)
    assert sorted(found["train"] + found["val"]) == sorted(documents)
    assert Counter(documents.values()) == {"moby-dick": 136, "sotu": 118}
    assert {documents[text] for text in found["val"]} == {"moby-dick", "sotu"}
    assert any(text.startswith("Call me Ishmael.") for text in documents)
    assert any(text.endswith("God bless the United States of America.") for text in documents)
    dataset = json.loads((out / "dataset.json").read_text())
    tokens = {name: shard["tokens"] for name, shard in dataset["shards"].items()}
    assert tokens == {"sample_train_000001.bin": 5_717_666, "sample_val_000000.bin": 302_047}
    readme = (DATA / "sample" / "README.md").read_text()
    assert all(f"{count:,}" in readme for count in tokens.values())
    assert tokenize_text.file_sha256(DATA / "sample" / "sample.jsonl.xz") in readme

    made = (out / "dataset.json").stat().st_mtime_ns
    tokenize_text.build_sample()
    assert (out / "dataset.json").stat().st_mtime_ns == made
    (out / "sample_val_000000.bin").write_bytes(b"damaged")
    tokenize_text.build_sample()
    assert (out / "sample_val_000000.bin").stat().st_size == 1024 + 2 * 302_047


def test_sample_is_clean():
    text = lzma.decompress((DATA / "sample" / "sample.jsonl.xz").read_bytes()).decode()
    for entry in map(json.loads, text.splitlines()):
        assert set(entry) == {"source", "title", "text"} and all(entry.values())
        assert not re.search(r"\r|\t|  | \n|\n\n\n|[\x00-\x09]|\[applause\]|\[laughter\]|&\w+;", entry["text"])


# ---------------------------------------------------------------------------------------------------------------------
# The download, from a stand-in for the hub


def shard(tokens: int, magic: int = 20240520, announced: int | None = None) -> bytes:
    header = np.zeros(256, "<i4")
    header[:3] = magic, 1, tokens if announced is None else announced
    return header.tobytes() + np.resize(np.arange(65536, dtype="<u2"), tokens).tobytes()


class Hub:
    """Answers what huggingface_hub asks of the hub: HEAD and GET, with ranges, of the files of one data set.

    The first GET of a name in `breaks` sends half of the file and closes the connection.
    """

    def __init__(self, files: dict[str, bytes], breaks: set[str]):
        hub, self.gets = self, []

        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self):
                self.answer(body=False)

            def do_GET(self):
                self.answer(body=True)

            def answer(self, body):
                prefix, _, name = self.path.rpartition("/")
                if prefix != f"/datasets/{fineweb.REPO}/resolve/main" or name not in files:
                    self.send_response(404)
                    self.send_header("X-Error-Code", "EntryNotFound")
                    self.send_header("Content-Length", "0")
                    self.end_headers()
                    return
                content = files[name]
                start = int(re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "bytes=0-"))[1])
                self.send_response(206 if start else 200)
                if start:
                    self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
                self.send_header("Content-Length", str(len(content) - start))
                self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
                self.send_header("X-Repo-Commit", "0" * 40)
                self.end_headers()
                if body:
                    hub.gets.append((name, start))
                    end = len(content) // 2 if name in breaks else len(content)
                    breaks.discard(name)
                    self.wfile.write(content[start:end])

            def log_message(self, *args):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()


@pytest.fixture
def hub():
    """Return a function that starts a Hub."""
    hubs = []

    def start(files, breaks=()):
        hubs.append(Hub(files, set(breaks)))
        return hubs[-1]

    yield start
    for one in hubs:
        one.server.shutdown()
        one.server.server_close()


def download(url: str, out: Path, n: str = "2") -> subprocess.CompletedProcess:
    """Run fineweb.py against a hub at url, without the pauses between its attempts."""
    code = "import runpy, sys, time; time.sleep = print; sys.argv.pop(0); runpy.run_path(sys.argv[0], None, '__main__')"
    command = [sys.executable, "-c", code, DATA / "fineweb.py", n, "--out", out]
    home = {"HF_ENDPOINT": url, "HF_HOME": str(out.parent / "home"), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    clean = {key: value for key, value in os.environ.items() if not key.lower().endswith("_proxy")}
    return subprocess.run(command, env=clean | home, capture_output=True, text=True, timeout=60)


VAL, TRAIN = "fineweb_val_000000.bin", ["fineweb_train_000001.bin", "fineweb_train_000002.bin"]


def test_download_resumes_keeps_and_repairs(hub, tmp_path):
    # The hub's client writes pieces of 10 MB: 30 MB break off after one and a half of them.
    files = {VAL: shard(500), TRAIN[0]: shard(15_000_000), TRAIN[1]: shard(700)}
    out = tmp_path / "out"
    out.mkdir()
    (out / VAL).write_bytes(files[VAL])
    (out / TRAIN[1]).write_bytes(files[TRAIN[1]][:-2])
    server = hub(files, breaks=[TRAIN[0]])
    done = download(server.url, out)
    assert done.returncode == 0, done.stderr
    assert {path.name: path.read_bytes() for path in out.iterdir()} == files
    assert f"{VAL}: already there" in done.stdout and f"{TRAIN[1]}: bad (2,422 bytes" in done.stdout
    # The second request for the broken file goes on in its middle; the good file is not asked for.
    (first, start1), (second, start2), (third, start3) = server.gets
    assert (first, second, third, start1, start3) == (TRAIN[0], TRAIN[0], TRAIN[1], 0, 0) and start2 > 0


BAD_SHARDS = [
    (shard(100, magic=20240521), "not a shard"),
    (shard(100, announced=101), "1,224 bytes where its header announces 1,226"),
    (shard(100) + b"\0\0", "1,226 bytes where its header announces 1,224"),
    (shard(0), "1,024 bytes where"),
    (shard(10)[:1000], "not a shard"),
    (b"", "not a shard"),
]


@pytest.mark.parametrize("content, problem", [*BAD_SHARDS, (shard(1), None)])
def test_fault(tmp_path, content, problem):
    path = tmp_path / VAL
    path.write_bytes(content)
    assert fineweb.fault(path) is problem is None or problem in fineweb.fault(path)


@pytest.mark.parametrize("bad, problem", BAD_SHARDS[:2])
def test_bad_shard_gets_no_final_name(hub, tmp_path, bad, problem):
    server = hub({VAL: shard(10), TRAIN[0]: bad})
    out = tmp_path / "out"
    assert_one_line(download(server.url, out, "1"), TRAIN[0], f"failed {fineweb.ATTEMPTS} times ({problem}")
    assert [path.name for path in out.iterdir() if path.name != ".partial"] == [VAL]
    assert [name for name, _ in server.gets].count(TRAIN[0]) == fineweb.ATTEMPTS


def test_file_that_the_hub_does_not_have_is_one_line(hub, tmp_path):
    assert_one_line(download(hub({VAL: shard(10)}).url, tmp_path / "out", "1"), f"the hub refuses {TRAIN[0]}", "404")


def test_no_network_is_one_line(tmp_path):
    with socket.socket() as free:  # bound but not listening: connections are refused
        free.bind(("127.0.0.1", 0))
        done = download(f"http://127.0.0.1:{free.getsockname()[1]}", tmp_path / "out")
    assert_one_line(done, "connection", "data/tokenize_text.py", "python train_gpt.py --preset sample")
    assert not list((tmp_path / "out").glob("*.bin"))


@pytest.mark.parametrize("n", ["0", "104"])
def test_number_of_shards_out_of_range_is_one_line(n, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["fineweb.py", n, "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as exit:
        fineweb.main()
    error = capsys.readouterr().err
    assert exit.value.code == 2 and error.count("\n") == 1 and f"N is {n}; the data set has 1 to 103" in error
    assert not (tmp_path / "out").exists()
