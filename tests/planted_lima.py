"""Black boxes over subsets whose best regions are known, and LiMA's search once more, as plainly as it can be said."""

import numpy as np
import torch


def planted(seed, m=30):
    """Two groups of 4 regions, of which one suffices, 6 interchangeable helpers, 6 harmful regions, the rest without effect."""
    roles = np.random.default_rng(seed).permutation(m)
    groups, helpers, harmful = (roles[:4], roles[4:8]), roles[8:14], roles[14:20]

    def probabilities(subsets):
        shown = subsets.numpy().astype(float)
        e = np.maximum(*[shown[:, group].mean(1) for group in groups]) ** 1.5
        d = 0.35 * shown[:, helpers].max(1)
        harm = -0.12 * shown[:, harmful].sum(1)
        p = 1 / (1 + np.exp(-8 * (e + d * (1 - e) + harm - 0.55)))
        return torch.from_numpy(np.stack([p, 1 - p], 1))

    return probabilities, {"groups": [set(g.tolist()) for g in groups], "harmful": set(harmful.tolist())}


def additive(m, seed=0):
    """Three classes whose logits are sums over the regions, no two alike."""
    weights = torch.from_numpy(np.random.default_rng(seed).normal(size=(m, 3)))
    return (lambda subsets: (subsets.double() @ weights).softmax(-1)), weights


def crossed(m, seed=0):
    """Four classes whose logits are quadratic in the regions: they help and hinder each other."""
    rng = np.random.default_rng(seed)
    pairs = torch.from_numpy(rng.normal(size=(4, m, m)) / m**0.5)
    return lambda subsets: torch.einsum("ni,cij,nj->nc", subsets.double(), pairs, subsets.double()).softmax(-1)


def search_by_hand(probabilities, m, target, weights, q, distance=None):
    """`(ranking, forward passes)`, one subset at a time."""
    passes = 0

    def p(subset):
        nonlocal passes
        passes += 1
        row = torch.zeros(1, m, dtype=torch.bool)
        row[0, list(subset)] = True
        return probabilities(row)[0].numpy()

    def effectiveness(subset):
        if distance is None or len(subset) < 2:
            return 0.0
        return sum(min(distance[i, j] for j in subset if j != i) for i in subset)

    def parts(subset):
        shown, left = p(subset), p([r for r in range(m) if r not in subset])
        confidence = 1 + sum(x * np.log(x) for x in shown if x > 0) / np.log(len(shown))
        return shown[target], 1 - left[target], confidence

    def total(known, subset):
        return float(np.dot(weights, [*known, effectiveness(subset)]))

    front, back, rest = [], [], list(range(m))
    while rest:
        if len(rest) == 1:
            front.append(rest.pop())
            break
        known = {r: parts([*front, r]) for r in rest}
        best = max(rest, key=lambda r: total(known[r], [*front, r]))
        if len(rest) > q:
            low = sorted(rest, key=lambda r: total(known[r], [*back, r]))[:q]
            worst = {r: total(parts([*back, r]), [*back, r]) for r in low if r != best}
            if worst:
                back.append(min(worst, key=worst.get))
                rest.remove(back[-1])
        front.append(best)
        rest.remove(best)
    return front + back[::-1], passes
