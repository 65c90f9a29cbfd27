"""`manyheads check`: is what we read of a model what the model computes?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from manyheads.cli.common import Force, ModelName, Opening, Seed, opens, refuse, terminal


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
