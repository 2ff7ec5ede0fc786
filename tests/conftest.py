"""What several test files need: datasets on disk."""

import json
import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # small tensors, and many processes at a time

import numpy as np
import pytest


def write_shard(path: Path, tokens, magic: int = 20240520, version: int = 1, count: int | None = None) -> Path:
    """Write (T,) tokens as a shard; the other arguments are for headers that lie."""
    header = np.zeros(256, "<i4")
    header[:3] = magic, version, len(tokens) if count is None else count
    path.write_bytes(header.tobytes() + np.asarray(tokens, "<u2").tobytes())
    return path


def write_folder(folder: Path, train, val, **about) -> Path:
    """Write a dataset: a shard for each list of tokens, and a dataset.json if `about` says anything."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, shards in (("train", train), ("val", val)):
        for i, tokens in enumerate(shards):
            write_shard(folder / f"tiny_{split}_{i:06d}.bin", tokens)
    if about:
        (folder / "dataset.json").write_text(json.dumps(about))
    return folder


@pytest.fixture(scope="session", name="write_shard")
def write_shard_fixture():
    return write_shard


@pytest.fixture(scope="session", name="write_folder")
def write_folder_fixture():
    return write_folder
