"""Rules of a generation config hold while drafting, token for token, or are refused by name; what ends a text ends a draft."""

import contextlib
import copy

import accelerate
import hypothesis
import pytest
import torch
import transformers as tf
from architectures import opened, padded, shared
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare

import manyheads as mh
from manyheads.draft.core import rules
from manyheads.draft.core.decode import generate
from manyheads.draft.core.drafter import Stepwise
from manyheads.draft.core.growth import BestFirst, Chain, Fixed
from manyheads.draft.drafters.prompt_lookup import PromptLookup
from manyheads.errors import InputError, UnsupportedError

PROMPT = "Monday Tuesday Wednesday"
NEW = 24


class Near(Stepwise):
    """The model's own logits with noise: guesses that are often right, often not."""

    kind = "near"

    def start(self, trunk, rows):
        self.generator = torch.Generator().manual_seed(0)

    def first(self, trunk, accepted):
        self.paths = [[row] for row in accepted.text]
        return self.logits(trunk)

    def next(self, trunk, nodes):
        rows = nodes.tokens.shape[0]
        parents = nodes.parents.expand(rows, -1).tolist()
        self.paths = [
            [self.paths[b][p] + [t] for p, t in zip(parents[b], nodes.tokens[b].tolist(), strict=True)]
            for b in range(rows)
        ]
        return self.logits(trunk)

    def logits(self, trunk):
        module = trunk.model.module
        own = torch.stack([torch.stack([module(torch.tensor([p])).logits[0, -1] for p in row]) for row in self.paths])
        return own + 3 * torch.randn(own.shape, generator=self.generator)


@pytest.fixture(scope="module")
def ladon():
    return mh.open_model()


@contextlib.contextmanager
def config(model, **settings):
    """The model under a generation config with these settings."""
    before = model.plain.generation_config
    model.plain.generation_config = copy.deepcopy(before)
    for name, value in settings.items():
        setattr(model.plain.generation_config, name, value)
    try:
        yield
    finally:
        model.plain.generation_config = before


def plain(model, prompt=PROMPT, **settings):
    batch = model.inputs(prompt)
    out = model.plain.generate(**batch, max_new_tokens=NEW, do_sample=False, **settings)
    return out[0, batch["input_ids"].shape[1] :].tolist()


def drafted(model, growth=None, drafter=None, **settings):
    return generate(model, drafter or PromptLookup(), PROMPT, growth=growth, max_new_tokens=NEW, **settings).tokens[0]


def _settings(base):
    """A setting of every rule that changes what the bundled model writes after the prompt; `base` is what it writes plainly."""
    return {
        "suppress_tokens": {"suppress_tokens": [base[3]]},
        "begin_suppress_tokens": {"begin_suppress_tokens": [base[0]]},
        "bad_words_ids": {"bad_words_ids": [[base[2]], [base[5], base[6]]]},
        "min_new_tokens": {"min_new_tokens": 20, "eos_token_id": base[4]},
        "min_length": {"min_length": 18, "eos_token_id": base[4]},
        "several ends": {"eos_token_id": [base[7], base[5]]},
        "forced_bos_token_id": {"forced_bos_token_id": 9},  # at work after one token only: see below
        "forced_eos_token_id": {"forced_eos_token_id": 7},
        "sequence_bias": {"sequence_bias": [[[base[5]], -50.0], [[base[7], base[8]], -50.0]]},
        "repetition_penalty": {"repetition_penalty": 50.0},
        "no_repeat_ngram_size": {"no_repeat_ngram_size": 2},
        "encoder_repetition_penalty": {"encoder_repetition_penalty": 1e4},
        "encoder_no_repeat_ngram_size": {"encoder_no_repeat_ngram_size": 1},
        "exponential_decay_length_penalty": {"exponential_decay_length_penalty": (6, 1.6)},
        "watermarking_config": {"watermarking_config": tf.WatermarkingConfig(bias=8.0)},
        "stop_strings": {"stop_strings": ["Sunday"]},
        "two at once": {"repetition_penalty": 1.5, "suppress_tokens": [base[1]], "min_new_tokens": 22},
    }


def _without_effect():
    """Settings that may be there and change no token."""
    return {
        "no_repeat_ngram_size": {"no_repeat_ngram_size": -1},
        "renormalize_logits": {"renormalize_logits": True},
        "remove_invalid_values": {"remove_invalid_values": True},
        "cache_implementation": {"cache_implementation": "static"},
        "use_cache": {"use_cache": False},
        "beams": {"num_beams": 1, "length_penalty": 0.3, "early_stopping": True},
        "sampling": {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": 20},
        "reports": {"return_dict_in_generate": False, "output_scores": True},
        "assistants": {"num_assistant_tokens": 3},
        "off": {"guidance_scale": 1.0, "penalty_alpha": 0.0, "num_beam_groups": 1, "token_healing": False},
        "of the maker's own": {"chat_format": "chatml"},
        "lengths": {"max_length": 500},
    }


@pytest.fixture(scope="module")
def base(ladon):
    return plain(ladon)


def _under(ladon, base, rule, *growths):
    settings = _settings(base)[rule]
    with config(ladon, **settings):
        wanted = plain(ladon, **({"tokenizer": ladon.tokenizer} if "stop_strings" in settings else {}))
        assert rule == "forced_bos_token_id" or wanted != base
        assert all(drafted(ladon, growth, Near()) == wanted for growth in growths)
        return wanted, drafted(ladon)


@pytest.mark.parametrize("rule", _settings(list(range(NEW))))
def test_every_rule_holds_in_a_draft_token_for_token(ladon, base, rule):
    wanted, got = _under(ladon, base, rule, Fixed([(0, 0), (1,), (0, 1, 0)]))
    assert got == wanted


@pytest.mark.slow
@pytest.mark.parametrize("rule", _settings(list(range(NEW))))
def test_every_rule_holds_in_a_tree_that_grows_best_first(ladon, base, rule):
    wanted, got = _under(ladon, base, rule, BestFirst(6, 2, 2, 3))
    assert got == wanted


@pytest.mark.parametrize("rule", _without_effect())
def test_what_changes_no_token_is_no_reason_to_refuse(ladon, base, rule):
    with config(ladon, **_without_effect()[rule]):
        assert drafted(ladon, Chain(3), Near()) == base


def test_a_first_token_that_is_forced_comes_after_a_prompt_of_one_token(ladon):
    one = ladon.inputs("Monday")["input_ids"][:, -1:]
    with config(ladon, forced_bos_token_id=9, begin_suppress_tokens=[9]):
        wanted = plain(ladon, one)
        got = generate(ladon, Near(), one, growth=Chain(3), max_new_tokens=NEW).tokens[0]
    assert got == wanted and got[0] == 9


@pytest.mark.parametrize(
    "settings",
    [
        {"num_beams": 2},
        {"num_return_sequences": 2},
        {"guidance_scale": 1.5},
        {"guidance_scale": 0},
        {"penalty_alpha": 0.6},
        {"token_healing": True},
        {"dola_layers": "high"},
        {"constraints": [1]},
        {"force_words_ids": [[5]]},
        {"cache_implementation": "quantized"},
        {"watermarking_config": tf.SynthIDTextWatermarkingConfig(keys=[1, 2, 3], ngram_len=2)},
        {"is_assistant": True},
    ],
    ids=lambda settings: "-".join(map(str, settings)),
)
def test_a_rule_that_cannot_be_followed_is_refused_by_name(ladon, settings):
    with config(ladon, **settings), pytest.raises(UnsupportedError, match=next(iter(settings))):
        drafted(ladon)


def test_a_setting_of_a_later_version_is_refused_until_it_is_known(ladon, monkeypatch):
    class Later(tf.GenerationConfig):
        def __init__(self, **kwargs):
            self.sparkle = kwargs.pop("sparkle", None)
            super().__init__(**kwargs)

    monkeypatch.setattr(rules, "GenerationConfig", Later)
    with config(ladon, sparkle=3), pytest.raises(UnsupportedError, match="sparkle=3"):
        drafted(ladon)


def test_every_setting_of_this_version_has_a_place():
    off = {
        "is_assistant",
        "token_healing",
        "dola_layers",
        "constraints",
        "force_words_ids",
        "continuous_batching_config",
    }
    named = {name for name in vars(tf.GenerationConfig()) if not name.startswith("_")}
    assert named == set(rules._KNOWN | set(rules._OFF) | off) & named
    assert not rules._KNOWN & (set(rules._OFF) | off)


TOKEN = st.integers(3, 60)
SOME = {
    "suppress_tokens": st.lists(TOKEN, min_size=1, max_size=20),
    "begin_suppress_tokens": st.lists(TOKEN, min_size=1, max_size=20),
    "bad_words_ids": st.lists(st.lists(TOKEN, min_size=1, max_size=2), min_size=1, max_size=5),
    "min_new_tokens": st.integers(1, 9),
    "min_length": st.integers(1, 15),
    "eos_token_id": st.lists(TOKEN, min_size=1, max_size=8),
    "forced_eos_token_id": TOKEN,
    "sequence_bias": st.lists(
        st.tuples(st.lists(TOKEN, min_size=1, max_size=2), st.floats(-10, 10)), min_size=1, max_size=3
    ),
    "repetition_penalty": st.floats(0.5, 3),
    "no_repeat_ngram_size": st.integers(-1, 3),
    "encoder_repetition_penalty": st.floats(0.5, 3),
    "exponential_decay_length_penalty": st.tuples(st.integers(0, 8), st.floats(0.9, 2)),
    "watermarking_config": st.floats(0, 6).map(lambda bias: tf.WatermarkingConfig(bias=bias)),
}


@pytest.mark.slow
@given(
    st.dictionaries(st.sampled_from(sorted(SOME)), st.none(), min_size=2, max_size=5).flatmap(
        lambda names: st.fixed_dictionaries({name: SOME[name] for name in names})
    ),
    st.lists(TOKEN, min_size=1, max_size=9),
)
@pytest.mark.filterwarnings("ignore:Unfeasible length")
@hypothesis.settings(max_examples=20, deadline=None, derandomize=True)
def test_rules_hold_in_any_mixture(settings, prompt):
    model, ids = opened("llama"), torch.tensor([prompt])
    if "sequence_bias" in settings:
        settings["sequence_bias"] = [list(pair) for pair in settings["sequence_bias"]]
    with config(model, **settings):
        try:
            wanted = shared("llama").generate(ids, max_new_tokens=10, do_sample=False)[0, ids.shape[1] :].tolist()
        except ValueError:  # a config that contradicts itself
            with pytest.raises(InputError, match="cannot be applied"):
                generate(model, Near(), ids, max_new_tokens=10)
            return
        for growth in (Chain(3), Fixed([(0, 0), (1,)])):
            assert generate(model, Near(), ids, growth=growth, max_new_tokens=10).tokens == [wanted]


def test_values_that_transformers_refuses_are_one_sentence(ladon):
    contradiction = {"forced_eos_token_id": 7, "suppress_tokens": [7]}
    for settings in ({"bad_words_ids": []}, {"suppress_tokens": "x"}, {"repetition_penalty": -1.0}, contradiction):
        with config(ladon, **settings), pytest.raises(InputError):
            drafted(ladon)


@pytest.mark.usefixtures("any_shape")
@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"top_p": float("nan")},
        {"top_k": -1},
        {"no_repeat_ngram": -1},
        {"repetition_penalty": float("nan")},
        {"stop": [1.5]},
        {"stop": [True]},
        {"stop": [""]},
    ],
    ids=str,
)
def test_values_out_of_range_are_one_sentence(ladon, wrong):
    with pytest.raises(InputError, match=next(iter(wrong))):
        drafted(ladon, **wrong)


def test_a_sampled_draft_follows_the_configs_own_top_p_min_p_and_rules():
    """Against the exact distribution of one token: what is forbidden or cut off never comes, the rest as often as it should."""
    torch.manual_seed(0)
    plain_model = tf.LlamaForCausalLM(
        tf.LlamaConfig(
            vocab_size=8,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            initializer_range=0.6,
            bos_token_id=None,
            eos_token_id=None,
        )
    ).eval()
    model, prompt, draws = mh.open_model(plain_model), torch.tensor([[1, 4, 2]]), 6000
    logits = model.logits(prompt)[:, -1]
    worst = int(logits.argmax())
    with config(model, top_p=0.9, min_p=0.05, typical_p=0.95, suppress_tokens=[worst], repetition_penalty=1.3):
        got = generate(model, Near(), prompt.expand(draws, -1), growth=Chain(1), max_new_tokens=1, temperature=0.8)
        scores = tf.RepetitionPenaltyLogitsProcessor(1.3)(prompt, logits)
        scores[:, worst] = -torch.inf
        for warper in (tf.TemperatureLogitsWarper(0.8), tf.TopPLogitsWarper(0.9), tf.MinPLogitsWarper(0.05)):
            scores = warper(prompt, scores)
        odds = tf.TypicalLogitsWarper(0.95)(prompt, scores).softmax(-1)[0].double()
        kept = odds > 0
        assert kept.sum() < 7
        seen = torch.bincount(torch.tensor(got.tokens)[:, 0], minlength=8)
        assert not seen[~kept].any()
        assert chisquare(seen[kept].numpy(), (odds[kept] / odds[kept].sum() * draws).numpy()).pvalue > 1e-3
    with config(model, top_p=0.01):  # what is given here counts more than the config
        for top_p, several in (({}, False), ({"top_p": 1.0}, True)):
            got = generate(model, Near(), prompt.expand(40, -1), max_new_tokens=1, temperature=0.8, **top_p)
            assert (len({row[0] for row in got.tokens}) > 1) == several
    with config(model, watermarking_config=tf.WatermarkingConfig()), pytest.raises(UnsupportedError, match="watermark"):
        generate(model, Near(), prompt, max_new_tokens=1, temperature=0.8)


# What ends a text


def test_strings_and_tokens_end_a_draft_where_they_end_plain_generation(ladon):
    base = plain(ladon)
    stopped = plain(ladon, stop_strings=["Sunday"], tokenizer=ladon.tokenizer)
    assert len(stopped) < NEW
    for growth in (Chain(1), Chain(5)):
        assert drafted(ladon, growth, Near(), stop=["Sunday"]) == stopped
        assert drafted(ladon, growth, Near(), stop="Sunday") == stopped
        assert drafted(ladon, growth, Near(), stop=["Sunday", base[1]]) == base[:2]
    # Strings leave the end tokens of the config as they are, tokens its strings; nothing ends but by the limit at [].
    with config(ladon, eos_token_id=base[2], stop_strings=["Sunday"]):
        assert drafted(ladon, stop=["no such day"]) == base[:3]
        assert drafted(ladon, stop=[max(base) + 1]) == stopped
        assert drafted(ladon, stop=[]) == base
    silent = mh.open_model(ladon.plain)
    with pytest.raises(InputError, match="without a tokenizer"):
        generate(silent, PromptLookup(), ladon.inputs(PROMPT), stop=["Sunday"])


def test_the_clock_of_the_config_ends_a_draft(ladon):
    with config(ladon, max_time=1e-9):
        assert drafted(ladon) == plain(ladon, max_time=None)[:1]


def test_where_nothing_may_follow_no_token_is_made_up(ladon):
    class Nothing(tf.LogitsProcessor):
        """Forbids everything after the fourth new token, and a token of its own at guesses that are not reached."""

        def __call__(self, input_ids, scores):
            return scores * 0 - torch.inf if input_ids.shape[1] >= self.length else scores

    rule = Nothing()
    length = ladon.inputs(PROMPT)["input_ids"].shape[1]
    for allowed in (0, 4):
        rule.length = length + allowed
        ways = [(Chain(3), {}), (Chain(3), {"temperature": 1.0}), (Chain(3, sample=True), {"temperature": 1.0})]
        for growth, sampling in [*ways, (Chain(3), {"temperature": 1.0, "acceptance": "typical"})]:
            with pytest.raises(UnsupportedError, match="forbid every token"):
                drafted(ladon, growth, Near(), processors=[rule], **sampling)
    rule.length = length + NEW  # forbidden beyond the limit only: guesses look there, the text never goes
    assert drafted(ladon, Chain(5), Near(), processors=[rule]) == plain(ladon)

    class Broken(tf.LogitsProcessor):
        def __call__(self, input_ids, scores):
            return scores * torch.nan

    with pytest.raises(UnsupportedError, match="not numbers"):
        drafted(ladon, processors=[Broken()])


# Prompts


@pytest.mark.usefixtures("any_shape")
def test_prompts_that_would_be_misread_are_refused_and_rows_that_are_read_are_their_own():
    model, batch = opened("llama"), padded("llama", "right")
    ids, mask = batch["input_ids"], batch["attention_mask"]
    with pytest.raises(InputError, match="row 1 of the prompt is padded after"):
        generate(model, PromptLookup(), batch)
    gap = mask.flip(1).clone()
    gap[0, 4] = 0
    with pytest.raises(InputError, match="row 0 of the prompt is padded after or between"):
        generate(model, PromptLookup(), {"input_ids": ids.flip(1), "attention_mask": gap})
    with pytest.raises(InputError, match="row 2 of the attention mask has no token"):
        generate(
            model,
            PromptLookup(),
            padded("llama", "left") | {"attention_mask": mask.flip(1) * torch.tensor([[1], [1], [0]])},
        )
    with pytest.raises(InputError, match="shape"):
        generate(model, PromptLookup(), {"input_ids": ids, "attention_mask": torch.ones(3, 1, 11, 11)})
    for wrong in (torch.zeros(0, 3).long(), torch.zeros(1, 0).long(), torch.tensor([[61]]), torch.ones(1, 3)):
        with pytest.raises(InputError):
            generate(model, PromptLookup(), wrong)
    moved = {"input_ids": ids, "position_ids": torch.arange(11)[None].expand(3, -1) + 1}
    with pytest.raises(UnsupportedError, match="positions"):
        generate(model, PromptLookup(), moved)
    left = padded("llama", "left")
    rows = generate(model, PromptLookup(), model.inputs(left), max_new_tokens=8, stop=[]).tokens
    with config(model, no_repeat_ngram_size=2, begin_suppress_tokens=[rows[1][0]], min_length=14):
        got = generate(model, PromptLookup(), left, max_new_tokens=8).tokens
        for row, own in enumerate(left["attention_mask"].bool()):
            alone = left["input_ids"][row][own][None]
            wanted = shared("llama").generate(alone, max_new_tokens=8, do_sample=False)
            assert got[row] == wanted[0, alone.shape[1] :].tolist()


def test_an_edit_by_position_is_refused_and_one_that_is_everywhere_is_followed():
    model = opened("llama")
    ids = torch.randint(3, 61, (1, 9), generator=torch.Generator().manual_seed(0))
    heads = ["L0H1", "L2H3"]
    for edit in (mh.Scale(heads, -3.0), mh.Ablate(heads, "uniform"), mh.Ablate(heads, "mean", model.mean_z(ids))):
        with model.editing(edit):
            wanted = model.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=None)[0, 9:].tolist()
            got = generate(model, Near(), ids, growth=Fixed([(0, 0), (1,)]), max_new_tokens=12, stop=[])
            assert got.tokens == [wanted]
    z = model.read_z(ids)
    for edit in (mh.Scale(heads, 0.0, positions=[3]), mh.Patch(heads, z), mh.Mask(heads, 0), mh.Ablate(heads, "mean")):
        with model.editing(edit), pytest.raises(UnsupportedError, match=f"this {type(edit).__name__} depends on where"):
            generate(model, Near(), ids, max_new_tokens=2)


def test_offloaded_models_are_not_drafted_for():
    away = mh.open_model(accelerate.cpu_offload(copy.deepcopy(shared("llama")), execution_device="cpu"))
    with pytest.raises(UnsupportedError, match="offloaded"):
        generate(away, PromptLookup(), torch.tensor([[5, 6]]), max_new_tokens=2)
