"""A text by the model of a checkpoint: `python -m evals.sample CHECKPOINT --prompt "The whale"`."""

import dataclasses
from pathlib import Path

import numpy as np
import torch
import tyro

from evals.common import Flags, InputError, LanguageModel, checkpoint_paths, load, one_line_errors


@dataclasses.dataclass
class Args(Flags):
    """A text that goes on from the prompt, each token drawn at random as the model has it."""

    prompt: str = ""
    """What the text begins with; by default a document begins."""
    length: int = 200
    """Characters after the prompt, at most."""
    temperature: float = 0.8
    """Below 1, likely tokens become likelier."""
    seed: int = 0
    """Of the draws."""
    out: tyro.conf.Suppress[Path] = Path()
    limit: tyro.conf.Suppress[int] = 0


def sample(lm: LanguageModel, args: Args) -> str:
    """Prompt and text. There is no cache, for it is short."""
    (prompt,) = lm.encode_prompts([args.prompt])
    text, tokens, generator = "", prompt, torch.Generator(lm.device).manual_seed(args.seed)
    while len(text) < args.length and len(tokens) < len(prompt) + args.length:
        (logits,) = next(lm.logits([tokens], [np.array([len(tokens) - 1])]))
        probs = (logits[:lm.vocab_size] / args.temperature).softmax(0)
        tokens = np.append(tokens, torch.multinomial(probs, 1, generator=generator).item())
        text = lm.decode(tokens[len(prompt):])
    return args.prompt + text[:args.length]


def main() -> None:
    with one_line_errors():
        args = tyro.cli(Args, description=__doc__, config=(tyro.conf.FlagCreatePairsOff,))
        if args.length < 1 or args.temperature <= 0:
            raise InputError("--length is 1 or more, and --temperature above 0")
        for path in checkpoint_paths(args):
            print(sample(load(path, args), args), flush=True)


if __name__ == "__main__":
    main()
