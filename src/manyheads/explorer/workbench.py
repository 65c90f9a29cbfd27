"""The workbench behind the page: one opened model, and what can be asked of it. Each answer is plain JSON.

Prompts have a bound in tokens, which the model's own positions may lower. Nothing is changed for good: edits last for one job.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from manyheads.atlas.core.registry import behaviours as registered
from manyheads.atlas.core.result import Atlas
from manyheads.atlas.surveys.run import survey
from manyheads.draft.core.decode import rounds
from manyheads.draft.core.drafter import Drafter
from manyheads.draft.drafters.prompt_lookup import PromptLookup
from manyheads.errors import InputError
from manyheads.explorer import asking
from manyheads.explorer.on_heads import head_features, moving_documents, promoted, shown_tokens
from manyheads.explorer.overview import numbers, pattern_numbers, score_series
from manyheads.heads import Head
from manyheads.model.editing.edits import Edit, Scale
from manyheads.model.editing.head_edit import HeadEdit
from manyheads.model.headmodel import HeadModel
from manyheads.model.reading.readers import ReadAttention
from manyheads.model.replay.recording import only_last
from manyheads.progress import Bar
from manyheads.report.numbers import visible
from manyheads.trace.explanation import explain
from manyheads.trace.positions.attention_score import attention_score
from manyheads.trace.sae.autoencoder import AttentionSae

TOKENS = 512  # of a prompt
NEXT = 20  # next tokens shown


@dataclass(eq=False)
class Workbench:
    """What the explorer knows: the model, a drafter for the decoding view (None: copying from the text itself), edits by name.

    `saes` are trained autoencoders by layer, `texts` the documents to look through for what a head does (none: bundled prose).
    """

    model: HeadModel
    name: str
    drafter: Drafter | None = None
    drafted_by: str = "prompt lookup, which copies what followed the same words before"
    edits: dict[str, HeadEdit] = field(default_factory=dict)
    saes: dict[int, AttentionSae] = field(default_factory=dict)
    texts: Sequence[str] = ()
    _answers: dict[type, Callable[[Any, Bar], Any]] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if self.model.tokenizer is None:
            raise InputError(f"{self.name} has no tokenizer, and the explorer shows texts; open a model that has one.")
        self._answers = {
            asking.Predict: self._predict,
            asking.Explain: self._explain,
            asking.LookAt: self._pattern,
            asking.WhyThere: self._why,
            asking.Promotes: self._promotes,
            asking.Carries: self._features,
            asking.Documents: self._documents,
            asking.Rewrite: self._rewrite,
            asking.Decode: self._decode,
            asking.Measure: self._measure,
        }

    @property
    def about(self) -> dict[str, Any]:
        """What the model is, for the page's head."""
        model = self.model
        return {
            "name": self.name,
            "layers": model.n_layers,
            "heads": model.n_heads,
            "kv_heads": model.n_kv_heads,
            "head_dim": model.head_dim,
            "parameters": sum(p.numel() for p in model.plain.parameters()),
            "fingerprint": model.fingerprint,
            "tokens": self.most_tokens,
            "saes": sorted(self.saes),
            "edits": [{"name": name, "says": str(edit)} for name, edit in self.edits.items()],
            "behaviours": [
                {"name": name, "title": one.about.title, "kind": one.about.kind} for name, one in registered().items()
            ],
        }

    @property
    def most_tokens(self) -> int:
        """The longest prompt, in tokens."""
        known = getattr(self.model.config, "max_position_embeddings", None)
        return min(
            TOKENS, known - asking.NEW_TOKENS if isinstance(known, int) and known > 2 * asking.NEW_TOKENS else TOKENS
        )

    def answer(self, asked: asking.Asked, bar: Bar = Bar()) -> Any:
        """The answer to one question. `InputError` for a prompt that is too long or a head that is not there."""
        for one in [getattr(asked, "head", None), *(s.head for s in getattr(asked, "scales", ()))]:
            if one is not None:
                self.model.head_set([one])
        return self._answers[type(asked)](asked, bar)

    def recipe(self, asked: asking.DeskScales) -> bytes:
        """The scales as a zip of a head edit's two files, for `manyheads edit bake`."""
        edit = HeadEdit.of(self.model, _edits(asked.scales), method="scale", found="by hand, in the explorer")
        packed = io.BytesIO()
        with TemporaryDirectory() as folder, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
            for file in sorted(edit.save(Path(folder) / "edit").iterdir()):
                archive.write(file, f"edit/{file.name}")
            archive.writestr(
                "edit/README.txt",
                "A head edit of manyheads. Fold it into an ordinary checkpoint with\n\n"
                "    manyheads edit bake MODEL edit --out edited\n",
            )
        return packed.getvalue()

    # Answers

    def _ids(self, prompt: str) -> Tensor:
        ids: Tensor = self.model.inputs(prompt)["input_ids"]
        if not ids.numel():
            raise InputError("the prompt has no tokens; write something.")
        if ids.shape[1] > self.most_tokens:
            raise InputError(f"the prompt has {ids.shape[1]} tokens; the explorer reads {self.most_tokens} at most.")
        return ids

    def _texts(self, ids: Sequence[int]) -> list[str]:
        return shown_tokens(self.model, ids)

    def _predict(self, asked: asking.Predict, bar: Bar) -> dict[str, Any]:
        ids = self._ids(asked.prompt)
        return {"tokens": self._texts(ids[0].tolist()), "next": self._next(ids)}

    def _next(self, ids: Tensor) -> list[dict[str, Any]]:
        """The most likely next tokens: text, probability."""
        p = self.model.logits(ids, **only_last(self.model.plain, 1))[0, -1].double().softmax(-1)
        best = p.topk(min(NEXT, len(p)))
        texts = self.model.tokenizer.batch_decode([[i] for i in best.indices.tolist()])
        return [
            {"token": text, "shown": visible(text), "p": float(f"{q:.4g}")}
            for text, q in zip(texts, best.values.tolist(), strict=True)
        ]

    def _explain(self, asked: asking.Explain, bar: Bar) -> dict[str, Any]:
        self._ids(asked.prompt)
        found = explain(self.model, asked.prompt, asked.answer or None, asked.against or None)
        mlps = {name: score for name, score in found.circuit.nodes.items() if name[0] == "M"}
        return {
            "tokens": [visible(token) for token in found.tokens],
            "answer": found.answer,
            "against": found.against,
            "difference": found.difference,
            "probability": found.probability,
            "heads": numbers(found.heads.values),
            "mlps": [mlps.get(f"M{layer}") for layer in range(self.model.n_layers)],
            "constants": dict(found.constants),
            "sources": {head: numbers(values) for head, values in found.sources.items()},
        }

    def _pattern(self, asked: asking.LookAt, bar: Bar) -> dict[str, Any]:
        ids, head = self._ids(asked.prompt), Head.parse(asked.head)
        kept: list[Float[np.ndarray, "T T"]] = []
        reader = ReadAttention(
            lambda call: kept.append(call.pattern[0, head.index].detach().float().cpu().numpy()), layers=[head.layer]
        )
        self.model.look(ids, reader)
        return {"head": asked.head, "tokens": self._texts(ids[0].tolist()), "weights": pattern_numbers(kept[0])}

    def _why(self, asked: asking.WhyThere, bar: Bar) -> dict[str, Any]:
        ids = self._ids(asked.prompt)
        found = attention_score(self.model, ids, asked.head, asked.query, asked.key)
        pairs = found.to_frame().head(40)
        return {
            "head": asked.head,
            "query": found.query,
            "key": found.key,
            "score": found.score,
            "bias": found.bias,
            "weight": found.weight,
            "softcap": found.softcap,
            "parts": list(found.parts),
            "by_query": numbers(np.array(list(found.by_query.values()))),
            "by_key": numbers(np.array(list(found.by_key.values()))),
            "pairs": [[row.query, row.key, row.share] for row in pairs.itertuples()],
        }

    def _promotes(self, asked: asking.Promotes, bar: Bar) -> dict[str, Any]:
        return {
            "head": asked.head,
            "rows": promoted(self.model, Head.parse(asked.head), self._ids(asked.prompt)[0], bar),
        }

    def _features(self, asked: asking.Carries, bar: Bar) -> dict[str, Any]:
        head, ids = Head.parse(asked.head), self._ids(asked.prompt)
        sae = self.saes.get(head.layer)
        if sae is None:
            raise InputError(f"no autoencoder of layer {head.layer} was given (--sae FOLDER).")
        return {"head": asked.head, "rows": head_features(self.model, sae, head, ids)}

    def _documents(self, asked: asking.Documents, bar: Bar) -> dict[str, Any]:
        return {
            "head": asked.head,
            "rows": moving_documents(self.model, self.texts or None, Head.parse(asked.head), bar),
        }

    def _rewrite(self, asked: asking.Rewrite, bar: Bar) -> dict[str, Any]:
        ids = self._ids(asked.prompt)
        edits = [*_edits(asked.scales), *self._on_desk(asked.edits, ids.shape[1])]
        if not edits:
            raise InputError("nothing is on the desk; scale a head or take an edit.")
        before = {"next": self._next(ids), "text": self._written(asked, bar)}
        with self.model.editing(*edits):
            after = {"next": self._next(ids), "text": self._written(asked, bar)}
        return {"before": before, "after": after, "shift": self._shift(ids, edits)}

    def _on_desk(self, chosen: Sequence[asking.OnDesk], length: int) -> list[Edit]:
        unknown = [one.name for one in chosen if one.name not in self.edits]
        if unknown:
            raise InputError(
                f"no edit {unknown[0]!r} was given (--edit FOLDER); there are: {', '.join(self.edits) or 'none'}."
            )
        found = [self.edits[one.name].at_strength(one.strength).edits(prompt_length=length) for one in chosen]
        return [edit for edits in found for edit in edits]

    def _shift(self, ids: Tensor, edits: Sequence[Edit]) -> float:
        """How far the next token's distribution moved: total variation, in [0, 1]."""
        before = self.model.logits(ids)[0, -1].double().softmax(-1)
        with self.model.editing(*edits):
            after = self.model.logits(ids)[0, -1].double().softmax(-1)
        return float((before - after).abs().sum() / 2)

    def _written(self, asked: asking.Rewrite, bar: Bar) -> str:
        step = bar.step("writing", asked.new_tokens)
        text = self.model.generate(
            asked.prompt, max_new_tokens=asked.new_tokens, do_sample=False, stopping_criteria=[_Counting(step)]
        )
        return str(text)

    def _decode(self, asked: asking.Decode, bar: Bar) -> dict[str, Any]:
        self._ids(asked.prompt)
        step = bar.step("writing", asked.new_tokens)
        passes: list[list[str]] = []
        sent = 0
        last = None
        drafter = self.drafter or PromptLookup()
        for last in rounds(
            self.model, drafter, asked.prompt, growth=None, max_new_tokens=asked.new_tokens, temperature=0.0
        ):
            new = last.tokens[0][sent:]
            sent += len(new)
            passes.append([self.model.tokenizer.decode([i]) for i in new])
            step(len(new))
        assert last is not None
        return {"passes": passes, "tokens_a_pass": last.tally.tokens_a_pass, "drafter": self.drafted_by}

    def _measure(self, asked: asking.Measure, bar: Bar) -> dict[str, Any]:
        found: Atlas = survey(self.model, [asked.behaviour], n=16, checks=False, bar=bar)
        if asked.behaviour not in found.scores:
            raise InputError(
                f"{asked.behaviour} cannot be scored here: {found.skipped.get(asked.behaviour, 'no reason given')}."
            )
        return score_series(found, asked.behaviour)


def _edits(scales: Sequence[asking.Scaling]) -> list[Edit]:
    """One edit a scale. The last word on a head counts."""
    last: Mapping[str, float] = {one.head: one.scale for one in scales}
    by_scale: dict[float, list[str]] = {}
    for head, scale in last.items():
        by_scale.setdefault(scale, []).append(head)
    return [Scale(heads, scale) for scale, heads in by_scale.items()]


class _Counting:
    """A stopping criterion that never stops by itself: it counts tokens, and lets a cancelled job end."""

    def __init__(self, bar: Bar) -> None:
        self.bar = bar

    def __call__(self, ids: Tensor, scores: Any, **_: Any) -> Tensor:
        self.bar(1)
        return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
