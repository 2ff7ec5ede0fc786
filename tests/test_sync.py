"""Tests of variants/sync.py: the scripts of this repository agree, and what differs is found and mended."""

import subprocess
import sys
from pathlib import Path

import pytest

from variants import sync

ROOT = Path(sync.__file__).parents[1]


def script(**bodies: str) -> str:
    """A script with a docstring and a section for each name; `_same` at the end of a name marks it."""
    text = '"""A script."""\n'
    for name, body in bodies.items():
        text += f"{sync.RULE}\n# {name.replace('_same', ' [same]')}\n{sync.RULE}\n{body}\n"
    return text


@pytest.fixture
def scripts(tmp_path) -> list[Path]:
    """Three that agree: the second has a kernel of its own, and the third has it too."""
    shared = {"Setup_same": "import os\nimport sys", "Training_same": "train()"}
    bodies = [script(**shared, Architecture="a = 1"),
              script(**shared, Recurrence_same="r = 1\n\nr = 2", Architecture="a = 2"),
              script(Recurrence_same="r = 1\n\nr = 2", Architecture="a = 3", **shared)]
    paths = [tmp_path / f"train_{i}.py" for i in range(3)]
    for path, body in zip(paths, bodies):
        path.write_text(body)
    return paths


def test_the_scripts_of_this_repository_agree():
    done = subprocess.run([sys.executable, ROOT / "variants/sync.py", "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert {"Setup [same]", "Data [same]", "Optimizer [same]", "Kernels [same]", "Training [same]"} == set(
        sync.sections((ROOT / "train_gpt.py").read_text()))


def test_sections_run_from_banner_to_banner(scripts):
    found = sync.sections(scripts[1].read_text())
    assert list(found) == ["Setup [same]", "Training [same]", "Recurrence [same]"]
    assert found["Setup [same]"] == f"{sync.RULE}\n# Setup [same]\n{sync.RULE}\nimport os\nimport sys\n"
    assert "".join(found.values()) in scripts[1].read_text()


def test_scripts_that_agree_are_left_alone(scripts, capsys):
    before = [path.read_bytes() for path in scripts]
    assert sync.synchronise(scripts, check=True) == sync.synchronise(scripts, check=False) == []
    assert [path.read_bytes() for path in scripts] == before and not capsys.readouterr().out


@pytest.mark.parametrize("old, new, fault", [
    ("import sys", "import re", "line 5 is 'import re', and should be 'import sys'"),
    ("import sys\n", "", "line 5 is '(end)', and should be 'import sys'"),
    ("train()", "train()\ntrain()", "line 5 is 'train()', and should be '(end)'"),
])
def test_a_line_that_differs_is_named_and_mended(scripts, old, new, fault):
    intact = scripts[2].read_text()
    scripts[2].write_text(intact.replace(old, new))
    (found,) = sync.synchronise(scripts, check=True)
    assert found.startswith("train_2.py: ") and "differs from train_0.py" in found and found.endswith(fault)
    assert scripts[2].read_text() != intact
    assert sync.synchronise(scripts, check=False) == []
    assert scripts[2].read_text() == intact


def test_a_section_that_the_first_script_lacks_comes_from_the_first_that_has_it(scripts):
    intact = scripts[2].read_text()
    scripts[2].write_text(intact.replace("r = 2", "r = 3"))
    (found,) = sync.synchronise(scripts, check=True)
    assert "Recurrence [same] differs from train_1.py: line 6" in found
    assert sync.synchronise(scripts, check=False) == [] and scripts[2].read_text() == intact


def test_other_sections_may_differ(scripts):
    scripts[1].write_text(scripts[1].read_text().replace("a = 2", "anything\nat all"))
    assert sync.synchronise(scripts, check=True) == []


@pytest.mark.parametrize("check", [True, False])
def test_a_missing_section_is_reported(scripts, check):
    scripts[1].write_text(script(Setup_same="import os\nimport sys", Training="train()"))
    assert sync.synchronise(scripts, check=check) == ["train_1.py: no section Training [same]"]
