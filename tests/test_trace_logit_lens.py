"""The logit lens reads every state as the model itself would, and shows where a constructed model makes up its mind."""

from functools import cache

import numpy as np
import pytest
import torch
from architectures import EVERY, EXTRA, VISION, inputs_for, opened, padded

import manyheads as mh
from manyheads.errors import InputError
from manyheads.lab.constructed import constructed
from manyheads.tasks import IOI, encode
from manyheads.trace.positions.logit_lens import read_states

ALL = [*EVERY, *EXTRA]


@cache
def ladon():
    return mh.open_model()


@pytest.mark.parametrize("name", ALL)
def test_the_last_state_is_the_model_itself_and_no_other_is(name):
    model, inputs = opened(name), inputs_for(name)
    lens = read_states(model, inputs, keep_logits=True)
    logits = model.logits(inputs)
    assert torch.equal(lens.logits[-1], logits if logits.ndim == 3 else logits[:, None])
    assert np.abs(lens.kl[-1]).max() <= 1e-5
    assert lens.kl.min() >= -1e-5
    assert lens.kl[:-1].mean() > 1e-3
    assert lens.states == ("embedding", *(f"L{i}{part}" for i in range(3) for part in (".attention", "")))


@pytest.mark.parametrize("name", ["llama", "gpt2", "granite", "gemma2", "opt", "olmo2"])
def test_each_layer_is_read_as_by_the_models_own_norm_and_unembedding(name):
    model, inputs = opened(name), inputs_for(name)
    lens = read_states(model, inputs, keep_logits=True)
    hidden = model.plain(**inputs, output_hidden_states=True).hidden_states
    for layer in range(3):
        state = model.layout.final_norm(hidden[layer]) @ model.layout.unembedding.weight.T
        state = state / {"granite": 1.5}.get(name, 1.0)
        state = 3.0 * torch.tanh(state / 3.0) if name == "gemma2" else state
        assert torch.allclose(lens.logits[2 * layer], state, atol=1e-4)


@pytest.mark.parametrize("name", [n for n in ALL if n not in VISION])
def test_after_attention_is_the_state_of_a_model_whose_mlp_there_is_silent_and_that_ends_there(name):
    model, inputs = opened(name), inputs_for(name)
    lens = read_states(model, inputs, keep_logits=True)
    last = model.layout.n_layers - 1
    block = model.layout.blocks[last]
    if block.post_norms is not None:  # the second norm would act on a silent MLP's sum once more
        handles = [block.post_norms[1].register_forward_hook(lambda m, a, out: seen[0]),
                   block.post_norms[0].register_forward_hook(lambda m, a, out: seen.append(out))]  # fmt: skip
        seen = []
    else:
        silent = lambda m, a, out: out * 0 if torch.is_tensor(out) else (out[0] * 0, *out[1:])  # noqa: E731
        handles = [block.mlp_write.register_forward_hook(silent)]
    try:
        expected = model.logits(inputs)
    finally:
        for handle in handles:
            handle.remove()
    assert torch.allclose(lens.logits[-2], expected, atol=1e-4)


def test_ranks_probabilities_and_divergences_are_the_textbooks():
    model, inputs = opened("llama"), inputs_for("llama")
    answers = torch.randint(0, 61, (3, 11), generator=torch.Generator().manual_seed(1))
    answers[0, 3] = -1
    lens = read_states(model, inputs, answers=answers, top=61, keep_logits=True)
    log_p = lens.logits.double().log_softmax(-1)
    divergence = (log_p[-1].exp() * (log_p[-1] - log_p)).sum(-1)
    assert np.abs(lens.kl - divergence.numpy()).max() <= 1e-5
    for s, b, t in [(0, 1, 2), (3, 2, 10), (6, 0, 0)]:
        order = lens.logits[s, b, t].argsort(descending=True)
        assert (lens.top_ids[s, b, t] == order.numpy()).all()
        assert lens.rank[s, b, t] == (order == answers[b, t]).nonzero().item()
        assert lens.log_prob[s, b, t] == pytest.approx(log_p[s, b, t, answers[b, t]].item(), abs=1e-5)
    assert (lens.rank[:, 0, 3] == -1).all()
    assert np.isnan(lens.log_prob[:, 0, 3]).all()
    settled = lens.settled
    for b, t in np.ndindex(3, 11):
        same = lens.top_ids[:, b, t, 0] == lens.top_ids[-1, b, t, 0]
        assert same[settled[b, t] :].all()
        assert settled[b, t] == 0 or not same[settled[b, t] - 1]


def test_the_last_positions_alone_read_the_same_and_nothing_large_is_kept():
    model, inputs = opened("llama"), inputs_for("llama")
    whole, last = read_states(model, inputs), read_states(model, inputs, keep=2)
    assert last.kl.shape == (7, 3, 2)
    assert last.logits is None
    assert np.abs(last.kl - whole.kl[:, :, -2:]).max() <= 1e-5
    assert last.positions.tolist() == [9, 10]


def test_a_padded_row_reads_as_it_does_alone():
    model, batch = opened("gpt2"), padded("gpt2", "left")
    together = read_states(model, batch)
    for row, n in enumerate((0, 2, 5)):
        alone = read_states(model, batch["input_ids"][row : row + 1, n:])
        assert np.abs(together.kl[:, row, n:] - alone.kl[:, 0]).max() <= 1e-4


@pytest.mark.parametrize("shape", ["llama", "gpt2"])
@pytest.mark.parametrize("seed", [0, 1])
def test_a_constructed_model_says_the_repeated_token_from_its_induction_head_on(shape, seed):
    built = constructed(shape, seed=seed)
    model = mh.open_model(built.module)
    (head,) = built.known["induction"]
    half = torch.stack([torch.randperm(200, generator=torch.Generator().manual_seed(i))[:20] + 20 for i in range(8)])
    ids = torch.cat([torch.full((8, 1), built.tokenizer.bos_token_id), half, half[:, :10]], 1)
    lens = read_states(model, ids, answers=half[:, 10], keep=1)
    speaks = lens.states.index(f"L{head.layer}.attention")
    assert (lens.rank[speaks:] == 0).all()
    assert np.median(lens.rank[:speaks]) > 5
    assert (lens.settled >= speaks).mean() >= 0.9
    assert (lens.log_prob[speaks] - lens.log_prob[speaks - 1]).min() > 1.0


def test_on_the_bundled_model_the_divergence_falls_and_the_answer_rises():
    batch = encode(IOI(), ladon().tokenizer, 32, 0)
    lens = read_states(ladon(), batch.inputs, answers=batch.answer_ids, keep=1)
    assert np.median(lens.kl[0]) > 4 * np.median(lens.kl[-3])
    assert (lens.rank[-1] == 0).mean() > 0.9
    assert np.median(lens.rank[0]) > 10


def test_what_it_shows(tmp_path):
    lens = read_states(ladon(), "When Mary and John went to the <store>, John gave a drink to", top=3)
    frame = lens.to_frame()
    assert len(frame) == len(lens.states) * len(lens.tokens[0])
    final = frame[(frame["state"] == "L5") & (frame["position"] == frame["position"].max())].iloc[0]
    assert final["top"] == final["answer"] == lens.names[int(lens.top_ids[-1, 0, -1, 0])]
    assert final["rank"] == 0
    text = lens.report(tmp_path / "lens.html").read_text("utf-8")
    assert text.count("<tr>") == len(lens.states) + 1
    assert "L5.attention" in text
    assert "<store>" not in text
    with pytest.raises(InputError, match="already exists"):
        lens.report(tmp_path / "lens.html")


def test_wrong_questions_are_refused():
    model, inputs = opened("llama"), inputs_for("llama")
    with pytest.raises(InputError, match=r"answers have shape \[4\]"):
        read_states(model, inputs, answers=torch.zeros(4, dtype=torch.long))
    with pytest.raises(InputError, match="top is 0"):
        read_states(model, inputs, top=0)
