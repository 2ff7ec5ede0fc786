#!/usr/bin/env bash
# Sets up the environment, gets the data and starts a script. From any folder, on one GPU, many, or none:
#
#   ./run.sh [script.py] [flags]    trains; the script is train_gpt.py unless given, the flags are the script's own
#   ./run.sh --help                 the script's flags
#   ./run.sh test [pytest flags]    ruff and the tests
#
# Environment variables:
#   PYTHON=python3    use this Python as it is and install nothing
#   NPROC=2           number of processes on this node (default: one per visible GPU, one without a GPU)
#   NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT (29500)    several nodes: start run.sh on each of them
set -euo pipefail
say() { echo "run.sh: $*" >&2; }
die() { say "$*"; exit 2; }

called_from=$PWD
cd "$(dirname "${BASH_SOURCE[0]}")"

# --- What to run, and on what. All refusals that need no environment come before the minutes of set-up.

script=train_gpt.py
case ${1:-} in
  test) script='test'; shift ;;
  '' | -*) ;;
  *) script=$1; shift ;;
esac
if [[ $script != test && ! -f $script ]]; then
  die "no script $script; there are: $(ls train_*.py variants/train_*.py 2>/dev/null | tr '\n' ' ')"
fi

gpus=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU' || true)
has_gpu=$((gpus > 0))
if ((has_gpu)) && [[ -n ${CUDA_VISIBLE_DEVICES+set} ]]; then
  IFS=, read -r -a visible <<<"${CUDA_VISIBLE_DEVICES%%-1*}" # as CUDA reads it: the list ends at -1
  gpus=${#visible[@]}
fi

NPROC=${NPROC:-$((gpus > 1 ? gpus : 1))} NNODES=${NNODES:-1}
[[ $NPROC =~ ^[1-9][0-9]*$ ]] || die "NPROC=$NPROC is not a number of processes"
[[ $NNODES =~ ^[1-9][0-9]*$ ]] || die "NNODES=$NNODES is not a number of nodes"
rank=${NODE_RANK:-}
if ((NNODES > 1)) && [[ -z ${MASTER_ADDR:-} || ! $rank =~ ^(0|[1-9][0-9]*)$ || $rank -ge $NNODES ]]; then
  die "NNODES=$NNODES also needs NODE_RANK, 0 to $((NNODES - 1)), and MASTER_ADDR, the address of node 0"
fi

# --- Environment

# Nodes may share this folder and start together: one of them sets up or downloads, the others wait and find it done.
# To be called in a subshell, whose end gives the lock back. Without flock (macOS) there is no such protection.
lock() { if command -v flock >/dev/null; then exec 9>.run.lock; flock 9 || true; fi; }

# A part of the environment is done when its stamp in .venv holds the checksums of the files that it was made from.
is_done() { [[ -x $py && -f .venv/stamp-$1 && $(<".venv/stamp-$1") == "$(cksum "${@:2}")" ]]; }
once() { # once PART FILE...: calls install_PART unless that part is done
  if is_done "$@"; then return; fi
  (lock; if ! is_done "$@"; then "install_$1"; cksum "${@:2}" >".venv/stamp-$1"; fi)
}
pip_install() { "$py" -m pip install --disable-pip-version-check -qq -c requirements.txt "$@" </dev/null; }

install_base() {
  say "setting up .venv with requirements.txt (once; takes minutes)"
  if ! "$py" -m pip --version >/dev/null 2>&1; then
    command -v python3 >/dev/null || die "python3 is missing: install Python 3.10 or newer"
    python3 -c 'import sys; sys.exit(sys.version_info < (3, 10))' || die "$(python3 --version) is older than 3.10"
    python3 -c 'import venv, ensurepip' 2>/dev/null || die "python3 has no venv module (apt install python3-venv)"
    [[ -x $py ]] || rm -rf .venv # its Python is gone from this machine
    python3 -m venv .venv
  fi
  pip_install -r requirements.txt || die "pip could not install requirements.txt, see above"
}
install_test() {
  pip_install -r requirements-test.txt || die "pip could not install requirements-test.txt, see above"
  if command -v apt-get >/dev/null && ! command -v chromium >/dev/null && ((EUID == 0)); then
    say "installing Chromium, in which records/index.html is tested (once; takes a minute)"
    (apt-get update && apt-get install -y --no-install-recommends chromium) >.venv/chromium.log 2>&1 </dev/null ||
      say "going on without Chromium: its tests skip themselves (see .venv/chromium.log)"
  fi
}
install_gpu() { # one by one, since each is optional: the scripts choose among the kernels that they can import
  say "installing the GPU kernels of requirements-gpu.txt (once; takes minutes)"
  export MAMBA_SKIP_CUDA_BUILD=TRUE MAMBA_FORCE_BUILD=TRUE # explained in requirements-gpu.txt
  : >.venv/gpu.log
  while read -r -a words || ((${#words[@]})); do
    if [[ ${words[0]:-#} == '#'* ]]; then continue; fi
    pip_install "${words[@]}" >>.venv/gpu.log 2>&1 ||
      say "going on without ${words[0]}: pip cannot install it (see .venv/gpu.log; rm .venv/stamp-gpu to try again)"
  done <requirements-gpu.txt
}

if [[ -z ${PYTHON:-} ]]; then
  py=$PWD/.venv/bin/python
  once base requirements.txt
  if [[ $script == test ]]; then once test requirements-test.txt requirements-evals.txt requirements.txt
  elif ((has_gpu)); then once gpu requirements-gpu.txt requirements.txt; fi
else
  py=$PYTHON
  if [[ $py == */* && $py != /* ]]; then py=$called_from/$py; fi
  command -v "$py" >/dev/null || die "PYTHON=$PYTHON is not a program"
  needed=(torch)
  if [[ $script == test ]]; then needed+=(pytest pytest-xdist ruff); fi
  # reads the installed packages' metadata, because importing torch takes seconds
  "$py" -c 'import re, sys
from importlib.metadata import PackageNotFoundError, version
for name in sys.argv[1:]:
    try:
        found = version(name)
    except PackageNotFoundError:
        sys.exit(f"run.sh: the Python of PYTHON= has no {name} (see requirements.txt and requirements-test.txt)")
    if name == "torch" and tuple(map(int, re.findall(r"\d+", found)[:2])) < (2, 11):
        sys.exit(f"run.sh: the Python of PYTHON= has torch {found}, but 2.11 or newer is needed")
' "${needed[@]}" || exit 2
fi

if [[ $script == test ]]; then
  lint=0
  "$py" -m ruff check . || lint=$?
  "$py" -m pytest -n 2 --dist loadfile "$@" # last, so that its closing line is; on two cores 4 minutes, not 7
  exit $lint
fi

# --- Data

data='' preset='' previous=''
for word in "$@"; do
  case $word in -h | --help) exec "$py" "$script" "$@" ;; esac
  case $word in --data=*) data=${word#*=} ;; --preset=*) preset=${word#*=} ;; esac
  case $previous in --data) data=$word ;; --preset) preset=$word ;; esac
  previous=$word
done

# A download that was cut off leaves .run.download behind: its shards alone would train for several epochs unnoticed.
have_fineweb() { [[ ! -e .run.download ]] && ls data/fineweb10B/*_{train,val}_*.bin >/dev/null 2>&1; }
get_fineweb() { (lock; have_fineweb || { touch .run.download && "$py" data/fineweb.py && rm .run.download; }); }
have_sample() { [[ -f data/sample/shards/dataset.json ]]; }
get_sample() { (lock; have_sample || "$py" data/tokenize_text.py --sample); }

if [[ -z $data$preset ]]; then # the scripts' defaults mean FineWeb and a GPU
  if ((gpus == 0)); then
    say "no NVIDIA GPU here: adding --preset sample, a small run on the sample text"
    preset=sample
  elif ! have_fineweb && ! get_fineweb; then
    say "data/fineweb.py failed: adding --preset sample, a small run on the sample text" \
      "(--data data/fineweb10B would train on the shards that are there)"
    preset=sample
  fi
  if [[ -n $preset ]]; then set -- "$@" --preset "$preset"; fi
fi
case $preset in
  sample) have_sample || get_sample ;;
  speedrun | short) [[ -n $data ]] || ((gpus == 0)) || have_fineweb || get_fineweb || say "data/fineweb.py failed" ;;
esac

# --- Launch. With exec, so that signals reach the launched program and its exit status is passed on.

launch=("$py")
if ((NNODES > 1 || NPROC > 1)); then
  # torchrun's executable need not be on PATH; every rank's GPU is its cuda:0, so that all find the same compiled graphs
  launch+=(-m torch.distributed.run --virtual-local-rank --nproc_per_node="$NPROC")
  if ((NNODES == 1)); then
    launch+=(--standalone) # picks a free port, so runs can share a node
  else
    launch+=(--nnodes="$NNODES" --node_rank="$rank" --master_addr="$MASTER_ADDR")
    launch+=(--master_port="${MASTER_PORT:-29500}")
  fi
  # CPU ranks share the cores; beside a GPU one thread per rank is enough, and torch.distributed.run's own default
  cores=$(nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((gpus == 0 && cores > NPROC ? cores / NPROC : 1))}
fi
exec "${launch[@]}" "$script" "$@"
