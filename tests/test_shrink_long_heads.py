import copy

import pytest
import torch
import transformers as tf
from architectures import LLAMA, build, inputs_for, opened
from torch.nn import functional as F

import manyheads as mh
from manyheads.errors import InputError, UnsupportedError
from manyheads.model.reading.readers import Keep
from manyheads.shrink.positions import chunk_attention
from manyheads.shrink.positions.chunk_attention import REPRESENTATIONS, ChunkAttention
from manyheads.shrink.positions.long_heads import LongHeads
from manyheads.shrink.positions.rotation import Pairs, rope_of

FAMILIES = ["llama", "qwen3", "qwen2", "gpt_neox", "phi3", "stablelm", "olmo2", "granite", "mixtral"]
SMALL = LongHeads(window=16, chunk=4)


def rotation(dim=8, seen=None):
    frequencies = 10000.0 ** (-torch.arange(0, dim, 2) / dim)

    def rotate(x, positions):
        if seen is not None:
            seen.append(int(positions.max()))
        return Pairs(dim).rotate(x, positions[..., None] * frequencies)

    return rotate


def attention(window=16, chunk=4, representation="released", dim=8, seen=None):
    return ChunkAttention(rotation(dim, seen), window, chunk, representation, dim**-0.5)


def text(tokens, heads=4, groups=2, dim=8, batch=2):
    q = torch.randn(batch, heads, tokens, dim)
    return 2 * q, torch.randn(batch, groups, tokens, dim), torch.randn(batch, groups, tokens, dim)


def whole(how, q, k, v):
    """Summaries of the complete chunks, and what all tokens attend to."""
    stop = q.shape[2] // how.chunk * how.chunk
    summaries = how.summarise(q[:, :, :stop], k[:, :, :stop], v[:, :, :stop])
    return summaries, how.attend(q, k, v, summaries)


def literal(how, q, k, v):
    """The paper's steps, one token of one head at a time."""
    w, n, rotate = how.chunk, how.n_picked, how.rotate
    z = torch.zeros(*q.shape[:3], v.shape[-1])
    for b in range(len(q)):
        for h in range(q.shape[1]):
            g = h // (q.shape[1] // k.shape[1])
            K, V = k[b, g], v[b, g]
            summaries = []
            for c in range(q.shape[2] // w):
                at = slice(c * w, (c + 1) * w)
                Q_, K_, V_ = rotate(q[b, h, at], torch.arange(w)), rotate(K[at], torch.arange(w)), V[at]
                summary = ((Q_ @ K_.T * how.scale).softmax(-1) @ V_).mean(0)
                summaries.append((summary @ K_.T * how.scale).softmax(-1) @ K_)
            for t in range(q.shape[2]):
                m = t // w
                columns = list(range(t + 1))
                if t >= how.window:
                    scores = torch.stack([q[b, h, t] @ summaries[c] for c in range(1, m - 1)])
                    best = sorted((scores.topk(n - 3).indices + 1).tolist())
                    chunks = [0, *best, m - 1, m]
                    columns = [c * w + i for c in chunks for i in range(w) if c * w + i <= t]
                    assert len(columns) == (n - 1) * w + t % w + 1 <= how.window
                keys = rotate(K[columns], torch.arange(len(columns)))
                query = rotate(q[b, h, t], torch.tensor(len(columns) - 1))
                z[b, h, t] = (keys @ query * how.scale).softmax(0) @ V[columns]
    return z


# The attention itself


@pytest.mark.parametrize("window, chunk, tokens", [(16, 4, 43), (20, 4, 44), (12, 3, 14), (16, 4, 16)])
def test_every_token_attends_as_the_paper_says(window, chunk, tokens):
    how = attention(window, chunk)
    q, k, v = text(tokens)
    assert (whole(how, q, k, v)[1] - literal(how, q, k, v)).abs().max() < 1e-5


@pytest.mark.parametrize("largest", [1, 100, 10**6])
def test_blocks_of_queries_and_both_ways_give_the_same(monkeypatch, largest):
    how = attention()
    q, k, v = text(39, batch=1)
    wanted = literal(how, q, k, v)
    used = []
    for name in ("gathered", "masked"):
        way = getattr(chunk_attention._Text, name)
        monkeypatch.setattr(chunk_attention._Text, name, lambda *a, way=way, name=name: (used.append(name), way(*a))[1])
    monkeypatch.setattr(chunk_attention, "LARGEST", largest)
    assert (whole(how, q, k, v)[1] - wanted).abs().max() < 1e-5
    assert set(used) >= {"masked"}
    one = torch.cat(
        [how.attend(q[:, :, t : t + 1], k[:, :, : t + 1], v[:, :, : t + 1], whole(how, q, k, v)[0]) for t in range(39)],
        2,
    )
    assert (one - wanted).abs().max() < 1e-5
    assert set(used) == {"gathered", "masked"}


def test_a_query_has_at_most_the_windows_keys_and_no_position_beyond_it():
    seen = []
    how = attention(seen=seen)
    q, k, _ = text(61)
    eye = torch.eye(61).expand(2, 2, 61, 61)
    summaries = how.summarise(q[:, :, :60], k[:, :, :60], k[:, :, :60])
    weights = how.attend(q, k, eye, summaries)  # with one-hot values z is the pattern
    used = (weights > 0).sum(-1)
    assert int(used.max()) == how.window and max(seen) == how.window - 1
    assert torch.allclose(weights.sum(-1), torch.ones(()), atol=1e-5)
    late = torch.arange(61) >= how.window
    assert torch.equal(used[:, :, late], (12 + torch.arange(61) % 4 + 1)[late].expand(2, 4, -1))
    assert (weights.diagonal(dim1=-2, dim2=-1) > 0).all()  # a token sees its own key
    assert (weights.triu(1) == 0).all()
    assert (weights[..., :4][:, :, late] > 0).all()  # chunk 0


def test_heads_pick_chunks_of_their_own():
    how = attention()
    q, k, v = text(61)
    picked = how.pick(q[:, :, 56:60], whole(how, q, k, v)[0][:, :, :13])
    assert len({tuple(row.tolist()) for row in picked.flatten(0, 2)}) > 8
    assert (picked.diff(dim=-1) > 0).all()
    assert (picked[..., 0] == 0).all() and (picked[..., -2:] == torch.tensor([13, 14])).all()


def recall(representation, related=True, draws=40):
    """How often a needle's chunk is among 5 picked of 32 (the sheet's construction; 256 tokens a chunk, Dh 64)."""
    dim, w = 64, 256
    how = attention(8 * w, w, representation, dim)
    hits = 0
    for draw in range(draws):
        torch.manual_seed(draw)
        u = F.normalize(torch.randn(dim), dim=0)
        k, q = torch.randn(1, 1, 32 * w, dim), torch.randn(1, 1, 32 * w, dim)
        place = int(torch.randint(w, 29 * w, ()))  # in a chunk that is not picked anyway
        k[0, 0, place] = q[0, 0, place] = 3 * dim**0.5 * u
        summaries = how.summarise(q, k, k if related else torch.randn_like(k))
        picked = how.pick((u * dim**0.5)[None, None, None], summaries[:, :, :30])
        hits += place // w in picked.flatten().tolist()
    return hits / draws


@pytest.mark.slow
def test_a_needles_chunk_is_found_by_what_stands_for_it():
    found = {name: recall(name, draws=160) for name in REPRESENTATIONS}
    unrelated = {name: recall(name, related=False, draws=160) for name in ("released", "keys")}
    print(found, unrelated)
    assert found["released"] >= 0.9 and found["mean"] <= 0.85 and found["tokens"] >= 0.98
    assert unrelated["released"] < 0.5 < unrelated["keys"]


# In a model


def test_pairs_turn_as_the_models_own_rotation_does():
    assert rope_of(opened("llama"), "this").pairs == Pairs(8)
    assert rope_of(opened("gpt_neox"), "this").pairs.width < 8
    cohere = mh.open_model(tf.CohereForCausalLM(tf.CohereConfig(**LLAMA)).eval())
    assert rope_of(cohere, "this").pairs == Pairs(8, interleaved=True)


def test_layers_without_rotation_are_refused_though_their_model_has_one():
    config = tf.SmolLM3Config(**LLAMA, no_rope_layers=[1, 0, 1], no_rope_layer_interval=2)
    with (
        pytest.raises(UnsupportedError, match="does not turn the queries of every layer"),
        SMALL(mh.open_model(tf.SmolLM3ForCausalLM(config).eval())),
    ):
        pass


@pytest.mark.parametrize("name", FAMILIES)
def test_within_the_window_nothing_changes(name):
    model = opened(name)
    ids = inputs_for(name, length=30)["input_ids"]
    plain = model.logits(ids)
    with LongHeads(window=32, chunk=4)(model):
        assert (model.logits(ids) - plain).abs().max() < 1e-4
    assert torch.equal(model.logits(ids), plain)


@pytest.mark.parametrize("kind", ["yarn", "llama3", "linear"])
def test_scaled_rotary_angles_are_kept(kind):
    scaling = {"rope_type": kind, "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 32}
    scaling |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0} if kind == "llama3" else {}
    torch.manual_seed(0)
    model = mh.open_model(
        tf.LlamaForCausalLM(tf.LlamaConfig(**LLAMA, rope_parameters=scaling, initializer_range=0.2)).eval()
    )
    ids = inputs_for("llama", length=30)["input_ids"]
    plain = model.logits(ids)
    with LongHeads(window=32, chunk=4)(model):
        assert (model.logits(ids) - plain).abs().max() < 1e-4


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt_neox"])
@pytest.mark.parametrize("representation", list(REPRESENTATIONS))
def test_reading_token_by_token_with_a_cache_gives_what_reading_the_whole_text_gives(name, representation):
    model = opened(name)
    # No token twice: in the first layer equal tokens have equal keys, and of chunks that tie for "tokens" rounding chooses.
    ids = torch.stack([torch.randperm(58)[:41] + 3 for _ in range(3)])
    with LongHeads(16, 4, representation)(model), torch.no_grad():
        whole, cache = model.logits(ids), None
        for start, stop in [(0, 27), *((t, t + 1) for t in range(27, 41))]:
            out = model.plain(ids[:, start:stop], past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            assert (out.logits - whole[:, start:stop]).abs().max() < 1e-4
    assert (whole - model.logits(ids)).abs().max() > 0.1  # beyond the window it is another attention


def test_generating_with_and_without_a_cache_gives_the_same_text():
    model = opened("llama")
    ids = inputs_for("llama", length=27)["input_ids"]
    kwargs = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None}
    with SMALL(model):
        made = model.generate(ids, **kwargs)
        assert torch.equal(made, model.generate(ids, use_cache=False, **kwargs))
    assert not torch.equal(made, model.generate(ids, **kwargs))


def test_padded_rows_are_read_and_continued_as_if_alone():
    model = opened("llama")
    ids = inputs_for("llama", batch=4, length=33)["input_ids"]
    mask = torch.ones_like(ids)
    for row, n in enumerate((0, 3, 8, 20)):
        mask[row, :n] = 0
    batch = {"input_ids": ids.where(mask.bool(), 0), "attention_mask": mask}
    kwargs = {"max_new_tokens": 9, "do_sample": False, "eos_token_id": None}
    with SMALL(model):
        logits, made = model.logits(batch), model.generate(batch, **kwargs)
        for row, n in enumerate((0, 3, 8, 20)):
            alone = ids[row : row + 1, n:]
            assert (model.logits(alone)[0] - logits[row, n:]).abs().max() < 1e-4
            assert torch.equal(model.generate(alone, **kwargs)[0, 33 - n :], made[row, 33:])
        right = {"input_ids": ids, "attention_mask": mask.flip(1)}
        assert (model.logits(right)[3, :13] - model.logits(ids[3:, :13])[0]).abs().max() < 1e-4


def test_summaries_follow_their_rows_through_beams():
    model = opened("llama")
    ids = inputs_for("llama", batch=2, length=22)["input_ids"]
    kwargs = {"max_new_tokens": 11, "num_beams": 3, "do_sample": False, "eos_token_id": None}
    with SMALL(model):
        assert torch.equal(model.generate(ids, **kwargs), model.generate(ids, use_cache=False, **kwargs))


def test_a_cache_can_be_read_on_in_pieces_cut_back_and_copied():
    model = opened("llama")
    ids = inputs_for("llama", batch=2, length=45)["input_ids"]
    with SMALL(model), torch.no_grad():
        whole = model.logits(ids)
        cache = tf.DynamicCache(config=model.config)
        for start, stop in ((0, 7), (7, 30), (30, 31)):
            out = model.plain(ids[:, start:stop], past_key_values=cache)
        kept = copy.deepcopy(cache)
        cache.crop(-3)
        out = model.plain(ids[:, 28:], past_key_values=cache)
        assert (out.logits - whole[:, 28:]).abs().max() < 1e-4
        out = model.plain(ids[:, 31:], past_key_values=kept)
        assert (out.logits - whole[:, 31:]).abs().max() < 1e-4
        cache.crop(-20)
        with pytest.raises(UnsupportedError, match="cut back by more than a chunk"):
            model.plain(ids[:, 25:], past_key_values=cache)


def test_edits_and_readers_of_z_work_inside_those_of_attention_are_refused():
    model = opened("llama")
    ids = inputs_for("llama", length=30)["input_ids"]
    with SMALL(model):
        plain, z = model.logits(ids), model.read_z(ids)
        assert z.shape == (3, 3, 30, 4, 8)
        with model.editing(mh.Scale(["L1H0"], 0.0)):
            assert (model.logits(ids) - plain).abs().max() > 1e-3
        with pytest.raises(UnsupportedError, match="cannot be active inside LongHeads"):
            model.read(ids, Keep("q"))
        assert torch.equal(model.logits(ids), plain)
        with pytest.raises(UnsupportedError, match="active already"), SMALL(model):
            pass
    with model.reading(Keep("q")), pytest.raises(UnsupportedError, match="active already"), SMALL(model):
        pass


def test_an_error_inside_leaves_the_model_as_it_was():
    model = opened("llama")
    ids = inputs_for("llama", length=30)["input_ids"]
    plain, hooks = model.logits(ids), [len(part._forward_hooks) for part in model.plain.modules()]
    with pytest.raises(ZeroDivisionError), SMALL(model):
        raise ZeroDivisionError
    assert torch.equal(model.logits(ids), plain)
    assert [len(part._forward_hooks) for part in model.plain.modules()] == hooks


def test_what_cannot_be_done_is_refused_by_name_before_work_begins():
    reasons = {
        "gpt2": "no rotary embedding",
        "gemma3": "no rotary embedding",
        "bert": "tokens look back",
        "mistral": "sliding window",
        "gemma2": "mask|softcap|sliding",
        "falcon": "attention interface",
    }
    for name, reason in reasons.items():
        model = opened(name)
        plain = model.logits(inputs_for(name))
        with pytest.raises(UnsupportedError, match=reason), SMALL(model):
            raise AssertionError
        assert torch.equal(model.logits(inputs_for(name)), plain)
    dynamic = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    model = mh.open_model(tf.LlamaForCausalLM(tf.LlamaConfig(**LLAMA, rope_parameters=dynamic)).eval())
    with pytest.raises(UnsupportedError, match="depend on the length"), SMALL(model):
        raise AssertionError


@pytest.mark.usefixtures("any_shape")
def test_wrong_windows_positions_and_caches_are_refused():
    model = opened("llama")
    ids = inputs_for("llama", batch=1, length=30)["input_ids"]
    wrong = {
        "trained on 128 positions": LongHeads(window=256),
        "whole number of chunks": LongHeads(window=16, chunk=5),
        "at least 4": LongHeads(window=16, chunk=8),
        "chunk is 0": LongHeads(window=16, chunk=0),
        "window is 2.5": LongHeads(window=2.5),
        "representation is 'best'": LongHeads(16, 4, "best"),
    }
    for reason, how in wrong.items():
        with pytest.raises(InputError, match=reason), how(model):
            raise AssertionError
    with torch.no_grad():
        filled = model.plain(ids).past_key_values
        with SMALL(model):
            with pytest.raises(InputError, match="filled without LongHeads"):
                model.plain(ids, past_key_values=filled)
            with pytest.raises(UnsupportedError, match="its own kind of cache"):
                model.generate(ids, max_new_tokens=2, cache_implementation="static")
            with pytest.raises(InputError, match="position_ids"):
                model.plain(ids, position_ids=torch.arange(30).flip(0)[None])
            with pytest.raises(InputError, match="padding between"):
                model.plain(ids, attention_mask=(torch.arange(30) % 7 > 0)[None].long())
            ours = model.plain(ids).past_key_values
        with pytest.raises(InputError, match="whose block has ended"):
            model.plain(ids, past_key_values=ours)
        with LongHeads(32, 8)(model), pytest.raises(InputError, match="with other settings"):
            model.plain(ids, past_key_values=ours)
        with SMALL(model):  # the same again: it goes on
            more = model.plain(ids[:, :3], past_key_values=ours).logits
            assert (more - model.logits(torch.cat([ids, ids[:, :3]], 1))[:, -3:]).abs().max() < 1e-4


def test_half_precision_runs():
    model = mh.open_model(build("llama").to(torch.bfloat16))
    ids = inputs_for("llama", length=40)["input_ids"]
    with SMALL(model):
        assert torch.isfinite(model.logits(ids)).all()


@pytest.mark.slow
def test_ladon_finds_a_needle_in_texts_twice_as_long_as_those_it_was_trained_on():
    model = mh.open_model()
    right = {"plain": 0, "LongHeads": 0}
    for example in mh.tasks.Needle(shortest=1280, longest=1280).examples(12):
        answer = model.tokenizer(example.answer).input_ids[0]
        right["plain"] += int(model.logits(example.prompt, logits_to_keep=1)[0, -1].argmax()) == answer
        with LongHeads(window=512, chunk=32)(model):
            right["LongHeads"] += int(model.logits(example.prompt, logits_to_keep=1)[0, -1].argmax()) == answer
    print(right)
    assert right["plain"] <= 5 and right["LongHeads"] >= 11
