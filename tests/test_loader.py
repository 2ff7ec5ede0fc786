"""Tests of the training script's data section: shards, the token stream, packed batches and validation rows."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import train_gpt as gpt

SEPARATOR = 0
BYTES = {"name": "tiny", "tokenizer": "bytes", "vocab_size": 257, "document_separator": 256}


def one_of(size: int, rank: int = 0) -> SimpleNamespace:
    """Rank `rank` of a world of `size` processes."""
    return SimpleNamespace(rank=rank, size=size, device=torch.device("cpu"), gpu=False)


class Shards:
    """A stand-in for gpt.Dataset: shards in memory."""

    def __init__(self, shards: list):
        self.train, self.separator = list(range(len(shards))), SEPARATOR
        self.shards = [np.asarray(shard, np.uint16) for shard in shards]
        self.tokens = {i: len(shard) for i, shard in enumerate(self.shards)}

    def read(self, index: int, start: int, count: int) -> np.ndarray:
        return self.shards[index][start:start + count]


def documents(lengths: list[int]) -> list[int]:
    """A stream of documents; no two of its tokens are the same but the separators."""
    stream = []
    for length in lengths:
        stream += [SEPARATOR, *range(len(stream) + 1, len(stream) + length)]
    return stream


def cut(stream: list, *borders: int) -> list[list]:
    """The stream in shards that end at the borders."""
    return [stream[a:b] for a, b in zip((0, *borders), (*borders, len(stream)))]


MIXED = documents([7, 1, 2, 40, 3, 16, 1, 1, 90, 5, 11, 8, 8, 30, 4, 23, 6, 2, 19, 3])
DATASETS = {
    "one shard": [MIXED],
    "documents across shard borders": cut(MIXED, 25, 27, 100, 130),
    "first token no separator": cut(MIXED[3:], 61),
    "one long document": [documents([150])],
    "separators only": [[SEPARATOR] * 37],
    "tiny shards": cut(MIXED[:20], *range(1, 20)),
}


def reference_step(stream: list, position: int, rows: int, row_tokens: int, longest: int, tails: str):
    """What a step's rows are, token by token: ([(inputs, targets, lengths of pieces)], next position)."""
    at = lambda i: stream[i % len(stream)]
    table = []
    for _ in range(rows):
        inputs, targets, lengths = [], [], []
        while len(inputs) < row_tokens:
            lengths.append(0)  # a piece begins here
            while True:
                inputs.append(at(position))
                targets.append(at(position + 1))
                lengths[-1] += 1
                position += 1
                if at(position) == SEPARATOR or lengths[-1] == longest or len(inputs) == row_tokens:
                    break
            while tails == "drop" and at(position) != SEPARATOR:
                position += 1
        table.append((inputs, targets, lengths))
    return table, position


def piece_lengths(cu_seqlens: torch.Tensor) -> list[int]:
    """The lengths of the documents in a row, without the empty ones that pad cu_seqlens."""
    return [length for length in cu_seqlens.diff().tolist() if length]


def rows_of(batches) -> list[tuple[list, list, list]]:
    return [(tokens.tolist(), targets.tolist(), piece_lengths(borders)) for tokens, targets, borders in batches]


def joined(rows) -> tuple[list, list, list]:
    """Rows end to end."""
    return tuple(sum((list(row[i]) for row in rows), []) for i in range(3))


def loader(dataset, row_tokens: int, micro_batch_tokens: int = 1 << 20, tails="continue", world=None):
    return gpt.TrainLoader(dataset, world or one_of(1), row_tokens, micro_batch_tokens, tails)


@pytest.mark.parametrize("tails", ["continue", "drop"])
@pytest.mark.parametrize("name", DATASETS)
@pytest.mark.parametrize("row_tokens, longest", [(16, 16), (32, 5), (24, 64), (50, 30), (7, 1), (1, 3)])
def test_batches_are_those_of_the_slow_reference(name, row_tokens, longest, tails):
    stream = sum(DATASETS[name], [])
    train, position = loader(Shards(DATASETS[name]), row_tokens, tails=tails), 0
    for rows in (3, 1, 4, 2, 5) * 3:  # most go through several epochs
        expected, position = reference_step(stream, position, rows, row_tokens, longest, tails)
        assert joined(rows_of(train.next(rows * row_tokens, longest))) == joined(expected)
        assert train.position == position and train.epoch_tokens == len(stream)


@pytest.mark.parametrize("tails", ["continue", "drop"])
def test_cut_rows_says_when_its_tokens_do_not_suffice(tails):
    whole, enough = gpt.cut_rows(np.array(MIXED), SEPARATOR, 3, 32, 20, tails), []
    last = max(start + length for row in whole[0] for start, length in row)  # the target of the last token
    for count in range(1, len(MIXED)):
        cut_rows = gpt.cut_rows(np.array(MIXED[:count]), SEPARATOR, 3, 32, 20, tails)
        assert cut_rows is None or cut_rows == whole
        enough.append(cut_rows is not None)
    first = len(enough) - sum(enough)  # the most tokens that do not suffice
    assert enough == [False] * first + [True] * sum(enough)
    assert first == (last if tails == "continue" else whole[1])  # to drop a tail, its end must be in sight


def test_real_shards_give_the_batches_of_the_slow_reference(tmp_path, write_folder):
    stream = [256 if token == SEPARATOR else token % 256 for token in MIXED]
    folder = write_folder(tmp_path / "bytes", cut(stream, 90, 200), [stream], **BYTES)
    train, position = loader(gpt.Dataset(str(folder)), 32), 0
    for _ in range(20):
        expected, position = reference_step([t % 256 for t in stream], position, 3, 32, 20, "continue")
        tokens, targets, lengths = joined(rows_of(train.next(96, 20)))
        assert ([t % 256 for t in tokens], [t % 256 for t in targets], lengths) == joined(expected)
        assert 256 in tokens


def any_shards_and_steps(test):
    """Makes a property test of `test(shards, row_tokens, longest, steps)`."""
    test = given(
        shards=st.lists(st.lists(st.integers(0, 3), max_size=60), min_size=1, max_size=4).filter(any),
        row_tokens=st.integers(1, 40), longest=st.integers(1, 50), steps=st.lists(st.integers(1, 4), max_size=6))(test)
    return settings(max_examples=200, deadline=None, derandomize=True, database=None)(test)


@any_shards_and_steps
def test_continue_uses_every_token_once_and_in_order(shards, row_tokens, longest, steps):
    stream, position = sum(shards, []), 0
    train = loader(Shards(shards), row_tokens)
    for rows in steps:
        ((tokens, targets, borders),) = train.next(rows * row_tokens, longest)
        expected = [stream[i % len(stream)] for i in range(position, position + rows * row_tokens + 1)]
        assert tokens.tolist() == expected[:-1] and targets.tolist() == expected[1:]
        assert tokens.dtype == targets.dtype == torch.int64 and borders.dtype == torch.int32
        assert borders[0] == 0 and borders[-1] == rows * row_tokens and len(borders) % 64 == 0
        assert (borders.diff() >= 0).all()
        assert set(range(0, rows * row_tokens, row_tokens)) <= set(borders.tolist())  # no piece in two rows
        for start, length in zip(borders.tolist(), borders.diff().tolist()):
            assert length <= longest and SEPARATOR not in tokens[start + 1:start + length]  # in one document
        position += rows * row_tokens


@pytest.mark.parametrize("tokens, documents, borders", [
    (16384, 1, 64), (16384, 63, 64), (16384, 64, 128), (16384, 128, 192), (65536, 1, 256), (65536, 255, 256),
    (65536, 256, 512), (40_000, 5, 128), (100, 5, 64)])
def test_borders_are_filled_up_so_that_a_size_of_batch_has_few_shapes(tokens, documents, borders):
    """To 64 for each whole 16,384 tokens, or 64, or a multiple of that; with empty documents at the end."""
    pieces = [(i, 1) for i in range(documents - 1)] + [(documents - 1, tokens - documents + 1)]
    packed, _, cu_seqlens = gpt.pack(np.arange(tokens + 1, dtype=np.uint16), pieces, torch.device("cpu"))
    assert len(packed) == tokens and len(cu_seqlens) == borders
    assert cu_seqlens.tolist() == [*range(documents), *[tokens] * (borders - documents)]


@any_shards_and_steps
def test_drop_begins_every_piece_with_a_document(shards, row_tokens, longest, steps):
    stream, position = sum(shards, []), 0
    assume(SEPARATOR in stream)
    train = loader(Shards([[SEPARATOR], *shards]), row_tokens, tails="drop")
    for rows in steps:
        expected, position = reference_step([SEPARATOR, *stream], position, rows, row_tokens, longest, "drop")
        ((tokens, targets, borders),) = batch = train.next(rows * row_tokens, longest)
        assert rows_of(batch) == [joined(expected)] and train.position == position
        assert (tokens[borders[borders < len(tokens)].long()] == SEPARATOR).all()


@pytest.mark.parametrize("tails", ["continue", "drop"])
@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_neither_world_size_nor_micro_batches_change_a_step(size, tails):
    shards, row_tokens, longest = DATASETS["documents across shard borders"], 12, 9
    for micro_batch_tokens in (1, 12, 24, 40, 1 << 20):
        ranks = [loader(Shards(shards), row_tokens, micro_batch_tokens, tails, one_of(size, r)) for r in range(size)]
        position = 0
        for rows in (8, 16, 24, 8):
            expected, position = reference_step(sum(shards, []), position, rows, row_tokens, longest, tails)
            batches = [rank.next(rows * row_tokens, longest) for rank in ranks]
            assert joined(rows_of(sum(batches, []))) == joined(expected)
            assert {rank.position for rank in ranks} == {position}
            for batch in batches:  # all ranks have the same work, in micro-batches that are as large as may be
                sizes = {len(tokens) for tokens, _, _ in batch}
                fitting = max(n for n in range(1, rows // size + 1) if rows // size % n == 0
                              and n <= max(1, micro_batch_tokens // row_tokens))
                assert sizes == {fitting * row_tokens} and len(batch) == rows // size // fitting


@pytest.mark.parametrize("tails", ["continue", "drop"])
def test_position_is_all_there_is_to_restore(tails):
    shards = DATASETS["documents across shard borders"]
    train = loader(Shards(shards), 16, tails=tails)
    for step in range(25):
        fresh = loader(Shards(shards), 16, tails=tails)
        fresh.position = train.position
        rows = 1 + step % 4
        assert rows_of(fresh.next(rows * 16, 10)) == rows_of(train.next(rows * 16, 10))
        assert fresh.position == train.position
    assert train.position > 3 * train.epoch_tokens


@pytest.mark.parametrize("size", [1, 2, 3, 4, 8])
def test_validation_rows_are_the_first_val_tokens_whatever_the_world_size(size, tmp_path, write_folder):
    folder = write_folder(tmp_path, [MIXED], cut(MIXED[4:], 50, 120), vocab_size=300, document_separator=SEPARATOR)
    dataset, stream = gpt.Dataset(str(folder)), MIXED[4:]
    for val_tokens, row_tokens in ((240, 24), (200, 100), (275, 275)):
        ranks = [gpt.val_rows(dataset, one_of(size, rank), val_tokens, row_tokens) for rank in range(size)]
        # with rows that begin anew at multiples of row_tokens, only their borders cut documents
        expected, end = reference_step(stream, 0, val_tokens // row_tokens, row_tokens, row_tokens, "continue")
        assert end == val_tokens
        assert sorted(rows_of(sum(ranks, []))) == sorted(expected)
        assert max(map(len, ranks)) - min(map(len, ranks)) <= 1  # shared out evenly


@pytest.mark.parametrize("tokens, row_tokens", [(len(MIXED), 1), (len(MIXED) + 40, 40), (100, 33), (0, 10), (-10, 10)])
def test_impossible_validation_set_is_refused(tokens, row_tokens, tmp_path, write_folder):
    dataset = gpt.Dataset(str(write_folder(tmp_path, [MIXED], cut(MIXED, 50))))
    with pytest.raises(gpt.UserError) as error:
        gpt.val_rows(dataset, one_of(1), tokens, row_tokens)
    assert_helpful(error, "--val-tokens", "--val-row-tokens", str(row_tokens), str(len(MIXED)))


def assert_helpful(error, *words: str):
    """One line, and the words that tell the user what to do."""
    text = str(error.value)
    assert "\n" not in text and all(word in text for word in words), text


@pytest.mark.parametrize("broken, words", [
    ({"magic": 20240519}, ("20240520", "make it again")),
    ({"version": 2}, ("[20240520, 2, 10]", "version 1", "again")),
    ({"count": 9}, ("10 tokens", "9", "make it again")),
    ({"count": 11}, ("10 tokens", "11", "make it again")),
])
def test_damaged_shard_is_refused(broken, words, tmp_path, write_folder, write_shard):
    write_folder(tmp_path, [MIXED, MIXED], [MIXED])
    path = write_shard(tmp_path / "tiny_train_000001.bin", range(10), **broken)
    with pytest.raises(gpt.UserError) as error:
        gpt.Dataset(str(tmp_path))
    assert_helpful(error, str(path), *words)


def test_empty_shard_is_refused(tmp_path, write_folder, write_shard):
    write_folder(tmp_path, [MIXED, MIXED], [MIXED])
    path = write_shard(tmp_path / "tiny_train_000001.bin", [])
    with pytest.raises(gpt.UserError) as error:
        gpt.Dataset(str(tmp_path))
    assert_helpful(error, str(path), "0 tokens", "at least 1", "make it again")


def test_shard_with_half_a_token_too_many_is_refused(tmp_path, write_folder, write_shard):
    write_folder(tmp_path, [MIXED], [MIXED])
    path = write_shard(tmp_path / "tiny_train_000001.bin", range(10))
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(gpt.UserError) as error:
        gpt.Dataset(str(tmp_path))
    assert_helpful(error, str(path), "10.5 tokens", "[20240520, 1, 10]")


@pytest.mark.parametrize("content", [b"", b"too short for a header", b"<!doctype html>" * 100])
def test_file_that_is_no_shard_is_refused(content, tmp_path, write_folder):
    path = write_folder(tmp_path, [MIXED], [MIXED]) / "tiny_val_000001.bin"
    path.write_bytes(content)
    with pytest.raises(gpt.UserError) as error:
        gpt.Dataset(str(tmp_path))
    assert_helpful(error, str(path), "make it again")


def test_token_outside_the_vocabulary_is_refused_when_its_shard_is_used(tmp_path, write_folder):
    folder = write_folder(tmp_path, [[256, 1, 2, 3], [256, 257]], [[256, 1, 300]], **BYTES)
    dataset = gpt.Dataset(str(folder))
    train = loader(dataset, 2)
    train.next(2, 2)
    with pytest.raises(gpt.UserError) as error:
        train.next(2, 2)  # it is the target of the last token
        train.next(2, 2)
    assert_helpful(error, "tiny_train_000001.bin", "token 257", "257", "vocab_size in dataset.json")
    with pytest.raises(gpt.UserError) as error:
        gpt.val_rows(dataset, one_of(1), 2, 2)
    assert_helpful(error, "tiny_val_000000.bin", "token 300", "make it again")


@pytest.mark.parametrize("train, val, missing", [(0, 0, "training"), (0, 1, "training"), (2, 0, "validation")])
def test_folder_without_shards_of_both_splits_is_refused(train, val, missing, tmp_path, write_folder):
    write_folder(tmp_path, [MIXED] * train, [MIXED] * val, **BYTES)
    with pytest.raises(gpt.UserError) as error:
        gpt.Dataset(str(tmp_path))
    assert_helpful(error, f"no {missing} shard in {tmp_path}", "data/fineweb.py", "--preset sample")


def test_folder_that_does_not_exist_is_refused(tmp_path):
    with pytest.raises(gpt.UserError) as error:
        gpt.Dataset(str(tmp_path / "nowhere"))
    assert_helpful(error, str(tmp_path / "nowhere"), "data/fineweb.py")


def test_damaged_dataset_json_is_refused(tmp_path, write_folder):
    path = write_folder(tmp_path, [MIXED], [MIXED], **BYTES) / "dataset.json"
    path.write_text(path.read_text()[:20])
    with pytest.raises(gpt.UserError) as error:
        gpt.Dataset(str(tmp_path))
    assert_helpful(error, str(path))


def test_dropping_tails_where_no_document_ends_is_refused():
    with pytest.raises(gpt.UserError) as error:
        loader(Shards([[1] * 1000]), 16, tails="drop").next(64, 8)
    assert_helpful(error, "--document-tails")


def test_dataset_json_is_respected(tmp_path, write_folder):
    dataset = gpt.Dataset(str(write_folder(tmp_path, [[7, 1, 1]], [[7, 1]], **BYTES | {"document_separator": 7})))
    assert (dataset.vocab_size, dataset.separator, dataset.about["tokenizer"]) == (257, 7, "bytes")
    tokens = next(iter(loader(dataset, 6).next(6, 6)))
    assert piece_lengths(tokens[2]) == [3, 3]


def test_without_dataset_json_the_shards_are_gpt2(tmp_path, write_folder):
    dataset = gpt.Dataset(str(write_folder(tmp_path / "fineweb10B", [[50256, 1, 1]], [[50256, 1]])))
    assert (dataset.vocab_size, dataset.separator, dataset.about["tokenizer"]) == (50257, 50256, "gpt2")
    assert dataset.about["name"] == "fineweb10B"
    assert dataset.read(dataset.train[0], 0, 9).tolist() == [50256, 1, 1]


def test_shards_are_read_in_the_order_of_their_names(tmp_path, write_folder):
    folder = write_folder(tmp_path, [[i] * 10 for i in range(1, 12)], [[1]], **BYTES)
    ((tokens, _, _),) = loader(gpt.Dataset(str(folder)), 110).next(110, 10)
    assert tokens.tolist() == [i for i in range(1, 12) for _ in range(10)]


def test_fingerprint_tells_data_apart(tmp_path, write_folder):
    def fingerprint(name, train, val):
        return gpt.Dataset(str(write_folder(tmp_path / name, train, val))).fingerprint

    same = fingerprint("a", [MIXED, MIXED], [MIXED])
    assert fingerprint("b", [MIXED, MIXED], [MIXED]) == same  # wherever it lies
    long = [1] * 200_000
    others = [fingerprint(*arguments) for arguments in (
        ("c", [MIXED], [MIXED]), ("d", [MIXED, MIXED], [MIXED[:-1]]), ("e", [MIXED, [*MIXED[:-1], 5]], [MIXED]),
        ("f", [[5, *MIXED[1:]], MIXED], [MIXED]), ("g", [long], [long]), ("h", [[2, *long[1:]]], [long]),
        ("i", [[*long[1:], 2]], [long]))]
    assert len({same, *others}) == len(others) + 1


def test_dataset_json_is_read_as_it_is_written_by_the_tokeniser(tmp_path, write_folder):
    about = BYTES | {"licence": "none", "source": "a test", "shards": {"tiny_train_000000.bin": {"tokens": 3}}}
    dataset = gpt.Dataset(str(write_folder(tmp_path, [[256, 1, 1]], [[256, 1]], **about)))
    assert json.loads(json.dumps(dataset.about)) == about
