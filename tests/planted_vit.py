"""A ViT set by hand, and the images and synthetic maps that go with it: what each head looks at, and who writes, is known."""

from __future__ import annotations

import torch
from transformers import ViTConfig, ViTForImageClassification

from manyheads.atlas.vision.strength import PatchGrid
from manyheads.model.opening import open_model

SIDE, CLASSES, HEADS, LAYERS, WIDTH = 5, 4, 8, 2, 32  # patches a side, colours, heads a layer, layers, head_dim
GRID = PatchGrid(SIDE, SIDE)
LOOKS = {(0, 0): "ring", (0, 3): "self", (0, 4): "row", (0, 5): "column", (0, 6): "content"}
COPY = ((0, 1), (1, 2))  # each alone carries the class to CLS
DEAD = ((0, 7), (1, 5))  # write nothing


def planted_vit(seed=0, sharp=60.0, looks=LOOKS, copies=COPY):
    """Tokens carry their position and colour in one-hot places; the class is the commonest colour."""
    torch.manual_seed(seed)
    width = HEADS * WIDTH
    model = ViTForImageClassification(
        ViTConfig(
            hidden_size=width,
            intermediate_size=8,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            image_size=SIDE,
            patch_size=1,
            num_channels=CLASSES,
            num_labels=CLASSES,
        )
    ).eval()
    tokens, colour, out = GRID.tokens, GRID.tokens, GRID.tokens + CLASSES + 1
    state = {name: torch.zeros_like(value) for name, value in model.state_dict().items()}
    for name in state:
        if "layernorm" in name and name.endswith("weight"):
            state[name] += 1.0
    state["vit.embeddings.position_embeddings"][0, :, :tokens] = torch.eye(tokens)
    state["vit.embeddings.cls_token"][0, 0, colour + CLASSES] = 1.0  # so that every token is as long
    for c in range(CLASSES):
        state["vit.embeddings.patch_embeddings.projection.weight"][colour + c, c] = 1.0
    for (layer, head), name in looks.items():
        q, k = (state[f"vit.layers.{layer}.attention.{part}_proj.weight"] for part in "qk")
        rows = slice(head * WIDTH, (head + 1) * WIDTH)
        if name == "content":
            q[rows, colour : colour + CLASSES] = k[rows, colour : colour + CLASSES] = torch.eye(WIDTH)[:, :CLASSES]
            q[rows] *= sharp / 16
        else:
            q[rows, :tokens] = torch.eye(WIDTH)[:, :tokens]
            wanted = torch.zeros(tokens, tokens)
            wanted[1:, 1:] = ideal(name)
            k[rows, :tokens] = sharp / 16 * torch.eye(WIDTH)[:, :tokens] @ wanted
    for layer, head in copies:
        rows = slice(head * WIDTH, head * WIDTH + CLASSES)
        state[f"vit.layers.{layer}.attention.v_proj.weight"][rows, colour : colour + CLASSES] = torch.eye(CLASSES)
        state[f"vit.layers.{layer}.attention.o_proj.weight"][out : out + CLASSES, rows] = torch.eye(CLASSES)
    state["classifier.weight"][:, out : out + CLASSES] = 8.0 * torch.eye(CLASSES)
    model.load_state_dict(state)
    return open_model(model)


def ideal(name, grid=GRID, radius=2):
    """Which patches a pattern that is a matter of position looks at, `[N, N]`."""
    dy, dx = grid.displacement
    return {
        "self": grid.distance == 0,
        "ring": grid.distance == radius,
        "row": dy == 0,
        "column": dx == 0,
        "global": torch.zeros_like(dy, dtype=torch.bool),
    }[name].float()


def coloured_images(n=24, seed=0, commonest=0.6):
    """Images `[n, 4, 5, 5]` of patches of one colour each, and their commonest colours."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (n,), generator=generator)
    count = round(commonest * GRID.patches)
    others = (labels[:, None] + torch.randint(1, CLASSES, (n, GRID.patches - count), generator=generator)) % CLASSES
    colours = torch.cat([labels[:, None].expand(-1, count), others], 1)
    order = torch.rand(n, GRID.patches, generator=generator).argsort(1)
    images = torch.nn.functional.one_hot(colours.gather(1, order), CLASSES).float().transpose(1, 2)
    return images.unflatten(-1, (SIDE, SIDE)), labels


KINDS = ("self", "ring", "row", "column", "global", "content")


def jittered_maps(grid, each=80, seed=0, radii=(1, 2, 3)):
    """`each` maps of six kinds, `[6 each, N, N]`, and their names.

    Jitter: a share of the queries (up to 60%) does not follow the pattern; its sharpness, noise in the scores and an even
    background differ from map to map; rings differ in radius; what content attends to is drawn anew, as regions that look at
    themselves or as keys that all look at.
    """
    generator = torch.Generator().manual_seed(seed)
    n = grid.patches

    def between(low, high):
        return low + (high - low) * float(torch.rand((), generator=generator))

    maps, names = [], []
    for name in KINDS:
        for i in range(each):
            if name == "content":
                wanted = _regions(grid, generator) if i % 2 else _keys(n, between(0.1, 0.4), generator)
            else:
                wanted = ideal(name, grid, radii[int(torch.randint(len(radii), (), generator=generator))])
            wanted = wanted * (torch.rand(n, 1, generator=generator) < between(0.4, 1.0))
            noise = torch.randn(n, n, generator=generator) * between(0.3, 1.0)
            even = between(0.0, 0.3)
            maps.append((1 - even) * (wanted * between(3.0, 5.0) + noise).softmax(-1) + even / n)
            names.append(name)
    return torch.stack(maps), names


def _regions(grid, generator):
    places = torch.stack(torch.meshgrid(torch.arange(grid.rows), torch.arange(grid.columns), indexing="ij"), -1)
    middles = torch.rand(int(torch.randint(3, 6, (), generator=generator)), 2, generator=generator) * (grid.rows - 1)
    region = (places.view(-1, 1, 2) - middles).norm(dim=-1).argmin(-1)
    return (region[:, None] == region).float()


def _keys(n, share, generator):
    return (torch.rand(1, n, generator=generator) < share).float().expand(n, n)
