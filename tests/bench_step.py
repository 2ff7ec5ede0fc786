"""Where the milliseconds of a training step go.

    python tests/bench_step.py train_gpt.py [flags of the script]

Builds the script's run, takes one micro-batch of its last stage, and measures the layers, the head with the loss, and
the optimiser apart, by CUDA graphs where the run has them; on a GPU also what kinds of kernel they spend it on, against
the time that the matrix products and the attention would take at 800 TFLOP/s, and the kernels that take longest. What
torch.compile makes of a recurrence counts as matrix products and the rest. On a CPU only the parts. Over several GPUs
(`torchrun --standalone --nproc-per-node 4 tests/bench_step.py ...`) also the communication that nothing hides.
"""

import importlib.util
import os
import re
import statistics
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist

PEAK = 800e12  # FLOP/s that large bf16 matrix products reach on an H100
KINDS = {  # of kernel, by its name; the first that matches, but what torch.compile made is of the rest
    "communication": r"nccl",
    "attention": r"flash|fmha|attention",
    "short convolution": r"short_convolution|causal_conv1d",
    "recurrence": r"chunk_|recurrent|delta_rule|wy_repr|recompute_w_u|solve_tri|merge_16x16|l2norm|cumsum|"
                  r"gdn_gate|beta_sigmoid|compute_dh0|_state_passing",
    "matrix products": r"gemm|nvjet|cutlass|xmma|cublas",
    "the rest": "",
}


def load(path: Path):
    """The script at `path` as a module."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    sys.modules[path.stem] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def milliseconds(function, gpu: bool, repeats: int) -> float:
    """Median time of function(), after one call that is not timed."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        function()
        if gpu:
            torch.cuda.synchronize()
        times.append(1000 * (time.perf_counter() - start))
    return statistics.median(times[1:])


def milliseconds_alone(function, gpu: bool, repeats: int) -> float:
    """The same without what the ranks send each other: its results are wrong, and take the same time."""
    names, done = ("reduce_scatter_tensor", "all_gather_into_tensor"), SimpleNamespace(wait=lambda: None)
    real = {name: getattr(dist, name) for name in names}

    def nothing(whole, part, **_):
        if not part.is_floating_point():  # rows of a table, which must exist: this rank's
            whole.view(-1, *part.shape).copy_(part)
        return done

    try:
        for name in names:
            setattr(dist, name, nothing)
        return milliseconds(function, gpu, repeats)
    finally:
        for name in names:
            setattr(dist, name, real[name])


def kernels(function) -> Counter:
    """Milliseconds on the GPU of each kernel, by name, in one call of function()."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        function()
        torch.cuda.synchronize()
    found = Counter()
    for event in profile.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            found[event.name] += event.self_device_time_total / 1000
    return found


def by_kind(found: Counter) -> Counter:
    kinds = Counter()
    for name, spent in found.items():
        matches = (kind for kind, pattern in KINDS.items() if re.search(pattern, name))
        kinds["the rest" if name.startswith("triton_") else next(matches)] += spent
    return kinds


def main(script: str, flags: list[str], repeats: int = 5):
    module = load(Path(script).resolve())
    args = module.parse_args(flags)
    args.out = tempfile.mkdtemp()  # for the log of a run that never starts
    run = module.Run(args, module.World())
    if run.world.rank:
        sys.stdout = open(os.devnull, "w")  # all ranks take part, and the first one tells
    if args.compile:
        run.warm_up()
    index, model, gpu = len(args.stages) - 1, run.model, run.world.gpu
    row, stage = args.stages[index], run.stages[index]
    micro_batches = run.loader.next(row.batch_tokens, row.document_tokens)
    batch, count = micro_batches[0], len(micro_batches)
    tokens = len(batch[0])
    with torch.no_grad():
        hidden, position = model.hidden(batch[0], batch[2], stage)

    def gradients_of_head(*inputs):
        model.hidden = lambda *_: (hidden.detach().requires_grad_(), position)
        loss = run.gradients(*inputs)
        del model.hidden
        return loss

    def whole():
        run.graphed(run.gradients, batch, stage)

    def head_and_loss():
        run.graphed(gradients_of_head, batch, stage)

    whole()
    looked_up = {table: table.looked_up[:] for table in model.parameters() if hasattr(table, "looked_up")}

    def optimiser():  # two steps, because Adam waits for every second one
        for step in range(2):
            for table, of_one_batch in looked_up.items():
                table.looked_up[:] = of_one_batch * count
            run.optimizer.step(step, 1.0, 0.95)

    parts = {"layers and embedding": (whole, count), "head and loss": (head_and_loss, count),
             "optimiser": (optimiser, 0.5)}
    spent = {part: milliseconds(function, gpu, repeats) * times for part, (function, times) in parts.items()}
    spent["layers and embedding"] -= spent["head and loss"]
    spent["data, if nothing hid it"] = milliseconds(
        lambda: run.loader.next(row.batch_tokens, row.document_tokens), gpu, repeats)
    if run.world.size > 1:
        alone = milliseconds_alone(optimiser, gpu, repeats)
        spent["communication not hidden"] = max(0.0, spent["optimiser"] - alone / 2)
    print(f"{script}: a step of {count} x {tokens} tokens on each of {run.world.size}, stage {index + 1}, attention "
          f"{run.attention}")
    print(f"{'part':26}{'ms':>9}{'bound':>9}")
    if not gpu:
        for part, ms in spent.items():
            print(f"{part:26}{ms:9.1f}")
        return
    found = {part: kernels(function) for part, (function, _) in parts.items()}
    found["layers and embedding"] -= found["head and loss"]
    sizes, head = model.num_params(), model.head.numel()
    context = round(tokens / (batch[2].diff() > 0).sum().item())
    scores = model.flops_per_token(context) - 6 * sizes["matmul"]
    bounds = {("layers and embedding", "matrix products"): 6 * (sizes["matmul"] - head),
              ("layers and embedding", "attention"): scores, ("head and loss", "matrix products"): 6 * head}
    for part, ms in spent.items():
        print(f"{part:26}{ms:9.1f}")
        for kind, on_gpu in by_kind(found.get(part, Counter())).most_common():
            flops = bounds.get((part, kind))
            bound = f"{1000 * flops * tokens * count / PEAK:9.1f}" if flops else ""
            print(f"  {kind:24}{on_gpu * parts[part][1]:9.1f}{bound}")
    print("\nkernels, ms a step")
    longest = Counter({(part, name): ms * parts[part][1] for part in found for name, ms in found[part].items()})
    for (part, name), ms in longest.most_common(24):
        print(f"{ms:9.2f}  {part:22}{name[:90]}")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
    if dist.is_initialized():
        dist.destroy_process_group()
