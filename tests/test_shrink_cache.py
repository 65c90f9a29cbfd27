"""The ragged cache: what it computes, what it holds, and what it refuses."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    BertConfig,
    BertModel,
    BloomConfig,
    BloomForCausalLM,
    DynamicCache,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import manyheads as mh
from manyheads.draft import PromptLookup, generate
from manyheads.errors import InputError, MismatchError, UnsupportedError
from manyheads.shrink.cache.attending import Compression
from manyheads.shrink.cache.duo_attention import DuoAttention
from manyheads.shrink.cache.kvpress import from_kvpress
from manyheads.shrink.cache.press import CacheCall, Press, ScorePress, highest
from manyheads.shrink.cache.ragged import Group, Window, merged
from manyheads.shrink.cache.snapkv import AdaKV, SnapKV, attention_of
from manyheads.shrink.cache.streaming import Streaming

SMALL = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "max_position_embeddings": 256,
}
GROUPED = SMALL | {"num_key_value_heads": 2, "head_dim": 8}
ARCHITECTURES = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**GROUPED)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**GROUPED)),
    "gemma3": lambda: Gemma3ForCausalLM(
        Gemma3TextConfig(
            **GROUPED,
            sliding_window=8,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
            query_pre_attn_scalar=8,
        )
    ),
    "gpt_neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**SMALL)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=97, n_embd=48, n_layer=3, n_head=6, n_positions=256)),
}


def opened(name: str) -> mh.HeadModel:
    torch.manual_seed(0)
    return mh.open_model(ARCHITECTURES[name]().eval(), tokenizer=None)


@pytest.fixture(scope="module")
def llama() -> mh.HeadModel:
    return opened("llama")


def prompt(rows: int, length: int, padded: bool, seed: int = 0) -> dict[str, Tensor]:
    """Rows of random tokens; with padding every row has another number of them, on the left."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 97, (rows, length), generator=generator)
    mask = torch.ones_like(ids)
    if padded:
        for row in range(1, rows):
            mask[row, : row * (length - 3) // rows] = 0
    return {"input_ids": ids, "attention_mask": mask}


@dataclass(frozen=True)
class Given(Press):
    """Keeps what it is told of a prompt, the same in every layer."""

    kept: Tensor = field(default_factory=lambda: torch.ones(1, 1, 1, dtype=torch.bool))

    def due(self, layer: object, new: int) -> bool:
        return new > 1

    def compress(self, call: CacheCall) -> Tensor:
        return self.kept & call.held


# What it computes


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_cache_that_drops_nothing_generates_what_the_model_generates(name: str) -> None:
    model = opened(name)
    for rows, padded in ((1, False), (4, True)):
        inputs = prompt(rows, 17, padded)
        plain = model.generate(inputs, max_new_tokens=8, min_new_tokens=8, do_sample=False)
        with Press()(model) as block:
            assert torch.equal(model.generate(inputs, max_new_tokens=8, min_new_tokens=8, do_sample=False), plain)
        tokens = inputs["attention_mask"].sum(1) + 7  # the last token is not read
        assert torch.equal(block.cache.lengths(), tokens[None, :, None].expand_as(block.cache.lengths()))
    assert torch.equal(
        model.generate(inputs, max_new_tokens=8, min_new_tokens=8, do_sample=False), plain
    )  # and is gone after the block


@pytest.mark.parametrize(
    "how",
    [
        {"num_beams": 3, "do_sample": False},
        {"do_sample": True},
        {"do_sample": True, "num_return_sequences": 3},
        {"do_sample": False, "prefill_chunk_size": 5},
    ],
    ids=["beams", "sampled", "returned sequences", "prompt in chunks"],
)
def test_every_way_to_generate_is_the_models_own(llama: mh.HeadModel, how: dict) -> None:
    inputs = prompt(3, 16, "prefill_chunk_size" not in how)
    torch.manual_seed(3)
    plain = llama.generate(inputs, max_new_tokens=9, **how)
    torch.manual_seed(3)
    with Press()(llama):
        assert torch.equal(llama.generate(inputs, max_new_tokens=9, **how), plain)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt_neox"])
def test_logits_after_tokens_were_dropped_are_those_of_a_pass_in_which_they_are_masked(name: str) -> None:
    model = opened(name)
    length, more = 12, 5
    ids = prompt(2, length + more, False)["input_ids"]
    kept = torch.rand(2, model.n_kv_heads, length, generator=torch.Generator().manual_seed(1)) < 0.5
    seen = torch.ones(2, model.n_heads, length + more, length + more, dtype=torch.bool).tril()
    seen[:, :, length:, :length] &= kept.repeat_interleave(model.n_heads // model.n_kv_heads, 1)[:, :, None]
    wanted = model.plain(ids, attention_mask=seen).logits[:, length - 1 :]
    with torch.no_grad(), Given(kept)(model) as block:
        found = [model.plain(ids[:, :length], use_cache=True)]
        cache = found[0].past_key_values
        assert torch.equal(cache.lengths(), kept.sum(-1).expand(model.n_layers, -1, -1))
        for at in range(length, length + more):
            found.append(model.plain(ids[:, at : at + 1], past_key_values=cache))
    assert block.cache is cache
    torch.testing.assert_close(torch.stack([out.logits[:, -1] for out in found], 1), wanted, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("chunks", [[30], [11, 19], [1] * 30, [3, 1, 1, 20, 5]], ids=str)
def test_streaming_heads_see_their_sinks_and_recent_tokens_however_the_text_comes(
    llama: mh.HeadModel, chunks: list[int]
) -> None:
    window = Window(2, 5)
    mixed = [[window, None], [None, window], [window, window]]

    @dataclass(frozen=True)
    class Some(Press):
        streams_prompt = True

        def windows(self, model: mh.HeadModel) -> list[list[Window | None]]:
            return mixed

    ids = prompt(2, 30, False)["input_ids"]
    column = torch.arange(30)
    behind = column[:, None] - column
    near = (behind >= 0) & ((behind < window.recent) | (column < window.sinks))
    found, start = [], 0
    with torch.no_grad(), Some()(llama) as block:
        cache = block.new_cache()
        for length in chunks:
            found.append(llama.plain(ids[:, start : start + length], past_key_values=cache).logits)
            start += length
    assert cache.lengths()[:, 0].tolist() == [[7, 30], [30, 7], [7, 7]]
    torch.testing.assert_close(torch.cat(found, 1), _masked_by_layer(llama, ids, mixed, near), atol=1e-5, rtol=1e-4)


def _masked_by_layer(model: mh.HeadModel, ids: Tensor, windows: list, near: Tensor) -> Tensor:
    """The model's own pass with a mask of its own in every layer, by edits that cut edges."""
    group = model.n_heads // model.n_kv_heads
    full = torch.ones_like(near).tril()
    edits = []
    for layer, of_heads in enumerate(windows):
        heads = [(layer, g * group + i) for g, one in enumerate(of_heads) if one is not None for i in range(group)]
        queries, keys = (full & ~near).nonzero(as_tuple=True)
        for query in queries.unique().tolist():
            edits.append(mh.Mask(heads, positions=[query], keys=keys[queries == query].tolist()))
    with model.editing(*edits):
        return model.logits(ids)


def test_layers_that_kept_different_numbers_of_heads_have_caches_of_their_own(llama: mh.HeadModel) -> None:
    cut = llama.prune([(0, 0), (0, 1), (0, 2), (2, 3)])  # layer 0 loses a KV head with its three query heads
    inputs = prompt(3, 15, True)
    plain = cut.generate(inputs, max_new_tokens=6, do_sample=False)
    with Press()(cut) as block:
        assert torch.equal(cut.generate(inputs, max_new_tokens=6, do_sample=False), plain)
    assert next(layer.n_kv_heads for layer in block.cache.ragged) == 1
    with Streaming(1, 4)(cut) as block:
        cut.generate(inputs, max_new_tokens=6, do_sample=False)
    assert {group.length for layer in block.cache.ragged for group in layer.groups} == {5}
    with pytest.raises(UnsupportedError, match="a score for every KV head"), DuoAttention()(cut):
        pass


# What it holds


@settings(max_examples=15, deadline=None)
@given(
    rows=st.integers(1, 8),
    length=st.integers(40, 160),
    new=st.integers(1, 12),
    ratio=st.floats(0.0, 0.9),
    safeguard=st.floats(0.0, 1.0),
    padded=st.booleans(),
)
def test_bytes_are_those_of_the_tokens_kept(
    llama: mh.HeadModel, rows: int, length: int, new: int, ratio: float, safeguard: float, padded: bool
) -> None:
    with AdaKV(Random(compression_ratio=ratio), safeguard)(llama) as block:
        llama.generate(prompt(rows, length, padded), max_new_tokens=new, min_new_tokens=new, do_sample=False)
    kept = int(block.cache.lengths().sum())
    assert kept * 2 * llama.head_dim * 4 <= block.nbytes <= 1.02 * kept * 2 * llama.head_dim * 4
    tokens = prompt(rows, length, padded)["attention_mask"].sum(1)
    budget = torch.tensor([math.ceil(round((1 - ratio) * int(t), 6)) for t in tokens])
    assert torch.equal(block.cache.lengths().sum((0, 2)), llama.n_layers * llama.n_kv_heads * (budget + new - 1))


@dataclass(frozen=True)
class Random(ScorePress):
    def score(self, call: CacheCall) -> Tensor:
        return torch.rand(call.held.shape, generator=torch.Generator().manual_seed(int(call.held.sum())))


def test_streaming_heads_stop_growing_and_others_do_not(llama: mh.HeadModel) -> None:
    with Streaming(4, 12)(llama) as block:
        llama.generate(prompt(2, 10, False), max_new_tokens=40, min_new_tokens=40, do_sample=False)
    assert set(block.cache.lengths().flatten().tolist()) == {16}
    assert block.nbytes == block.cache.lengths().sum() * 2 * llama.head_dim * 4


def test_a_head_is_cut_again_while_text_is_generated(llama: mh.HeadModel) -> None:
    with SnapKV(tokens=40, every=10)(llama) as block:
        llama.generate(prompt(2, 60, False), max_new_tokens=61, min_new_tokens=61, do_sample=False)
    assert set(block.cache.lengths().flatten().tolist()) == {40}  # 120 columns: just cut
    with SnapKV(tokens=40)(llama) as block:
        llama.generate(prompt(2, 60, False), max_new_tokens=61, min_new_tokens=61, do_sample=False)
    assert set(block.cache.lengths().flatten().tolist()) == {100}


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_a_ring_holds_the_sinks_and_the_newest_in_order(data: st.DataObject) -> None:
    window = Window(data.draw(st.integers(0, 4)), data.draw(st.integers(1, 6)))
    first, more = data.draw(st.integers(0, 20)), data.draw(st.integers(0, 30))
    tokens = torch.arange(first + more, dtype=torch.float32)[None, :, None]
    group = Group(torch.tensor([0]), tokens[:, :first], -tokens[:, :first], window)
    for at in range(first, first + more):
        group.append(tokens[:, at], -tokens[:, at])
    every = list(range(first + more))
    wanted = every if len(every) <= window.size else every[: window.sinks] + every[-window.recent :]
    keys, values = group.in_order
    assert keys[0, :, 0].tolist() == wanted
    assert torch.equal(values, -keys)
    assert sorted(group.held[0][0, :, 0].tolist()) == wanted


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=8), st.integers(0, 9))
def test_groups_split_and_join_without_losing_a_token(counts: list[int], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    keys = torch.rand(len(counts), 5, 2, generator=generator)
    kept = torch.stack([torch.randperm(5, generator=generator) < count for count in counts])
    groups = merged(Group(torch.arange(len(counts)), keys, keys + 1).keeping(kept))
    assert [group.length for group in groups] == sorted(set(counts))
    for group in groups:
        for member, held in zip(group.members.tolist(), group.held[0], strict=True):
            assert torch.equal(held, keys[member][kept[member]])


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(-3, 3), min_size=1, max_size=12), st.integers(0, 14))
def test_the_highest_are_the_highest_and_of_equals_the_newer(scores: list[int], count: int) -> None:
    order = sorted(range(len(scores)), key=lambda i: (scores[i], i), reverse=True)
    found = highest(torch.tensor(scores, dtype=torch.float32), torch.tensor(count))
    assert found.nonzero()[:, 0].tolist() == sorted(order[:count])


def test_snapkv_keeps_what_the_newest_queries_attend_to(llama: mh.HeadModel) -> None:
    ids = prompt(1, 50, False)["input_ids"]
    patterns: dict[int, Tensor] = {}
    llama.look(ids, mh.model.reading.readers.ReadAttention(lambda c: patterns.__setitem__(c.layer, c.pattern)))
    seen: list[Tensor] = []

    class Spy(SnapKV):
        def score(self, call: CacheCall) -> Tensor:
            seen.append(attention_of(call).flatten(1, 2))
            return super().score(call)

    with torch.no_grad(), Spy(tokens=40)(llama):
        llama.plain(ids, use_cache=True)
    for layer in range(llama.n_layers):
        torch.testing.assert_close(seen[layer], patterns[layer][:, :, -32:], atol=1e-5, rtol=1e-4)


# What it refuses


def test_what_cannot_be_compressed_is_refused_by_name(llama: mh.HeadModel) -> None:
    bert = BertModel(BertConfig(vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=4))
    bloom = BloomForCausalLM(BloomConfig(vocab_size=97, hidden_size=32, n_layer=2, n_head=4))
    gemma = Gemma2ForCausalLM(Gemma2Config(**GROUPED, attn_logit_softcapping=20.0, layer_types=["full_attention"] * 3))
    refusals: list[tuple[PreTrainedModel, str]] = [(bert, "no text|encoder"), (bloom, "interface"), (gemma, "softcap")]
    for module, why in refusals:
        model = mh.open_model(module.eval(), tokenizer=None)
        with pytest.raises(UnsupportedError, match=why), Streaming()(model):
            pass
    with pytest.raises(InputError, match="open_model"), Press()(llama.plain):
        pass


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: SnapKV(compression_ratio=1.0), "leaves no token"),
        (lambda: SnapKV(compression_ratio=-0.1), "at least 0"),
        (lambda: SnapKV(), "one of the two"),
        (lambda: SnapKV(0.5, 64), "one of the two"),
        (lambda: SnapKV(tokens=16), "32 newest"),
        (lambda: SnapKV(tokens=64, kernel=4), "odd"),
        (lambda: Streaming(recent=0), "recent"),
        (lambda: AdaKV(Streaming()), "scores tokens"),
        (lambda: AdaKV(SnapKV(0.5), 1.5), "safeguard"),
    ],
)
@pytest.mark.usefixtures("any_shape")
def test_settings_that_make_no_sense_are_refused_when_they_are_given(make: object, why: str) -> None:
    with pytest.raises(InputError, match=why):
        make()  # type: ignore[operator]


def test_a_cache_works_in_its_own_block_only(llama: mh.HeadModel) -> None:
    ids = prompt(1, 8, False)["input_ids"]
    with torch.no_grad(), Press()(llama) as block:
        mine = llama.plain(ids, use_cache=True).past_key_values
        with pytest.raises(UnsupportedError, match="already"), Press()(llama):
            pass
        with pytest.raises(InputError, match="holds tokens already"):
            filled = DynamicCache()
            filled.update(torch.zeros(1, 2, 3, 8), torch.zeros(1, 2, 3, 8), 0)
            llama.plain(ids, past_key_values=filled)
        with pytest.raises(UnsupportedError, match="StaticCache"):
            llama.generate({"input_ids": ids}, max_new_tokens=2, cache_implementation="static")
        reader = mh.model.reading.readers.ReadAttention(lambda call: None)
        with pytest.raises(UnsupportedError, match="reader"), llama.reading(reader):
            llama.generate({"input_ids": ids}, max_new_tokens=2)
        with pytest.raises(InputError, match="pad on the left"):
            llama.plain(ids, attention_mask=torch.tensor([[1] * 6 + [0] * 2]), use_cache=True)
        with pytest.raises(UnsupportedError, match="draft"):
            generate(llama, PromptLookup(), ids, max_new_tokens=4)
    with pytest.raises(UnsupportedError, match="inside the `with` block"):
        llama.plain(ids[:, :1], past_key_values=mine)
    with torch.no_grad(), Press()(llama), pytest.raises(MismatchError, match="another block"):
        llama.plain(ids[:, :1], past_key_values=mine)
    assert isinstance(block, Compression)


def test_an_exception_inside_leaves_the_model_as_it_was(llama: mh.HeadModel) -> None:
    inputs = prompt(2, 9, True)
    plain = llama.generate(inputs, max_new_tokens=4, do_sample=False)
    before = llama.config._attn_implementation
    with pytest.raises(RuntimeError, match="mine"), Streaming(1, 2)(llama):
        llama.generate(inputs, max_new_tokens=4)
        raise RuntimeError("mine")
    assert llama.config._attn_implementation == before
    assert torch.equal(llama.generate(inputs, max_new_tokens=4, do_sample=False), plain)


# Presses of kvpress


class ScorerPress:
    """As kvpress has it: tokens of each head by their score, the rest dropped after the prompt."""

    def __init__(self, compression_ratio: float) -> None:
        self.compression_ratio = compression_ratio

    def compress(self, module: object, *_: object) -> None:
        """Drops what scores lowest."""


class KeyNorms(ScorerPress):
    def score(self, module, hidden_states, keys, values, attentions, kwargs):  # type: ignore[no-untyped-def]
        assert hidden_states.shape[:2] == keys.shape[::2] and attentions is None
        assert module.rotary_emb is not None and "position_embeddings" in kwargs
        return -keys.norm(dim=-1)


class AdaKVPress:
    def __init__(self, press: ScorerPress, alpha_safeguard: float = 0.2) -> None:
        self.press, self.alpha_safeguard = press, alpha_safeguard


def test_a_press_of_kvpress_runs_and_the_dropped_tokens_are_gone(llama: mh.HeadModel) -> None:
    ids = prompt(2, 40, False)["input_ids"]
    keys: dict[int, Tensor] = {}
    llama.look(ids, mh.model.reading.readers.ReadAttention(lambda c: keys.__setitem__(c.layer, c.key)))
    with torch.no_grad(), from_kvpress(KeyNorms(0.75))(llama) as block:
        llama.plain(ids, use_cache=True)
    for layer, ragged in enumerate(block.cache.ragged):
        norms = torch.cat([g.in_order[0].norm(dim=-1) for g in ragged.groups]).view(2, 2, 10)
        lowest = keys[layer].norm(dim=-1).sort(-1).values[..., :10]
        torch.testing.assert_close(norms.sort(-1).values, lowest)
    assert not hasattr(llama.layout.blocks[0].core, "rotary_emb")
    with torch.no_grad(), from_kvpress(AdaKVPress(KeyNorms(0.75)))(llama) as block:
        llama.plain(ids, use_cache=True)
    assert torch.equal(block.cache.lengths().sum(-1), torch.full((3, 2), 20))
    assert len(block.cache.lengths().unique()) > 1
    with pytest.raises(InputError, match="without padding"), torch.no_grad(), from_kvpress(KeyNorms(0.5))(llama):
        llama.generate(prompt(2, 40, True), max_new_tokens=2)
    with pytest.raises(UnsupportedError, match="object does more"):
        from_kvpress(object())
