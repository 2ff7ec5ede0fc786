"""Logs of runs that never were, consistent in all that can be checked, and a repository to land them in."""

import hashlib
import json
import lzma
import re
import shutil
from pathlib import Path

import numpy as np

import runlog
from add import Args, add
from record import Record, Repository

ROOT = Path(__file__).resolve().parents[1]
LINE = "# " + "-" * 118
SOURCE = f'''"""
train_gpt.py: a script that only looks like one.

Its second paragraph.
"""
import torch

{LINE}
# Setup [same]
{LINE}

torch._dynamo.config.recompile_limit = 64

{LINE}
# Architecture
{LINE}

model = torch.compile(torch.nn.Linear(8, 8), dynamic=False, fullgraph=True)

{LINE}
# Training [same]
{LINE}

print("</script> in a script must not end the page's")
''' + "".join(f"step({i})\n" for i in range(20))
TRACKS = """
[defaults]
runs = 3
p = 0.01
compile_settings = ["dynamic", "fullgraph", "torch._dynamo.config.recompile_limit"]
[tracks.big]
title = "Big to 3.28"
about = "A track without a pinned fingerprint."
dataset = "big"
val_tokens = 4096
val_row_tokens = 1024
target = 3.28
headline = "8 x NVIDIA H100 80GB HBM3"
[tracks.sample]
title = "Sample to 1.8"
about = "A track."
dataset = "sample"
fingerprints = ["f00d"]
val_tokens = 2048
val_row_tokens = 512
target = 1.8
[tracks.evidence]
title = "Evidence"
about = "Unranked."
ranked = false
"""


def seal(text: str) -> str:
    """`text` with the digest that it should end in: what a forger would do."""
    head = text.rpartition(runlog.SEAL)[0]
    return f'{head}{runlog.SEAL}{hashlib.sha256(head.encode()).hexdigest()}"}}\n'


def log_text(seed: int = 0, loss: float = 1.7, step_seconds: float = 0.5, source: str = SOURCE,
             args: dict | None = None, params: int = 2_400_000, older: bool = False, **environment) -> str:
    """A log as a script writes it; an `older` one has the share of the GPU's peak, and a text by the model. A run's
    losses and times follow from its seed; the last loss is near `loss`."""
    rng = np.random.default_rng(seed)
    stages = [{"steps": 0.25, "batch_tokens": batch} for batch in (1024, 2048, 2048, 4096)]
    args = {"seed": seed, "max_tokens": 60_000, "target": 1.8, "val_tokens": 2048, "val_row_tokens": 512,
            "val_every": 10, "compile": False, "data": "data/sample/shards", "out": "logs", "stages": stages,
            "model_dim": 192, "layers": "s l"} | (args or {})
    environment = {
        "script": "train_gpt.py", "source_sha256": hashlib.sha256(source.encode()).hexdigest(), "git_commit": None,
        "command": ["train_gpt.py", "--seed", str(seed)], "python": "3.11.7", "torch": "2.13.0", "cuda": None,
        "numpy": "2.4.6", "triton": None, "device": "x86_64 CPU", "threads": 1, "world_size": 1,
        "attention": "reference", "dataset": "sample", "fingerprint": "f00d", "params": {"total": params},
        "args": args} | environment
    parts, batches = (np.array([stage[key] for stage in args["stages"]]) for key in ("steps", "batch_tokens"))
    steps = int(args["max_tokens"] / (parts @ batches))
    sizes = np.repeat(batches, np.diff(np.round(np.cumsum(parts) * steps).astype(int), prepend=0)).tolist()
    total, done, now, lines = sum(sizes), 0, 0.0, []
    stopping = 1e-4  # seconds from a step's report to the stop of the clock; the next step's time has them
    for step, batch in enumerate(sizes, 1):
        validated = step > 1 and lines[-1].split()[1].startswith("val_loss")
        work = step_seconds * rng.uniform(0.9, 1.1)
        done, now, seconds = done + batch, now + work, work + stopping * validated
        val_loss = loss + 4 * (1 - step / steps) ** 2 + rng.normal(0, 0.002)
        lines.append(f"step:{step}/{steps} train_loss:{val_loss + rng.normal(0, 0.05):.4f} train_time:{now:.3f}s "
                     f"step_time:{1000 * seconds:.1f}ms tokens:{done} tokens/s:{batch / seconds:.0f} "
                     f"{'mfu:0.412 ' * older}ends_in:{(total / done - 1) * now:.0f}s")
        if step == steps or (args["val_every"] and step % args["val_every"] == 0):
            now += stopping
            lines.append(f"step:{step}/{steps} val_loss:{val_loss:.4f} train_time:{now:.3f}s")
    speed, reached = total / now, val_loss <= args["target"]
    rule = "=" * 100
    report = "\n".join([
        f"{environment['script']} on {environment['world_size']} x {environment['device']}, attention "
        f"{environment['attention']}, data {environment['dataset']}: {params / 1e6:.1f}M parameters, {steps} steps, "
        f"{total / 1e6:.1f}M tokens, target {args['target']}", "startup:2.3s", *lines,
        f"{'reached' if reached else 'missed'} the target: val_loss {val_loss:.4f}, target {args['target']}, in "
        f"{now:.1f} s of training ({speed:.0f} tokens/s)", *["sample: 'The whale'"] * older])
    closing = json.dumps({
        "val_loss": val_loss, "target": args["target"], "reached": reached, "seed": seed, "steps": steps,
        "tokens": total, "train_seconds": now, "startup_seconds": 2.34, "total_seconds": now + 10,
        "tokens_per_second": speed, **({"mfu": 0.412} if older else {}), "val_tokens": args["val_tokens"],
        **environment, "peak_memory_mib": None if "CPU" in environment["device"] else 31245.39})
    return seal(f"{source}{rule}\n{json.dumps(environment)}\n{rule}\n{report}\n{closing[:-1]}{runlog.SEAL}")


def compressed(path: Path) -> Path:
    """Replaces a file by its .xz, in another way than add.py compresses."""
    packed = path.with_name(f"{path.name}.xz")
    packed.write_bytes(lzma.compress(path.read_bytes(), preset=0))
    path.unlink()
    return packed


def sub(pattern: str, replacement: str, text: str) -> str:
    """re.sub of the one place that matches."""
    changed, count = re.subn(pattern, replacement, text, flags=re.M)
    assert count == 1, f"{pattern} matches {count} times"
    return changed


class Site:
    """A repository with the programs' own page and vendored files, but tracks and scripts of its own."""

    def __init__(self, root: Path):
        self.root, self.records = root, root / "records"
        shutil.copytree(ROOT / "records" / "vendor", self.records / "vendor")
        for name in ("page.html", "modded_nanogpt.tsv"):
            shutil.copy(ROOT / "records" / name, self.records)
        (self.records / "tracks.toml").write_text(TRACKS)
        (root / "train_gpt.py").write_text(SOURCE)
        for folder in (root, self.records):
            (folder / "README.md").write_text("Above.\n\n<!-- generated by records/leaderboard.py: begin -->\n"
                                              "<!-- generated by records/leaderboard.py: end -->\n\nBelow.\n")

    @property
    def repository(self) -> Repository:
        return Repository(self.root)

    def logs(self, texts: list[str] | None = None, day: int = 1, **fields) -> list[Path]:
        """Writes logs; by default those of seeds 0, 1, 2 with `fields` as of log_text."""
        folder, paths = self.root / "logs", []
        folder.mkdir(exist_ok=True)
        for text in texts or [log_text(seed, **fields) for seed in range(3)]:
            paths.append(folder / f"2026-11-{day:02}T00-00-00Z_train_gpt_{len(list(folder.iterdir())):08x}.txt")
            paths[-1].write_text(text)
        return paths

    def add(self, paths: list[Path] | None = None, name: str = "Name", **options) -> Record:
        return add(self.repository, Args(tuple(paths or self.logs()), name=name, **{"by": "Somebody", **options}))

    def files(self) -> dict[str, bytes]:
        """Everything but the logs that were given."""
        return {str(path.relative_to(self.root)): path.read_bytes() for path in self.root.rglob("*")
                if path.is_file() and path.parent.name != "logs"}
