"""Do decoders that learn languages in their prompt hold its n-grams and the automaton's state? Probes beside baselines (#44).

Akyürek et al., arXiv:2401.12973. A decoder of two layers learns on prompts of random automata, alone or with n-gram heads after
its first layer. Probes (`probes.py`) read the states after the embedding and after each layer. Beside them stand the same network
untrained, what the prompt shows on its surface (the last three tokens as one-hot, the shares of all tokens so far, the place),
and targets that were shuffled. Nothing was trained on the automata that probes are tested on. The model's predictions are also
compared with the backoff n-gram, with Baum and Welch, and with the truth, by total variation on the same prompts.

**Claim.** What learns in context holds n-grams, and predicts as an n-gram does rather than as Baum and Welch do. **Refuted by**
an untrained twin, or by a surface, that holds as much.

Departures: a Llama of width 64 and two layers that learns for minutes, on prompts of 160 tokens. Of a probe's scores over the
layers the highest counts, for every network alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from manyheads.evaluation import Claim, Experiment, register_experiment
from manyheads.inputs import check_integer
from manyheads.lab.automata import (
    VOCABULARY,
    Automaton,
    Prompts,
    backoff,
    language_prompts,
    next_symbol_accuracy,
    random_automata,
    total_variation,
)
from manyheads.lab.languages.baum_welch import baum_welch
from manyheads.lab.languages.probes import (
    automaton_states,
    last_tokens,
    ngram_conditionals,
    ngram_counts,
    probe_r2,
    shares_so_far,
    state_auc,
    state_pairs,
)
from manyheads.lab.languages.prose import WithNgramHeads
from manyheads.lab.ngram_layer import NgramHeads
from manyheads.lab.recurrent import LEARNING, predict, train_recurrent
from manyheads.lab.small_llama import llama_config
from manyheads.model.hooks import caught
from manyheads.model.opening import open_model

ORDERS = (1, 2, 3)  # of the contexts whose followers are asked for


@dataclass(frozen=True)
class ProbedSizes:
    """How much there is: automata to learn from, and for probes to learn from and be tested on; tokens of a prompt; updates.

    `with_heads` are the updates of the decoder with n-gram heads, `hidden_markov` the prompts that Baum and Welch read.
    """

    automata: int = 20_000
    probed: int = 300
    tested: int = 150
    width: int = 160
    updates: int = 4000
    with_heads: int = 800
    hidden_markov: int = 20


class PromptDecoder(nn.Module):
    """A Llama of `layers` layers over the tokens of automata; `heads`, a stack of n-gram heads, stand after its first layer."""

    def __init__(self, heads: NgramHeads | None = None, *, width: int = 64, layers: int = 2, seed: int = 0) -> None:
        super().__init__()
        check_integer(layers, "layers", 2)
        config = llama_config(VOCABULARY, width, layers, 2, intermediate_size=2 * width, max_position_embeddings=1024)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.network = WithNgramHeads(open_model(LlamaForCausalLM(config)), heads)

    def forward(self, input_ids: Int[Tensor, "B T"]) -> Float[Tensor, "B T V"]:
        """Logits of the next token after each token."""
        logits: Tensor = self.network(input_ids, use_cache=False).logits
        return logits

    @torch.no_grad()
    def states(self, tokens: Int[Tensor, "B T"], *, rows: int = 50) -> list[Float[Tensor, "B T D"]]:
        """The states after the embedding and after each layer, before the last norm; `rows` prompts at a time."""
        self.eval()
        # Not `output_hidden_states`: from the second pass on, Transformers takes them before the n-gram heads are added.
        body = self.network.decoder.model
        with caught(*body.layers, body.norm, side="input") as found:
            for one in tokens.split(rows):
                self(one)
        n = len(body.layers) + 1
        parts = [found[i : i + n] for i in range(0, len(found), n)]
        return [torch.cat(layer) for layer in zip(*parts, strict=True)]


@dataclass(frozen=True)
class ProbedPrompts:
    """Prompts whose automata are known, for probes to learn from or be tested on."""

    automata: Sequence[Automaton]
    prompts: Prompts
    seed: int = 0

    def targets(self) -> dict[str, Float[Tensor, "B T V"]]:
        """What is asked for after every token, by name: conditionals and counts of each order."""
        tokens, out = self.prompts.tokens, {}
        for n in ORDERS:
            out[f"conditionals {n}"] = ngram_conditionals(tokens, n)
            out[f"counts {n}"] = ngram_counts(tokens, n).log1p()
        return out

    def surface(self) -> Float[Tensor, "B T F"]:
        """What the prompt shows without any network: the last three tokens, the shares of all so far, and the place."""
        return torch.cat([last_tokens(self.prompts.tokens, 3), shares_so_far(self.prompts.tokens)], -1)


def probe_layers(
    layers: tuple[Sequence[Float[Tensor, "B T D"]], Sequence[Float[Tensor, "C S D"]]],
    learned: ProbedPrompts,
    tested: ProbedPrompts,
) -> dict[str, float]:
    """The highest R2 (or AUC) over layers of every target, and that of layer l under "TARGET, layer l"; "shuffled" the highest
    R2 of shuffled conditionals of order 1. `layers` are the states of both kinds of prompts."""
    out: dict[str, float] = {}
    there, there_new = learned.prompts.scored, tested.prompts.scored
    known, asked = learned.targets(), tested.targets()
    pairs = [
        state_pairs(one.prompts.tokens, automaton_states(one.automata, one.prompts.tokens), seed=one.seed)
        for one in (learned, tested)
    ]
    shuffled = []
    for at, (h, h_new) in enumerate(zip(*layers, strict=True)):
        for name in known:
            out[f"{name}, layer {at}"] = probe_r2((h, known[name], there), (h_new, asked[name], there_new))
        out[f"same state, layer {at}"] = state_auc((h, pairs[0]), (h_new, pairs[1]))
        first = f"conditionals {ORDERS[0]}"
        shuffled.append(probe_r2((h, known[first], there), (h_new, asked[first], there_new), shuffle=learned.seed))
    for name in (*known, "same state"):
        out[name] = max(value for key, value in out.items() if key.startswith(f"{name}, layer "))
    return out | {"shuffled": max(shuffled)}


def distances(predicted: Float[Tensor, "B T V"], given: Prompts, hidden_markov: int = 20) -> dict[str, float]:
    """Accuracy, and total variation to the truth and the backoff of orders 1 to 4; on so many prompts to Baum and Welch too."""
    out = {
        "accuracy": next_symbol_accuracy(predicted, given),
        "to truth": total_variation(predicted, given.truth, given),
    }
    few = Prompts(given.tokens[:hidden_markov], given.legal[:hidden_markov])
    for order in (1, 2, 3, 4):
        out[f"to backoff {order}"] = total_variation(predicted[:hidden_markov], backoff(few.tokens, order), few)
    return out | {"to Baum-Welch": total_variation(predicted[:hidden_markov], _hidden_markov(few), few)}


_FITTED: list[tuple[Tensor, Tensor]] = []  # the newest fit, which several models are compared with


def _hidden_markov(few: Prompts) -> Tensor:
    if not _FITTED or not torch.equal(_FITTED[0][0], few.tokens):
        _FITTED[:] = [(few.tokens, baum_welch(few.tokens))]
    return _FITTED[0][1]


@lru_cache(maxsize=1)
def _data(sizes: ProbedSizes, seed: int) -> tuple[Prompts, ProbedPrompts, ProbedPrompts]:
    drawn = random_automata(sizes.automata, sizes.probed, sizes.tested, seed=seed)
    prompts = [
        language_prompts(drawn[split], strings=(20, 20), lengths=(1, 24), width=sizes.width, seed=seed + number)
        for number, split in enumerate(("train", "val", "test"))
    ]
    return (
        prompts[0],
        ProbedPrompts(drawn["val"], prompts[1], seed),
        ProbedPrompts(drawn["test"], prompts[2], seed),
    )


def _network(heads: bool, trained: bool) -> Any:
    def run(sizes: ProbedSizes, seed: int) -> dict[str, float]:
        given, learned, tested = _data(sizes, seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            stack = NgramHeads(64, ORDERS) if heads else None
        model = PromptDecoder(stack, seed=seed)
        if trained:
            # A decoder alone needs a high rate to begin within minutes; it was chosen by 1,000 updates of seed 0.
            steps, rate = (sizes.with_heads, 3e-3) if heads else (sizes.updates, 1e-2)
            settings = replace(LEARNING, steps=steps, rows=16, rate=rate, warmup=min(100, steps), seed=seed)
            train_recurrent(model, given, settings)
        states = model.states(learned.prompts.tokens), model.states(tested.prompts.tokens)
        found = probe_layers(states, learned, tested)
        return found | distances(predict(model, tested.prompts.tokens), tested.prompts, sizes.hidden_markov)

    return run


def _surface(sizes: ProbedSizes, seed: int) -> dict[str, float]:
    _, learned, tested = _data(sizes, seed)
    return probe_layers(([learned.surface()], [tested.surface()]), learned, tested)


def _more(metric: str, method: str, other: str) -> Any:
    return lambda v: v[method, metric] - v[other, metric]


def _nearer(method: str) -> Any:
    """How much nearer the predictions are to the nearest backoff than to Baum and Welch."""
    return lambda v: v[method, "to Baum-Welch"] - min(v[method, f"to backoff {n}"] for n in (1, 2, 3, 4))


register_experiment(
    Experiment(
        "automaton-probes",
        (44,),
        "2401.12973",
        "Do states of decoders that learn in context hold n-grams and the automaton's state?",
        datasets=lambda quick: {
            "automata": ProbedSizes(200, 40, 20, 60, 12, 12, 4) if quick else ProbedSizes(),
        },
        methods={
            "decoder": _network(False, True),
            "decoder, untrained": _network(False, False),
            "with n-gram heads": _network(True, True),
            "with n-gram heads, untrained": _network(True, False),
            "surface": _surface,
        },
        baseline="surface",
        claims=(
            Claim(
                "the decoder's states hold bigram conditionals more than its untrained twin's, by .1 of R2",
                _more("conditionals 1", "decoder", "decoder, untrained"),
                at_least=0.1,
            ),
            Claim("and more than the surface, by .1", _more("conditionals 1", "decoder", "surface"), at_least=0.1),
            Claim(
                "with n-gram heads states hold trigram conditionals, R2",
                lambda v: v["with n-gram heads", "conditionals 2"],
                at_least=0.7,
            ),
            Claim(
                "more than the decoder's, by .2",
                _more("conditionals 2", "with n-gram heads", "decoder"),
                at_least=0.2,
            ),
            Claim(
                "with n-gram heads pairs in the same state are told apart better than by the untrained twin, by .03 of AUC",
                _more("same state", "with n-gram heads", "with n-gram heads, untrained"),
                at_least=0.03,
            ),
            Claim(
                "and than by the surface, by .03", _more("same state", "with n-gram heads", "surface"), at_least=0.03
            ),
            Claim(
                "the decoder's states tell them apart better than its untrained twin's, by .03",
                _more("same state", "decoder", "decoder, untrained"),
                at_least=0.03,
            ),
            Claim(
                "from shuffled targets nothing is read",
                lambda v: max(v[one, "shuffled"] for one in ("decoder", "with n-gram heads", "surface")),
                at_most=0.02,
            ),
            Claim(
                "with n-gram heads predictions are nearer to an n-gram's than to Baum and Welch's",
                _nearer("with n-gram heads"),
                at_least=0.0,
            ),
            Claim("so are the decoder's", _nearer("decoder"), at_least=0.0),
        ),
        minutes=25,
        lower=frozenset({"to truth", "shuffled"}),
        room="lab",
    )
)
