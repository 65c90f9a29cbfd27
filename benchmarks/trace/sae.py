"""Attention-output autoencoders, and codes: three things.

    manyheads bench sae --model smollm2 [--layer 15] [--minutes 10] [--features 1024] [--sparsity 3]
    manyheads bench sae --codes
    manyheads bench sae [--features 512] [--tokens 256]          (in an environment with sae-lens 6: pip install sae-lens)

The first trains an autoencoder of one layer's heads (#10) on prose that comes with Python, in at most so many minutes of one
thread for a model like SmolLM2-135M: 60 passages of 128 tokens and 200 steps a minute, so that a run can be repeated. Activations
are kept in memory. On held-out topics it
prints active features (L0), dead ones, variance explained, and the share of the loss recovered; beside it as many principal
components as features are active, as many random directions, and the autoencoder before its training.

The second ranks the bundled model's heads by SAE codes (#6) on indirect objects, greater-than and docstrings, 100 prompts of one
length each against their twins, 3 seeds: AUC for the heads that matter alone (patched from the twin, at least 5 % of what the
twin moves), beside its baselines. "codes" is how many a head has on average, trained and untrained; "rank" is the rank
correlation of the counts with those of swapped labels, "loss" what training leaves of it.

The third compares ours in sae-lens and sae-lens's in ours:

1. one of ours is saved by `export_sae_lens` and loaded by `sae_lens.SAE.load_from_disk`
2. one of theirs is saved by `save_model` and loaded by `import_sae_lens`, once with and once without b_dec taken off the input
3. theirs loaded into ours is saved again, and loaded by theirs

Both read the same heads' outputs of the bundled model; printed are the largest differences of encodings and reconstructions,
beside the largest value. Without sae-lens it says what to install.
"""

from __future__ import annotations

import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from circuits import on_ladon
from rich.console import Console
from rich.table import Table
from scipy.stats import spearmanr

import manyheads as mh
from manyheads.tasks.texts import opening_token
from manyheads.trace.circuits.codes import CodeSae, codes_of, mean_head_outputs
from manyheads.trace.circuits.discovery_roc import roc
from manyheads.trace.sae.autoencoder import (
    AttentionSae,
    head_outputs,
    principal_components,
    projection_sae,
    quality,
    with_unit_rows,
)
from manyheads.trace.sae.files import export_sae_lens, import_sae_lens
from manyheads.trace.sae.training import TRAINING, SaeSettings, train_sae

LAYER = 3
TOLERANCE = 1e-4


def theirs(path: Path, width: int, features: int, *, centred: bool) -> None:
    """A random autoencoder, made and saved by sae-lens itself."""
    from sae_lens import StandardSAE, StandardSAEConfig
    from sae_lens.saes.sae import SAEMetadata

    config = StandardSAEConfig(
        d_in=width,
        d_sae=features,
        apply_b_dec_to_input=centred,
        reshape_activations="hook_z",
        metadata=SAEMetadata(hook_name=f"blocks.{LAYER}.attn.hook_z", model_name="ladon"),
    )
    sae = StandardSAE(config)
    with torch.no_grad():
        for part in sae.parameters():
            part.normal_(std=part.shape[0] ** -0.5 if part.ndim > 1 else 0.1)
    sae.save_model(str(path))


def differences(ours: AttentionSae, loaded: Any, z: torch.Tensor) -> tuple[float, float, float]:
    """The largest difference of encodings, of reconstructions, and the largest encoding; z `[N, H, Dh]`."""
    x = z.flatten(-2)
    with torch.no_grad():
        f, mine = loaded.encode(z), ours.encode(x)
        back = loaded.decode(f).reshape(x.shape)
    return float((f - mine).abs().max()), float((back - ours.decode(mine)).abs().max()), float(mine.max())


def prose(model: mh.HeadModel, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of `length` tokens of Python's language reference, behind the opening token: those to learn from, those held out."""
    from pydoc_data.topics import topics

    rows: tuple[list[list[int]], list[list[int]]] = ([], [])
    begin = opening_token(model)
    lead = [] if begin is None else [begin]
    for number, name in enumerate(sorted(topics)):
        ids = model.tokenizer(topics[name], add_special_tokens=False, verbose=False)["input_ids"]
        room = length - len(lead)
        rows[number % 10 == 9].extend([lead + ids[i : i + room] for i in range(0, len(ids) - room + 1, room)])
    mixed = [torch.randperm(len(part), generator=torch.Generator().manual_seed(0)) for part in rows]
    return torch.tensor(rows[0])[mixed[0]], torch.tensor(rows[1])[mixed[1]]


def one_layer(model: mh.HeadModel, layer: int, minutes: float, features: int, sparsity: float) -> Table:
    """Train an autoencoder of one layer within `minutes`, and measure it on held-out text."""
    started = time.process_time()
    train, held = prose(model, 128)
    pieces: list[torch.Tensor] = []
    for ids in train[: round(60 * minutes)].split(8):
        pieces.append(head_outputs(model, layer, ids, first=1))
    x = torch.cat(pieces)
    scale = float((x - x.mean(0)).square().mean().sqrt())  # sparsity is for unit variance
    training = replace(TRAINING, steps=round(200 * minutes), rows=512, warmup=100)
    settings = SaeSettings(features=features, sparsity=sparsity, resample_at=(), refit=80, training=training)
    untaught = replace(settings, refit=0, training=replace(training, steps=1, rate=0.0))
    read = time.process_time() - started
    found, untrained = (rescaled(train_sae(model, layer, x / scale, how), scale) for how in (settings, untaught))
    took = time.process_time() - started - read
    some = [held[i : i + 4] for i in range(0, min(len(held), 16), 4)]
    quality_of = {"autoencoder": quality(model, found, some)}
    rank = round(quality_of["autoencoder"].l0)
    anyhow = torch.linalg.qr(torch.randn(x.shape[1], rank, generator=torch.Generator().manual_seed(0))).Q.T
    for name, directions in (("principal components", principal_components(x, rank)), ("random directions", anyhow)):
        quality_of[name] = quality(model, projection_sae(layer, model.n_heads, directions, x.mean(0)), some)
    quality_of["before training"] = quality(model, untrained, some)
    title = f"layer {layer}: {len(x):,} activations of width {x.shape[1]} read in {read:.0f} s, trained in {took:.0f} s"
    table = Table(title=f"{title} of one processor; {quality_of['autoencoder'].n:,} held-out tokens")
    for column in ("", "features", "L0", "dead", "explained", "loss", "plain", "z = 0", "recovered"):
        table.add_column(column)
    for name, q in quality_of.items():
        whole = name in ("autoencoder", "before training")
        losses = [f"{loss:.3f}" for loss in (q.ce_sae, q.ce, q.ce_zero)]
        sizes = (str(features if whole else rank), f"{q.l0:.1f}", f"{q.dead:.2f}" if whole else "")
        table.add_row(name, *sizes, f"{q.explained:.3f}", *losses, f"{q.recovered:.3f}")
    return table


def rescaled(sae: AttentionSae, scale: float) -> AttentionSae:
    """The autoencoder of x from that of x / scale: features grow by `scale`."""
    return replace(sae, b_enc=sae.b_enc * scale, b_dec=sae.b_dec * scale)


def three_tasks(seeds: int = 3) -> Table:
    """The paper's three tasks on the bundled model."""
    model = mh.open_model()
    table = Table(title=f"SAE codes on ladon, 100 prompts against their twins: AUC, means of {seeds} seeds")
    columns = (
        "task",
        "at",
        "heads",
        "trained",
        "normalised",
        "edges",
        "untrained",
        "swapped",
        "less swapped",
        "difference",
    )
    for column in (*columns, "codes", "untrained", "rank", "loss"):
        table.add_column(column)
    for name in ("ioi", "greater_than", "docstring"):
        case = on_ladon(model, name, 100)
        for position in ("mean", "last"):
            both = [mean_head_outputs(model, ids, position=position) for ids in (case.batch.inputs, case.batch.twins)]
            rows = []
            for seed in range(seeds):
                found = codes_of(*both, model.shape, seed=seed)
                bare = CodeSae(both[0].shape[-1], 200, torch.Generator().manual_seed(seed)).codes(torch.cat(both))
                kinds = (found.scores, found.normalised, found.edge_scores, found.untrained, found.swapped)
                less = found.scores.values - found.swapped.values
                aucs = [roc(s, case.known).auc for s in (*kinds, less, found.mean_difference)]
                many = [np.mean([len(set(column)) for column in table_.T]) for table_ in (found.codes, bare)]
                rank = spearmanr(found.scores.values.ravel(), found.swapped.values.ravel())[0]
                rows.append([*aucs, *many, rank, found.losses[-1] / found.losses[0]])
            means = np.mean(rows, 0)
            cells = [f"{v:.2f}" for v in means[:7]] + [f"{v:.0f}" for v in means[7:9]] + [f"{v:.2f}" for v in means[9:]]
            table.add_row(name, position, str(len(case.known)), *cells)
    return table


def main(
    name: Annotated[
        str | None, typer.Option("--model", help="Train on a layer of this model: smollm2, a name, a folder.")
    ] = None,
    layer: Annotated[int, typer.Option(help="Its layer.")] = 15,
    minutes: Annotated[float, typer.Option(help="Minutes of one thread, about.")] = 10.0,
    sparsity: Annotated[float, typer.Option(help="Weight of the sum of features, for unit variance.")] = 3.0,
    codes: Annotated[
        bool, typer.Option("--codes", help="Rank the bundled model's heads by codes on three tasks.")
    ] = False,
    features: Annotated[int, typer.Option(help="Features of each autoencoder.")] = 1024,
    tokens: Annotated[int, typer.Option(help="Tokens that both read.")] = 256,
) -> None:
    """Print the table asked for; of the comparison, exit code 1 if anything differs by more than 1e-4."""
    if name or codes:
        torch.set_num_threads(1)
        wanted = three_tasks() if codes else one_layer(mh.open_model(name), layer, minutes, features, sparsity)
        Console(width=170).print(wanted)
        return
    try:
        from sae_lens import SAE, __version__
    except ImportError:
        typer.echo(
            "sae-lens is not installed; run this in an environment of its own with pip install sae-lens.", err=True
        )
        raise typer.Exit(2) from None
    model = mh.open_model()
    width = model.n_heads * model.head_dim
    generator = torch.Generator().manual_seed(0)
    z = model.read_z(torch.randint(model.vocab_size, (1, tokens), generator=generator))[LAYER, 0].float()
    W_enc = torch.randn(width, features, generator=generator) * width**-0.5
    b_enc, b_dec = torch.randn(features, generator=generator), torch.randn(width, generator=generator)
    ours = with_unit_rows(AttentionSae(LAYER, model.n_heads, W_enc, b_enc, W_enc.T.contiguous(), b_dec))
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        export_sae_lens(ours, folder / "ours", model_name="ladon", context_size=tokens)
        rows.append(("ours in theirs", *differences(ours, SAE.load_from_disk(folder / "ours"), z)))
        for centred in (True, False):
            path = folder / f"theirs-{centred}"
            theirs(path, width, features, centred=centred)
            read = import_sae_lens(path, model)
            label = f"theirs in ours{'' if centred else ', b_dec not taken off'}"
            rows.append((label, *differences(read, SAE.load_from_disk(path), z)))
            export_sae_lens(read, folder / f"again-{centred}")
            again = SAE.load_from_disk(folder / f"again-{centred}")
            rows.append((f"{label}, back in theirs", *differences(with_unit_rows(read), again, z)))
    table = Table("", "encodings", "reconstructions", "largest encoding", title=f"sae-lens {__version__}")
    for label, *values in rows:
        table.add_row(label, *(f"{value:.1e}" for value in values[:2]), f"{values[2]:.1f}")
    Console().print(table)
    if max(max(row[1:3]) for row in rows) > TOLERANCE:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
