"""Images of 5 x 5 patches of known types, and a small ViT pretrained to tell every patch's type."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import ViTConfig, ViTForImageClassification

PATCH, GRID, BACKGROUND, CLASSES, NOISE = 4, 5, 6, 8, 0.5


def draw(types: Tensor, generator: torch.Generator) -> Tensor:
    """Images `[N, 1, 20, 20]` of types `[N, 25]`: fixed random patches under noise of half their strength."""
    kinds = torch.randn(BACKGROUND + CLASSES, 1, PATCH, PATCH, generator=torch.Generator().manual_seed(0))
    n = len(types)
    patches = kinds[types] + NOISE * torch.randn(n, GRID**2, 1, PATCH, PATCH, generator=generator)
    grid = patches.view(n, GRID, GRID, PATCH, PATCH).permute(0, 1, 3, 2, 4)
    return grid.reshape(n, 1, GRID * PATCH, GRID * PATCH)


def images(n: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Images with one patch of a class's type somewhere in a background that all classes share; labels; that patch's place."""
    generator = torch.Generator().manual_seed(seed)
    types = torch.randint(BACKGROUND, (n, GRID**2), generator=generator)
    labels = torch.randint(CLASSES, (n,), generator=generator)
    places = torch.randint(GRID**2, (n,), generator=generator)
    types[torch.arange(n), places] = BACKGROUND + labels
    return draw(types, generator), labels, places


def pretrained(steps: int = 500, seed: int = 0, n_layers: int = 3, n_heads: int = 4) -> ViTForImageClassification:
    """A ViT whose patch tokens tell their own patch's type, all types mixed; it has seen neither classes nor backgrounds."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = untrained(n_layers, n_heads).train()
    head = torch.nn.Linear(48, BACKGROUND + CLASSES)
    optimizer = torch.optim.AdamW([*model.parameters(), *head.parameters()], lr=2e-3)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min((step + 1) / 50, 1 - step / steps)
        types = torch.randint(BACKGROUND + CLASSES, (64, GRID**2), generator=generator)
        tokens = model.vit(draw(types, generator)).last_hidden_state[:, 1:]
        loss = F.cross_entropy(head(tokens).flatten(0, 1), types.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def untrained(n_layers: int = 3, n_heads: int = 4) -> ViTForImageClassification:
    """The same model before training."""
    config = ViTConfig(
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=n_layers,
        num_attention_heads=n_heads,
        image_size=GRID * PATCH,
        patch_size=PATCH,
        num_channels=1,
        num_labels=BACKGROUND + CLASSES,
        initializer_range=0.1,
    )
    return ViTForImageClassification(config).eval()
