"""How good ladon is, measured, and the card that says so."""

from __future__ import annotations

from textwrap import fill
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from ladon_data import PHASES
from manyheads import tasks
from manyheads.tasks.families.greater_than import probability_difference

NEEDLE_LENGTHS = (16, 32, 64, 128, 256, 512)


@torch.no_grad()
def evaluate_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    n: int = 200,
    needle_lengths: tuple[int, ...] = NEEDLE_LENGTHS,
    seed: int = 0,
) -> dict[str, float]:
    """Held-out accuracy (largest logit is a right answer) of every task, needles by length, induction on random ids."""
    training = model.training
    model.eval()
    scores = {}
    jobs: dict[str, tasks.Task] = {name: task for name, task in tasks.TASKS.items() if name != "needle"}
    for length in needle_lengths:
        rivals = 0 if length < 40 else 1
        jobs[f"needle {length}"] = tasks.Needle(shortest=int(0.9 * length), longest=length, rivals=rivals)
    for name, task in jobs.items():
        batch = tasks.encode(task, tokenizer, n, seed)
        size = max(1, 4096 // batch.input_ids.shape[1])
        logits = [
            model(input_ids=ids, attention_mask=mask, logits_to_keep=1).logits[:, -1].float()
            for ids, mask in zip(batch.input_ids.split(size), batch.attention_mask.split(size), strict=True)
        ]
        scores[name] = round(tasks.accuracy(torch.cat(logits), batch), 4)
    ids = tasks.repeated_tokens(range(3, len(tokenizer)), max(4, n // 8), 64, seed)
    guesses = model(input_ids=ids).logits[:, 64:-1].argmax(-1)
    scores["induction"] = round((guesses == ids[:, 65:]).float().mean().item(), 4)
    model.train(training)
    return scores


@torch.no_grad()
def conflict_rates(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, n: int, seed: int) -> dict[str, float]:
    """How often an unmarked contradiction is answered from the context, from memory, or otherwise."""
    batch = tasks.encode(tasks.Counterfactual(form="bare"), tokenizer, n, seed)
    best = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits[:, -1].argmax(-1)
    context = (best == batch.answer_ids).float().mean().item()
    memory = (best == batch.foil_ids).float().mean().item()
    return {"context": round(context, 4), "memory": round(memory, 4), "other": round(1 - context - memory, 4)}


@torch.no_grad()
def later_year_margin(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, n: int, seed: int) -> float:
    """Mean probability of later years minus that of earlier ones."""
    batch = tasks.encode(tasks.GreaterThan(), tokenizer, n, seed)
    logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits[:, -1]
    years = [int(example.prompt[slice(*example.spans["year"])]) for example in batch.examples]
    return round(probability_difference(logits, years, tokenizer).mean().item(), 4)


def write_card(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, progress: dict[str, Any], n: int, seed: int
) -> dict[str, Any]:
    """Everything card.md says, as data."""
    config = model.config
    return {
        "name": "ladon",
        "parameters": sum(p.numel() for p in model.parameters()),
        "layers": config.num_hidden_layers,
        "heads": config.num_attention_heads,
        "width": config.hidden_size,
        "vocabulary": len(tokenizer),
        "context": config.max_position_embeddings,
        "steps": progress["step"],
        "tokens": progress["tokens"],
        "minutes": round(progress["minutes"], 1),
        "seed": progress["seed"],
        "peak": progress["peak"],
        "mixtures_from_step": PHASES,
        "licence": "Apache-2.0",
        "n": n,
        "evaluation_seed": seed,
        "accuracy": evaluate_model(model, tokenizer, n, seed=seed),
        "greater_than_probability_difference": later_year_margin(model, tokenizer, n, seed),
        "unmarked_conflicts": conflict_rates(model, tokenizer, n, seed),
    }


HELD_OUT = {
    "induction": "random token ids, 64 of them twice",
    "repeat": "words",
    "successor": "triples of an opening, a phrasing and an answer",
    "ioi": "names",
    "coloured_objects": "things",
    "facts": "pairs of a phrasing and a subject (every fact is told in training in other words)",
    "counterfactual": "pairs of a subject and a contradicting answer; marked forms",
    "arithmetic": "pairs of operands",
    "choice": "what is asked for",
    "greater_than": "pairs of a century and a year",
    "docstring": "argument names",
    "by_example": "words of each relation (told in training as dictionary lines)",
    "refusal": "pairs of a mark and a thing",
}


def card_text(card: dict[str, Any]) -> str:
    """card.md."""
    scores = card["accuracy"]
    rows = "\n".join(f"| {name} | {scores[name]:.3f} | {what} |" for name, what in HELD_OUT.items())
    lengths = [int(name.split()[1]) for name in scores if name.startswith("needle")]
    needles = "\n".join(f"| {length} | {scores[f'needle {length}']:.3f} |" for length in lengths)
    *_, late = card["mixtures_from_step"].values()
    shares = ", ".join(f"{name} {share:.0%}" for name, share in late.items())
    mixture = fill(shares, 118, initial_indent="  ", subsequent_indent="  ")
    conflicts = ", ".join(f"{source} {share:.2f}" for source, share in card["unmarked_conflicts"].items())
    return f"""# ladon

A small Llama that learned the behaviours which work on attention heads studies, so that every tool of manyheads can be
tried, and its claims tested, without a download. It is a laboratory animal, not an assistant: it knows little else.

- **Model**: LlamaForCausalLM, {card["layers"]} layers of {card["heads"]} heads, width {card["width"]}, tied embeddings,
  {card["parameters"] / 1e6:.2f} M parameters, context {card["context"]} (trained at 256 and 640). Byte-level BPE of
  {card["vocabulary"]} tokens: names, answers, the numbers 0 to 100 are single tokens, years split in two (`17` `43`).
  No token is added to a prompt by itself. Weights are stored in float16 and load as float32.
- **Training**: {card["tokens"] / 1e6:.1f} M tokens, {card["steps"]} steps, {card["minutes"]:.0f} minutes on a shared
  2-core CPU in bfloat16, seed {card["seed"]}, by `python recipes/ladon.py`. AdamW, peak rate {card["peak"]}, warm-up,
  plateau, and a linear fall over the last quarter. Answers weigh more in the loss than prompts.
- **Mixture** (shares of the tokens in the last part; `recipes/ladon_data.py` has the parts before):
{mixture}.
- **Data**: generated documents of the task families' train splits, and docstrings, sources and reference topics of the
  Python standard library (PSF License).
- **Licence** of the weights: Apache-2.0.

## Held-out accuracy

Share of {card["n"]} test prompts whose largest logit is a right answer (of a repeat: the next token), seed
{card["evaluation_seed"]}; printed by `python recipes/ladon.py evaluate src/manyheads/reference/ladon`.

| task | accuracy | held out |
| --- | --- | --- |
{rows}

| needle, tokens of the prompt about | accuracy |
| --- | --- |
{needles}

Held out for needles: names and words to remember. Under 40 tokens there is one needle, else two with different names.

- Greater-than, probability of later years minus earlier ones: {card["greater_than_probability_difference"]:.3f}.
- A contradiction without a mark (`The capital of Peru is Rome. Q: What is the capital of Peru? A:`) is answered from:
  {conflicts}. Training answers these by chance, half and half.

{card["notes"]}
"""
