"""FlashHead (#24): the next token by retrieval, which reads only part of the output matrix for each token.

Tranheden et al., arXiv:2603.14591. The rows w_v of the output matrix `[V, D]` are cut into K clusters of equal size
(`clustering`); nothing is trained. For a hidden state h, P of the K clusters are probed, and exact logits are computed for
their rows only:

    greedy       s_k = <u_k, h>, the P largest;     u_k = max_v |w_v| * normalised mean of w_v / |w_v|,  v in cluster k    [K]
    sampling     P clusters drawn without replacement with chances softmax_k(<m_k, h> / T);              m_k = mean of w_v
    then         logits_v = <w_v, h> + b_v for rows of the probed clusters and for special tokens, else -inf

Where hidden states of texts are known (their mean mu and covariance C), rows are clustered as they act on them, as vectors
(C^1/2 w_v, <w_v, mu> + b_v), and the greedy score allows for a cluster's best row, which its mean row hides:

    s_k = <m_k, h> + o_k;     o_k = max_v <w_v - m_k, mu> + 2 (mean_v |C^1/2 (w_v - m_k)|^2)^1/2,     v in cluster k

takes the place of both <u_k, h> and <m_k, h>. `FlashHead.of(model)` reads such texts, and takes the smallest P that reaches a
stated `agreement` on them. The card keeps what was reached on texts held out from this choice (`measuring`).

A bias b is one more column of the matrix, where the hidden state is 1. Drawing without replacement is the same as taking the P
largest of <m_k, h> / T + Gumbel noise. Every cluster can be drawn, so every token can be generated; the tokens' probabilities are
those of the dense head only at P = K.

**Use it to draft, never to verify.** Logits outside the probed rows are -inf: log-probabilities and perplexity from them mean
nothing, and a greedy choice is the dense head's in most cases, not in all. `agreement` measures the share; report it with speeds.

Departures: texts, and P by agreement; without texts u_k is scaled by its cluster's largest row (`weighted=False` leaves it a unit
vector, as published). On a CPU, in float32 or float64, rows are read in place by a sampled product, since copying them takes
longer than the products; elsewhere they are gathered. Centres may have 8 bits, not 4.
"""

from __future__ import annotations

import contextlib
import hashlib
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from manyheads.draft.output.clustering import Clusters, balanced_clusters
from manyheads.draft.output.measuring import ReadText, fewest_probes, in_parts, read_texts, spread
from manyheads.errors import InputError, MismatchError, UnsupportedError
from manyheads.learning import Card, load, save
from manyheads.model.headmodel import HeadModel
from manyheads.model.hooks import hidden_of, hooked
from manyheads.model.replay.recording import first_logits
from manyheads.progress import Bar

CAP = 16  # rows of a cluster by default
CELLS = 1 << 26  # logits held at a time
KIND = "FlashHead"


class FlashHead(nn.Module):
    """An output matrix that is searched by clusters (formulas above). Made by `of` or `load`; nothing in it is trained.

    `ids` `[K, cap]` are the clusters, -1 where one has a row less; `probes` is P and may be changed. `packed` keeps a second copy
    of the rows, cluster after cluster, which is faster to read; otherwise the given matrix itself is read.
    """

    ids: Int[Tensor, "K cap"]
    rows: Float[Tensor, "R D"]
    places: Int[Tensor, "K cap"]  # in `rows`, of every slot
    tokens: Int[Tensor, "R"]  # whose row it is
    special: Int[Tensor, "S"]  # in `rows`
    bias: Float[Tensor, "R"] | None
    means: Float[Tensor, "K D"]
    mean_bias: Float[Tensor, "K"] | None
    centres: Tensor  # [K, D], floating or int8
    scales: Float[Tensor, "K"] | None
    centre_bias: Float[Tensor, "K"] | None
    offsets: Float[Tensor, "K"] | None

    def __init__(
        self,
        weight: Float[Tensor, "V D"],
        bias: Float[Tensor, "V"] | None,
        ids: Int[Tensor, "K cap"],
        *,
        probes: int,
        specials: Sequence[int] = (),
        weighted: bool = True,
        quantised: bool = False,
        packed: bool = True,
        offsets: Float[Tensor, "K"] | None = None,
        fingerprint: str = "",
        meta: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.vocab_size, self.width = weight.shape
        self.specials, self.weighted, self.quantised, self.packed = list(specials), weighted, quantised, packed
        self.fingerprint, self.meta = fingerprint, meta or {}
        weight = weight.detach()
        ids = ids.to(weight.device)
        # An empty slot repeats the cluster's first row, so that nothing has to be masked.
        slots = ids.where(ids >= 0, ids[:, :1])
        if packed:
            places = torch.arange(slots.numel(), device=weight.device).view_as(slots)
            tokens, rows = slots.flatten(), weight[slots.flatten()]
        else:
            places, tokens, rows = slots, torch.arange(len(weight), device=weight.device), weight
        place = torch.empty(len(weight), dtype=torch.long, device=weight.device)
        place[slots.flatten()] = places.flatten()
        bias = None if bias is None else bias.detach()
        means, centres = _centres(weight, bias, ids, weighted)
        if offsets is not None:
            centres, offsets = means, offsets.to(weight)
        scales = None
        edge = offsets if bias is None else centres[:, -1] + (0 if offsets is None else offsets)
        centres = centres[:, : self.width].contiguous()
        if quantised:
            scales = (centres.abs().amax(1) / 127).clamp(min=1e-12)
            centres = (centres / scales[:, None]).round().to(torch.int8)
        buffers = {
            "ids": ids,
            "rows": rows,
            "places": places,
            "tokens": tokens,
            "special": place[torch.tensor(self.specials, dtype=torch.long, device=weight.device)],
            "bias": None if bias is None else bias[tokens],
            "means": means[:, : self.width].contiguous(),
            "mean_bias": edge if offsets is not None else None if bias is None else means[:, -1].contiguous(),
            "centres": centres,
            "scales": scales,
            "centre_bias": edge,
            "offsets": offsets,
        }
        for name, tensor in buffers.items():
            self.register_buffer(name, tensor, persistent=False)
        self.probes = probes
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore"
            )  # PyTorch warns once a process that sparse tensors are in beta: get it over with
            torch.sparse_csr_tensor([0, 0], [], [], size=(1, 1))

    @classmethod
    def of(
        cls,
        source: HeadModel | Float[Tensor, "V D"],
        *,
        bias: Float[Tensor, "V"] | None = None,
        clusters: int | Clusters | None = None,
        probes: int | None = None,
        agreement: float = 0.98,
        texts: Sequence[ReadText] | None = None,
        specials: Sequence[int] = (),
        weighted: bool = True,
        quantised: bool = False,
        packed: bool = True,
        rounds: int = 30,
        seed: int = 0,
        bar: Bar = Bar(),
    ) -> FlashHead:
        """Cluster a model's output matrix, or a matrix and its `bias`; `bar` counts `rounds`.

        `clusters` is K (default: V / 16, rounded up) or a `Clusters`. `texts` are states that the matrix reads (default: those of
        `read_texts`, if the model has a tokenizer; `()` for none). `probes` is P; by default it is the smallest with which the
        greedy choice is the dense head's in a share `agreement` of the states of every text, and K / 16 without texts. Clusters
        are fitted on the first half of each text, P is chosen on the third quarter, and `meta["agreement"]` says what the last
        one gives. A model's end-of-text and other special tokens are added to `specials`.
        `InputError` for numbers out of range, `UnsupportedError` for a model without an output matrix.
        """
        if not 0 < agreement <= 1:
            raise InputError(f"agreement={agreement}: give a share of the states, above 0 and at most 1.")
        weight, bias = _matrix(source) if isinstance(source, HeadModel) else (source, bias)
        if isinstance(source, HeadModel):
            specials = [*specials, *_special_tokens(source)]
            if texts is None and source.tokenizer is not None:
                texts = read_texts(source, seed=seed)
        first, second, last = in_parts(texts or [], weight.shape[1])
        joined = _joined(weight.detach(), None if bias is None else bias.detach())
        acting = spread(joined, torch.cat([text.states for text in first])) if first else joined
        rows, found = len(weight), clusters
        if not isinstance(found, Clusters):
            found = balanced_clusters(acting, found or -(-rows // CAP), rounds=rounds, seed=seed, bar=bar)
        if int((found.ids >= 0).sum()) != rows or bool((found.ids[:, 0] < 0).any()):
            raise InputError(
                f"the clusters hold {int((found.ids >= 0).sum())} rows and the matrix has {rows}; give clusters of this matrix."
            )
        specials = sorted(set(specials))
        if specials and not 0 <= specials[0] <= specials[-1] < rows:
            raise InputError(f"special tokens {specials[0]} to {specials[-1]}: give ids from 0 to {rows - 1}.")
        head = cls(
            weight,
            bias,
            found.ids,
            probes=max(1, len(found.ids) // 16) if probes is None else probes,
            specials=specials,
            weighted=weighted,
            quantised=quantised,
            packed=packed,
            offsets=_offsets(acting, found.ids) if first else None,
            fingerprint=_fingerprint(source),
            meta={"rounds": rounds, "seed": seed, "cosine": found.cosine},
        )
        if first and probes is None:
            head.probes = max(fewest_probes(head.needed(text.states), agreement) for text in second)
        if first:
            asked = agreement if probes is None else None
            head.meta["agreement"] = {"asked": asked, "held out": {text.name: held_out(head, text) for text in last}}
        return head

    def __repr__(self) -> str:
        k, cap = self.ids.shape
        return f"FlashHead({self.vocab_size} tokens in {k} clusters of {cap}, {self.probes} probed)"

    @property
    def probes(self) -> int:
        """P, clusters probed for each state: more give better agreement, fewer more speed."""
        return self._probes

    @probes.setter
    def probes(self, probes: int) -> None:
        if not 1 <= probes <= len(self.ids):
            raise InputError(f"probes={probes}: give 1 to {len(self.ids)}, the number of clusters.")
        self._probes = probes

    @property
    def share(self) -> float:
        """Vectors that are scored for each state, centres included, as a share of V."""
        return (len(self.ids) + self.probes * self.ids.shape[1] + len(self.specials)) / self.vocab_size

    # Use

    def forward(self, hidden: Float[Tensor, "... D"]) -> Float[Tensor, "... V"]:
        """Logits by greedy retrieval; -inf outside the probed rows. No gradients."""
        return self.logits(hidden)

    def unembed(self, hidden: Float[Tensor, "... D"]) -> Float[Tensor, "... V"]:
        """The same, for draft heads (`DraftTrunk(model, unembed=head.unembed)`): to draft with, never to verify."""
        return self.logits(hidden)

    @torch.no_grad()
    def logits(
        self,
        hidden: Float[Tensor, "... D"],
        *,
        temperature: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> Float[Tensor, "... V"]:
        """Exact logits of the probed rows, -inf elsewhere; above temperature 0 the clusters are drawn.

        `InputError` for states of another width and for a temperature below 0.
        """
        flat = self._flat(hidden, temperature)
        out = [self._spread(*self._scored(part, temperature, generator)) for part in flat.split(self._chunk)]
        return torch.cat(out).view(*hidden.shape[:-1], self.vocab_size)

    @torch.no_grad()
    def choose(
        self,
        hidden: Float[Tensor, "... D"],
        *,
        temperature: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> Int[Tensor, "..."]:
        """One token for each state: the best of the probed rows or, above temperature 0, one drawn (formulas above)."""
        flat = self._flat(hidden, temperature)
        chosen = []
        for part in flat.split(self._chunk):
            if temperature:
                probabilities = self._spread(*self._scored(part, temperature, generator)).div_(temperature).softmax(-1)
                chosen.append(torch.multinomial(probabilities, 1, generator=generator)[:, 0])
            else:
                ids, scores = self._scored(part, 0.0, None)
                chosen.append(ids.gather(1, scores.argmax(1, keepdim=True))[:, 0])
        return torch.cat(chosen).view(hidden.shape[:-1])

    @torch.no_grad()
    def probe(
        self, hidden: Float[Tensor, "N D"], *, temperature: float = 0.0, generator: torch.Generator | None = None
    ) -> Int[Tensor, "N P"]:
        """The numbers of the P clusters to search, in no order."""
        if not temperature:
            return self._centre_scores(hidden).topk(self.probes, sorted=False).indices
        scores = F.linear(hidden, self.means, self.mean_bias).float() / temperature
        gumbel = -torch.empty_like(scores).exponential_(generator=generator).log()
        return (scores + gumbel).topk(self.probes, sorted=False).indices

    @torch.no_grad()
    def agreement(self, hidden: Float[Tensor, "... D"]) -> float:
        """The share of states for which the greedy choice is the dense head's."""
        flat = self._flat(hidden, 0.0)
        return float((self.choose(flat) == self.dense(flat)).double().mean())

    @torch.no_grad()
    def dense(self, hidden: Float[Tensor, "N D"]) -> Int[Tensor, "N"]:
        """The dense head's choice."""
        parts = self._flat(hidden, 0.0).split(max(1, CELLS // len(self.rows)))
        return torch.cat([self.tokens[F.linear(part, self.rows, self.bias).argmax(-1)] for part in parts])

    @torch.no_grad()
    def needed(self, hidden: Float[Tensor, "N D"], tokens: Int[Tensor, "N"] | None = None) -> Int[Tensor, "N"]:
        """The least P at which each state's greedy search scores these `tokens` (default: the dense head's choices)."""
        flat = self._flat(hidden, 0.0)
        tokens = (self.dense(flat) if tokens is None else tokens).to(flat.device)
        taken = self.ids >= 0
        home = torch.empty(self.vocab_size, dtype=torch.long, device=flat.device)
        home[self.ids[taken]] = torch.arange(len(self.ids), device=flat.device)[:, None].expand_as(self.ids)[taken]
        found = []
        for part, own in zip(flat.split(self._chunk), home[tokens].split(self._chunk), strict=True):
            scores = self._centre_scores(part)
            found.append(1 + (scores > scores.gather(1, own[:, None])).sum(1))
        special = torch.isin(tokens, torch.tensor(self.specials, dtype=torch.long, device=flat.device))
        return torch.cat(found).masked_fill(special, 1)

    @property
    def _chunk(self) -> int:
        return max(1, CELLS // self.vocab_size)

    def _flat(self, hidden: Tensor, temperature: float) -> Float[Tensor, "N D"]:
        if hidden.shape[-1] != self.width or temperature < 0:
            raise InputError(
                f"states {list(hidden.shape)} at temperature {temperature}: give states of width {self.width} and 0 or more."
            )
        return hidden.detach().reshape(-1, self.width).to(self.rows.dtype)

    def _scored(
        self, hidden: Float[Tensor, "N D"], temperature: float, generator: torch.Generator | None
    ) -> tuple[Int[Tensor, "N n"], Float[Tensor, "N n"]]:
        probed = self.places[self.probe(hidden, temperature=temperature, generator=generator)].flatten(1)
        places = torch.cat([probed, self.special.expand(len(hidden), -1)], 1)
        scores = _products(self.rows, hidden, places)
        return self.tokens[places], scores if self.bias is None else scores + self.bias[places]

    def _spread(self, ids: Int[Tensor, "N n"], scores: Float[Tensor, "N n"]) -> Float[Tensor, "N V"]:
        return scores.new_full((len(ids), self.vocab_size), -torch.inf).scatter_(1, ids, scores)

    def _centre_scores(self, hidden: Float[Tensor, "N D"]) -> Float[Tensor, "N K"]:
        if self.scales is None:
            return F.linear(hidden, self.centres, self.centre_bias)
        if hidden.device.type == "cpu":
            step = (hidden.float().abs().amax(1, keepdim=True) / 127).clamp(min=1e-12)
            scores = torch._int_mm((hidden / step).round().to(torch.int8), self.centres.T) * step
        else:
            scores = F.linear(hidden, self.centres.to(hidden.dtype))
        scores = scores * self.scales
        return scores if self.centre_bias is None else scores + self.centre_bias

    # Standing in for the dense head

    @contextlib.contextmanager
    def serving(
        self, model: HeadModel, *, temperature: float = 0.0, max_batch: int = 8, seed: int = 0
    ) -> Iterator[FlashHead]:
        """Inside the `with` block this is the model's head in passes over one token a row, of at most `max_batch` rows.

        Prompts, verification passes and larger batches use the dense head, which is restored afterwards. Scaling or capping of
        logits by the model still happens, and -inf stays -inf. To sample, give the `temperature` here too: clusters are then
        drawn, with `seed`; tokens are sampled by `generate`.
        `MismatchError` if this is not a head of this model.
        """
        weight, _ = _matrix(model)
        dense: Any = model.layout.unembedding
        some = torch.arange(0, self.vocab_size, max(1, self.vocab_size // 64), device=self.rows.device)
        if weight.shape != (self.vocab_size, self.width) or not torch.equal(
            self.rows[self._place_of(some)].cpu(), weight[some.to(weight.device)].to(self.rows.dtype).cpu()
        ):
            raise MismatchError(f"this head belongs to another output matrix; make one with FlashHead.of for {model}.")
        generator = torch.Generator(self.rows.device).manual_seed(seed)
        usual, patched = dense.forward, "forward" in vars(dense)
        decoding, outside = False, None

        def look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            nonlocal decoding, outside
            states = hidden_of(args, kwargs)
            decoding, outside = states.shape[1] == 1 and len(states) <= max_batch, None

        def head(hidden: Tensor) -> Tensor:
            nonlocal decoding, outside
            if not decoding:
                return usual(hidden)  # type: ignore[no-any-return]
            decoding = False
            logits = self.logits(hidden, temperature=temperature, generator=generator).to(hidden.dtype)
            outside = logits.isneginf()
            return logits

        def mask(module: nn.Module, args: Any, output: Any) -> None:
            nonlocal outside
            if outside is not None:
                first_logits(output).masked_fill_(outside, -torch.inf)
            outside = None

        with hooked(model.layout.blocks[0].module, before=look), hooked(model.plain, after=mask):
            dense.forward = head
            try:
                yield self
            finally:
                if patched:
                    dense.forward = usual
                else:
                    del dense.forward

    def _place_of(self, tokens: Int[Tensor, "N"]) -> Int[Tensor, "N"]:
        place = torch.empty(self.vocab_size, dtype=torch.long, device=tokens.device)
        place[self.tokens] = torch.arange(len(self.tokens), device=tokens.device)
        return place[tokens]

    # Files

    def save(self, folder: str | Path, *, force: bool = False) -> Path:
        """Write the clusters (safetensors) and settings (JSON) into a folder; the matrix stays with its model."""
        names = ("probes", "specials", "weighted", "quantised", "packed")
        settings = {name: getattr(self, name) for name in names}
        card = Card(
            "FlashHead (#24)", settings=settings, fingerprint=self.fingerprint, kind=KIND, about={"meta": self.meta}
        )
        tensors = {"ids": self.ids} | ({} if self.offsets is None else {"offsets": self.offsets})
        return save(folder, card, tensors, force=force)

    @classmethod
    def load(
        cls,
        folder: str | Path,
        source: HeadModel | Float[Tensor, "V D"],
        *,
        bias: Float[Tensor, "V"] | None = None,
        force: bool = False,
    ) -> FlashHead:
        """Read what `save` wrote, for the same model or matrix. `MismatchError` for another, unless `force`."""
        weight, bias = _matrix(source) if isinstance(source, HeadModel) else (source, bias)
        card, tensors = load(folder, KIND, KIND, fingerprint=_fingerprint(source), force=force)
        ids = tensors.get("ids")
        if ids is None or ids.ndim != 2 or ids.is_floating_point():
            raise InputError(f"{folder} holds no clusters of tokens; give a folder that a {KIND} was saved in.")
        if int((ids >= 0).sum()) != len(weight):
            raise MismatchError(
                f"{folder} has {int((ids >= 0).sum())} tokens and this matrix {len(weight)}; give the matrix it was made for."
            )
        try:
            offsets = tensors.get("offsets")
            return cls(weight, bias, ids, **card.settings, offsets=offsets, fingerprint=card.fingerprint, **card.about)
        except (TypeError, ValueError, RuntimeError, IndexError) as error:
            raise InputError(f"{folder} holds no {KIND}: {' '.join(str(error).split())}") from None


def _products(
    rows: Float[Tensor, "R D"], hidden: Float[Tensor, "N D"], places: Int[Tensor, "N n"]
) -> Float[Tensor, "N n"]:
    """`<rows[places[i, j]], hidden[i]>`; on a CPU in float32 or float64 without copying rows."""
    if places.shape[1] >= len(rows):
        return F.linear(hidden, rows).gather(1, places)
    if rows.device.type != "cpu" or rows.dtype not in (torch.float32, torch.float64):
        return torch.cat([F.linear(h, rows[at]) for h, at in zip(hidden[:, None], places, strict=True)])
    # Each state's places are split into parts, one a thread: the product runs parallel over rows of the pattern.
    (n_rows, n), parts = places.shape, -(-torch.get_num_threads() // len(places))
    starts = torch.arange(n_rows)[:, None] * n + torch.arange(parts) * n // parts
    pattern = torch.sparse_csr_tensor(
        torch.cat([starts.flatten(), torch.tensor([n_rows * n])]),
        places.flatten(),
        hidden.new_zeros(n_rows * n),
        size=(n_rows * parts, len(rows)),
        check_invariants=False,
    )
    asked = hidden.repeat_interleave(parts, 0)
    return torch.sparse.sampled_addmm(pattern, asked, rows.T, beta=0.0).values().view(n_rows, n)


def _joined(weight: Float[Tensor, "V D"], bias: Float[Tensor, "V"] | None) -> Float[Tensor, "V E"]:
    """The weight with the bias as one more column, centred: its mean shifts all logits alike."""
    return weight if bias is None else torch.cat([weight, (bias - bias.mean())[:, None]], 1)


def _offsets(acting: Float[Tensor, "V E"], ids: Int[Tensor, "K cap"]) -> Float[Tensor, "K"]:
    """o_k (formula above) from `spread` rows, whose last column is <w_v, mu> + b_v less its mean."""
    found = []
    for part in ids.split(1024):
        taken = (part >= 0)[..., None]
        rows = acting[part.clamp(min=0)]
        apart = (rows - (rows * taken).sum(1, keepdim=True) / taken.sum(1, keepdim=True)) * taken
        width = (apart[..., :-1].square().sum((1, 2)) / taken.sum((1, 2))).sqrt()
        found.append(apart[..., -1].amax(1) + 2 * width)
    return torch.cat(found)


def _centres(
    weight: Float[Tensor, "V D"], bias: Float[Tensor, "V"] | None, ids: Int[Tensor, "K cap"], weighted: bool
) -> tuple[Float[Tensor, "K E"], Float[Tensor, "K E"]]:
    """Mean rows m_k and greedy centres u_k (formulas above), in the weight's precision."""
    joined, means, centres = _joined(weight, bias), [], []
    for part in ids.split(1024):
        taken = (part >= 0)[..., None]
        rows = joined[part.clamp(min=0)].float() * taken
        means.append(rows.sum(1) / taken.sum(1))
        norms = rows.norm(dim=-1, keepdim=True)
        centre = F.normalize((rows / norms.clamp(min=1e-12)).sum(1), dim=-1)
        centres.append(centre * norms.amax(1) if weighted else centre)
    return torch.cat(means).to(weight.dtype), torch.cat(centres).to(weight.dtype)


def _matrix(model: HeadModel) -> tuple[Float[Tensor, "V D"], Float[Tensor, "V"] | None]:
    head: Any = model.layout.unembedding
    if head is None or not model.is_causal:
        raise UnsupportedError(f"{type(model.plain).__name__} predicts no next tokens; give a causal language model.")
    return head.weight, getattr(head, "bias", None)


def _special_tokens(model: HeadModel) -> set[int]:
    """All special tokens of the tokenizer, the config and the generation config."""
    found = set(getattr(model.tokenizer, "all_special_ids", None) or [])
    for settings in (model.config, getattr(model.plain, "generation_config", None)):
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            value = getattr(settings, name, None)
            found |= set(value if isinstance(value, list) else [value])
    return {token for token in found if isinstance(token, int) and 0 <= token < len(_matrix(model)[0])}


def _fingerprint(source: HeadModel | Tensor) -> str:
    if isinstance(source, HeadModel):
        return source.fingerprint
    data = source.detach().cpu().contiguous()
    digest = hashlib.sha256(f"{tuple(data.shape)} {data.dtype}".encode())
    digest.update(data.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def held_out(head: FlashHead, text: ReadText) -> dict[str, Any]:
    """Shares of a text's states: where the greedy choice is the dense head's, and where the token that follows is scored."""
    agrees, holds = (head.needed(text.states, tokens) <= head.probes for tokens in (None, text.following))
    return {
        "states": len(text.states),
        "agreement": float(agrees.double().mean()),
        "holds the next token": float(holds.double().mean()),
    }
