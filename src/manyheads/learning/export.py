"""A linear head as the classifier of Transformers itself, which TRL, vLLM and others open without us."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from manyheads.errors import InputError, UnsupportedError
from manyheads.learning.attached import AttachedHeads
from manyheads.learning.head import LinearHead, ScalarHead
from manyheads.model.headmodel import HeadModel

CLOSE = 1e-4  # of outputs, beside their largest size


def sequence_classifier(heads: AttachedHeads, name: str) -> PreTrainedModel:
    """The trunk with the linear head `name` as `AutoModelForSequenceClassification`: a reward head has `num_labels=1`.

    The head must read what the architecture's own classifier reads: the last layer at the last token, of most decoders, without a
    bias. What comes out is tried on a padded batch, so it computes what the heads do. `UnsupportedError` says what does not fit.
    """
    one = heads.attached.get(name)
    if one is None:
        raise InputError(f"there is no head {name!r}; the heads are {', '.join(heads.attached)}.")
    trunk = heads.trunk
    if not isinstance(one.head, LinearHead) or not isinstance(trunk.module, PreTrainedModel):
        what = type(one.head).__name__ if isinstance(trunk.module, PreTrainedModel) else type(trunk.module).__name__
        raise UnsupportedError(f"a {what} is not exported; give a LinearHead or ScalarHead on a model of Transformers.")
    config = copy.deepcopy(trunk.module.config)
    config.num_labels = one.head.settings.outputs
    config.problem_type = "regression" if isinstance(one.head, ScalarHead) else "single_label_classification"
    if getattr(config, "pad_token_id", None) is None:
        config.pad_token_id = _padding(trunk.model)
    try:
        made: Any = AutoModelForSequenceClassification.from_config(config, dtype=trunk.module.dtype)
    except ValueError:
        raise UnsupportedError(f"Transformers has no classifier for {type(trunk.module).__name__}.") from None
    made.base_model.load_state_dict(trunk.backbone.state_dict())
    inside = {id(part) for part in made.base_model.modules()}
    layers = [part for part in made.modules() if isinstance(part, nn.Linear) and id(part) not in inside]
    mine = one.head.linear
    if len(layers) != 1 or (layers[0].bias is None) != (mine.bias is None):
        raise UnsupportedError(
            f"the classifier of {type(made).__name__} has not the one linear layer of this head; train the head with bias="
            f"{mine.bias is None}, or keep it as it is."
        )
    layers[0].load_state_dict(mine.state_dict())
    _prove(made.eval(), heads, name)
    exported: PreTrainedModel = made
    return exported


def _padding(model: Any) -> int:
    tokenizer = model.tokenizer if isinstance(model, HeadModel) else None
    found = getattr(tokenizer, "pad_token_id", None)
    return 0 if found is None else int(found)


@torch.no_grad()
def _prove(made: Any, heads: AttachedHeads, name: str) -> None:
    """Outputs are the head's own on three rows, two of which are padded on the right."""
    pad, vocabulary = made.config.pad_token_id, made.get_input_embeddings().num_embeddings
    draw = torch.randint(vocabulary, (3, 8), generator=torch.Generator().manual_seed(0))
    ids = torch.where(draw == pad, (pad + 1) % vocabulary, draw)
    mask = (torch.arange(8) < torch.tensor([[8], [5], [3]])).long()
    batch = {"input_ids": ids.where(mask > 0, pad), "attention_mask": mask}
    mode = heads.training
    heads.eval()
    one = heads.attached[name]
    wanted = one.head(heads.trunk.states(batch, one.layer, one.pool))
    heads.train(mode)
    got = made(**{key: value.to(heads.trunk.device) for key, value in batch.items()}).logits
    if not torch.allclose(got, wanted, atol=CLOSE * float(wanted.abs().max())):
        raise UnsupportedError(
            f"{type(made).__name__} reads other states than head {name!r} (layer {one.layer}, {one.pool}); a head of the last "
            "layer at the last token can be exported from most decoders."
        )
