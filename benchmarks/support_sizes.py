"""Record how many tokens top-p keeps, and the probability that they held, by sampling the demo's task.

    python benchmarks/support_sizes.py --name untrained                    SmolLM2-135M-Instruct as it comes
    python benchmarks/support_sizes.py --name trained --model DIR/model    what `make demo` exported

Each writes its model into support_sizes.json beside this file, six minutes and one on two cores:

    models: {name: model, top_p, temperature, prompts, completions, tokens, mean, median, max, singleton_fraction,
             sizes           {tokens of a support: at how many sampled positions}
             ratio           {edges, counts}: exp(log p(y) - log q(y)) of the drawn tokens y; p is over the whole
                             vocabulary, q what the sampler drew from. It is the mass of the support
             ratio_mean      of tokens; completion_ratio: {edges, counts, median} of its product over a completion
             support_ratio   [least, most]: the same with p on the support, from the same logits in float64}

The prompts are the first of the training set, the model's dtype is bfloat16, and logits are as transformers' `generate`
returns them. Nothing but counts is kept.
"""

from __future__ import annotations

import argparse
import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from torch import Tensor

OUT = Path(__file__).resolve().parent / "support_sizes.json"
RATIO_EDGES = [round(0.9 + 0.002 * i, 3) for i in range(51)]  # tokens at top-p 0.95 lie in [0.95, 1]
COMPLETION_EDGES = [round(0.02 * i, 2) for i in range(51)]


@dataclass
class Seen:
    """What was drawn, completion by completion: sizes, and ratios over the whole vocabulary and on the support."""

    sizes: list[int] = field(default_factory=list)
    ratios: list[float] = field(default_factory=list)
    completion_ratios: list[float] = field(default_factory=list)
    support_ratios: list[float] = field(default_factory=list)

    def add(self, tokens: Tensor, logits: Tensor, scores: Tensor) -> None:
        """A completion: `tokens` `[L]`, raw logits and what was drawn from, -inf where nothing was kept, `[L, V]`."""
        kept, logits = scores > -torch.inf, logits.double()

        def logprobs(of: Tensor) -> Tensor:
            return of.log_softmax(-1).gather(-1, tokens[:, None])[:, 0]

        drawn = logprobs(scores.double())
        ratios = (logprobs(logits) - drawn).exp()
        self.sizes += kept.sum(-1).tolist()
        self.ratios += ratios.tolist()
        self.completion_ratios.append(float(ratios.prod()))
        self.support_ratios += (logprobs(logits.masked_fill(~kept, -torch.inf)) - drawn).exp().tolist()

    def record(self) -> dict[str, Any]:
        """Counts."""
        sizes = Counter(self.sizes)
        return {
            "completions": len(self.completion_ratios),
            "tokens": len(self.sizes),
            "mean": mean(self.sizes),
            "median": median(self.sizes),
            "max": max(self.sizes),
            "singleton_fraction": sizes[1] / len(self.sizes),
            "sizes": {str(size): sizes[size] for size in sorted(sizes)},
            "ratio": histogram(self.ratios, RATIO_EDGES),
            "ratio_mean": mean(self.ratios),
            "completion_ratio": histogram(self.completion_ratios, COMPLETION_EDGES)
            | {"median": median(self.completion_ratios)},
            "support_ratio": [min(self.support_ratios), max(self.support_ratios)],
        }


def histogram(values: Sequence[float], edges: list[float]) -> dict[str, list[Any]]:
    """Counts between edges, what lies outside in the first and the last."""
    counts = [0] * (len(edges) - 1)
    width = edges[1] - edges[0]
    for value in values:
        counts[min(max(math.floor((value - edges[0]) / width), 0), len(counts) - 1)] += 1
    return {"edges": edges, "counts": counts}


@torch.no_grad()
def sample(
    model: Any, prompt_ids: Sequence[Sequence[int]], *, completions: int, length: int, top_p: float, seed: int = 0
) -> Seen:
    """Completions of each prompt by `generate`, at temperature 1; a completion ends with its end-of-text token."""
    seen = Seen()
    torch.manual_seed(seed)
    end = model.generation_config.eos_token_id
    ends = torch.tensor(end if isinstance(end, list) else [end])
    for ids in prompt_ids:
        found = model.generate(
            input_ids=torch.tensor([list(ids)]),
            attention_mask=torch.ones(1, len(ids), dtype=torch.int64),
            do_sample=True,
            temperature=1.0,
            top_p=top_p,
            top_k=0,
            max_new_tokens=length,
            num_return_sequences=completions,
            output_logits=True,
            output_scores=True,
            return_dict_in_generate=True,
        )
        logits, scores = torch.stack(found.logits, 1), torch.stack(found.scores, 1)
        for row, tokens in enumerate(found.sequences[:, len(ids) :]):
            stops = torch.isin(tokens, ends).nonzero()
            count = int(stops[0, 0]) + 1 if stops.numel() else tokens.numel()
            seen.add(tokens[:count], logits[row, :count], scores[row, :count])
    return seen


def main(arguments: Sequence[str] | None = None) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from grpo_fast.trainer import smollm2
    from grpo_fast.trainer.data import load_examples, render_prompt
    from grpo_fast.trainer.recipe import load_config, shipped_recipes

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", required=True, help="of the model in the file")
    parser.add_argument("--model", default=smollm2.NAME, help="folder of a model (default: %(default)s)")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--top-p", type=float, default=0.95)
    parser.add_argument("--out", type=Path, default=OUT)
    given = parser.parse_args(arguments)
    config = load_config(shipped_recipes()["demo"], [])
    path = smollm2.smollm2_path() if given.model == smollm2.NAME else given.model
    tokenizer = AutoTokenizer.from_pretrained(path)
    examples = load_examples(config.data, "train")
    examples = [examples[number] for number in range(given.prompts)]
    seen = sample(
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).eval(),
        [render_prompt(example, tokenizer, config.data) for example in examples],
        completions=config.rollout.num_generations,
        length=config.rollout.max_completion_length,
        top_p=given.top_p,
    )
    record = {"model": smollm2.NAME, "top_p": given.top_p, "temperature": 1.0, "prompts": len(examples)} | seen.record()
    whole = json.loads(given.out.read_text()) if given.out.exists() else {"models": {}}
    whole["models"][given.name] = record
    given.out.write_text(json.dumps(whole) + "\n")
    print({name: value for name, value in record.items() if not isinstance(value, dict)})


if __name__ == "__main__":
    main()
