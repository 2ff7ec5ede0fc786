"""Our scores against lm-evaluation-harness: its own task files and metrics, on the same local examples."""

import json
from pathlib import Path

import pytest

pytest.importorskip("lm_eval", reason="needs lm-eval (requirements-test.txt)")

import lm_eval
import yaml
from lm_eval.tasks import TaskManager

from evals import hellaswag, lambada, recall
from evals.lm_eval_adapter import CheckpointLM
from test_evals import HELLASWAG, LAMBADA, flags, language_model, one_thread, write_lines  # noqa: F401

TASKS = Path(lm_eval.__file__).parent / "tasks"


@pytest.fixture(autouse=True)
def no_network(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)


def harness(lm, task: dict, file: Path) -> dict:
    """The harness's results of a task whose data is a local file."""
    task |= {"dataset_path": "json", "dataset_name": None, "training_split": None, "tag": [],
             "dataset_kwargs": {"data_files": {task.get("validation_split") or task["test_split"]: str(file)}}}
    quick = TaskManager(include_defaults=False)  # else it reads thousands of task files
    results = lm_eval.simple_evaluate(CheckpointLM(lm), tasks=[task], bootstrap_iters=0, task_manager=quick)["results"]
    return {name.removesuffix(",none"): value for name, value in results[task["task"]].items()}


def task_file(path: str) -> dict:
    """A task as the harness ships it; what its YAML names as a function is taken from the module beside it."""
    class Loader(yaml.SafeLoader):
        pass

    def function(_, node):
        module, name = node.value.split(".")
        source: dict = {}
        exec((TASKS / path).with_name(f"{module}.py").read_text(), source)
        return source[name]

    Loader.add_constructor("!function", function)
    return yaml.load((TASKS / path).read_text(), Loader)


@pytest.mark.parametrize("bos", [False, True])
def test_hellaswag_equals_the_harness_to_the_last_digit(tmp_path, bos):
    file, lm = write_lines(tmp_path / "rows.jsonl", HELLASWAG * 2), language_model(bos=bos, pack_tokens=512)
    task = task_file("hellaswag/hellaswag.yaml")
    task["metric_list"].append({"metric": "acc_bytes", "aggregation": "mean", "higher_is_better": True})
    theirs, ours = harness(lm, task, file), hellaswag.evaluate(lm, flags(file=file, out=tmp_path))
    assert {name: metric.value for name, metric in ours.items()} == {name: theirs[name] for name in ours}
    assert set(ours) == {"acc", "acc_norm", "acc_bytes"}


@pytest.mark.parametrize("bos", [False, True])
def test_lambada_equals_the_harness_to_the_last_digit(tmp_path, bos):
    file, lm = write_lines(tmp_path / "rows.jsonl", LAMBADA), language_model(bos=bos, pack_tokens=512)
    theirs = harness(lm, task_file("lambada/lambada_openai.yaml"), file)
    ours = lambada.evaluate(lm, flags(file=file, out=tmp_path))
    assert {name: metric.value for name, metric in ours.items()} == {name: theirs[name] for name in ours}


def test_rolling_likelihood_and_generation():
    lm = language_model(pack_tokens=512)
    adapter = CheckpointLM(lm)
    requests = [lm_eval.api.instance.Instance("loglikelihood_rolling", {}, (text,), 0) for text in ("abc", "the gate")]
    scores = lm.encode_pairs([("", "abc"), ("", "the gate")])
    assert len(scores[0][0]) == 4  # the separator, and the text
    alone = [adapter.loglikelihood_rolling([request], disable_tqdm=True)[0] for request in requests]
    assert adapter.loglikelihood_rolling(requests, disable_tqdm=True) == pytest.approx(alone, abs=1e-4)
    kinds = [{"until": ["\n"], "max_gen_toks": 8}, {"until": "e", "max_gen_toks": 12}, {"max_gen_toks": 5}]
    requests = [lm_eval.api.instance.Instance("generate_until", {}, ("the gate", kind), 0) for kind in kinds * 2]
    texts = adapter.generate_until(requests, disable_tqdm=True)
    assert texts[:3] == texts[3:] and all(isinstance(text, str) for text in texts) and "e" not in texts[1]


def test_recall_equals_the_harness(tmp_path):
    """SWDE's prompts and scores in the harness's format, by its own task class."""
    rows = [{"text": "\nAuthor: Ada\n\nSummary of information above...\nauthor:", "key": "author", "value": " Ada"},
            {"text": "Year: 1843\n\nSummary of information above...\nyear: ", "key": "year", "value": "1843"}]
    source: dict = {}
    exec((TASKS / "swde" / "task.py").read_text(), source)
    task = source["SWDE"].__new__(source["SWDE"])
    for row in rows:
        page = recall.convert(json.loads(json.dumps(row)))
        assert recall.lmeval_prompt("swde", page) == task.doc_to_text(row)
        for text in ("by ADA.", "in 1843", ""):
            assert task.process_results(row, [text]) == {"contains": recall.contains(text, page.answers)}
