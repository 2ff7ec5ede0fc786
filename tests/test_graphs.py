"""Tests of Run.graphed: what a CUDA graph may not change, with a stand-in on a CPU and with real graphs on a GPU."""

import functools
import io
import re
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import train_gpt as gpt
import train_hybrid as hybrid

FLAGS = ("--preset sample --row-tokens 64 --micro-batch-tokens 128 --val-tokens 512 --val-row-tokens 256 --val-windows "
         "16 32 --val-every 4 --model-dim 32 --num-heads 2 --head-lr 0.05 --bigram-rows 301 --tied-until 0.5").split()
STAGES = [(256, 32, (1.0, 0.5)), (256, 48, (1.0,)), (192, 64, (1.0,)), (192, 64, (1.0,))]  # 2 or 3 micro-batches a step
for i, (batch, longest, weights) in enumerate(STAGES):
    FLAGS += (f"--stages.{i}.batch-tokens {batch} --stages.{i}.document-tokens {longest} --stages.{i}.windows 8 "
              f"{16 + 8 * i} --stages.{i}.candidates 320 --stages.{i}.loss-weights").split() + [*map(str, weights)]
STEPS, STEP_TOKENS = 10, sum(stage[0] for stage in STAGES) // 4
HYBRID = "--kv-heads 2 --diff-heads 2 --recurrent-heads 2 --layers".split() + ["lv r d"]
SCRIPTS = pytest.mark.parametrize("script, others", [
    (gpt, ["--layers", "sev= le -e levh"]), (hybrid, HYBRID), (hybrid, [*HYBRID, "--recurrent", "mamba2"])],
    ids=["gpt", "gdn", "mamba2"])


@pytest.fixture(scope="module")
def data(tmp_path_factory, write_folder):
    rng = np.random.default_rng(0)
    stream = np.concatenate([[256, *rng.integers(0, 40, rng.integers(3, 60))] for _ in range(300)])
    return write_folder(tmp_path_factory.mktemp("data"), [stream[:6000]], [stream[6000:8000]], name="tiny",
                        tokenizer="bytes", vocab_size=257, document_separator=256)


@pytest.fixture
def new_run(data, tmp_path):
    def make(script, others, *more):
        return script.Run(script.parse_args([
            *FLAGS, *others, "--data", str(data), "--out", str(tmp_path), "--max-tokens", str(STEPS * STEP_TOKENS),
            *more]), script.World())
    return make


def looked_up_since(run, earlier: list[int]) -> list[torch.Tensor]:
    """Rows and gradients that lookups left with each table, behind the first so many pairs."""
    return [x for table, n in zip(run.tables, earlier) for pair in table.looked_up[n:] for x in pair]


class Graph:
    """Stands in for a CUDA graph. A replay calls the function again, and puts the outputs where the captured ones are:
    the result, and the rows that were looked up with their gradients."""
    run = captured = None  # the only run, and the graph that is being captured
    captures = 0

    def replay(self):
        (function, inputs), earlier = self.call, [len(table.looked_up) for table in self.run.tables]
        results = [function(*inputs).detach(), *looked_up_since(self.run, earlier)]
        for table, n in zip(self.run.tables, earlier):
            del table.looked_up[n:]
        for place, x in zip(self.outputs, results, strict=True):
            place.copy_(x)


class Capture:
    """Stands in for torch.cuda.graph. The function runs, for it makes the outputs; but a real capture computes nothing:
    so gradients are as before, and the outputs hold garbage."""
    def __init__(self, graph, pool, capture_error_mode):
        assert pool == "pool" and capture_error_mode == "thread_local"
        self.graph, self.banks = graph, Graph.run.optimizer.banks.values()

    def __enter__(self):
        self.grads = [bank.grads.clone() for bank in self.banks]
        self.earlier, Graph.captured = [len(table.looked_up) for table in Graph.run.tables], self.graph

    def __exit__(self, *_):
        Graph.captured, Graph.captures = None, Graph.captures + 1
        for bank, grads in zip(self.banks, self.grads):
            bank.grads.copy_(grads)
        self.graph.outputs = [self.graph.result, *looked_up_since(Graph.run, self.earlier)]
        for x in self.graph.outputs:
            x.fill_(float("nan") if x.is_floating_point() else 10**9)


@pytest.fixture
def on_gpu(monkeypatch):
    """Makes a run believe, inside of graphed() alone, that it is a compiled one on a GPU."""
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", Capture)
    monkeypatch.setattr(Graph, "run", None)
    monkeypatch.setattr(Graph, "captures", 0)

    @functools.cache
    def recorded(function):
        """The function, which tells a graph under capture what it was called with."""
        def call(*inputs):
            result = function(*inputs)
            if Graph.captured:
                Graph.captured.call, Graph.captured.result = (function, inputs), result.detach()
            return result
        return call

    def pretend(run):
        def graphed(function, batch, stage, graphed=run.graphed):
            run.world.gpu = run.args.compile = True
            try:
                return graphed(recorded(function), batch, stage)
            finally:
                run.world.gpu = run.args.compile = False
        run.graphed, run.pool, run.attention, Graph.run = graphed, "pool", "flash-attn-4", run
        return run
    return pretend


def batches(run, count: int, tokens: int = 128, documents: int = 5) -> list[tuple[torch.Tensor, ...]]:
    """Micro-batches as the loader packs them, of other tokens each, in documents of about the same length."""
    stream, borders = run.loader.read(0, count * tokens + 1), np.linspace(0, tokens, documents + 1).astype(int)
    return [gpt.pack(stream[start:], list(zip(borders, np.diff(borders))), run.world.device)
            for start in range(0, count * tokens, tokens)]


def vary(run):
    """Weights of which none is special, so that all have gradients."""
    torch.manual_seed(1)
    with torch.no_grad():
        for param in run.model.parameters():
            param.add_(0.1 * torch.randn(param.shape, device=param.device))
    return run


def passes(run, function, inputs, stage) -> tuple[list, list, list]:
    """(losses, gradients of each bank, rows looked up and their gradients) of micro-batches, from nothing."""
    for bank in run.optimizer.banks.values():
        bank.grads.zero_()
    losses = [function(batch, stage).detach().clone() for batch in inputs]
    looked_up = [x for table in run.tables for pair in table.looked_up for x in pair]
    for table in run.tables:
        table.looked_up.clear()
    return losses, [bank.grads.clone() for bank in run.optimizer.banks.values()], looked_up


def both(run, inputs, stage):
    """passes() by plain calls, and by graphs."""
    return (passes(run, lambda batch, stage: run.gradients(*batch, stage), inputs, stage),
            passes(run, lambda *inputs: run.graphed(run.gradients, *inputs), inputs, stage))


@SCRIPTS
def test_micro_batches_by_one_graph_have_the_gradients_rows_and_losses_of_each(script, others, new_run, on_gpu):
    """Every one of them: a static output that nobody copied would hold the last one's."""
    run = on_gpu(vary(new_run(script, others)))
    inputs = batches(run, 3)
    before = [x.clone() for batch in inputs for x in batch]
    want, got = both(run, inputs, run.stages[0])
    assert len(run.graphs) == 1 and [len(part) for part in got] == [3, len(run.optimizer.banks), 6]
    assert all(torch.equal(x, y) for part, reference in zip(got, want) for x, y in zip(part, reference, strict=True))
    assert len({loss.item() for loss in got[0]}) == 3 and not torch.equal(got[2][0], got[2][2])
    assert all(torch.equal(x, y) for x, y in zip(before, (x for batch in inputs for x in batch)))  # places are copies


def test_a_graph_serves_the_micro_batches_of_a_stage_and_a_shape(new_run, on_gpu):
    run = on_gpu(new_run(gpt, ["--layers", "s"]))
    first, second = run.stages[:2]
    cases = [  # function, batch, stage, graphs there are then
        (run.gradients, batches(run, 1)[0], first, 1), (run.gradients, batches(run, 2)[1], first, 1),
        (run.gradients, batches(run, 1, documents=63)[0], first, 1),  # fits into as many borders
        (run.gradients, batches(run, 1, documents=64)[0], first, 2), (run.gradients, batches(run, 1, 64)[0], first, 3),
        (run.gradients, batches(run, 1)[0], second, 4), (run.model, batches(run, 1)[0], first, 5),
        (run.model, batches(run, 1)[0], run.val_stages[0], 6)]
    for again in (False, True):
        for function, batch, stage, count in cases:
            assert run.graphed(function, batch, stage).item() == function(*batch, stage).item()
            assert len(run.graphs) == Graph.captures == (6 if again else count)


@pytest.mark.parametrize("gpu, compile", [(False, False), (False, True), (True, False)])
def test_without_a_gpu_or_compilation_the_function_is_called(gpu, compile, new_run, monkeypatch):
    run = new_run(gpt, ["--layers", "s"])
    monkeypatch.setattr(torch.cuda, "graph", None)
    monkeypatch.setattr(run.world, "gpu", gpu)
    monkeypatch.setattr(run.args, "compile", compile)
    calls, given = [], batches(run, 1)[0]

    def function(*inputs):
        calls.append(inputs)
        return torch.ones((), requires_grad=True)

    result = run.graphed(function, given, run.stages[0])
    assert result == 1 and not result.requires_grad and not run.graphs
    assert all(x is y for x, y in zip(*calls, (*given, run.stages[0])))


def losses(run) -> list[str]:
    return re.findall(r"^step:\d+/\d+ \w+_loss:\S+", open(run.file.name).read(), re.M)


def addresses(run) -> list[int]:
    """Where a graph finds parameters, gradients and the stages' loss weights."""
    banks = (bank for bank in run.optimizer.banks.values() if not isinstance(bank, (gpt.RowBank, hybrid.RowBank)))
    return [x.data_ptr() for x in (*run.model.parameters(), *(bank.grads for bank in banks),
                                   *(param.grad for param in run.model.parameters() if param.grad is not None),
                                   *(stage.loss_weights for stage in run.stages + run.val_stages))]


def test_attention_that_makes_the_host_wait_is_in_no_graph(new_run, on_gpu):
    run = on_gpu(new_run(gpt, SCRIPTS.args[1][0][1]))
    run.attention = "reference"
    assert run.graphed(run.gradients, batches(run, 1)[0], run.stages[0]).isfinite() and not run.graphs


@SCRIPTS
def test_training_by_graphs_is_training_without(script, others, new_run, on_gpu, monkeypatch):
    """Of all stages, to the last bit; and a warm-up makes the graphs of every step, and leaves nothing else behind."""
    plain, graphed = new_run(script, others), on_gpu(new_run(script, others))
    monkeypatch.setattr(script.Block, "compile", lambda *_, **__: None)
    captured = addresses(graphed)
    graphed.warm_up()
    assert len(graphed.graphs) == len(STAGES) + 1  # and validation in the last stage
    for run in (plain, graphed):
        run.train()
    graphed.model.load_state_dict(plain.model.state_dict())
    for bank, other in zip(graphed.optimizer.banks.values(), plain.optimizer.banks.values()):
        bank.load_state_dict(other.state_dict())
    assert addresses(graphed) == captured  # where a graph reads and writes, whatever happens to the run
    assert losses(graphed) == losses(plain) and len(losses(plain)) == STEPS + 3
    assert len(graphed.graphs) == len(STAGES) + 2  # at step 4 validation is in another stage
    for (name, bank), other in zip(plain.optimizer.banks.items(), graphed.optimizer.banks.values()):
        x, y = bank.state_dict(), other.state_dict()
        assert [part for part in x if not torch.equal(x[part], y[part])] == [], name


class Calls(torch.overrides.TorchFunctionMode):
    """Notes the names of what is called."""
    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.names.add(function.__name__)
        return function(*args, **kwargs or {})


WAITING = {"__setitem__", "item", "tolist", "__bool__", "__int__", "__float__", "cpu", "nonzero", "masked_select"}


def test_a_step_hands_work_to_the_gpu_without_waiting_for_it(new_run, monkeypatch):
    """Else the GPU would wait for the next batch. A number put into an element, x[0] = 1, waits as item() does."""
    run, batches = new_run(*SCRIPTS.args[1][0]), []
    monkeypatch.setattr(run, "graphed", lambda function, batch, stage: batches.append(batch) or torch.ones(()))
    monkeypatch.setattr(run.optimizer, "step", lambda *_, **__: None)
    monkeypatch.setattr(run, "read_report", lambda: None)  # waits for the step before
    with Calls() as calls:
        run.train_step()
    assert len(batches) == 2 and run.unread[2].tolist() == [2.0, 0.0]
    assert "fill_" in calls.names and not calls.names & WAITING


# On a GPU


def error(x: torch.Tensor, reference: torch.Tensor) -> float:
    return ((x.double() - reference.double()).norm() / reference.double().norm().clamp_min(1e-9)).item()


WIDE = "--model-dim 256 --row-tokens 1024 --micro-batch-tokens 2048 --val-row-tokens 512 --compile".split()
for i in range(4):
    WIDE += f"--stages.{i}.batch-tokens 4096 --stages.{i}.document-tokens 300 --stages.{i}.windows 64 128".split()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@SCRIPTS
def test_real_steps_never_wait_for_the_gpu(script, others, new_run):
    torch._dynamo.reset()
    run = new_run(script, others, *WIDE, "--max-tokens", "40960")
    run.warm_up()
    run.train_step()  # starts the clock, with nothing under way
    try:
        torch.cuda.set_sync_debug_mode("error")
        for _ in range(4):
            run.train_step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@SCRIPTS
def test_real_graphs_have_the_gradients_rows_and_losses_of_each_micro_batch(script, others, new_run):
    """Two stages with two micro-batches each, by the compiled model; and validation, and a graph made without warm-up,
    for more documents. Sums by atomic additions have no order: so gradients in bf16 differ a little."""
    torch._dynamo.reset()
    run = new_run(script, others, *WIDE, "--max-tokens", "40960")
    run.warm_up()
    vary(run)
    assert len(run.graphs) == 5
    cases = [(index, batches(run, 2, 2048, documents)) for index, documents in ((0, 10), (1, 20), (0, 100))]
    for index, inputs in cases * 2:
        want, got = both(run, inputs, run.stages[index])
        assert [len(part) for part in got] == [2, len(run.optimizer.banks), 4]
        for part, reference, tolerance in zip(got, want, (1e-3, 3e-2, 3e-2)):
            assert all(error(x, y) < tolerance for x, y in zip(part, reference))
        assert all(torch.equal(x, y) for x, y in zip(got[2][::2], want[2][::2]))  # rows
    stage = run.val_stages[-1]
    for batch in run.val_rows:
        assert error(run.graphed(run.model, batch, stage), run.model(*batch, stage).detach()) < 1e-3
    assert len(run.graphs) == 6


# What processes beside the run compile --------------------------------------------------------------------------------


def beside(script, others, data, monkeypatch, task, rank=0, ranks=1, per_machine=1):
    """Builds what a process beside a rank of a run builds, without a process group and without a log; does its task."""
    for name, value in dict(COMPILE_BESIDE=task, RANK=rank, WORLD_SIZE=ranks, LOCAL_WORLD_SIZE=per_machine).items():
        monkeypatch.setenv(name, str(value))
    flags = [*FLAGS, *others, "--data", str(data), "--attention", "reference", "--out", "/dev/null/no"]
    run = script.Run(script.parse_args(flags), script.World())
    if task:
        run.compile_beside(task)
    return run


@SCRIPTS
def test_a_process_beside_the_run_calls_every_kernel_forward_and_backward(script, others, data, monkeypatch):
    calls = []

    def counted(name, function):
        return lambda *inputs, **options: calls.append(name) or function(*inputs, **options)

    forward, backward, *rest = script.ATTENTION_BACKENDS["reference"]
    monkeypatch.setitem(script.ATTENTION_BACKENDS, "reference", (
        counted("forward", forward), counted("backward", backward), *rest))
    for name in ("attention_forward", "attention_backward", "mlp"):
        monkeypatch.setattr(script, name, counted(name, getattr(script, name)))  # the first two it chooses anew
    if script is hybrid:
        monkeypatch.setattr(hybrid, "recurrence_in_use", {
            kind: counted(kind, function) for kind, function in hybrid.recurrence_in_use.items()})
        monkeypatch.setattr(hybrid, "choose_recurrence", lambda *_: "reference")
    blocks = beside(script, others, data, monkeypatch, "kernels").model.blocks
    attend = [getattr(block, "attends", True) for block in blocks]
    assert calls.count("forward") == calls.count("backward") >= sum(attend) > 1 and calls.count("mlp") == len(blocks)
    if script is hybrid:
        kind = "state space" if "mamba2" in others else "gated delta rule"
        assert calls.count(kind) == len(blocks) and calls.count("short convolution") >= len(blocks)


def about(x):
    """What a compiled graph depends on of an input."""
    if not isinstance(x, torch.Tensor):
        return str(x)
    return *map(str, (*x.shape, *x.stride())), x.dtype, x.device, x.requires_grad


@SCRIPTS
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_process_beside_the_run_compiles_the_optimiser_for_what_a_rank_owns(
        ranks, script, others, data, new_run, monkeypatch):
    """The same functions of the same shapes as a run with so many ranks: else the run would not find them on disk."""
    called, settings = [], torch._inductor.config.triton

    def compiled(function, **options):
        def call(*inputs):
            called.append((function.__name__, settings.autotune_pointwise, options, [about(x) for x in inputs]))
        return call

    monkeypatch.setattr(torch, "compile", compiled)
    flags = [*others, "--compile", "--row-tokens", "32"]
    run, world = new_run(script, flags), SimpleNamespace(rank=0, size=ranks)
    with torch._inductor.config.patch("triton.autotune_pointwise", True):
        run.calls()  # sets the compiler up
        for bank in script.Optimizer(run.model.param_groups(), world, compile=True).banks.values():
            if not isinstance(bank, script.RowBank):  # its kernel is Triton's
                bank.update(1, 0.0, 0.9)
    wanted, called[:] = called[:], []
    with torch._inductor.config.patch("triton.autotune_pointwise", True):
        beside(script, flags, data, monkeypatch, "optimiser", ranks=ranks)
    assert called == wanted and len(called) > 1
    assert {(name, autotune) for name, autotune, *_ in called} == {("normuon_update", False)}


@SCRIPTS
@pytest.mark.parametrize("tokens, ranks", [(128, 1), (96, 2)])
def test_a_process_beside_the_run_compiles_the_blocks_without_running_them(
        tokens, ranks, script, others, data, monkeypatch):
    """For each size of a micro-batch the graphs of the run, of inputs like the run's, which would not find them on
    disk otherwise: the last first, and beside another rank from the middle on."""
    graphs, flags = [], [*others, "--compile", "--row-tokens", "32", "--micro-batch-tokens", str(tokens)]

    def see(graph, inputs):
        if (kind := (graph.code, [about(x) for x in inputs])) not in graphs:
            graphs.append(kind)
        return graph.forward

    if script is hybrid:  # a kernel reads the table of chunks, whose length varies, and a reference does not
        monkeypatch.setattr(hybrid, "choose_recurrence", lambda *_: "reference")
        for kind, at in {"gated delta rule": 2, "state space": 0}.items():
            monkeypatch.setitem(hybrid.recurrence_in_use, kind, lambda *inputs, at=at: inputs[at] + inputs[-1].sum())
    run = beside(script, flags, data, monkeypatch, "", ranks=ranks)
    for block in run.model.blocks:
        block.compile(backend=see, dynamic=False, fullgraph=True)
    for function, batch, stage in run.calls():
        function(*batch, stage)
    wanted, kinds = graphs[:], len(run.model.blocks)
    assert len(wanted) % kinds == 0 and len(wanted) // kinds == len({len(batch[0]) for _, batch, _ in run.calls()})

    def fused(*_):
        raise AssertionError("it ran")

    def without_data(mode=script.FakeTensorMode, **options):
        assert script.gemm_act is None  # it would read them
        return mode(**options)

    config, wanted_config = torch._functorch.config, (
        "autograd_cache_allow_custom_autograd_functions", "force_non_lazy_backward_lowering")
    for name in wanted_config:
        monkeypatch.setattr(config, name, False)
    monkeypatch.setattr(torch._inductor, "compile", see)
    monkeypatch.setattr(script, "FakeTensorMode", without_data)
    monkeypatch.setattr(script, "gemm_act", fused)
    monkeypatch.setattr(script, "reference_blocks", fused)  # attention
    for rank, per_machine in {(0, ranks), (ranks - 1, ranks), (ranks - 1, 1)}:
        graphs.clear()
        torch._dynamo.reset()
        beside(script, flags, data, monkeypatch, "blocks", rank, ranks, per_machine)
        ahead = len(wanted) // 2 if rank and per_machine == 2 else 0
        assert graphs == (wanted[-ahead:] + wanted[:-ahead])[::-1]
        assert script.gemm_act is fused  # what is compiled has it
        assert all(getattr(config, name) for name in wanted_config)  # else nothing backward, or nothing, is kept


def test_after_an_edit_above_the_flags_nothing_on_disk_is_found(new_run, tmp_path, monkeypatch):
    """torch's cache does not know the backward formulas of custom ops, and would go on with the one before."""
    monkeypatch.setattr(torch.compiler.config, "cache_key_tag", "")
    text, tags = gpt.SCRIPT.read_text(), []
    for old, new in (("", ""), ("(*attention_backward_op(dout", "(*attention_backward_op(2 * dout"), ("0.15", "0.16")):
        (path := tmp_path / "train_gpt.py").write_text(text.replace(old, new, 1))
        assert path.read_text() != text or not old
        monkeypatch.setattr(gpt, "SCRIPT", path)
        new_run(gpt, ["--layers", "le lev"]).calls()
        tags.append(torch.compiler.config.cache_key_tag)
    assert tags[0] == tags[2] != tags[1] and tags[0]


@pytest.mark.parametrize("device, rank, per_node, tasks", [
    ("/dev/nvidiactl", None, None, ["blocks", "kernels", "optimiser"]),
    ("/dev/nvidiactl", 0, 8, ["blocks", "kernels", "optimiser"]), ("/dev/nvidiactl", 1, 8, ["blocks"]),
    ("/dev/nvidiactl", 8, 8, ["blocks", "kernels", "optimiser"]), ("/dev/null", None, None, [])])
def test_a_run_on_a_gpu_starts_processes_that_compile(device, rank, per_node, tasks, monkeypatch):
    started = []
    monkeypatch.setattr(gpt.subprocess, "Popen", lambda argv, **options: started.append((argv, options)) or options)
    monkeypatch.setattr(gpt.os.path, "exists", lambda path: path == device)
    monkeypatch.setattr(sys, "argv", ["some/train.py", "--seed", "1"])
    for name, value in {"RANK": rank, "LOCAL_WORLD_SIZE": per_node, "COMPILE_BESIDE": None}.items():
        monkeypatch.delenv(name, raising=False) if value is None else monkeypatch.setenv(name, str(value))
    assert gpt.start_beside() == [options for _, options in started]
    for argv, options in started:
        assert argv == [sys.executable, "some/train.py", "--seed", "1"]
        assert options["stdout"] == options["stderr"] == gpt.subprocess.DEVNULL and options["stdin"] == subprocess.PIPE
    assert [options["env"].pop("COMPILE_BESIDE") for _, options in started] == tasks
    assert all(options["env"] == gpt.os.environ for _, options in started)  # ranks as the run's
    monkeypatch.setenv("COMPILE_BESIDE", "blocks")
    assert gpt.start_beside() == []  # such a process starts none


@pytest.mark.parametrize("gpu, flag, told, compiles", [  # gpu: free bytes of its memory, 0: there is none
    (80e9, "--compile", ".", True), (80e9, "--no-compile", ".", False), (40e9, "--compile", ".", False),
    (0, "--compile", ".", False), (80e9, "--compile", "", False)])
def test_a_process_beside_the_run_takes_little_memory_and_time(gpu, flag, told, compiles, data, monkeypatch):
    compiled, limits, world = [], [], SimpleNamespace(gpu=gpu > 0)
    monkeypatch.setattr(gpt, "World", lambda: world)
    monkeypatch.setattr(gpt, "Run", lambda args, world: SimpleNamespace(
        compile_beside=lambda task: compiled.append((args, world, task))))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (gpu, 80e9))
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", limits.append)
    monkeypatch.setenv("COMPILE_BESIDE", "blocks")
    monkeypatch.setattr(sys, "stdin", io.StringIO(told))  # by the run, once it has the GPU; ends with the run
    flags = [*FLAGS, "--data", str(data), "--resume", "x", flag]
    monkeypatch.setattr(sys, "argv", ["train", *flags])
    gpt.main()
    args = replace(gpt.parse_args(flags), bigram_rows=2, val_tokens=256, resume=None)
    assert compiled == [(args, world, "blocks")] * compiles and limits == [0.2] * compiles


@pytest.fixture
def sleeping(monkeypatch):
    """Two processes beside the run that wait to be told, and then write the word that they were told and sleep."""
    code = "import sys, time; print(sys.stdin.read(), flush=True); time.sleep(600)"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    started = [subprocess.Popen([sys.executable, "-c", code], **pipes) for _ in range(2)]
    monkeypatch.setattr(gpt, "beside", started)
    yield started
    for process in started:
        process.kill()


def test_the_processes_beside_a_run_end_before_the_clock_starts(new_run, sleeping):
    run = new_run(gpt, ["--layers", "sev= le -e levh"], "--compile")
    for block in run.model.blocks:
        block.compile = lambda **_: None
    run.warm_up()
    assert all(process.wait(timeout=10) < 0 for process in sleeping)


@pytest.mark.parametrize("error, end", [(gpt.UserError("mend this"), SystemExit), (MemoryError("full"), MemoryError)])
def test_a_run_tells_the_processes_beside_it_to_begin_and_ends_them_when_it_fails(
        error, end, data, monkeypatch, sleeping):
    told = []

    class Run:
        def __init__(self, *_):
            told.extend(process.stdout.readline() for process in sleeping)
            raise error

    monkeypatch.setattr(gpt, "Run", Run)
    monkeypatch.setattr(sys, "argv", ["train", *FLAGS, "--data", str(data)])
    with pytest.raises(end):
        gpt.main()
    assert told == [b".\n"] * 2 and all(process.wait(timeout=10) < 0 for process in sleeping)
