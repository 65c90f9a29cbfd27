"""Two ciphers learned from scratch (#89): the rarer task and the less probable answers are done worse, in equal training.

McCoy et al., arXiv:2309.13638. A document is a cipher, a word of five letters written in it (each letter moved by the cipher's
number), and the word. Words come by Zipf's law, ciphers 95 to 5 ("skewed") or 50 to 50 ("balanced"). A two-layer Llama reads
letters. Prediction, of the share of words decoded wholly right:

    task      rare cipher below the common one by .1 and more when skewed, by less than .03 when balanced
    output    the rarer half of the words below the other half by .1 and more
    signs     logit P(right) = c + a [common cipher] + b log p(word): a > 0 and b > 0, each with p < .01

Refuted by: a gap that is smaller, or a coefficient of the other sign. All words have five letters, every letter one token.
Training ends while the task is still being learned (100 steps, chosen on seed 0); `skewed, longer` goes on four times as long.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import LlamaForCausalLM

from manyheads.data.real import needed
from manyheads.evaluation import Claim, Experiment, register_experiment
from manyheads.lab.small_llama import llama_config
from manyheads.training import ADAM, fit, generator_of, next_token_loss

LETTERS, LENGTH = 26, 5
SHIFTS = (3, 11)  # of the common cipher and of the rare one
VOCABULARY = LETTERS + 3  # two ciphers and the token before the answer


@dataclass(frozen=True)
class Ciphers:
    """`words` random words by Zipf's law, `common` the share of the first cipher; `steps` of training."""

    words: int = 400
    common: float = 0.95
    steps: int = 100

    def spelled(self, seed: int) -> Int[Tensor, "W 5"]:
        """The words, the commonest first."""
        return torch.randint(LETTERS, (self.words, LENGTH), generator=torch.Generator().manual_seed(seed))

    @property
    def prior(self) -> Float[Tensor, " W"]:
        """Zipf's law."""
        p = 1 / torch.arange(1, self.words + 1).double()
        return p / p.sum()


def written(words: Int[Tensor, "B 5"], cipher: Int[Tensor, " B"]) -> Int[Tensor, "B 12"]:
    """Cipher, the word in it, the sign that the answer comes, the word."""
    moved = (words + torch.tensor(SHIFTS)[cipher][:, None]) % LETTERS
    sign = torch.full((len(words), 1), VOCABULARY - 1)
    return torch.cat([LETTERS + cipher[:, None], moved, sign, words], 1)


def decoder(data: Ciphers, seed: int) -> LlamaForCausalLM:
    """A two-layer Llama trained on documents; its loss is that of the answers."""
    words, prior = data.spelled(seed), data.prior
    torch.manual_seed(seed)
    model = LlamaForCausalLM(llama_config(VOCABULARY, 64, 2, 4, intermediate_size=256))

    def batch(i: int) -> dict[str, Tensor]:
        draw = generator_of(seed, i)
        chosen = torch.multinomial(prior, 64, replacement=True, generator=draw)
        rows = written(words[chosen], (torch.rand(64, generator=draw) >= data.common).long())
        weights = torch.zeros(rows.shape)
        weights[:, -LENGTH:] = 1.0
        return {"input_ids": rows, "weights": weights}

    fit(
        model,
        batch,
        replace(ADAM, steps=data.steps, rate=1e-3, decay=0.3, seed=seed),
        loss=next_token_loss,
        device="cpu",
    )
    return model.eval()


def deciphered(model: LlamaForCausalLM, words: Int[Tensor, "W 5"], cipher: int) -> Float[np.ndarray, " W"]:
    """Which words are decoded wholly right (greedy, by teacher forcing)."""
    rows = written(words, torch.full((len(words),), cipher))
    with torch.no_grad():
        best = model(input_ids=rows).logits[:, -LENGTH - 1 : -1].argmax(-1)
    right: Tensor = (best == words).all(1)
    return right.double().numpy()


def _run(common: float, longer: int = 1) -> Callable[[Ciphers, int], dict[str, float]]:
    def run(data: Ciphers, seed: int) -> dict[str, float]:
        data = replace(data, common=common, steps=longer * data.steps)
        words = data.spelled(seed)
        model = decoder(data, seed)
        right = np.stack([deciphered(model, words, cipher) for cipher in (0, 1)])
        half = data.words // 2
        task, output = _z(right, np.log(data.prior.numpy()))
        return {
            "first cipher": float(right[0].mean()),
            "second cipher": float(right[1].mean()),
            "common words": float(right[:, :half].mean()),
            "rare words": float(right[:, half:].mean()),
            "z of task": task,
            "z of output": output,
        }

    return run


def _z(right: Float[np.ndarray, "2 W"], log_p: Float[np.ndarray, " W"]) -> tuple[float, float]:
    """Z of the two coefficients of the logit above; NaN where cells are so nearly all right that it has no finite fit."""
    words = len(log_p)
    design = np.stack([np.repeat([1.0, 0.0], words), np.tile(log_p, 2), np.ones(2 * words)], 1)
    if right.mean() > 0.99 or right.mean(1).max() == 1:
        return float("nan"), float("nan")
    fitted = needed("statsmodels.api").Logit(right.ravel(), design).fit(disp=0)
    return float(fitted.tvalues[0]), float(fitted.tvalues[1])


def _gap(method: str, first: str, second: str) -> Callable[..., float]:
    return lambda v: float(v[method, first] - v[method, second])


Z = 2.576  # p < .01, two-sided

register_experiment(
    Experiment(
        "ciphers",
        (89,),
        "2309.13638",
        "Is a deterministic task done worse where task or answer are rare?",
        datasets=lambda quick: {"two ciphers": Ciphers(200) if quick else Ciphers()},
        methods={"skewed": _run(0.95), "balanced": _run(0.5), "skewed, longer": _run(0.95, 4)},
        baseline="balanced",
        claims=(
            Claim("the rare cipher is done worse by .1", _gap("skewed", "first cipher", "second cipher"), at_least=0.1),
            Claim("rare words are done worse by .1", _gap("skewed", "common words", "rare words"), at_least=0.1),
            Claim("the task's coefficient is above 0 (z)", lambda v: v["skewed", "z of task"], at_least=Z),
            Claim("the output's coefficient is above 0 (z)", lambda v: v["skewed", "z of output"], at_least=Z),
            Claim(
                "balanced training has no gap of ciphers",
                lambda v: abs(v["balanced", "first cipher"] - v["balanced", "second cipher"]),
                at_most=0.03,
            ),
        ),
        minutes=1,
        room="lab",
    )
)
