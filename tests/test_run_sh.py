"""run.sh's choices, in a copy of it among stand-ins for python3, nvidia-smi and flock that write down their calls.

The stand-in for Python makes a .venv whose python is the same stand-in, pretends to install packages and to run
scripts, and leaves `python -c` to the real one. PATH holds nothing but stand-ins and a few plain tools.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TOOLS = "bash cat cksum cp dirname grep ls mkdir rm sleep touch tr".split()
pytestmark = pytest.mark.skipif(not all(map(shutil.which, TOOLS)), reason="needs a POSIX shell and its usual tools")

FAKE_PYTHON = r"""#!/bin/bash
# FAIL: a pattern; calls that match it fail. STATUS: exit status of a script.
case "$*" in
  "-c "* | "-m pip --version") ;; # run.sh's questions
  *) echo "${0##*/} $*" >>"$CALLS" ;;
esac
[[ -n ${FAIL:-} && "$*" == $FAIL ]] && exit 1
case "$*" in
  --version) echo Python 3.9.1 ;;
  "-c "*) exec "$REAL_PYTHON" "$@" ;;
  "-m venv "*) mkdir -p .venv/bin && cp "$0" .venv/bin/python ;;
  "-m pip install "*) echo "MAMBA ${MAMBA_SKIP_CUDA_BUILD:-} ${MAMBA_FORCE_BUILD:-}" >>"$CALLS.env" ;;
  "data/tokenize_text.py --sample") mkdir -p data/sample/shards && touch data/sample/shards/dataset.json ;;
  "data/fineweb.py"*) mkdir -p data/fineweb10B && touch data/fineweb10B/fineweb_{val_000000,train_000001}.bin ;;
  *wait.py*) trap 'echo "got SIGTERM" >>"$CALLS"; exit 43' TERM; touch ready; while :; do sleep 0.02; done ;;
  *train_*) echo "OMP ${OMP_NUM_THREADS:-}" >>"$CALLS.env"; exit "${STATUS:-0}" ;;
esac
"""

SAMPLE = "python data/tokenize_text.py --sample"
INSTALL = "python -m pip install --disable-pip-version-check -qq -c requirements.txt "


class Checkout:
    """A copy of the repository's set-up files in a folder, with stand-ins."""

    def __init__(self, folder: Path):
        self.bin, self.root, self.log = folder / "bin", folder / "repo", folder / "calls"
        self.bin.mkdir()
        self.root.mkdir()
        for tool in TOOLS:
            (self.bin / tool).symlink_to(shutil.which(tool))
        for name in ("run.sh", "requirements.txt", "requirements-gpu.txt", "requirements-evals.txt",
                     "requirements-test.txt"):
            shutil.copy(ROOT / name, self.root)
        for name in ("train_gpt.py", "variants/train_rwkv.py"):
            (self.root / name).parent.mkdir(exist_ok=True)
            (self.root / name).touch()
        self.fake("python3", FAKE_PYTHON)
        self.fake("flock", '#!/bin/bash\necho "flock" >>"$CALLS"\n')
        self.fake("nproc", "#!/bin/bash\necho 6\n")
        self.gpus(0)

    def fake(self, name: str, text: str):
        (self.bin / name).write_text(text)
        (self.bin / name).chmod(0o755)

    def gpus(self, count: int):
        lines = "\n".join(f"GPU {i}: a GPU (UUID: GPU-{i})\n  MIG 1g.10gb: not a GPU" for i in range(count))
        self.fake("nvidia-smi", f"#!/bin/bash\necho '{lines}'\n" if count else "#!/bin/bash\nexit 9\n")

    def shards(self):
        (self.root / "data/fineweb10B").mkdir(parents=True)
        for name in ("fineweb_val_000000.bin", "fineweb_train_000001.bin"):
            (self.root / "data/fineweb10B" / name).touch()

    def env(self, **extra: str) -> dict[str, str]:
        return {"PATH": str(self.bin), "CALLS": str(self.log), "REAL_PYTHON": sys.executable, **extra}

    def run(self, *words: str, status: int = 0, cwd: Path | None = None, **env: str) -> tuple[list[str], str]:
        """(the calls in their order without the locks', the messages) of `./run.sh words`; env as in a shell."""
        self.log.unlink(missing_ok=True)
        Path(f"{self.log}.env").unlink(missing_ok=True)
        done = subprocess.run(["bash", str(self.root / "run.sh"), *words], env=self.env(**env), cwd=cwd or self.root,
                              capture_output=True, text=True, timeout=20)
        assert done.returncode == status, done.stdout + done.stderr
        calls = self.log.read_text().splitlines() if self.log.exists() else []
        self.locks = calls.count("flock")
        return [call for call in calls if call != "flock"], done.stderr

    def environment(self) -> str:
        return Path(f"{self.log}.env").read_text()


@pytest.fixture
def fresh(tmp_path):
    return Checkout(tmp_path)


@pytest.fixture
def ready(fresh):
    """A checkout after its first start, on a machine without a GPU."""
    fresh.run()
    return fresh


def gpu_lines() -> list[str]:
    lines = (ROOT / "requirements-gpu.txt").read_text().splitlines()
    return [line for line in lines if line and not line.startswith("#")]


# --- environment


def test_first_start_without_a_gpu(fresh):
    calls, messages = fresh.run()
    assert calls == ["python3 -m venv .venv", INSTALL + "-r requirements.txt", SAMPLE,
                     "python train_gpt.py --preset sample"]
    assert fresh.locks == 2  # the environment's and the data's
    assert "setting up .venv" in messages and "adding --preset sample" in messages
    assert len(messages.splitlines()) == 2


def test_second_start_only_starts_the_script(ready):
    began = time.monotonic()
    calls, messages = ready.run()
    assert time.monotonic() - began < 2
    assert calls == ["python train_gpt.py --preset sample"] and ready.locks == 0
    assert messages.count("\n") == 1


def test_first_start_with_a_gpu_installs_the_kernels_after_torch(fresh):
    fresh.gpus(1)
    calls, _ = fresh.run()
    kernels = [INSTALL + line for line in gpu_lines()]
    assert calls == ["python3 -m venv .venv", INSTALL + "-r requirements.txt", *kernels, "python data/fineweb.py",
                     "python train_gpt.py"]
    assert [line.split("==")[0].split("[")[0] for line in gpu_lines()] == ["flash-attn-4", "fla-core", "setuptools",
                                                                           "mamba-ssm"]
    assert "--no-deps --no-build-isolation" in gpu_lines()[-1] and "MAMBA TRUE TRUE" in fresh.environment()
    assert fresh.run() == (["python train_gpt.py"], "")


def test_a_kernel_that_cannot_be_installed_is_done_without(fresh):
    fresh.gpus(1)
    calls, messages = fresh.run(FAIL="*flash-attn-4*")
    assert [line for line in messages.splitlines() if "going on without" in line] == [
        "run.sh: going on without flash-attn-4[cu13]==4.0.0b36: pip cannot install it "
        "(see .venv/gpu.log; rm .venv/stamp-gpu to try again)"]
    assert any("fla-core" in call for call in calls) and calls[-1] == "python train_gpt.py"
    assert fresh.run()[0] == ["python train_gpt.py"]  # no second try


def test_a_gpu_that_appears_later_gets_its_kernels(ready):
    ready.gpus(1)
    calls, _ = ready.run()
    assert calls[:-2] == [INSTALL + line for line in gpu_lines()]


def test_changed_requirements_are_installed(ready):
    with open(ready.root / "requirements.txt", "a") as file:
        file.write("# changed\n")
    assert ready.run()[0][0] == INSTALL + "-r requirements.txt"


def test_last_kernel_line_without_a_line_end(fresh):
    fresh.gpus(1)
    (fresh.root / "requirements-gpu.txt").write_text("# kernels\n\n  # indented\na==1\nb==2 --no-deps")
    assert fresh.run()[0][2:4] == [INSTALL + "a==1", INSTALL + "b==2 --no-deps"]


def test_failed_set_up_is_taken_up_again(fresh):
    calls, messages = fresh.run(FAIL="*-r requirements.txt", status=2)
    assert calls[-1] == INSTALL + "-r requirements.txt" and "could not install requirements.txt" in messages
    assert fresh.run()[0][0] == INSTALL + "-r requirements.txt"


def test_environment_whose_python_is_gone_is_made_again(ready):
    (ready.root / ".venv/bin/python").unlink()
    assert ready.run()[0][:2] == ["python3 -m venv .venv", INSTALL + "-r requirements.txt"]


def test_works_without_flock(fresh):
    (fresh.bin / "flock").unlink()
    assert fresh.run()[0][-1] == "python train_gpt.py --preset sample"


@pytest.mark.skipif(not shutil.which("flock"), reason="needs flock")
def test_starts_at_the_same_time_set_up_once(fresh):
    (fresh.bin / "flock").unlink()
    (fresh.bin / "flock").symlink_to(shutil.which("flock"))
    fresh.fake("python3", FAKE_PYTHON.replace('"-m pip install "*)', '"-m pip install "*) sleep 0.3;'))
    starts = [subprocess.Popen(["bash", "run.sh"], env=fresh.env(), cwd=fresh.root, stderr=subprocess.DEVNULL)
              for _ in range(3)]
    assert [start.wait(timeout=20) for start in starts] == [0, 0, 0]
    calls = fresh.log.read_text().splitlines()
    assert calls.count(INSTALL + "-r requirements.txt") == 1 and calls.count(SAMPLE) == 1
    assert calls.count("python train_gpt.py --preset sample") == 3


def test_python_is_missing(fresh):
    (fresh.bin / "python3").unlink()
    assert "python3 is missing" in fresh.run(status=2)[1]


def test_python_is_too_old(fresh):
    assert "Python 3.9.1 is older than 3.10" in fresh.run(status=2, FAIL="-c*version_info*")[1]


def test_python_without_venv(fresh):
    calls, messages = fresh.run(status=2, FAIL="-c*ensurepip*")
    assert "has no venv module" in messages and not calls


# --- PYTHON=


PYTEST = "python -m pytest -n 2 --dist loadfile"


def installed(folder: Path, **versions: str) -> dict[str, str]:
    """Environment variables in which the real Python finds these packages and no others."""
    for name, version in versions.items():
        info = folder / "site" / f"{name}-{version}.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    bare = folder / "bare_python"  # -S: without the site-packages of the Python that runs the tests
    bare.write_text(f'#!/bin/bash\nexec "{sys.executable}" -S "$@"\n')
    bare.chmod(0o755)
    return {"PYTHON": "python3", "REAL_PYTHON": str(bare), "PYTHONPATH": str(folder / "site")}


@pytest.mark.parametrize("version", ["2.11.0", "2.13.0+cpu", "3.0.0a0+git12"])
def test_python_given_installs_nothing(fresh, tmp_path, version):
    fresh.gpus(1)
    fresh.shards()
    assert fresh.run("--seed", "1", **installed(tmp_path, torch=version)) == (["python3 train_gpt.py --seed 1"], "")
    assert not (fresh.root / ".venv").exists()


@pytest.mark.parametrize(("versions", "words"), [
    ({"torch": "2.10.1+cu128"}, "has torch 2.10.1+cu128"), ({}, "has no torch")])
def test_python_given_with_old_or_no_torch(fresh, tmp_path, versions, words):
    calls, messages = fresh.run(status=2, **installed(tmp_path, **versions))
    assert words in messages and len(messages.splitlines()) == 1 and not calls


def test_python_given_that_does_not_exist(fresh):
    assert "PYTHON=nopython is not a program" in fresh.run(status=2, PYTHON="nopython")[1]


def test_python_given_by_a_path_from_where_run_sh_is_called(fresh, tmp_path):
    env = installed(tmp_path, torch="2.13.0") | {"PYTHON": "bin/python3"}
    assert fresh.run("--help", cwd=tmp_path, **env)[0] == ["python3 train_gpt.py --help"]


# --- data


def test_gpu_with_data_downloads_nothing(ready):
    ready.gpus(1)
    ready.shards()
    assert ready.run()[0][-1] == "python train_gpt.py"
    assert ready.run()[0] == ["python train_gpt.py"]


def test_gpu_without_a_network_trains_on_the_sample(fresh):
    fresh.gpus(1)
    calls, messages = fresh.run("--seed", "1", FAIL="data/fineweb.py*")
    assert calls[-3:] == ["python data/fineweb.py", SAMPLE, "python train_gpt.py --seed 1 --preset sample"]
    assert "data/fineweb.py failed: adding --preset sample" in messages


def test_download_that_was_cut_off_is_taken_up_again(fresh):
    fresh.gpus(1)
    fresh.run(FAIL="data/fineweb.py*")
    fresh.shards()  # some shards, not all
    assert fresh.run()[0] == ["python data/fineweb.py", "python train_gpt.py"]
    assert fresh.run()[0] == ["python train_gpt.py"]


@pytest.mark.parametrize("gpus", [0, 1])
@pytest.mark.parametrize("flags", ["--data mine", "--data=mine", "--data mine --preset short", "--preset tiny"])
def test_data_and_preset_of_the_user_are_respected(ready, gpus, flags):
    ready.gpus(gpus)
    calls, messages = ready.run(*flags.split(), "--seed", "1")
    assert calls[-1] == f"python train_gpt.py {flags} --seed 1"
    assert "preset" not in messages and not any("data/" in call for call in calls)


@pytest.mark.parametrize("flags", ["--preset short", "--preset=speedrun"])
def test_presets_on_fineweb_get_it_for_a_gpu(fresh, flags):
    call, flags = f"python train_gpt.py {flags}", flags.split()
    assert fresh.run(*flags)[0][-2:] != ["python data/fineweb.py", call]  # a CPU: the script says what is missing
    fresh.gpus(1)
    calls, messages = fresh.run(*flags, FAIL="data/fineweb.py*")
    assert calls[-2:] == ["python data/fineweb.py", call] and "data/fineweb.py failed" in messages
    assert fresh.run(*flags)[0] == ["python data/fineweb.py", call]
    assert fresh.run(*flags)[0] == [call]


@pytest.mark.parametrize("flags", ["--preset sample", "--preset=sample"])
def test_sample_preset_of_the_user_gets_its_shards(fresh, flags):
    calls, messages = fresh.run(*flags.split())
    assert calls[-2:] == [SAMPLE, f"python train_gpt.py {flags}"] and "adding" not in messages


def test_sample_that_cannot_be_made_ends_the_start(fresh):
    assert fresh.run(status=1, FAIL="*tokenize_text*")[0][-1] == SAMPLE


@pytest.mark.parametrize("words", [["--help"], ["-h"], ["variants/train_rwkv.py", "--seed", "1", "--help"]])
def test_help_is_the_scripts_own(fresh, words):
    fresh.gpus(8)
    script = words if words[0].endswith(".py") else ["train_gpt.py", *words]
    calls, _ = fresh.run(*words)
    assert calls[-1] == "python " + " ".join(script)
    assert not any("data/" in call or "distributed" in call for call in calls)


# --- launch


def launch(checkout: Checkout, *words: str, **env: str) -> str:
    return checkout.run("--preset", "x", *words, **env)[0][-1]


def test_eight_gpus(ready):
    ready.gpus(8)
    assert launch(ready) == ("python -m torch.distributed.run --virtual-local-rank --nproc_per_node=8 --standalone "
                             "train_gpt.py --preset x")
    assert "OMP 1\n" in ready.environment()
    assert launch(ready, NPROC="1") == "python train_gpt.py --preset x"
    assert "--nproc_per_node=4 " in launch(ready, NPROC="4")


@pytest.mark.parametrize(("visible", "processes"), [("0,3,5", 3), ("2", 1), ("0,1,-1,2", 2), ("GPU-0,GPU-1", 2)])
def test_visible_gpus_are_counted(ready, visible, processes):
    ready.gpus(8)
    call = launch(ready, CUDA_VISIBLE_DEVICES=visible)
    assert (f"--nproc_per_node={processes} " in call) if processes > 1 else call == "python train_gpt.py --preset x"


@pytest.mark.parametrize("visible", ["", "-1"])
def test_hidden_gpus_are_no_gpus(ready, visible):
    ready.gpus(8)
    assert ready.run(CUDA_VISIBLE_DEVICES=visible)[0][-1] == "python train_gpt.py --preset sample"


def test_processes_on_a_cpu_share_its_cores(ready):
    assert "--nproc_per_node=2 --standalone" in launch(ready, NPROC="2")
    assert ready.environment() == "OMP 3\n"
    launch(ready, NPROC="8")
    assert ready.environment() == "OMP 1\n"
    launch(ready, NPROC="2", OMP_NUM_THREADS="5")
    assert ready.environment() == "OMP 5\n"
    launch(ready)
    assert ready.environment() == "OMP \n"  # one process: torch's own choice


def test_two_nodes(ready):
    ready.gpus(8)
    expected = ("python -m torch.distributed.run --virtual-local-rank --nproc_per_node=8 --nnodes=2 --node_rank=1 "
                "--master_addr=node0 --master_port={} train_gpt.py --preset x")
    nodes = {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "node0"}
    assert launch(ready, **nodes) == expected.format(29500)
    assert launch(ready, **nodes, MASTER_PORT="1234") == expected.format(1234)
    assert "--nproc_per_node=1 --nnodes=2" in launch(ready, **nodes, NPROC="1")
    assert "--standalone" in launch(ready, **nodes | {"NNODES": "1"})


@pytest.mark.parametrize("env", [
    {"NNODES": "2", "MASTER_ADDR": "node0"}, {"NNODES": "2", "NODE_RANK": "0"},
    {"NNODES": "2", "MASTER_ADDR": "node0", "NODE_RANK": "2"},
    {"NNODES": "2", "MASTER_ADDR": "node0", "NODE_RANK": "x"},
    {"NNODES": "two"}, {"NPROC": "0"}, {"NPROC": "all"}])
def test_bad_numbers_of_nodes_and_processes_are_refused(fresh, env):
    calls, messages = fresh.run(status=2, **env)
    assert len(messages.splitlines()) == 1 and not calls  # before any set-up


def test_unknown_script(fresh):
    calls, messages = fresh.run("train_gtp.py", status=2)
    assert messages.strip() == "run.sh: no script train_gtp.py; there are: train_gpt.py variants/train_rwkv.py"
    assert not calls


def test_flags_reach_the_script_as_they_are(ready):
    (ready.root / "train_mine.py").touch()
    assert ready.run("train_mine.py", "--preset=x", "--name", "two  words *")[0] == [
        "python train_mine.py --preset=x --name two  words *"]


def test_from_another_folder(ready, tmp_path):
    assert ready.run(cwd=tmp_path)[0] == ["python train_gpt.py --preset sample"]


def test_exit_status_is_the_scripts(ready):
    ready.run(status=7, STATUS="7")


def test_sigterm_reaches_the_script(ready):
    (ready.root / "wait.py").touch()
    started = subprocess.Popen(["bash", "run.sh", "wait.py", "--data=x"], env=ready.env(), cwd=ready.root)
    try:
        deadline = time.monotonic() + 10
        while not (ready.root / "ready").exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        started.send_signal(signal.SIGTERM)
        assert started.wait(timeout=10) == 43
    finally:
        started.kill()
    assert "got SIGTERM" in ready.log.read_text()


# --- ./run.sh test


def test_test_installs_once_and_passes_its_arguments_to_pytest(fresh):
    fresh.gpus(8)  # the tests need no kernels
    tests = ["python -m ruff check .", f"{PYTEST} -q -k name"]
    calls, _ = fresh.run("test", "-q", "-k", "name")
    assert calls == ["python3 -m venv .venv", INSTALL + "-r requirements.txt", INSTALL + "-r requirements-test.txt",
                     *tests]
    assert fresh.run("test", "-q", "-k", "name") == (tests, "")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root installs packages of the system")
def test_test_installs_chromium_if_it_can(fresh):
    fresh.fake("apt-get", '#!/bin/bash\necho "apt-get $*" >>"$CALLS"; exit "${APT:-0}"\n')
    calls, messages = fresh.run("test", APT="1")
    assert "apt-get update" in calls and "going on without Chromium" in messages and calls[-1] == PYTEST
    (fresh.root / ".venv/stamp-test").unlink()
    assert "apt-get install -y --no-install-recommends chromium" in fresh.run("test")[0]
    (fresh.root / ".venv/stamp-test").unlink()
    fresh.fake("chromium", "#!/bin/bash\n")
    assert not [call for call in fresh.run("test")[0] if "apt-get" in call]


@pytest.mark.parametrize("fails", ["*ruff*", "*pytest*"])
def test_test_fails_with_ruff_or_pytest(fresh, fails):
    calls, _ = fresh.run("test", status=1, FAIL=fails)
    assert calls[-2:] == ["python -m ruff check .", PYTEST]


def test_test_with_python_given(fresh, tmp_path):
    env = installed(tmp_path, torch="2.13.0", pytest="9.0", pytest_xdist="3.8")
    assert "has no ruff" in fresh.run("test", status=2, **env)[1]
    env = installed(tmp_path, ruff="0.17")
    assert fresh.run("test", **env)[0] == ["python3 -m ruff check .", PYTEST.replace("python", "python3")]


def test_ci_runs_the_tests(fresh):
    (fresh.root / ".ci").mkdir()
    shutil.copy(ROOT / ".ci/run", fresh.root / ".ci/run")
    assert os.access(ROOT / ".ci/run", os.X_OK) and os.access(ROOT / "run.sh", os.X_OK)
    subprocess.run(["bash", ".ci/run"], env=fresh.env(), cwd=fresh.root, check=True, timeout=20)
    assert fresh.log.read_text().splitlines()[-1] == f"{PYTEST} -q"
