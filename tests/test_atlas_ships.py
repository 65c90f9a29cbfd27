"""Ships finds the head a refusal hangs on: set by hand or trained; and what the published score misses."""

from functools import cache

import numpy as np
import pytest
import torch
from architectures import DECODERS, VOCAB
from bars import Counting
from planted_gates import planted, prompts
from planted_refusal import SEEDS, trained

import manyheads as mh
from manyheads.atlas.safety.sahara import audit
from manyheads.atlas.safety.ships import ABOUTS, EPSILON, angles, removal, ships
from manyheads.errors import InputError


def scaled(name, part, head):
    """A copy of a tiny model in which one head's W_q, W_k or W_v is multiplied by 1e-5, as the paper's code does."""
    torch.manual_seed(0)
    module = DECODERS[name]().eval()
    layer, index = head
    with torch.no_grad():
        if name == "gpt2":
            attention, width = module.transformer.h[layer].attn, 32
            start = "qkv".index(part) * width + index * 8
            attention.c_attn.weight[:, start : start + 8] *= EPSILON
            attention.c_attn.bias[start : start + 8] *= EPSILON
        else:
            attention = module.model.layers[layer].self_attn
            weight = getattr(attention, f"{part}_proj").weight.unflatten(0, (-1, 8))
            weight[index if part == "q" else index // 2] *= EPSILON
    return module


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_head_with_small_queries_or_keys_attends_alike_to_all_it_may_see(name):
    """#113 (a): max |A - 1/i| <= 1e-4; scaling q or k gives the z of uniform ablation within 1e-4."""
    ids, head = torch.randint(3, VOCAB, (2, 12)), mh.Head(1, 2)
    torch.manual_seed(0)
    model = mh.open_model(DECODERS[name]().eval())
    with model.editing(removal([head], "undifferentiated")):
        ours = model.read_z(ids)[1]
    wanted = torch.ones(12, 12).tril() / torch.arange(1, 13)[:, None]
    for part, heads in (("q", [2]), ("k", [2] if name == "gpt2" else [2, 3])):  # a KV head belongs to two query heads
        module = scaled(name, part, head)
        module.set_attn_implementation("eager")
        with torch.no_grad():
            pattern = module(ids, output_attentions=True).attentions[1]
        assert float((pattern[:, heads] - wanted).abs().max()) <= 1e-4
        theirs = mh.open_model(module).read_z(ids)[1]
        assert float((ours[:, :, 2] - theirs[:, :, 2]).abs().max()) <= 1e-4


def test_small_values_are_a_small_z():
    ids = torch.randint(3, VOCAB, (2, 12))
    torch.manual_seed(0)
    model = mh.open_model(DECODERS["gpt2"]().eval())
    with model.editing(removal(["L1H2"], "contribution")):
        ours = model.logits(ids)
    assert torch.allclose(ours, mh.open_model(scaled("gpt2", "v", (1, 2))).logits(ids), atol=1e-5)


def test_a_query_norm_undoes_what_the_paper_does_and_not_what_we_do():
    """Qwen 3 norms queries after W_q: 1e-5 W_q changes next to nothing, uniform attention does."""
    ids = torch.randint(3, VOCAB, (2, 12))
    torch.manual_seed(0)
    module = DECODERS["qwen3"]().eval()
    model = mh.open_model(module)
    clean = model.read_z(ids)[1, :, :, 2]
    with model.editing(removal(["L1H2"], "undifferentiated")):
        ours = model.read_z(ids)[1, :, :, 2]
    with torch.no_grad():
        module.model.layers[1].self_attn.q_proj.weight.unflatten(0, (4, 16))[2] *= 1e-2
    assert float((ours - clean).abs().max()) > 0.05
    assert float((model.read_z(ids)[1, :, :, 2] - clean).abs().max()) < 0.05


@pytest.mark.parametrize("how", ["undifferentiated", "contribution"])
def test_scores_are_their_formulas_one_forward_pass_a_head(how):
    """Against full passes, SciPy-free principal angles and plain loops."""
    torch.manual_seed(0)
    model = mh.open_model(DECODERS["llama"]().eval())
    batch = prompts(12, words=4, flagged=1.0)
    scores = ships(model, task=batch, how=how, rank=2)

    def run():
        out = model.plain(batch.input_ids, output_hidden_states=True)
        return out.logits[:, -1].double().log_softmax(-1), out.hidden_states[-1][:, -1].double()

    with torch.no_grad():
        p, m = run()
        for head in [(0, 1), (1, 0), (2, 3)]:
            with model.editing(removal([head], how)):
                p_h, m_h = run()
            kl = (p.exp() * (p - p_h)).sum(-1)
            lost = (p - p_h).gather(-1, batch.answer_ids[:, None])[:, 0]
            shift = (m_h - m).norm(dim=-1) / m.norm(dim=-1).mean()
            for name, wanted in (("ships", kl), ("ships_direction", lost), ("ships_shift", shift)):
                assert abs(scores[name][head] - float(wanted.mean())) <= 1e-5
                assert abs(scores[name].stderr[head] - float(wanted.std()) / 12**0.5) <= 1e-5
            for name, side in (("ships_angle", "right"), ("ships_left_angle", "left")):
                assert abs(scores[name][head] - principal(m, m_h, 2, side)) <= 1e-3


def principal(a, b, rank, side):
    """The same angles by the eigenvectors of Gram matrices."""

    def basis(x):
        gram = x @ x.T if side == "left" else x.T @ x
        return torch.linalg.eigh(gram).eigenvectors[:, -rank:]

    overlap = basis(a).T @ basis(b)
    return float(torch.linalg.eigvalsh(overlap.T @ overlap).clamp(0, 1).sqrt().arccos().rad2deg().sum())


def test_left_singular_vectors_do_not_see_all_queries_move_alike():
    """The trap: every state turns by the same right angle; queries' relations stay as they were."""
    generator = torch.Generator().manual_seed(0)
    states = torch.zeros(20, 8)
    states[:, 0] = 5.0
    states += 0.1 * torch.randn(20, 8, generator=generator)
    moved = states.clone()
    moved[:, [0, 1]] = states[:, [1, 0]]
    assert angles(states, moved[None], side="right")[0] > 85
    assert angles(states, moved[None], side="left")[0] < 1e-4
    assert angles(states, states[None])[0] < 1e-4


@cache
def watching(second=False):
    """A planted refusal: one head watches for the flag, one below says words; `comply` speaks where no head refuses."""
    heads = {(1, 1): ("watch", 12.0), (0, 3): ("say", 2.0)}
    return planted(heads | ({(1, 2): ("watch", 12.0)} if second else {}), seed=5, comply=2.0)


@pytest.mark.parametrize("how", ["undifferentiated", "contribution"])
def test_the_planted_refusal_head_is_found_by_every_score_but_the_left_one_may_miss_it(how):
    scores = ships(watching(), task=prompts(48, words=12, flagged=1.0), how=how)
    for name in ("ships", "ships_direction", "ships_angle", "ships_shift"):
        assert scores[name].top(1) == mh.HeadSet(["L1H1"]), name
        assert scores[name].above(ABOUTS[name].threshold) >= mh.HeadSet(["L1H1"])
    assert scores["ships"].meta["worst_of"][1][1] == 1.0
    assert scores["ships"].ranked()[0][1] > 20 * abs(scores["ships"].ranked()[2][1])


def test_kl_has_no_sign_and_the_direction_has():
    """A head that speaks for compliance moves the next token too: KL finds it, the direction says it is no refusal head."""
    model = planted({(1, 1): ("watch", 3.0), (1, 3): ("excuse", 3.0)}, seed=5, comply=2.0)
    scores = ships(model, task=prompts(48, words=12, flagged=1.0))
    assert scores["ships"]["L1H3"] > 0.05
    assert scores["ships_direction"]["L1H3"] < -0.1 < 0.1 < scores["ships_direction"]["L1H1"]


def test_scores_say_what_they_are_of_and_progress_counts_requests():
    seen = []
    model = watching()
    scores = ships(model, task=prompts(20, words=12, flagged=1.0), bar=Counting(seen))
    assert sum(seen) == 20 and list(scores) == list(ABOUTS)
    for name, score in scores.items():
        assert score.n == 20 and score.meta["method"] == name and score.meta["fingerprint"] == model.fingerprint
        assert np.isfinite(score.stderr).all() and (score.stderr >= 0).all()


def test_wrong_input_says_what_is_wrong():
    model, batch = watching(), prompts(8, words=12, flagged=1.0)
    with pytest.raises(InputError, match="unknown removal"):
        ships(model, task=batch, how="erased")
    with pytest.raises(InputError, match="rank is 9"):
        ships(model, task=batch, rank=9)
    with pytest.raises(InputError, match="need a tokenizer"):
        ships(model)


@pytest.mark.slow
def test_the_head_that_ships_finds_in_a_trained_toy_is_the_worst_to_lose():
    """#113 (b): in 5 of 5 seeds; without it requests are answered that were refused, without the median head none."""
    lost, medians = [], []
    for seed in range(5):
        model, requests, flagged = trained(seed)
        scores = ships(model, task=flagged)["ships"]
        none, *each = audit(model, [[], *([head] for head in model.heads)], requests=requests)
        answered = np.array([one.answered for one in each])
        assert none.answered == 0 and none.false_refusals == 0
        assert answered[scores.values.argmax()] == answered.max()
        assert max(one.false_refusals for one in each) <= 0.02
        lost.append(answered[scores.values.argmax()])
        medians.append(np.median(answered))
    assert np.mean(lost) >= 0.4
    assert np.mean(medians) == 0


@pytest.mark.slow
def test_right_singular_vectors_pick_the_worst_head_of_trained_toys():
    """#113 (c): in at least 7 of 8 seeds; left ones in fewer."""
    right = left = 0
    for seed in range(SEEDS):
        model, requests, flagged = trained(seed)
        scores = ships(model, task=flagged)
        each = audit(model, [[head] for head in model.heads], requests=requests)
        answered = np.array([one.answered for one in each])
        right += answered[scores["ships_angle"].values.argmax()] == answered.max() > 0
        left += answered[scores["ships_left_angle"].values.argmax()] == answered.max() > 0
    assert right >= 7
    assert left <= right
