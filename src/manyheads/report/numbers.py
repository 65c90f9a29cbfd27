"""Numbers and tokens as a reader sees them. A number that does not exist (NaN) is written n/a."""

from __future__ import annotations

import math

_SHOWN = {" ": "·", "\n": "⏎", "\r": "␍", "\t": "⇥", "Ġ": "·", "Ċ": "⏎", "▁": "·"}


def number(value: float, decimals: int = 2) -> str:
    """`value` with a proper minus sign: `number(-0.5) == "−0.50"`."""
    if not math.isfinite(value):
        return "n/a" if math.isnan(value) else "∞" if value > 0 else "−∞"
    text = f"{value:.{decimals}f}" if abs(value) < 1e4 else f"{value:,.0f}"
    return text.replace("-", "−") if text.strip("-0.") else text.lstrip("-")


def or_dash(value: float) -> str:
    """`value`, or a dash where it is not defined (NaN)."""
    return "–" if math.isnan(value) else number(value)


def plus_minus(value: float, error: float, *, exact: bool = False) -> str:
    """`value ± error`, with as many decimals as the error deserves; only `value` where it is `exact`."""
    if exact or not math.isfinite(value):
        return number(value)
    decimals = 2 if not 0 < error < 0.01 else 3
    return f"{number(value, decimals)} ± {number(error, decimals)}"


def brief(value: float) -> str:
    """`value` for a small cell: `.83`, `−.4`, `1.0`, `12`."""
    if not math.isfinite(value):
        return "–"
    if abs(value) >= 9.95:
        return number(value, 0)
    text = number(value, 1 if abs(value) >= 0.995 else 2)
    return text.replace("0.", ".", 1) if abs(value) < 0.995 else text


def format_p(p: float) -> str:
    """`0.048`, or `< 0.001`."""
    return "< 0.001" if p < 0.001 else number(p, 3 if p < 0.1 else 2)


def p_equals(p: float, letter: str = "p") -> str:
    """`p = 0.048`, or `p < 0.001`, never broken over two lines."""
    return f"{letter} {'' if p < 0.001 else '= '}{format_p(p)}".replace(" ", "\N{NO-BREAK SPACE}")


def count(n: int, singular: str, plural: str = "") -> str:
    """`1 head`, `2 heads`, `5,120 examples`."""
    return f"{n:,} {singular if n == 1 else plural or singular + 's'}"


def visible(token: str) -> str:
    """A token with its spaces and line breaks made visible, and nothing in it that could disturb the text around it."""
    shown = (_SHOWN.get(c) or (c if c.isprintable() else f"\\u{{{ord(c):x}}}") for c in token)
    return "".join(shown) or "∅"
