"""Models whose layers do not all have heads: scores stand in their own layers' rows, or are refused by name."""

import numpy as np
import pytest
import torch
import transformers as tf
from architectures import LLAMA
from test_model_inputs import strong

import manyheads as mh
from manyheads.errors import UnsupportedError
from manyheads.model.reading import ReadAttention


@pytest.fixture(scope="module")
def hybrid():
    config = tf.JambaConfig(**LLAMA, attn_layer_period=3, attn_layer_offset=1, num_experts=1, num_experts_per_tok=1)
    return mh.open_model(strong(tf.JambaForCausalLM(config)))


def test_scores_stand_in_the_rows_of_the_layers_that_have_heads(hybrid):
    scores = mh.atlas.first_token(hybrid, n=4)
    assert scores.values.shape == (3, 4) and np.isnan(scores.values[[0, 2]]).all()
    assert {head.layer for head in scores.top(4)} == {1} and {head.layer for head in scores.above(0.0)} == {1}
    seen = []
    from manyheads.atlas.core.repeats import repeats

    rows, _, _ = repeats(hybrid, 4, 64, 0)
    hybrid.look(rows, ReadAttention(lambda call: seen.append(call.pattern[:, :, 2:, 0].mean((0, 2)))))
    assert np.allclose(scores.values[1], seen[0].numpy(), atol=1e-5)


@pytest.mark.parametrize(
    "use",
    [
        lambda m, ids: mh.atlas.positional(m, n=4),
        lambda m, ids: mh.logit_attribution(m, ids, torch.tensor([5, 6])),
        lambda m, ids: m.ov(torch.ones(1, 32)),
        lambda m, ids: mh.edge_attribution(m, ids, ids.flip(0), lambda logits: logits[:, -1, 5]),
    ],
)
def test_what_needs_heads_in_every_layer_says_so(hybrid, use):
    with pytest.raises(UnsupportedError, match="of the layers of JambaForCausalLM only 1 have heads"):
        use(hybrid, torch.randint(3, 50, (2, 8), generator=torch.Generator().manual_seed(0)))
