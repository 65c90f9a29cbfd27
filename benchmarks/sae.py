"""Attention-output autoencoders: ours in sae-lens, sae-lens's in ours, and the largest difference between the two.

    manyheads bench sae [--features 512] [--tokens 256]          (in an environment with sae-lens 6: pip install sae-lens)

1. one of ours is saved by `export_sae_lens` and loaded by `sae_lens.SAE.load_from_disk`
2. one of theirs is saved by `save_model` and loaded by `import_sae_lens`, once with and once without b_dec taken off the input
3. theirs loaded into ours is saved again, and loaded by theirs

Both read the same heads' outputs of the bundled model; printed are the largest differences of encodings and reconstructions,
beside the largest value. Without sae-lens it says what to install.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

import manyheads as mh
from manyheads.trace.sae.autoencoder import AttentionSae, with_unit_rows
from manyheads.trace.sae.files import export_sae_lens, import_sae_lens

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


def main(
    features: Annotated[int, typer.Option(help="Features of each autoencoder.")] = 512,
    tokens: Annotated[int, typer.Option(help="Tokens that both read.")] = 256,
) -> None:
    """Print the table; exit code 1 if anything differs by more than 1e-4."""
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
