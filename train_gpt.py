"""
train_gpt.py: the speedrun Transformer, from tokens to a logged result in one file.

One block, for T packed tokens (documents end to end, cu_seqlens says where each begins) of width D and H heads:

    x   (T, D)  <- a x + b x0 + c x2            x0: the token's normalised embedding; x2: its and the last one's, hashed
    qkv (T, 3, H, D/H) = s W_qkv norm(x);  q, k <- rope(norm(q)), rope(norm(k));  v <- v + g * value_embedding(token)
    x   (T, D)  <- x + t W_out attention(q, k, v)               causal, inside the document, short or long window
    x   (T, D)  <- d x + W_down relu(W_up norm(x))^2            hidden width 4 D

Two layers add x0; three take some of v off what attention says; the last three's attention reads y, the stream after
the eighth. The loss is the cross-entropy of 23 sigmoid((W_head norm(x - e y) + 5) / 7.5), in training over some rows of
W_head, for two thirds of the run the embedding. Matrices learn by NorMuon, the rest by Adam, as in the public speedrun
(github.com/KellerJordan/modded-nanogpt). Last: 3.205 after 100M tokens of Wikipedia, see records/.
"""
import time

process_start = time.perf_counter()

import bisect
import contextlib
import gc
import hashlib
import importlib
import json
import math
import os
import platform
import re
import signal
import subprocess
import sys
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Literal, NamedTuple

os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # batches of changing size fragment less
os.environ.setdefault("FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED", "1")  # its kernels take 7 s to compile: once
gc.disable()  # until the clock starts: imports and tracing make objects that stay (0.5 s off the imports)

def start_beside() -> list[subprocess.Popen]:
    """Where there is an NVIDIA GPU, starts the processes that compile beside this one (Run.compile_beside)."""
    rank, per_machine = (int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("LOCAL_WORLD_SIZE", 1)))
    if "COMPILE_BESIDE" in os.environ or not os.path.exists("/dev/nvidiactl"):
        return []
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    return [subprocess.Popen([sys.executable, *sys.argv], env=os.environ | {"COMPILE_BESIDE": task}, **pipes)
            for task in ("blocks", "kernels", "optimiser")[:1 if rank % per_machine else 3]]

beside = start_beside() if __name__ == "__main__" else []  # now: they import torch, which takes 3 to 5 s

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import tyro
from torch import Tensor, nn
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_map_only

# ----------------------------------------------------------------------------------------------------------------------
# Setup [same]
# ----------------------------------------------------------------------------------------------------------------------
SCRIPT = Path(__file__).resolve()

class UserError(Exception):
    """Something the user can mend. Its text is one line: what is wrong and what to do. Rank 0 prints it; exit 2."""

class World:
    """The processes of this run, one per GPU as torchrun's environment says, or one alone; matrices are of `dtype`."""
    def __init__(self):
        self.rank, self.size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.gpu = torch.cuda.is_available()
        self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if self.gpu else torch.device("cpu")
        self.dtype = torch.bfloat16 if self.gpu else torch.float32
        if self.gpu:
            torch.cuda.set_device(self.device)
        if self.size > 1 and "COMPILE_BESIDE" not in os.environ:
            dist.init_process_group("nccl" if self.gpu else "gloo", device_id=self.device if self.gpu else None)

    def sum(self, tensor: Tensor) -> Tensor:
        """Adds `tensor` over the ranks, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def gather(self, tensor: Tensor) -> Tensor:
        """The ranks' tensors end to end, (ranks x N, ...) of (N, ...)."""
        whole = tensor if self.size == 1 else tensor.new_empty(self.size * len(tensor), *tensor.shape[1:])
        if self.size > 1:
            dist.all_gather_into_tensor(whole, tensor)
        return whole

    def mark(self) -> torch.cuda.Event | None:
        """On a GPU, the moment at which all work given to it so far is done."""
        return torch.cuda.current_stream().record_event(torch.cuda.Event(enable_timing=True)) if self.gpu else None

    def barrier(self):
        if self.gpu:
            torch.cuda.synchronize()
        if self.size > 1:
            dist.barrier()

def atomic_save(state: dict, path: Path):
    """torch.save under a temporary name, fsync, rename: `path` never holds a partial file."""
    with open(temporary := path.with_name(f".{path.name}.partial"), "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)

# ----------------------------------------------------------------------------------------------------------------------
# Data [same]
# ----------------------------------------------------------------------------------------------------------------------
def shard_tokens(path: Path) -> int:
    """The number of tokens in a shard, by its header: 256 int32 (20240520, version 1, tokens); uint16 tokens follow."""
    header, held = np.fromfile(path, np.int32, 256).tolist(), (path.stat().st_size - 1024) / 2
    if header[:3] != [20240520, 1, held] or not held:
        raise UserError(f"{path} holds {held:g} tokens and begins with {header[:3]}, not with 20240520, version 1 and "
                        "the number of tokens, at least 1: download it or make it again")
    return header[2]

class Dataset:
    """A folder of shards, `*_train_*.bin` and `*_val_*.bin`, with an optional dataset.json (GPT-2 BPE without one)."""
    def __init__(self, folder: str):
        self.folder = Path(folder)
        self.train, self.val = (sorted(self.folder.glob(f"*_{split}_*.bin")) for split in ("train", "val"))
        if not self.train or not self.val:
            raise UserError(f"no {'validation' if self.train else 'training'} shard in {folder}: get data with `python "
                            "data/fineweb.py` or data/tokenize_text.py, or try the sample: `./run.sh --preset sample`")
        described = self.folder / "dataset.json"
        self.about = {"name": self.folder.name, "tokenizer": "gpt2", "vocab_size": 50257, "document_separator": 50256}
        try:
            self.about |= json.loads(described.read_text()) if described.exists() else {}
            self.vocab_size, self.separator = int(self.about["vocab_size"]), int(self.about["document_separator"])
        except (ValueError, TypeError) as error:
            raise UserError(f"{described} is damaged ({error}): mend it, or make the dataset again") from error
        self.tokens = {path: shard_tokens(path) for path in self.train + self.val}
        digest = hashlib.sha256()  # of names, sizes, heads and tails: enough to tell whether two runs had the same data
        for path, tokens in self.tokens.items():
            shard = np.memmap(path, np.uint16, "r")
            digest.update(f"{path.name} {tokens}\n".encode() + shard[:1 << 15].tobytes() + shard[-1 << 15:].tobytes())
        self.fingerprint = digest.hexdigest()

    def read(self, path: Path, start: int, count: int) -> np.ndarray:
        """Tokens [start, start + count) of one shard, or fewer where it ends, uint16."""
        tokens = np.fromfile(path, dtype=np.uint16, count=count, offset=1024 + 2 * start)
        if tokens.max(initial=0) >= self.vocab_size:
            raise UserError(f"{path} has token {tokens.max()}: make it again, or correct vocab_size in dataset.json")
        return tokens

def cut_rows(tokens: np.ndarray, separator: int, rows: int, row_tokens: int, longest: int, tails: str):
    """Cuts the head of `tokens` into `rows` rows of pieces (start, length) of one document each. What is longer than
    `longest`, or than its row has room, is cut, and goes on as a new piece if tails "continue", is lost if they "drop".
    Returns (rows of pieces, tokens consumed), or None if `tokens` ends too soon."""
    starts = [*np.flatnonzero(tokens == separator).tolist(), len(tokens)]
    table, position = [], 0
    for _ in range(rows):
        pieces, room = [], row_tokens
        while room:
            end = starts[bisect.bisect_right(starts, position)]
            length = min(end - position, longest, room)
            if position + length == len(tokens) or (tails == "drop" and end == len(tokens)):
                return None  # the token after a piece is its last target; to drop a tail, its end must be in sight
            pieces.append((position, length))
            position = end if tails == "drop" else position + length
            room -= length
        table.append(pieces)
    return table, position

def pack(tokens: np.ndarray, pieces: list[tuple[int, int]], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Lays pieces of `tokens` end to end: (tokens (T,), targets (T,), cu_seqlens (pieces + 1, padded) int32)."""
    where = np.concatenate([np.arange(start, start + length) for start, length in pieces])
    borders = np.cumsum([0] + [length for _, length in pieces], dtype=np.int32)
    unit = 64 * max(1, len(where) // 16_384)  # filled up with empty documents: so shapes, and graphs, are few
    borders = np.pad(borders, (0, -len(borders) % unit), mode="edge")
    tensors = map(torch.from_numpy, (tokens[where].astype(np.int64), tokens[where + 1].astype(np.int64), borders))
    if device.type == "cuda":  # a copy from pinned memory does not wait for the GPU
        tensors = (tensor.pin_memory().to(device, non_blocking=True) for tensor in tensors)
    return tuple(tensors)

class TrainLoader:
    """Batches of packed documents from one endless stream, all training shards epoch after epoch: rows of `row_tokens`,
    the same for any number of ranks, of which each packs its part into micro-batches. To restore, set `position`."""
    def __init__(self, dataset: Dataset, world: World, row_tokens: int, micro_batch_tokens: int, tails: str):
        self.dataset, self.world, self.position = dataset, world, 0
        self.row_tokens, self.micro_batch_tokens, self.tails = row_tokens, micro_batch_tokens, tails
        *self.starts, self.epoch_tokens = np.cumsum([0] + [dataset.tokens[path] for path in dataset.train]).tolist()

    def read(self, position: int, count: int) -> np.ndarray:
        """Tokens [position, position + count) of the stream, uint16."""
        parts = []
        while count:
            offset = position % self.epoch_tokens
            index = bisect.bisect_right(self.starts, offset) - 1
            parts.append(self.dataset.read(self.dataset.train[index], offset - self.starts[index], count))
            position, count = position + len(parts[-1]), count - len(parts[-1])
        return np.concatenate(parts)

    def micro_batch_rows(self, batch_tokens: int) -> int:
        """The most rows that divide one rank's share of a batch and fit into a micro-batch."""
        share, fitting = batch_tokens // self.row_tokens // self.world.size, self.micro_batch_tokens // self.row_tokens
        return max(rows for rows in range(1, share + 1) if share % rows == 0 and rows <= max(1, fitting))

    def next(self, batch_tokens: int, longest: int) -> list[tuple[Tensor, Tensor, Tensor]]:
        """This rank's micro-batches of the next step, each (tokens, targets, cu_seqlens)."""
        rows, separator, cut, span = batch_tokens // self.row_tokens, self.dataset.separator, None, batch_tokens + 1
        while cut is None:
            tokens = self.read(self.position, span)
            cut = cut_rows(tokens, separator, rows, self.row_tokens, longest, self.tails)
            if cut is None and span > self.epoch_tokens and separator not in tokens:
                raise UserError(f"no document begins with {separator}: mend dataset.json, or --document-tails continue")
            span = span * 3 // 2
        table, consumed = cut
        self.position += consumed
        share, size = rows // self.world.size, self.micro_batch_rows(batch_tokens)
        mine = table[self.world.rank * share:(self.world.rank + 1) * share]
        return [pack(tokens, sum(mine[i:i + size], []), self.world.device) for i in range(0, share, size)]

def val_rows(dataset: Dataset, world: World, tokens: int, row_tokens: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """This rank's rows of the first `tokens` validation tokens; only the rows' borders cut documents."""
    available = sum(dataset.tokens[path] for path in dataset.val)
    if not 0 < row_tokens <= tokens < available or tokens % row_tokens:
        raise UserError(f"--val-tokens {tokens} must be a multiple of --val-row-tokens {row_tokens}, and less than the "
                        f"{available} tokens of the validation shards in {dataset.folder}")
    stream = np.concatenate([dataset.read(path, 0, tokens + 1) for path in dataset.val])[:tokens + 1]
    rows, _ = cut_rows(stream, dataset.separator, tokens // row_tokens, row_tokens, row_tokens, "continue")
    return [pack(stream, pieces, world.device) for pieces in rows[world.rank::world.size]]

# ----------------------------------------------------------------------------------------------------------------------
# Optimizer [same]
# ----------------------------------------------------------------------------------------------------------------------
@dataclass
class ParamGroup:
    """Parameters, by name, that learn alike. A Muon parameter of more than two dimensions is a stack of matrices."""
    method: Literal["muon", "adam", "rows"]  # rows: Adam without momentum, for the rows of a table that were looked up
    params: dict[str, nn.Parameter]
    lr: float
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.95)  # Adam
    every: int = 2  # Adam: update on every second step, with the gradients of both
    cautious: bool = True  # decay only where update and weight agree in sign (arXiv 2510.12402)
    tied_to: str = ""  # the parameter with which this group's only one shares gradients while the run is tied

POLAR_EXPRESS = ((8.156554524902461, -22.48329292557795, 15.878769915207462),
                 (4.042929935166739, -2.808917465908714, 0.5000178451051316),
                 (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
                 (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
                 (2.3465413258596377, -1.7097828382687081, 0.42323551169305323))

def polar_express(x: Tensor) -> Tensor:
    """About the nearest orthogonal matrix to each of a stack (n, rows, cols): Polar Express (arXiv 2505.16932)."""
    x = x / (x.norm(dim=(-2, -1), keepdim=True) * 1.02 + 1e-6)
    x = x.bfloat16() if x.is_cuda else x
    tall = x.size(-2) > x.size(-1)
    for a, b, c in POLAR_EXPRESS:
        gram = x.mT @ x if tall else x @ x.mT  # the smaller of the two
        gram = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, x, gram, beta=a) if tall else torch.baddbmm(x, gram, x, beta=a)
    return x

def normuon_update(weights, momentum, second, grad, lr, decay, mu):
    """NorMuon (arXiv 2510.05491): orthogonalised Nesterov momentum, every neuron's update of about the same size. In
    place. weights, momentum, grad (n, rows, cols); second (n, rows, 1) or (n, 1, cols); lr (n, 1, 1); rest 0-D."""
    grad = grad.float()
    momentum.lerp_(grad, 1 - mu)
    update = polar_express(grad.lerp(momentum, mu)).float()
    mean_square = update.square().mean(-1 if second.size(-1) == 1 else -2, keepdim=True)
    second.lerp_(mean_square, 1 - 0.9)
    scale = second.clamp_min(1e-10).rsqrt()  # per neuron; the update as a whole keeps its norm
    scale = scale * (mean_square.sum((1, 2), True) / (mean_square * scale**2).sum((1, 2), True).clamp_min(1e-10)).sqrt()
    update = update * scale
    weights.sub_(lr * (update + decay * weights * (update * weights >= 0)))

def adam_update(weights, first, second, grad, lr, decay, beta1, beta2, count, cautious: bool):
    """AdamW (arXiv 1711.05101): weights, moments and gradient (n,), the rest 0-D. In place."""
    grad = grad.float()
    first.lerp_(grad, 1 - beta1)
    second.lerp_(grad.square(), 1 - beta2)
    update = first / (1 - beta1**count) / ((second / (1 - beta2**count)).sqrt() + 1e-10)
    weights.sub_(lr * (update + decay * weights * (update * weights > 0 if cautious else 1.0)))

def row_update(weights, second, rows, grads, lr, decay, beta, count):
    """adam_update without momentum of rows (N,) of weights and second (V, D), fp32, by gradients (N, D), those of equal
    rows added up. In place. The kernel wants them sorted: so all ranks get the same bits."""
    if triton and weights.is_cuda:  # 196,608 tokens: with the sort 1.1 ms, by PyTorch 4.2 (H200)
        (rows, order), cols = rows.sort(stable=True), weights.size(1)
        return row_kernel[len(rows), triton.cdiv(cols, 256)](  # with 4 warps 3.6 ms
            weights, second, rows, order, grads, len(rows), lr, decay, beta, 1 - beta**count, cols, 256, num_warps=1)
    rows, place = rows.unique(return_inverse=True)
    grad = weights.new_zeros(len(rows), weights.size(1)).index_add_(0, place, grads.float())
    old, mean_square = weights[rows], second[rows].lerp(grad.square(), 1 - beta)
    update = grad / ((mean_square / (1 - beta**count)).sqrt() + 1e-10)
    second[rows], weights[rows] = mean_square, old - lr * (update + decay * old * (update * old > 0))

class Bank:
    """Parameters end to end in one buffer, `weights`, of which every rank owns, updates and sends out an equal part; it
    keeps that in fp32 (`master`), and moments (`state`). A step: reduce_scatter of `grads`, update, all_gather."""
    def __init__(self, world: World, params: dict[str, nn.Parameter], unit: int, every: int):
        """`unit`: elements to which the place of a parameter and the part of a rank are rounded up."""
        some = next(iter(params.values()))
        self.starts = np.cumsum([0] + [math.ceil(p.numel() / unit) * unit for p in params.values()]).tolist()
        self.world, self.every, self.used, self.pending, self.state = world, every, self.starts[-1], None, {}
        self.part = math.ceil(self.used / (unit * world.size)) * unit
        self.weights = torch.zeros(self.part * world.size, dtype=some.dtype, device=some.device)
        self.grads = torch.zeros_like(self.weights)
        for param, start in zip(params.values(), self.starts):
            place = slice(start, start + param.numel())
            self.weights[place] = param.data.flatten()
            param.data, param.grad = self.weights[place].view_as(param), self.grads[place].view_as(param)
        self.own = self.weights[world.rank * self.part:][:self.part]
        self.grad = torch.empty_like(self.own) if world.size > 1 else self.grads
        self.master = self.own.float()  # the very same memory if the weights are fp32

    def reset(self):
        self.master.copy_(self.own)
        torch._foreach_zero_([self.grads, *self.state.values()])

    def reduce(self):
        if self.world.size > 1:
            self.pending = dist.reduce_scatter_tensor(self.grad, self.grads, async_op=True)

    def gather(self):
        self.own.copy_(self.master)
        if self.world.size > 1:
            self.pending = dist.all_gather_into_tensor(self.weights, self.own.clone(), async_op=True)

    def wait(self):
        if self.pending:
            self.pending.wait()

    def state_dict(self) -> dict[str, Tensor]:
        """The whole bank on the CPU, the same for every number of ranks. All ranks take part."""
        whole = {"grads": self.world.sum(self.grads.clone())[:self.used].cpu()}  # those that wait for Adam's next turn
        for name, part in {"master": self.master, **self.state}.items():
            parts = part.new_zeros(self.world.size, part.numel())
            parts[self.world.rank] = part.flatten()
            whole[name] = self.world.sum(parts).flatten()[:self.used * part.numel() // self.part].cpu()
        return whole

    def load_state_dict(self, whole: dict[str, Tensor]):
        for name, part in {"master": self.master, **self.state}.items():
            saved = whole[name][self.world.rank * part.numel():][:part.numel()]
            part.view(-1)[:len(saved)] = saved
        self.grads[:self.used] = whole["grads"].to(self.grads.device) / self.world.size  # they are added up again
        self.gather()
        self.wait()

class MuonBank(Bank):
    """A bank of equal matrices (n, rows, cols). A rank owns whole ones, because Muon needs them whole."""
    def __init__(self, world: World, groups: dict[str, ParamGroup], params: dict[str, nn.Parameter], compile: bool):
        rows, cols = next(iter(params.values())).shape[-2:]
        super().__init__(world, params, unit=rows * cols, every=1)
        n, device = self.part // (rows * cols), self.weights.device
        self.state = {"momentum": torch.zeros(n, rows, cols, device=device),
                      "second": torch.zeros((n, rows, 1) if rows >= cols else (n, 1, cols), device=device)}
        lr, decay = torch.zeros(2, n * world.size, 1, 1)
        for (name, param), start in zip(params.items(), self.starts):
            place = slice(start // (rows * cols), (start + param.numel()) // (rows * cols))
            lr[place] = groups[name].lr * math.sqrt(max(1, rows / cols))  # tall ones move their output less
            decay[place] = groups[name].weight_decay
        self.lr, self.decay = (x.chunk(world.size)[world.rank].to(device) for x in (lr, decay))
        self.function = torch.compile(normuon_update, dynamic=False, fullgraph=True) if compile else normuon_update

    def update(self, count: int, lr: float, momentum: float):
        shape = self.state["momentum"].shape
        self.function(self.master.view(shape), *self.state.values(), self.grad.view(shape), self.lr * lr,
                      self.decay * lr, torch.tensor(momentum))

class AdamBank(Bank):
    """A bank of anything else, cut without regard to shapes, because Adam works element by element."""
    def __init__(self, world: World, groups: dict[str, ParamGroup], params: dict[str, nn.Parameter], compile: bool):
        self.group = groups[next(iter(params))]
        super().__init__(world, params, unit=128, every=self.group.every)  # kernels want aligned inputs
        self.state = {name: torch.zeros_like(self.master) for name in ("first", "second")}
        compile = compile and self.part > 2**20  # a graph for gates and scalars does not pay for its compilation
        self.function = torch.compile(adam_update, dynamic=True, fullgraph=True) if compile else adam_update

    def update(self, count: int, lr: float, momentum: float):
        numbers = (self.group.lr * lr, self.group.weight_decay * lr, *self.group.betas, float(count))
        self.function(self.master, *self.state.values(), self.grad, *map(torch.tensor, numbers), self.group.cautious)

class RowBank(Bank):
    """A table (V, D) of which a step looks up few rows and changes no others, whole on every rank, in fp32. Ranks send
    each other the gradients of their tokens' rows, not the table. Loss -0.006 (24M tokens, emulated)."""
    def __init__(self, world: World, groups: dict[str, ParamGroup], params: dict[str, nn.Parameter], compile: bool):
        (name, self.table), = params.items()
        super().__init__(SimpleNamespace(rank=0, size=1, sum=lambda x: x), params, unit=1, every=1)  # as if alone
        self.ranks, self.group, self.state = world, groups[name], {"second": torch.zeros_like(self.master)}
        self.table.looked_up, self.table.grad, self.grads, self.grad = [], None, *self.weights.new_empty(2, 0)

    def update(self, count: int, lr: float, momentum: float):
        tables = (x.view(self.table.shape) for x in (self.master, self.state["second"]))
        looked_up = (self.ranks.gather(torch.cat(parts)) for parts in zip(*self.table.looked_up))  # rows, gradients
        row_update(*tables, *looked_up, self.group.lr * lr, self.group.weight_decay * lr, self.group.betas[1], count)
        self.table.looked_up.clear()

class Optimizer:
    """NorMuon for stacks of matrices, Adam for the rest, in banks sharded over the ranks."""
    def __init__(self, groups: list[ParamGroup], world: World, compile: bool):
        stacks, group_of = {}, {name: group for group in groups for name in group.params}
        for i, group in enumerate(groups):
            for name, param in group.params.items():
                key = {"muon": (MuonBank, param.shape[-2:]), "adam": (AdamBank, i, param.dtype),
                       "rows": (RowBank, name)}[group.method]
                stacks.setdefault(key, {})[name] = param
        self.banks = {" ".join(params): kind(world, group_of, params, compile) for (kind, *_), params in stacks.items()}
        self.pairs = [(self.banks[" ".join(g.params)], self.banks[g.tied_to]) for g in groups if g.tied_to]

    def step(self, step: int, lr: float, momentum: float, tied: bool = False):
        """Updates the banks whose turn it is and clears their gradients. `lr` is the schedule's factor."""
        due = [bank for bank in self.banks.values() if (step + 1) % bank.every == 0]
        for bank, other in self.pairs:
            if tied and bank in due:  # both learn from the sum: equal at first, weights and moments stay equal
                other.grads.copy_(bank.grads.add_(other.grads))
        for bank in due:
            bank.reduce()
        for bank in due:  # while one bank is updated, the next one's gradients and the last one's weights travel
            bank.wait()
            bank.update((step + 1) // bank.every, lr, momentum)
            bank.gather()
        for bank in due:
            bank.wait()
            bank.grads.zero_()

# ----------------------------------------------------------------------------------------------------------------------
# Kernels [same]
# ----------------------------------------------------------------------------------------------------------------------
# A backend is a forward (q, k, v, *mask) -> (out, lse (H, T)) and a backward (dout, q, k, v, out, lse, *mask) -> (dq,
# dk, dv), with shapes as in varlen_attention; the mask is its other arguments, cu_seqlens and three numbers.

def reference_blocks(q, k, cu_seqlens, longest, window, scale, block=256):
    """Yields (queries, keys, scores (H, queries, keys)), `block` queries at a time; fp32, or fp64 for fp64 inputs."""
    q, k = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (q, k))
    index = torch.arange(len(q), device=q.device)
    first = cu_seqlens[torch.bucketize(index, cu_seqlens, right=True) - 1]  # where each token's document begins
    for start in range(0, len(q), block):
        queries = slice(start, min(start + block, len(q)))
        keys = slice(max(start - window + 1, first[start].item()), queries.stop)
        i, j = index[queries, None], index[None, keys]
        visible = (j <= i) & (j > i - window) & (j >= first[queries, None])
        scores = torch.einsum("qhd,khd->hqk", q[queries], k[keys]) * scale
        yield queries, keys, scores.masked_fill(~visible, -math.inf)

def reference_forward(q, k, v, *mask):
    out, lse = v.new_empty(v.shape), q.new_empty(q.shape[1::-1], dtype=torch.float32)
    for queries, keys, scores in reference_blocks(q, k, *mask):
        probs = scores.softmax(-1)
        out[queries] = torch.einsum("hqk,khd->qhd", probs, v[keys].to(probs.dtype)).to(v.dtype)
        lse[:, queries] = scores.logsumexp(-1)
    return out, lse

def reference_backward(dout, q, k, v, out, lse, *mask):
    dout, q, k, v, out = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (dout, q, k, v, out))
    dq, dk, dv = (torch.zeros_like(x) for x in (q, k, v))
    for queries, keys, scores in reference_blocks(q, k, *mask):
        probs, douts = scores.softmax(-1), dout[queries]
        dv[keys] += torch.einsum("hqk,qhd->khd", probs, douts)
        dprobs = torch.einsum("qhd,khd->hqk", douts, v[keys])
        dscores = probs * (dprobs - (douts * out[queries]).sum(-1).T[..., None]) * mask[-1]
        dq[queries] = torch.einsum("hqk,khd->qhd", dscores, k[keys])
        dk[keys] += torch.einsum("hqk,qhd->khd", dscores, q[queries])
    return dq, dk, dv

def flash_attn_options(borders, longest, window, scale) -> dict:
    return dict(cu_seqlens_q=borders, cu_seqlens_k=borders, max_seqlen_q=longest, max_seqlen_k=longest, causal=True,
                softmax_scale=scale, window_size_left=window - 1, window_size_right=0)

def flash_attn_forward(q, k, v, *mask):
    from flash_attn.cute.interface import _flash_attn_fwd
    return _flash_attn_fwd(q, k, v, return_lse=True, **flash_attn_options(*mask))[:2]

def flash_attn_backward(dout, q, k, v, out, lse, *mask):
    from flash_attn.cute.interface import _flash_attn_bwd
    return _flash_attn_bwd(q, k, v, out, dout, lse, **flash_attn_options(*mask))[:3]

def torch_forward(q, k, v, borders, longest, window, scale):  # what torch.nn.attention.varlen.varlen_attn calls
    return torch.ops.aten._flash_attention_forward(q, k, v, borders, borders, longest, longest, 0.0, False, False,
                                                   scale=scale, window_size_left=window - 1, window_size_right=0)[:2]

def torch_backward(dout, q, k, v, out, lse, borders, longest, window, scale):
    no_dropout = torch.zeros(2, dtype=torch.uint64, device=q.device), torch.empty(0, device=q.device)
    return torch.ops.aten._flash_attention_backward(
        dout, q, k, v, out, lse, borders, borders, longest, longest, 0.0, False, *no_dropout, scale=scale,
        window_size_left=window - 1, window_size_right=0)

ATTENTION_BACKENDS = {  # fastest first: (forward, backward, module that must import, oldest GPU that will do)
    "flash-attn-4": (flash_attn_forward, flash_attn_backward, "flash_attn.cute.interface", (9, 0)),
    "torch": (torch_forward, torch_backward, "torch", (8, 0)),
    "reference": (reference_forward, reference_backward, "torch", (0, 0))}
attention_forward, attention_backward = reference_forward, reference_backward

def choose_attention(name: str, device: torch.device) -> str:
    """Puts the backend `name` into use, or for "auto" the fastest one that runs on `device`. Returns its name."""
    global attention_forward, attention_backward
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)
    for candidate in ATTENTION_BACKENDS if name == "auto" else [name]:
        attention_forward, attention_backward, module, oldest = ATTENTION_BACKENDS[candidate]
        reason = f"needs a GPU of compute capability {oldest[0]}.{oldest[1]}"
        try:
            if capability >= oldest:
                importlib.import_module(module)
                return candidate
        except Exception as error:  # a package built for another torch or CUDA may raise anything
            reason = f"does not import ({type(error).__name__}: {' '.join(str(error).split())})"
    raise UserError(f"--attention {name} {reason}: leave it at auto, or choose another")

@torch.library.custom_op(f"{SCRIPT.stem}::attention", mutates_args=())  # named by script: a test imports two
def attention_op(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: Tensor, window: Tensor,
                 scale: Tensor) -> tuple[Tensor, Tensor]:
    return attention_forward(q, k, v, cu_seqlens, max_seqlen.item(), window.item(), scale.item())

@torch.library.custom_op(f"{SCRIPT.stem}::attention_backward", mutates_args=())
def attention_backward_op(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, cu_seqlens: Tensor,
                          max_seqlen: Tensor, window: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    mask = cu_seqlens, max_seqlen.item(), window.item(), scale.item()
    grads = attention_backward(dout.contiguous(), q, k, v, out, lse, *mask)
    return tuple(grad.to(x.dtype).contiguous() for grad, x in zip(grads, (q, k, v)))

attention_op.register_fake(lambda q, k, v, *_: (v.new_empty(v.shape), q.new_empty(q.shape[1::-1], dtype=torch.float)))
attention_backward_op.register_fake(lambda dout, q, k, v, *_: tuple(x.new_empty(x.shape) for x in (q, k, v)))
attention_op.register_autograd(
    lambda ctx, dout, dlse: (*attention_backward_op(dout, *ctx.saved_tensors), None, None, None, None),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs[:3], *output, *inputs[3:]))

def varlen_attention(q, k, v, cu_seqlens, max_seqlen, window, scale) -> Tensor:
    """Causal attention in each of the packed documents, q, k (T, H, D), v (T, H, Dv) -> (T, H, Dv), whose borders, 0
    to T, are cu_seqlens (documents + 1,) int32. max_seqlen: a bound on their length. A query sees `window` keys, its
    own last. scale: of the scores. The last three, as 0-D CPU tensors, are no part of a compiled graph."""
    max_seqlen, window, scale = (torch.as_tensor(x) for x in (max_seqlen, window, scale))
    return attention_op(q, k, v, cu_seqlens, max_seqlen, window, scale)[0]

triton = gemm_act = None  # what does not import, plain PyTorch does
try:
    import triton
    import triton.language as tl
    if torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0):
        from quack.gemm_interface import gemm_act, gemm_dact  # it comes with flash-attn-4
except Exception:  # torch without CUDA, or a package built for another torch or CUDA, which may raise anything
    gemm_act = None

if triton:
    @triton.jit
    def softcap_loss_kernel(logits, targets, weights, counts, losses, VOCAB: tl.constexpr, AHEAD: tl.constexpr,
                            BLOCK: tl.constexpr):
        """A program is a row of logits (T, VOCAB), which it reads for the sum of exponentials and then overwrites with
        the loss's gradient. Targets and weights (T, AHEAD), counts (2,), losses (T,)."""
        row = tl.program_id(0).to(tl.int64)
        logits, targets, weights = logits + row * VOCAB, targets + row * AHEAD, weights + row * AHEAD
        sums, known, others = tl.zeros((BLOCK,), tl.float32), tl.load(counts), tl.load(counts + 1)
        weight_sum, chosen = 0.0, 0.0
        for k in tl.static_range(AHEAD):
            capped = 23 * tl.sigmoid((tl.load(logits + tl.load(targets + k)).to(tl.float32) + 5) / 7.5)
            weight_sum, chosen = weight_sum + tl.load(weights + k), chosen + tl.load(weights + k) * capped
        for start in range(0, VOCAB, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            cap = tl.sigmoid((tl.load(logits + columns, columns < VOCAB, -float("inf")).to(tl.float32) + 5) / 7.5)
            sums += tl.where(columns < VOCAB, tl.exp(23 * cap), 0.0) * tl.where(columns < known, 1.0, others)
        total = tl.sum(sums, 0)
        tl.store(losses + row, weight_sum * tl.log(total) - chosen)
        for start in range(0, VOCAB, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            cap = tl.sigmoid((tl.load(logits + columns, columns < VOCAB, 0.0).to(tl.float32) + 5) / 7.5)
            grad = weight_sum * tl.exp(23 * cap) * tl.where(columns < known, 1.0, others) / total
            for k in tl.static_range(AHEAD):
                grad -= tl.where(columns == tl.load(targets + k), tl.load(weights + k), 0.0)
            tl.store(logits + columns, grad * cap * (1 - cap) * (23 / 7.5), columns < VOCAB)

    @triton.jit
    def row_kernel(weights, second, rows, order, grads, tokens, lr, decay, beta, correction, COLS, BLOCK: tl.constexpr):
        """row_update, in BLOCK columns, of a row that begins at a place of sorted rows; order: whose gradient it is"""
        begin, columns = tl.program_id(0), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        row = tl.load(rows + begin)
        if tl.load(rows + begin - 1, begin > 0, -1) != row:
            grad, inside, at = tl.zeros((BLOCK,), tl.float32), columns < COLS, row * COLS + columns
            while tl.load(rows + begin, begin < tokens, -1) == row:  # 16 at a time: some rows stand there 2,000 times
                places, begin = begin + tl.arange(0, 16), begin + 16
                same = tl.load(rows + places, places < tokens, -1) == row
                source = grads + tl.load(order + places, same, 0)[:, None] * COLS + columns[None, :]
                grad += tl.sum(tl.load(source, same[:, None] & inside[None, :], 0.0).to(tl.float32), 0)
            old, square = tl.load(weights + at, inside), beta * tl.load(second + at, inside) + (1 - beta) * grad * grad
            update = grad / (tl.sqrt(square / correction) + 1e-10)
            tl.store(second + at, square, inside)
            tl.store(weights + at, old - lr * (update + decay * tl.where(update * old > 0, old, 0.0)), inside)

class SoftcapLoss(torch.autograd.Function):
    """Model.loss behind its norm. Logits become their own gradient: 28.6 ms for 65,536 x 50,304, not 37.4 (H100)."""
    @staticmethod
    def forward(ctx, x, head, targets, weights, counts):
        logits, losses = F.linear(x, head), torch.empty(len(x), device=x.device)
        softcap_loss_kernel[len(x),](logits, targets, weights, counts, losses, len(head), targets.size(1), BLOCK=2048)
        ctx.save_for_backward(x, head, logits)
        return losses.sum()

    @staticmethod
    def backward(ctx, dloss):
        x, head, grad = ctx.saved_tensors
        return (dloss * (grad @ head)).to(x.dtype), (dloss * (grad.T @ x)).to(head.dtype), None, None, None

class Lookup(torch.autograd.Function):
    """Rows (T,) of a table (V, D) -> (T, D). The gradient goes to the table's RowBank, or straight into table.grad: for
    50,304 rows 0.58 ms, not 0.95 for one as large as the table (65,536 tokens, H100), and 2% off in bf16."""
    @staticmethod
    def forward(ctx, table, rows):
        ctx.table = table
        ctx.save_for_backward(rows)
        return F.embedding(rows, table).to(torch.bfloat16 if table.is_cuda else table.dtype)

    @staticmethod
    def backward(ctx, grad):
        if hasattr(ctx.table, "looked_up"):
            ctx.table.looked_up.append((*ctx.saved_tensors, grad))
            return None, None
        total = torch.zeros_like(ctx.table) if ctx.table.grad is None else ctx.table.grad
        total.index_add_(0, *ctx.saved_tensors, grad.to(total.dtype))
        return None if total is ctx.table.grad else total, None

class FusedMLP(torch.autograd.Function):
    """mlp() by quack, whose products do the activation: the first takes 0.42 ms, not 0.82 (65,536 tokens, H100)."""
    @staticmethod
    def forward(ctx, x, up, down):
        preact, hidden = gemm_act(x, up.T, activation="relu_sq", tuned=False)
        ctx.save_for_backward(x, up, down, preact)
        return hidden @ down

    @staticmethod
    def backward(ctx, dout):
        x, up, down, preact = ctx.saved_tensors
        dpreact, hidden = gemm_dact(dout.contiguous(), down.T, preact, activation="relu_sq", tuned=False)
        return dpreact @ up, dpreact.T @ x, hidden.T @ dout

def mlp(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """relu(x @ up.T)^2 @ down: x (T, D), up and down (W, D) -> (T, D)."""
    fused = gemm_act and x.is_cuda and x.dtype == torch.bfloat16
    return FusedMLP.apply(x, up, down) if fused else F.linear(x, up).relu().square() @ down

# ----------------------------------------------------------------------------------------------------------------------
# Architecture
# ----------------------------------------------------------------------------------------------------------------------
class StageInputs(NamedTuple):
    """A stage's numbers, as tensors, so that compiled code serves all stages; the first four on the CPU."""
    max_seqlen: Tensor
    short_window: Tensor
    long_window: Tensor
    scale: Tensor  # of the attention scores
    frequencies: Tensor  # (head_dim / 4,), of the rotary embedding, radians per token
    loss_weights: Tensor  # (tokens ahead,)
    candidates: int  # rows of the head that the loss knows
    batch_tokens: int  # of a step

def norm(x: Tensor) -> Tensor:
    """RMSNorm without gain over the last dimension."""
    return F.rms_norm(x, (x.size(-1),))

def scaled(scalar: Tensor, x: Tensor) -> Tensor:
    """`scalar` times x (T, D), in fp32. A column gets its gradient in the norm's kernel: steps 0.5% shorter."""
    return scalar.expand(len(x), 1) * x

def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding (arXiv 2104.09864) of half of each head, (T, H, D) by cos and sin (T, 1, D / 4)."""
    a, b, rest = x.split([x.size(-1) // 4, x.size(-1) // 4, x.size(-1) // 2], dim=-1)
    return torch.cat([(a * cos - b * sin).to(x.dtype), (a * sin + b * cos).to(x.dtype), rest], dim=-1)

def yarn(windows: list[int], head_dim: int) -> tuple[float, Tensor]:
    """(score scale, rotary frequencies (head_dim / 4,)) after long `windows`, by YaRN (arXiv 2309.00071): as they grow,
    what turned less than once in one is slowed down to fit, and scores are sharpened: loss -0.005 (24M tokens)."""
    scale, frequencies = 0.1, (1 / 1024) ** torch.linspace(0, 1, head_dim // 4, dtype=torch.float64)
    for old, new in zip(windows, windows[1:]):
        keep = ((old * frequencies / (2 * math.pi) - 1) / 31).clamp(0, 1)
        frequencies = frequencies * (old / new + keep * (1 - old / new))
        scale *= 1 + 0.2 * math.log(new / old)
    return scale, frequencies.float()

class Block(nn.Module):
    """One layer, which has what the letters of its word in --layers say."""
    def __init__(self, word: str, args: "Hyperparameters", vocab_size: int, dtype: torch.dtype, ends: bool):
        super().__init__()
        self.args, self.ends, dim = args, ends, args.model_dim  # the layer that ends all takes off what is held
        self.attends, self.long, self.injects, self.valued, self.late = "-" not in word, *(c in word for c in "levh")
        self.paired, self.offset, self.exclusive, self.holds = (c in word for c in "pox=")
        small = {"residual": True, "mlp_residual": True, "inject": self.injects, "bigram_gate": args.bigram_rows,
                 "in_scale": self.attends, "out_scale": self.attends, "own_gate": self.exclusive, "backout": ends}
        for name in (name for name, used in small.items() if used):
            self.register_parameter(name, nn.Parameter(torch.empty(args.num_heads if name == "own_gate" else ())))
        self.up, self.down = (nn.Parameter(torch.empty(4 * dim, dim, dtype=dtype)) for _ in range(2))
        if self.attends:
            self.qkv, self.out = (nn.Parameter(torch.empty(*n, dim, dim, dtype=dtype)) for n in ((3,), ()))
        if self.valued:
            self.value_table = nn.Parameter(torch.empty(vocab_size, dim, dtype=dtype))
            self.value_gate = nn.Parameter(torch.empty(args.num_heads, 12))

    def attention(self, x, values, position, cos, sin, cu_seqlens, max_seqlen, window, scale) -> Tensor:
        qkv, out = self.in_scale * self.qkv.flatten(0, 1), self.out_scale * self.out  # q, k are normed: v's
        q, k, v = F.linear(x, qkv).view(len(x), 3, self.args.num_heads, -1).unbind(1)  # (T, H, D / H)
        q, k = norm(q), norm(k)
        if self.valued:  # what a token says whatever its context; a gate per head, 1 at first
            gate = 2 * torch.sigmoid(torch.cat([x[:, :6], values[:, :6]], 1) @ self.value_gate.T.to(x.dtype))
            v = v + gate[..., None] * values.view_as(v)
        if self.offset:  # the half that is not rotated: so one layer can find what followed
            turning, still = k.chunk(2, -1)
            k = torch.cat([turning, torch.where(position[:, None, None] > 0, still.roll(1, 0), still)], -1)
        if self.paired:  # heads h and h + H / 2 are one of twice the length, and see each other's keys
            q, k, v = (y.reshape(2 * len(x), -1, y.size(-1)) for y in (q, k, v))
            cu_seqlens = 2 * cu_seqlens
        y = varlen_attention(rotate(q, cos, sin), rotate(k, cos, sin), v, cu_seqlens, max_seqlen, window, scale)
        if self.exclusive:  # what a head says of the token itself the stream knows: it loses a part of that
            y, v = (z.reshape(len(x), self.args.num_heads, -1).float() for z in (y, v))
            y = y - self.own_gate.tanh()[:, None] * (y * v).sum(-1, True) / v.square().sum(-1, True).clamp_min(1e-8) * v
        return F.linear(y.reshape(len(x), -1).to(x.dtype), out)

    def forward(self, x, x0, bigram, held, *inputs) -> Tensor:
        """x, x0 and, where they are used, bigram, held (T, D); inputs: the others of `attention`. -> (T, D)"""
        x = scaled(self.residual, x)
        if self.injects:
            x = x + scaled(self.inject, x0)
        if bigram is not None:
            x = x + scaled(self.bigram_gate, bigram)
        x = x.to(x0.dtype)
        if self.attends:
            x = x + self.attention(norm(held if self.late else x), *inputs)
        x = scaled(self.mlp_residual, x) + mlp(norm(x), self.up, self.down)
        return (x + scaled(self.backout, held) if self.ends else x).to(x0.dtype)

class Model(nn.Module):
    """A decoder with a layer for each word of `args.layers`; takes (tokens, targets, cu_seqlens, stage)."""
    def __init__(self, args: "Hyperparameters", vocab_size: int, device: torch.device, dtype: torch.dtype):
        super().__init__()
        words, dim = args.layers.split(), args.model_dim
        if not words or not all(re.fullmatch("([sl]e?v?h?p?o?x?|-e?)=?", word) for word in words) or (
                not re.fullmatch("(=h*)?", re.sub("[^=h]", "", args.layers)) or "=" in words[-1]):
            raise UserError(f'--layers "{args.layers}" must be words s, l or -, then e, then for s or l v, h, p, o, x '
                            "in this order, one before the last with =, later ones with h")
        if dim < 16 or args.num_heads < 1 or dim % (8 * args.num_heads) or ("p" in args.layers and args.num_heads % 2):
            raise UserError(f"--model-dim {dim} must be 16 or more, 8n x --num-heads {args.num_heads} (even for p)")
        if args.bigram_rows < 0 or args.bigram_rows == 1:
            raise UserError(f"--bigram-rows {args.bigram_rows} must be 2 or more, or 0 for none")
        self.args, self.vocab_size = args, math.ceil(vocab_size / 128) * 128  # padded: kernels like round numbers
        with torch.device(device):
            self.embedding, self.head = (nn.Parameter(torch.empty(self.vocab_size, dim, dtype=dtype)) for _ in range(2))
            if args.bigram_rows:
                self.bigram_table = nn.Parameter(torch.empty(args.bigram_rows, dim))
                bits = torch.randint(2, (8192, dim), generator=torch.Generator().manual_seed(0), device="cpu")
                self.register_buffer("signs", (2 * bits - 1).to(device, dtype), persistent=False)
            ends = [False] * (len(words) - 1) + ["=" in args.layers]
            self.blocks = nn.ModuleList(Block(word, args, self.vocab_size, dtype, e) for word, e in zip(words, ends))
        self.windows = [(args.stages[-1].windows[block.long], 1 + block.paired)  # and how often a token stands there
                        for block in self.blocks if block.attends]

    @torch.no_grad()
    def initialise(self, seed: int):
        """Uniform matrices of std 0.5 / sqrt(columns), zero outputs of MLPs."""
        torch.manual_seed(seed)
        for name, param in self.named_parameters():
            if name.endswith((".qkv", ".out", ".up")):
                nn.init.uniform_(param, -(bound := 0.5 * math.sqrt(3 / param.size(-1))), bound)
            elif name.endswith(("embedding", ".value_table")):
                nn.init.normal_(param, std=1.0 if name == "embedding" else 0.01)
            else:
                special = {"bigram_gate": 0.05, "in_scale": 0.5, "out_scale": 1.0, "backout": -0.5}
                nn.init.constant_(param, 1.1**0.5 if "residual" in name else special.get(name.split(".")[-1], 0.0))
        if self.args.tied_until:
            self.embedding.copy_(nn.init.normal_(self.head, std=0.005))

    def bigram(self, tokens: Tensor, position: Tensor) -> Tensor:
        """(T, D): a token and the one before in its document share a row of a table by a hash, told apart by signs."""
        before, last = torch.where(position > 0, tokens.roll(1), 0), len(self.bigram_table) - 1
        row = torch.where(position > 0, (36313 * tokens ^ 27191 * before) % last, last)  # first tokens share the last
        return Lookup.apply(self.bigram_table, row) * self.signs[(tokens ^ before) % len(self.signs)]

    def hidden(self, tokens: Tensor, cu_seqlens: Tensor, stage: StageInputs) -> tuple[Tensor, Tensor]:
        """tokens (T,) -> the stream after the last layer (T, D), position in the document (T,)."""
        index = torch.arange(len(tokens), device=tokens.device)
        position = index - cu_seqlens[torch.bucketize(index, cu_seqlens, right=True) - 1]
        places = []
        for n in (1, 2):  # slots of a token in the sequence: where heads are paired it has two
            angle = (n * position[:, None] + torch.arange(n, device=tokens.device)).view(-1, 1, 1) * stage.frequencies
            places.append((position, angle.cos(), angle.sin(), cu_seqlens, n * stage.max_seqlen))
        x0 = norm(Lookup.apply(self.embedding, tokens))
        bigram = self.bigram(tokens, position) if self.args.bigram_rows else None
        x, held = x0.view_as(x0), None  # a block given one tensor twice would compile apart: so, two views
        for block in self.blocks:
            window = stage.long_window if block.long else stage.short_window
            values = Lookup.apply(block.value_table, tokens) if block.valued else None
            x = block(x, x0, bigram, held if block.late or block.ends else None, values, *places[block.paired], window,
                      stage.scale)
            held = x.view_as(x) if block.holds else held
        return x, position

    def logits(self, x: Tensor, head: Tensor | None = None) -> Tensor:
        """(T, D) -> (T, vocabulary), fp32, between 0 and 23; or (T, rows) with some rows of the head, (rows, D)."""
        return 23 * torch.sigmoid((F.linear(norm(x), self.head if head is None else head).float() + 5) / 7.5)

    def candidates(self, targets: Tensor, turn: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """Sampled softmax (arXiv 1412.2007): rows of the head (count,) that score a micro-batch, its targets and then
        others by turns; the place of every row among them, (vocabulary,), -1 for none; and (2,) how many are targets,
        and how much one of the others counts: the root of how many it stands for, between bias and noise."""
        every = torch.arange(self.vocab_size, device=targets.device)
        order = ((10007 * every + turn) % self.vocab_size).index_fill(0, targets.flatten(), -1)
        rows, known = order.argsort()[:count], (order < 0).sum().float()
        others = ((self.vocab_size - known) / (count - known).clamp(min=1)).sqrt()
        return rows, torch.full_like(every, -1).index_copy(0, rows, every[:count]), torch.stack([known, others])

    def loss(self, head: Tensor, counts: Tensor, x: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
        """Cross-entropy of x (T, D) for targets (T, ahead), rows of `head`, by weights (T, ahead), summed, 0-D fp32."""
        if triton and x.is_cuda:
            return SoftcapLoss.apply(norm(x), head, targets, weights, counts)
        others = torch.where(torch.arange(len(head), device=x.device) < counts[0], 0.0, counts[1].log())
        logits, pairs = self.logits(x, head) + others, zip(targets.unbind(1), weights.unbind(1))
        return sum(weight @ F.cross_entropy(logits, target, reduction="none") for target, weight in pairs)

    def forward(self, tokens: Tensor, targets: Tensor, cu_seqlens: Tensor, stage: StageInputs) -> Tensor:
        """tokens, targets (T,), cu_seqlens (documents + 1,) -> the summed loss, 0-D fp32. A token also predicts those
        after its target, if of its document, by the stage's loss weights: multi-token prediction (arXiv 2404.19737)."""
        x, position = self.hidden(tokens, cu_seqlens, stage)
        ahead = range(len(stage.loss_weights))
        later = torch.stack([targets.roll(-k) for k in ahead], 1)
        weights = stage.loss_weights * torch.stack([position.roll(-k) == position + k for k in ahead], 1)
        rows, place, counts = self.candidates(later, tokens.sum(), stage.candidates)  # the sum: another at every step
        weights, later = weights * (place[later] >= 0), place[later].clamp(min=0)  # those that had a place
        return self.loss(Lookup.apply(self.head, rows), counts, x, later, weights)

    def stage_inputs(self, index: int, validation: bool = False) -> StageInputs:
        """The tensors of stage `index`, or those to validate with in it."""
        args, stage = self.args, self.args.stages[index]
        if validation:
            stage = replace(stage, document_tokens=args.val_row_tokens, windows=args.val_windows, loss_weights=(1.0,),
                            candidates=0)
        scale, frequencies = yarn([row.windows[1] for row in args.stages[:index + 1]], args.model_dim // args.num_heads)
        numbers = (torch.tensor(x) for x in (stage.document_tokens, *stage.windows, scale))
        on_device = (x.to(self.head.device) for x in (frequencies, torch.tensor(stage.loss_weights)))
        candidates = stage.candidates if 0 < stage.candidates < self.vocab_size else self.vocab_size
        return StageInputs(*numbers, *on_device, candidates, stage.batch_tokens)

    def param_groups(self) -> list[ParamGroup]:
        """Which parameter learns how, by name; the largest first, because nothing hides what travels last."""
        args, named = self.args, dict(self.named_parameters())
        def like(*endings: str) -> dict[str, nn.Parameter]:
            return {name: named.pop(name) for name in list(named) if name.endswith(endings)}
        head = ParamGroup("adam", like("head"), args.head_lr, args.head_weight_decay, (0.5, 0.95))
        scalars = like("residual", ".inject", "_scale", "backout")
        groups = [ParamGroup("muon", like(".qkv", ".out", ".up"), args.muon_lr, args.muon_weight_decay),
                  ParamGroup("muon", like(".down"), 2 * args.muon_lr, args.muon_weight_decay),
                  ParamGroup("rows", like("bigram_table"), args.bigram_lr, args.value_weight_decay, (0.0, 0.95)),
                  ParamGroup("adam", like(".value_table"), args.value_lr, args.value_weight_decay, (0.75, 0.95)),
                  head, replace(head, params=like("embedding"), tied_to="head" if args.tied_until else ""),
                  ParamGroup("adam", like("_gate"), args.gate_lr, 0.0, (0.9, 0.99)),
                  ParamGroup("adam", scalars, args.scalar_lr, 0.0, (0.9, 0.99))]
        assert not named, f"no group for {list(named)}"
        return [group for group in groups if group.params]

    def num_params(self) -> dict[str, int]:
        """Parameters: all, those in matrix products (what a FLOP count needs), those looked up in tables."""
        sizes = {name: p.numel() for name, p in self.named_parameters() if p.ndim > 1}
        tables = sum(size for name, size in sizes.items() if name.endswith(("embedding", "_table")))
        total = sum(p.numel() for p in self.parameters())
        return {"total": total, "matmul": sum(sizes.values()) - tables, "tables": tables}

    def flops_per_token(self, context: int) -> float:
        """Training FLOPs per token in documents of `context` tokens: 6 a matrix weight, 12 a key seen and channel."""
        spans = [(min(window, slots * context), slots * context) for window, slots in self.windows]
        seen = sum((w * (w + 1) / 2 + (length - w) * w) / length for w, length in spans)
        return 6 * self.num_params()["matmul"] + 12 * self.args.model_dim * seen

    def cache_bytes(self, context: int) -> int:
        """Bytes of keys and values, in bf16, that decoding keeps after `context` tokens."""
        return sum(4 * self.args.model_dim * min(math.ceil(window / slots), context) for window, slots in self.windows)

# ----------------------------------------------------------------------------------------------------------------------
# Hyperparameters
# ----------------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Stage:
    """A row of the stage table: all that changes during a run."""
    steps: float  # part of the run's steps
    batch_tokens: int  # tokens per step, over all ranks
    document_tokens: int  # longer documents are cut
    windows: tuple[int, int]  # short and long attention window, in tokens
    lr: float  # learning-rate factor before the cooldown
    loss_weights: tuple[float, ...]  # of predicting 1, 2, ... tokens ahead; move to the next row's during the stage
    candidates: int = 0  # rows of the head in the training loss (0: all); 16,384: -17.6% time, loss +0.006 (24M)

@dataclass
class Hyperparameters:
    """Flags. Learning rates and decays are multiplied by the schedule's factor; decays but AdamW's are cautious."""
    preset: Literal["speedrun", "short", "sample"] = "speedrun"  # defaults: for 640M tokens, for 100M, or for a CPU
    data: str = "data/fineweb10B"  # folder of token shards
    seed: int = 0  # of the initial weights
    max_tokens: int = 640_000_000  # tokens to train on; the stages, the cooldown and the momentum stretch with it
    target: float = 3.28  # validation loss to reach, nats per token
    val_tokens: int = 10_485_760  # the first so many validation tokens are the validation set
    val_row_tokens: int = 65_536  # validation tokens in a forward pass; such rows cut documents, so the loss changes
    val_every: int = 125  # steps between validations, which are not timed (0: only at the end)
    optimizer: Literal["muon", "adamw"] = "muon"  # adamw: for everything, as architecture papers have it
    attention: Literal["auto", "flash-attn-4", "torch", "reference"] = "auto"  # backend
    compile: bool = field(default_factory=torch.cuda.is_available)  # torch.compile; by default on a GPU
    out: str = "logs"  # folder for the run's log
    checkpoint: str | None = None  # folder for checkpoints, the newest stays; without it only SIGTERM saves, in --out
    save_every: int = 0  # steps between checkpoints (0: only at the end)
    resume: str | None = None  # checkpoint to go on from, with the flags of the run that wrote it
    row_tokens: int = 16_384  # tokens in a row of packed documents; a batch is whole rows, shared out to the ranks
    micro_batch_tokens: int = 65_536  # most tokens in one forward and backward pass of a rank: less needs less memory
    document_tails: Literal["continue", "drop"] = "drop"  # rest of a cut document: a new piece, or lost (-0.04 at 20M)
    stages: tuple[Stage, Stage, Stage, Stage] = (
        Stage(423 / 1285, 131_072, 896, (128, 384), 1.0, (1.0, 0.5, 0.25), 16_384),
        Stage(424 / 1285, 262_144, 2048, (384, 896), 1.52, (1.0, 0.5), 16_384),
        Stage(348 / 1285, 393_216, 2048, (640, 1408), 1.73, (1.0,), 16_384),
        Stage(90 / 1285, 393_216, 2048, (768, 1664), 1.73, (1.0,)))
    val_windows: tuple[int, int] = (768, 2560)  # short and long attention window at validation
    layers: str = "sep svp svp lox sx sep - sx= svh svh lvho"
    """a word per layer: s or l attends with the short or long window, - does not, e adds the token's embedding (in two
    layers, not all: steps 1.8% shorter, loss -0.002 at 24M tokens), v has a value embedding, = holds the stream after
    the layer and takes a learned part of it off at the end (backout: -0.017 at 16M), h has attention read the held one
    (late input: -0.023), p makes of two heads one that sees both their keys in half the window, o puts the unrotated
    half of a key one token on (with p -0.209), x takes off a learned part of the token's own value (-0.004 at 100M)"""
    model_dim: int = 768  # width of the residual stream
    num_heads: int = 6  # attention heads
    bigram_rows: int = 377_280  # of the table of hashed pairs of tokens (0: none): loss -0.078 (20M tokens)
    tied_until: float = 0.667  # part of the run in which embedding and head are one matrix (0: never): -0.254 (16M)
    cooldown: tuple[float, float] = (0.395, 0.988)  # parts of the run where the learning rate begins and ends its fall
    lr_floor: float = 0.15  # learning-rate factor after the cooldown
    muon_lr: float = 0.023  # matrices, times sqrt(rows / columns) if tall; the MLP's output twice that
    muon_weight_decay: float = 0.0276  # matrices
    muon_momentum: tuple[float, float] = (0.85, 0.95)  # Muon's momentum at the ends of the run, and in between
    muon_ramps: tuple[float, float] = (0.233, 0.039)  # parts of the run in which the momentum rises, and falls
    head_lr: float = 0.008  # output head and token embedding, Adam
    head_weight_decay: float = 0.006  # output head and token embedding
    value_lr: float = 0.6  # value embeddings, Adam
    value_weight_decay: float = 0.015  # value embeddings and bigram table
    bigram_lr: float = 0.9  # bigram table, Adam without momentum
    gate_lr: float = 0.008  # gates, Adam
    scalar_lr: float = 0.04  # scalars of the residual stream, Adam
    adamw_lr: float = 0.002  # everything, with --optimizer adamw
    adamw_weight_decay: float = 0.1  # matrices, with --optimizer adamw

PRESETS = {
    "speedrun": Hyperparameters(),
    "short": Hyperparameters(  # half the batch, twice the steps: loss -0.41 at 20M tokens (rates times 0.66 to 0.73)
        preset="short", max_tokens=100_000_000, val_every=250, bigram_rows=1_000_000,  # loss -0.008 (24M)
        stages=tuple(replace(s, batch_tokens=s.batch_tokens // 2, lr=0.7 * s.lr) for s in Hyperparameters.stages)),
    "sample": Hyperparameters(
        preset="sample", data="data/sample/shards", max_tokens=600_000, target=1.8, val_tokens=294_912,
        val_row_tokens=16_384, val_every=0, row_tokens=512, micro_batch_tokens=4096,
        stages=tuple(Stage(0.25, 4096, 512, w, 1.0, (1.0,)) for w in ((32, 64), (64, 128), (64, 192), (64, 256))),
        document_tails="continue", val_windows=(64, 384), layers="se sev le -e lev", model_dim=192, num_heads=3,
        bigram_rows=8192, tied_until=0.0, head_lr=0.03)}

# ----------------------------------------------------------------------------------------------------------------------
# Training [same]
# ----------------------------------------------------------------------------------------------------------------------
SWITCHES = ("CUBLAS", "CUDA", "FLA_", "FLASH_", "NCCL", "OMP_", "PYTORCH", "QUACK", "TORCH", "TRITON")  # logged
FREE_FLAGS = "data attention compile out checkpoint save_every resume micro_batch_tokens val_every".split()  # to resume

class Schedule:
    """Stage, learning rate and momentum of every step, by the stage table and the budget of tokens."""
    def __init__(self, args: "Hyperparameters", world: World):
        self.args, self.batches, rows = args, [row.batch_tokens for row in args.stages], args.row_tokens * world.size
        parts = np.array([row.steps for row in args.stages])
        if parts.min() < 0 or abs(parts.sum() - 1) > 1e-6:
            raise UserError(f"the stages' steps are parts of the run, and add up to {parts.sum():.4f} instead of 1")
        if min(rows, args.micro_batch_tokens, *self.batches) < 1 or any(n % rows for n in self.batches):
            raise UserError(f"{world.size} ranks cannot share {self.batches} tokens in rows of {args.row_tokens} "
                            f"by micro-batches of {args.micro_batch_tokens}: take fitting --row-tokens, or other ranks")
        self.steps = int(args.max_tokens / (parts @ self.batches))
        if self.steps < 1:
            raise UserError(f"--max-tokens {args.max_tokens} is less than a step of {parts @ self.batches:.0f} tokens")
        self.ends = np.round(np.cumsum(parts) * self.steps).astype(int).tolist()
        self.tokens_before = [0, *np.cumsum(np.repeat(self.batches, np.diff(self.ends, prepend=0))).tolist()]
        self.tokens = self.tokens_before[-1]  # of the whole run, the last of those before each step

    def stage(self, step: int) -> tuple[int, float]:
        """(the stage of `step`, how far through it the step is); after the last step, the last stage."""
        index = min(bisect.bisect_right(self.ends, step), bisect.bisect_left(self.ends, self.steps))
        start, end = ([0] + self.ends)[index:index + 2]
        return index, (step - start) / max(1, end - start)

    def lr(self, step: int) -> float:
        begin, end = self.args.cooldown
        cooled = min(max((step / self.steps - begin) / max(end - begin, 1e-9), 0), 1)
        return (1 - cooled) * self.args.stages[self.stage(step)[0]].lr + cooled * self.args.lr_floor

    def momentum(self, step: int) -> float:
        (low, high), (rise, fall), done = self.args.muon_momentum, self.args.muon_ramps, (step + 1) / self.steps
        return low + (high - low) * min(1, done / max(rise, 1e-9), (1 - done) / max(fall, 1e-9))

class Run:
    """One run: builds everything, then trains, validates, logs and saves."""
    def __init__(self, args: "Hyperparameters", world: World):
        self.args, self.world = args, world
        self.flags = json.loads(json.dumps(asdict(args)))  # as JSON knows them
        self.data, self.schedule = Dataset(args.data), Schedule(args, world)
        self.attention = choose_attention(args.attention, world.device)
        self.loader = TrainLoader(self.data, world, args.row_tokens, args.micro_batch_tokens, args.document_tails)
        self.val_rows = val_rows(self.data, world, args.val_tokens, args.val_row_tokens)
        self.resumed = self.read_checkpoint(args.resume) if args.resume else None
        self.model = Model(args, self.data.vocab_size, world.device, world.dtype)
        groups = self.model.param_groups()
        if args.optimizer == "adamw":
            groups = [replace(group, method="adam", lr=args.adamw_lr, betas=(0.9, 0.95), every=1, cautious=False,
                              weight_decay=args.adamw_weight_decay * (group.method == "muon")) for group in groups]
        self.model.initialise(args.seed)
        self.optimizer = Optimizer(groups, world, args.compile)
        self.step, self.seconds, self.start = 0, 0.0, None  # start: since when the clock runs, if it does
        self.unread, self.last_report, self.saved, self.file, self.digest = None, 0.0, None, None, hashlib.sha256()
        self.stop_here = self.stop = False  # this rank got a SIGTERM; all ranks know
        self.stages, self.val_stages = ([self.model.stage_inputs(i, v) for i in range(4)] for v in (False, True))
        self.graphs, self.pool = {}, torch.cuda.graph_pool_handle() if world.gpu else None
        self.tables = [bank.table for bank in self.optimizer.banks.values() if isinstance(bank, RowBank)]
        if world.rank == 0 and "COMPILE_BESIDE" not in os.environ:
            name = f"{time.strftime('%Y-%m-%dT%H-%M-%SZ', time.gmtime())}_{SCRIPT.stem}_{os.urandom(4).hex()}.txt"
            try:
                Path(args.out).mkdir(parents=True, exist_ok=True)
                self.file = open(Path(args.out) / name, "w", buffering=1, encoding="utf-8")
            except OSError as error:
                raise UserError(f"--out {args.out} cannot be a folder for logs ({error.strerror})") from error

    def log(self, text: str, console: bool = True):
        if self.file:
            self.digest.update(f"{text}\n".encode())
            print(text, file=self.file)
            if console:
                print(text, flush=True)

    def calls(self) -> list[tuple]:
        """Sets the compiler up. Returns all that it must compile: (function, a batch of random tokens, stage)."""
        torch._dynamo.config.recompile_limit = 64  # kinds of block x sizes of micro-batch
        torch._dynamo.config.run_gc_after_compile = False  # 2.6 of 21.0 s of a warm start (H100)
        # torch keeps blocks too, whose MLP is an autograd.Function: one found on disk takes 0.8 s, not 2.7 (H100)
        torch._functorch.config.autograd_cache_allow_custom_autograd_functions = True
        torch._functorch.config.force_non_lazy_backward_lowering = True  # without waiting for a backward pass
        # it is blind to the backward formulas of custom ops: so, what it keeps belongs to this text up to the flags
        source = SCRIPT.read_text(encoding="utf-8").split("# Hyperparameters")[0].encode()
        torch.compiler.config.cache_key_tag = hashlib.sha256(source).hexdigest()
        torch._inductor.config.triton.autotune_pointwise = False  # 7 s or more of start-up for no speed
        passes, calls = [(self.gradients, self.loader.micro_batch_rows(row.batch_tokens) * self.args.row_tokens, stage)
                         for row, stage in zip(self.args.stages, self.stages)], []
        for function, size, stage in [*passes, (self.model, self.args.val_row_tokens, self.val_stages[-1])]:
            borders = torch.linspace(0, size, 64 * max(1, size // 16_384), device=self.world.device).int()
            torch._dynamo.mark_dynamic(borders, 0)  # the number of documents varies, and must not recompile
            tokens, targets = torch.randint(self.data.vocab_size, (2, size), device=self.world.device)
            calls.append((function, (tokens, targets, borders), stage))
        return calls

    def warm_up(self):
        """Compiles all, and captures the CUDA graphs of all stages, on random tokens. Then weights are fresh again."""
        calls = self.calls()
        for block in self.model.blocks:  # apart, so that those of one kind share a graph: 73.5 s, not 96.8 (H100)
            block.compile(dynamic=False, fullgraph=True)
        for function, batch, stage in calls:  # all before graphs take memory: by stages Dragon held 63 GiB
            function(*batch, stage)
        for call in calls:
            self.graphed(*call)
        self.optimizer.step(1, 0.0, 0.9)
        for process in beside:
            process.kill()  # if it is late: all has been needed by now
        self.model.initialise(self.args.seed)
        for bank in self.optimizer.banks.values():
            bank.reset()

    def compile_beside(self, task: str):
        """In a process beside the run's, leaves on disk what the run will need: the kernels of other packages, or
        the optimiser, or the blocks, the last first, because the run begins at the other end. Dragon starts in
        65 to 72 s, and with one process that did kernels alone in 81 to 98 (H100, empty caches)."""
        global gemm_act
        calls, inputs = self.calls(), []
        if task == "kernels":
            tokens, _, borders = calls[0][1]
            return self.model.hidden(tokens[:2048], borders.clamp(max=2048), self.stages[0])[0].sum().backward()
        if task == "optimiser":
            for bank in self.optimizer.banks.values():
                if not isinstance(bank, RowBank):  # its kernel is Triton's, which compiles fast
                    bank.update(1, 0.0, 0.9)
            return
        watch = nn.modules.module.register_module_forward_pre_hook(lambda *call: inputs.append(call))
        kept, gemm_act = gemm_act, None  # quack's kernel would run, on tensors that have no data
        with FakeTensorMode(allow_non_fake_inputs=True):  # so that no kernel is waited for
            for _, (tokens, _, borders), stage in {len(call[1][0]): call for call in calls}.values():
                self.model.hidden(tokens, borders, stage)
        gemm_act = kept
        watch.remove()

        def compile_only(graph, inputs):
            torch._inductor.compile(graph, inputs)
            return lambda *_: sys.exit()  # instead of what it compiled, which needs the kernels

        def real(fake: Tensor) -> Tensor:  # its values are never read
            x = torch.empty_strided(fake.shape, fake.stride(), dtype=fake.dtype, device=fake.device)
            for dimension in getattr(fake, "_dynamo_dynamic_indices", ()):
                torch._dynamo.mark_dynamic(x, dimension)
            return x.requires_grad_(fake.requires_grad)

        ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # of this machine, each with such a process:
        ahead = len(inputs) * (self.world.rank % ranks) // ranks  # they share the blocks
        for block, given in reversed(inputs[-ahead:] + inputs[:-ahead]):
            block.compile(backend=compile_only, dynamic=False, fullgraph=True)
            with contextlib.suppress(SystemExit):
                block(*tree_map_only(FakeTensor, real, given))

    def gradients(self, tokens: Tensor, targets: Tensor, cu_seqlens: Tensor, stage) -> Tensor:
        """Adds the gradients of a micro-batch to the banks'. Returns its part of the step's loss, 0-D fp32."""
        loss = self.model(tokens, targets, cu_seqlens, stage) / stage.batch_tokens
        loss.backward()
        return loss / stage.loss_weights.sum()

    def graphed(self, function, batch: tuple[Tensor, Tensor, Tensor], stage) -> Tensor:
        """function(*batch, stage), 0-D, overwritten by the next call; stage is one of this run's. On a GPU a CUDA graph
        does it, captured when a shape is new, if need be on the clock: Python takes 0.3 ms, not 25 to 34 (H200)."""
        if not (self.world.gpu and self.args.compile and self.attention != "reference"):  # whose host waits for the GPU
            return function(*batch, stage).detach()
        key = function, id(stage), *(x.shape for x in batch)
        if key not in self.graphs:
            places = [x.clone() for x in batch]
            earlier = [(table.looked_up, len(table.looked_up)) for table in self.tables]
            with torch.cuda.graph(graph := torch.cuda.CUDAGraph(), self.pool, capture_error_mode="thread_local"):
                result = function(*places, stage).detach()
            looked_up = [(parts, [parts.pop() for _ in range(len(parts) - n)]) for parts, n in earlier]  # empty yet
            self.graphs[key] = graph, places, result, looked_up
        graph, places, result, looked_up = self.graphs[key]
        torch._foreach_copy_(places, batch)
        graph.replay()
        for parts, new in looked_up:
            parts += [(rows.clone(), grad.clone()) for rows, grad in new]
        return result

    def validate(self) -> float:
        """Mean cross-entropy of the next token over the validation set, nats. Stops the clock."""
        self.stop_clock()
        stage = self.val_stages[self.schedule.stage(self.step)[0]]
        total = torch.zeros((), dtype=torch.float64, device=self.world.device)
        with torch.set_grad_enabled(self.args.compile):  # compiled graphs would be made anew without gradients
            for batch in self.val_rows:
                total += self.graphed(self.model, batch, stage)
        loss = self.world.sum(total).item() / self.args.val_tokens
        if not math.isfinite(loss):
            raise FloatingPointError(f"step {self.step}: the validation loss is {loss}. Try lower rates, as --muon-lr. "
                                     f"Last checkpoint: {self.saved or self.args.resume}")
        self.log(f"step:{self.step}/{self.schedule.steps} val_loss:{loss:.4f} train_time:{self.seconds:.3f}s")
        return loss

    def train_step(self):
        """One step of the optimiser. On a GPU its loss is read a step later, so that it never waits for the log."""
        if self.start is None:
            self.world.barrier()
            self.began, self.start = self.world.mark(), time.perf_counter()
        index, done = self.schedule.stage(self.step)
        row, stage, following = self.args.stages[index], self.stages[index], self.args.stages[min(index + 1, 3)]
        weights = zip(row.loss_weights, (*following.loss_weights, *[0.0] * len(row.loss_weights)))  # or on to none
        stage.loss_weights.copy_(torch.tensor([(1 - done) * a + done * b for a, b in weights]), non_blocking=True)
        report = torch.zeros(2, device=self.world.device)
        report[1].fill_(self.stop_here)  # report[1] = ... would wait for the GPU, and the GPU then for the data
        for batch in self.loader.next(row.batch_tokens, row.document_tokens):
            report[0].add_(self.graphed(self.gradients, batch, stage))
        self.optimizer.step(self.step, self.schedule.lr(self.step), self.schedule.momentum(self.step),
                            tied=self.step < self.args.tied_until * self.schedule.steps)
        self.step += 1
        on_host = torch.empty(2, pin_memory=self.world.gpu).copy_(self.world.sum(report), non_blocking=True)
        if arrived := self.world.mark():
            self.read_report()  # that of the step before, while this one runs
        self.unread = self.step, row.batch_tokens, on_host, arrived
        if not arrived:
            self.read_report()

    def read_report(self):
        """Waits for the loss of the last step that was not read yet, and writes its line."""
        if not self.unread:
            return
        (step, batch_tokens, report, arrived), self.unread = self.unread, None
        if arrived:
            arrived.synchronize()  # not the whole stream, where the next step is already under way
        loss, stop = report.tolist()
        if not math.isfinite(loss):
            raise FloatingPointError(f"step {step}: the training loss is {loss}. Try lower rates, as --muon-lr. "
                                     f"Last checkpoint: {self.saved or self.args.resume}")
        self.stop |= stop > 0
        now = self.seconds + (self.began.elapsed_time(arrived) / 1000 if arrived else time.perf_counter() - self.start)
        done, seconds, self.last_report = self.schedule.tokens_before[step], now - self.last_report, now
        self.log(f"step:{step}/{self.schedule.steps} train_loss:{loss:.4f} train_time:{now:.3f}s step_time:"
                 f"{1000 * seconds:.1f}ms tokens:{done} tokens/s:{batch_tokens / seconds:.0f} "
                 f"ends_in:{(self.schedule.tokens / done - 1) * now:.0f}s")

    def stop_clock(self):
        if self.start is not None:
            self.read_report()
            self.world.barrier()
            self.seconds, self.start = self.seconds + time.perf_counter() - self.start, None  # of steps, data included

    def save(self, name: str):
        """Writes a checkpoint, and then removes the one before. All ranks take part."""
        previous, self.saved = self.saved, Path(self.args.checkpoint or self.args.out) / f"{name}.pt"
        state = {"script": SCRIPT.name, "source": SCRIPT.read_text(), "args": self.flags, "step": self.step,
                 "dataset": self.data.about | {"fingerprint": self.data.fingerprint}, "seconds": self.seconds,
                 "model": {name: param.detach().cpu() for name, param in self.model.named_parameters()},
                 "optimizer": {name: bank.state_dict() for name, bank in self.optimizer.banks.items()},
                 "position": self.loader.position, "rng": torch.get_rng_state()}
        if self.world.rank == 0:
            self.saved.parent.mkdir(parents=True, exist_ok=True)
            atomic_save(state, self.saved)
            if previous and previous != self.saved:
                previous.unlink(missing_ok=True)
        self.log(f"checkpoint:{self.saved}")
        self.world.barrier()

    def read_checkpoint(self, path: str) -> dict:
        """The state of a run that this one can take up, also with another number of ranks."""
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            its = {"script": state["script"], "shards": state["dataset"]["fingerprint"], **state["args"]}
            mine = {"script": SCRIPT.name, "shards": self.data.fingerprint, **self.flags}
        except Exception as error:  # torch.load raises anything on a file that is not its own
            raise UserError(f"--resume {path} is no checkpoint of this script ({type(error).__name__})") from error
        other = [f"{flag} is {mine.get(flag)} here and {its.get(flag)} there" for flag in its | mine
                 if flag not in FREE_FLAGS and mine.get(flag) != its.get(flag)]
        if other:
            raise UserError(f"--resume {path} is of another run, give the same flags: {'; '.join(other)}")
        return state

    def environment(self) -> dict:
        git = subprocess.run("git describe --always --dirty --abbrev=40 --exclude='*'", shell=True, cwd=SCRIPT.parent,
                             capture_output=True, text=True)  # by a shell: then there need not be any git
        cpu = re.findall("model name.*: (.*)", Path("/proc/cpuinfo").read_text()) or [platform.machine()]
        device = torch.cuda.get_device_name() if self.world.gpu else f"{cpu[0]} CPU"
        return {"script": SCRIPT.name, "source_sha256": hashlib.sha256(SCRIPT.read_bytes()).hexdigest(),
                "git_commit": git.stdout.strip() or None, "command": sys.argv, "python": platform.python_version(),
                "torch": torch.__version__, "cuda": torch.version.cuda, "triton": getattr(triton, "__version__", None),
                "numpy": np.__version__, "threads": torch.get_num_threads(), "world_size": self.world.size,
                "device": device, "attention": self.attention, "dataset": self.data.about["name"],
                "kernels": ({"MLP": "quack"} if gemm_act else {}) | getattr(self.model, "kernels", {}),
                "variables": {name: value for name, value in sorted(os.environ.items()) if name.startswith(SWITCHES)},
                "fingerprint": self.data.fingerprint, "params": self.model.num_params(), "args": self.flags}

    def train(self):
        args, steps, environment = self.args, self.schedule.steps, self.environment()
        self.log(f"{SCRIPT.read_text()}{'=' * 100}\n{json.dumps(environment)}\n{'=' * 100}", console=False)
        self.log(f"{SCRIPT.name} on {self.world.size} x {environment['device']}, attention {self.attention}, data "
                 f"{self.data.about['name']}: {environment['params']['total'] / 1e6:.1f}M parameters, {steps} steps, "
                 f"{self.schedule.tokens / 1e6:.1f}M tokens, target {args.target}")
        if args.compile:
            self.warm_up()
        if state := self.resumed:
            self.model.load_state_dict(state["model"])
            for name, bank in self.optimizer.banks.items():
                bank.load_state_dict(state["optimizer"][name])
            torch.set_rng_state(state["rng"])
            self.step, self.seconds, self.loader.position = state["step"], state["seconds"], state["position"]
            self.log(f"resumed:{args.resume} step:{self.step}")
        signal.signal(signal.SIGTERM, lambda *_: setattr(self, "stop_here", True))
        self.last_report, ended = self.seconds, self.loader.position // self.loader.epoch_tokens  # epochs
        gc.freeze()
        gc.enable()
        self.log(f"startup:{(startup := time.perf_counter() - process_start):.1f}s")
        while self.step < steps:
            if args.val_every and self.step and self.step % args.val_every == 0:
                self.validate()
            self.train_step()
            if (now := self.loader.position // self.loader.epoch_tokens) > ended:
                ended = now
                self.log(f"epoch:{ended + 1} begins, all {self.loader.epoch_tokens} training tokens have been read")
            save = args.checkpoint and args.save_every and self.step % args.save_every == 0
            if self.stop or (save and self.step < steps):
                self.stop_clock()
                self.save(f"{SCRIPT.stem}_step{self.step:06d}")
                if self.stop:
                    self.log(f"stopped by SIGTERM: go on with the same flags and --resume {self.saved}")
                    return
        val_loss = self.validate()
        if args.checkpoint:
            self.save(f"{SCRIPT.stem}_final")
        speed, reached = self.schedule.tokens / self.seconds, val_loss <= args.target
        self.log(f"{'reached' if reached else 'missed'} the target: val_loss {val_loss:.4f}, target {args.target},"
                 f" in {self.seconds:.1f} s of training ({speed:.0f} tokens/s)")
        closing = json.dumps({
            "val_loss": val_loss, "target": args.target, "reached": reached, "steps": steps, "tokens_per_second": speed,
            "tokens": self.schedule.tokens, "val_tokens": args.val_tokens, "train_seconds": self.seconds, **environment,
            "startup_seconds": startup, "total_seconds": time.perf_counter() - process_start, "seed": args.seed,
            "peak_memory_mib": torch.cuda.max_memory_allocated() / 2**20 if self.world.gpu else None})
        self.digest.update(closing[:-1].encode())  # a record refuses a log that was cut or edited
        self.log(f'{closing[:-1]}, "log_sha256": "{self.digest.hexdigest()}"}}')

def parse_args(argv: list[str], quiet: bool = False) -> "Hyperparameters":
    """Flags to hyperparameters: --preset picks the defaults, the other flags change one each."""
    preset = re.search(r"(?:^| )--preset[= ](\w+)", " ".join(argv))
    default = PRESETS.get(preset[1] if preset else "speedrun", PRESETS["speedrun"])
    return tyro.cli(Hyperparameters, default=default, args=argv, console_outputs=not quiet, description=__doc__.strip())

def main():
    rank, code = int(os.environ.get("RANK", 0)), 0
    try:
        args, task = parse_args(sys.argv[1:], quiet=rank > 0), os.environ.get("COMPILE_BESIDE")
        if task is not None and not sys.stdin.read(1):
            return  # the run has ended
        world = World()
        if task is not None:
            if args.compile and world.gpu and torch.cuda.mem_get_info()[0] > 50e9:  # bytes free
                torch.cuda.set_per_process_memory_fraction(0.2)  # a model that needs more leaves no room for it
                args = replace(args, bigram_rows=min(args.bigram_rows, 2), val_tokens=args.val_row_tokens, resume=None)
                Run(args, world).compile_beside(task)
            return
        for process in beside:  # now, because there are GPUs that only the first process to ask gets
            with contextlib.suppress(BrokenPipeError), process.stdin:
                process.stdin.write(b".")
        Run(args, world).train()
    except (UserError, FloatingPointError) as error:
        code = 2 if isinstance(error, UserError) else 1
        if rank == 0:
            print(f"{SCRIPT.name}: {error}", file=sys.stderr, flush=True)
    finally:
        for process in beside:
            process.kill()
    if dist.is_initialized():
        dist.destroy_process_group()
    sys.exit(code)

if __name__ == "__main__":
    main()
