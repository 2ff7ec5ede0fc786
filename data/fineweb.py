"""Download FineWeb as GPT-2 tokens: the validation shard and the first N train shards of 100M tokens (200 MB).

    python data/fineweb.py        # 9 train shards, enough for a record run of the reference script
    python data/fineweb.py 103    # all of the 10B-token sample

Run it again to resume: good files are kept, bad ones are fetched again. The shards come from the public data set
kjj0/fineweb10B-gpt2 of the modded-nanogpt speedrun; FineWeb itself is HuggingFaceFW/fineweb (licence ODC-By 1.0).
"""

import dataclasses
import os
import shutil
import sys
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HTTPError, LocalEntryNotFoundError
from huggingface_hub.utils import logging

REPO = "kjj0/fineweb10B-gpt2"
TRAIN_SHARDS = 103
ATTEMPTS = 3  # each one resumes where the one before broke off
ALTERNATIVES = (
    "tokenise your own text with `python data/tokenize_text.py`, "
    "or train on the embedded sample with `python train_gpt.py --preset sample`"
)


@dataclasses.dataclass
class Args:
    """Download the validation shard and N train shards of FineWeb."""

    n: Annotated[tyro.conf.Positional[int], tyro.conf.arg(metavar="[N]")] = 9
    """Number of train shards of 100M tokens (200 MB), 1 to 103."""
    out: Path = Path(__file__).resolve().parent / "fineweb10B"
    """Folder for the shards."""


class DownloadError(Exception):
    """A shard cannot be had; the message says why and what to do."""


def fault(path: Path) -> str | None:
    """Return what is wrong with a shard (256 int32: 20240520, 1, tokens; then uint16 tokens), None if nothing."""
    header, size = np.fromfile(path, "<i4", count=256), path.stat().st_size
    if len(header) < 256 or header[0] != 20240520 or header[1] != 1:
        return "not a shard of version 1"
    expected = 1024 + 2 * int(header[2])
    return None if size == expected > 1024 else f"{size:,} bytes where its header announces {expected:,}"


def fetch(name: str, out: Path) -> None:
    """Download one shard into out. It gets its final name only after its check. Raises DownloadError."""
    staging = out / ".partial"  # keeps unfinished files between runs; on the same disk, so that the last move is atomic
    problem = ""
    for _ in range(ATTEMPTS):
        try:
            staged = Path(hf_hub_download(REPO, name, repo_type="dataset", local_dir=staging))
        except LocalEntryNotFoundError:  # the hub did not answer at all
            raise DownloadError(f"no connection to the Hugging Face hub; run it again later, {ALTERNATIVES}") from None
        except HfHubHTTPError as error:
            raise DownloadError(f"the hub refuses {name} ({str(error).splitlines()[0]}); {ALTERNATIVES}") from None
        except (HTTPError, OSError, RuntimeError) as error:  # the connection broke, the disk is full, or hf_xet failed
            problem = f"{type(error).__name__}: {error}".splitlines()[0]
            continue
        problem = fault(staged)
        if problem is None:
            os.replace(staged, out / name)
            return
        staged.unlink()
    advice = f"check the connection and run it again to resume, {ALTERNATIVES}"
    raise DownloadError(f"{name} failed {ATTEMPTS} times ({problem}); {advice}")


def main() -> None:
    args = tyro.cli(Args, description=__doc__)
    logging.set_verbosity_error()  # the hub's own warnings at every retry would bury the one line that matters
    try:
        if not 1 <= args.n <= TRAIN_SHARDS:
            raise DownloadError(f"N is {args.n}; the data set has 1 to {TRAIN_SHARDS} train shards")
        args.out.mkdir(parents=True, exist_ok=True)
        for name in ["fineweb_val_000000.bin"] + [f"fineweb_train_{i:06d}.bin" for i in range(1, args.n + 1)]:
            path = args.out / name
            problem = fault(path) if path.exists() else "missing"
            if problem is None:
                print(f"{name}: already there")
                continue
            if problem != "missing":
                print(f"{name}: bad ({problem}), downloading it again")
                path.unlink()
            fetch(name, args.out)
        shutil.rmtree(args.out / ".partial", ignore_errors=True)
    except (DownloadError, OSError) as error:
        print(f"fineweb.py: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit("fineweb.py: interrupted; run the command again to resume")


if __name__ == "__main__":
    main()
