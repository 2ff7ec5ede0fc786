"""Any task of lm-evaluation-harness on a checkpoint: `python -m evals.lm_eval_adapter --tasks sciq,swde CHECKPOINT`.

Needs `pip install lm-eval==0.4.13`. `CheckpointLM` is a model of the harness: it can also be given to
lm_eval.simple_evaluate(model=CheckpointLM(lm), ...).
"""

import dataclasses
import json
import sys
from typing import Any

import numpy as np
import tyro
from tqdm import tqdm

try:
    import lm_eval
    from lm_eval.api.model import TemplateLM
except ImportError:
    print("lm_eval_adapter.py: lm-evaluation-harness is missing: pip install lm-eval==0.4.13", file=sys.stderr)
    sys.exit(2)

from evals.common import Flags, InputError, LanguageModel, checkpoint_paths, load, one_line_errors


class CheckpointLM(TemplateLM):
    """A checkpoint as the harness sees it. Nothing is cut: the models have no longest context."""

    def __init__(self, lm: LanguageModel):
        super().__init__()
        self.lm = lm

    @property
    def eot_token_id(self) -> int:
        return self.lm.separator

    @property
    def tokenizer_name(self) -> str:
        return self.lm.dataset["tokenizer"]

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        bos = [self.lm.separator] if self.lm.bos and add_special_tokens is not False else []
        return bos + self.lm.encode([string])[string].tolist()

    def _score(self, sequences: list[list[int]], starts: list[int], quiet: bool) -> list[tuple[float, bool]]:
        wanted = [np.arange(start, len(tokens)) for start, tokens in zip(starts, sequences)]
        results: dict[int, tuple[float, bool]] = {}
        with tqdm(total=len(sequences), disable=quiet or None) as bar:
            for scores in self.lm.score([np.array(tokens) for tokens in sequences], wanted):
                results |= {i: (float(log_probs.sum()), bool(hits.all())) for i, (log_probs, hits) in scores.items()}
                bar.update(len(scores))
        return [results[i] for i in range(len(sequences))]

    def _loglikelihood_tokens(self, requests, disable_tqdm: bool = False, **_: Any) -> list[tuple[float, bool]]:
        contexts = [context or [self.lm.separator] for _, context, _ in requests]
        sequences = [context + continuation for context, (_, _, continuation) in zip(contexts, requests)]
        return self._score(sequences, [len(context) for context in contexts], disable_tqdm)

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
        sequences = [[self.lm.separator, *self.tok_encode(request.args[0], False)] for request in requests]
        return [score for score, _ in self._score(sequences, [1] * len(sequences), disable_tqdm)]

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        texts: dict[int, str] = {}
        kinds: dict[str, list[int]] = {}
        for i, request in enumerate(requests):
            kinds.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(i)
        with tqdm(total=len(requests), disable=disable_tqdm or None) as bar:
            for kind, members in kinds.items():
                options = json.loads(kind)
                if options.get("do_sample") and options.get("temperature", 1.0) > 0:
                    raise InputError("a task samples, and here is only greedy generation: leave it out")
                stops = options.get("until") or []
                prompts = self.lm.encode_prompts([requests[i].args[0] for i in members])
                for part in self.lm.generate(prompts, options.get("max_gen_toks", 256),
                                             [stops] if isinstance(stops, str) else stops):
                    texts |= {members[i]: text for i, text in part.items()}
                    bar.update(len(part))
        return [texts[i] for i in range(len(requests))]


@dataclasses.dataclass
class Args(Flags):
    """Tasks of lm-evaluation-harness on a checkpoint."""

    tasks: str = "hellaswag,lambada_openai"
    """Names of tasks of the harness, with commas."""
    num_fewshot: int | None = None
    """Examples in the prompt; by default what each task says."""


def main() -> None:
    with one_line_errors():
        args = tyro.cli(Args, description=__doc__, config=(tyro.conf.FlagCreatePairsOff,))
        for path in checkpoint_paths(args):
            results = lm_eval.simple_evaluate(model=CheckpointLM(load(path, args)), tasks=args.tasks.split(","),
                                              num_fewshot=args.num_fewshot, limit=args.limit or None)["results"]
            print(json.dumps({"checkpoint": str(path), "results": results}, default=str), flush=True)


if __name__ == "__main__":
    main()
