"""What a survey finds where there is nothing to find: `manyheads bench false_positives [MODEL] [--seeds 3] [--random 100]`.

An untrained twin of the model (the same architecture and tokenizer, random weights) is surveyed as a model is. For each twin:
behaviours scored and blind, behaviours with heads at their threshold or above, claims tested, claims with p <= .05 and with
q <= .05, and the behaviours that the report would call causal. The model itself stands in the last line, on the same settings.
With R random sets no p is below 1 / (1 + R), and q only reaches .05 if R is large enough for the number of claims.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

import manyheads as mh
from manyheads.atlas.core.null import untrained_twin
from manyheads.files import write_atomically
from manyheads.pages.atlas_tables import behaviour_verdict, found_heads

COLUMNS = ("scored", "blind", "found", "heads", "claims", "p <= .05", "q <= .05", "least p")


def counted(atlas: mh.Atlas) -> dict[str, Any]:
    """What one survey claims."""
    found = {name: found_heads(atlas, name) for name in atlas.scores}
    verdicts = {name: behaviour_verdict(atlas, name) for name, heads in found.items() if heads}
    p = [check.p_value for check in atlas.checks]
    blind = sum("blind" in reason for reason in atlas.skipped.values())
    figures = (
        len(found),
        blind,
        len(verdicts),
        len({head for heads in found.values() for head in heads}),
        len(p),
        sum(one <= 0.05 for one in p),
        sum(one <= 0.05 for one in atlas.q_values()),
        min((check.least_p for check in atlas.checks), default=1.0),
    )
    causal = [name for name, verdict in verdicts.items() if verdict in ("causal", "causal by p alone")]
    return dict(zip(COLUMNS, figures, strict=True)) | {"causal": causal, "verdicts": verdicts}


def main(
    model: Annotated[str, typer.Argument(help="ladon, smollm2, or a folder.")] = "ladon",
    seeds: Annotated[int, typer.Option(min=1, help="Twins.")] = 3,
    n: Annotated[int, typer.Option(help="Examples of a behaviour.")] = 32,
    random: Annotated[int, typer.Option(min=20, help="Random sets of each check.")] = 100,
    behaviours: Annotated[str, typer.Option(help="Only these, separated by commas.")] = "",
    out: Annotated[Path, typer.Option(help="Folder of the results, a file each.")] = Path("false-positives"),
) -> None:
    """Print a line a survey."""
    torch.set_num_threads(1)
    out.mkdir(parents=True, exist_ok=True)
    opened = mh.open_model(model)
    names = behaviours.split(",") if behaviours else None
    print(f"{'':12}", *(f"{column:>9}" for column in COLUMNS), " seconds  causal", flush=True)
    for seed in [*range(seeds), -1]:
        title = model if seed < 0 else f"twin {seed}"
        file = out / f"{Path(model).name}-{seed}.json"
        if not file.is_file():
            # The survey's own null is the twin of seed 0.
            surveyed = opened if seed < 0 else untrained_twin(opened, 1000 + seed)
            started = time.process_time()
            found = counted(mh.atlas.survey(surveyed, names, n=n, n_random=random))
            text = json.dumps(found | {"seconds": round(time.process_time() - started)}, indent=1)
            write_atomically(file, lambda path, text=text: path.write_text(text, "utf-8"))  # type: ignore[misc]
        found = json.loads(file.read_text("utf-8"))
        figures = (f"{found[column]:9.3g}" for column in COLUMNS)
        print(f"{title:12}", *figures, f"{found['seconds']:8}  {', '.join(found['causal'])}", flush=True)


if __name__ == "__main__":
    typer.run(main)
