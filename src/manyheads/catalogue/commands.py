"""What to type to try a method of the catalogue. A method without a line here is imported in Python."""

from __future__ import annotations

_EXPERIMENTS = {
    "lab run": {
        22: "weird-generalisation",
        23: "reversal",
        26: "autoregression",
        27: "initial-guess",
        44: "ngram-prose",
        48: "softmax-regression",
        51: "abrupt",
        54: "in-context-descent",
        73: "token-selection",
        80: "inductive-bias",
    },
    "predict run": {
        13: "llm-boost",
        19: "fourier",
        25: "head-tuning",
        38: "dual-head",
        42: "lp-ft",
        60: "prefer-to-classify",
        65: "flad",
        68: "careers",
        79: "dual-distillation",
        92: "ngrams",
        97: "hard-patches",
        100: "momentum",
        101: "projection-heads",
        105: "multi-tap",
        107: "confidence",
        124: "autoint",
    },
    "forecast try": {
        29: "autotcl",
        55: "vsformer",
        58: "cogdpm",
        69: "hiss",
        77: "teleconnection",
        81: "vessels",
        95: "sparse_advection",
    },
    "vision run": {
        103: "next-view",
        117: "distilled-images",
        118: "split-views",
    },
}
_FORECASTERS = {
    18: "gpht",
    39: "channel_clustering",
    49: "scientist",
    50: "olinear",
    52: "chronos2",
    56: "softs",
    72: "smetimes",
    85: "mhac",
    86: "tspulse",
    90: "time-llm",
    94: "autotimes",
}
_SHRINK = {16: "moh", 41: "shrp", 47: "duo", 53: "dha", 78: "splora", 84: "amp"}
_BEHAVIOURS = {4: "successor", 11: "retrieval", 14: "arithmetic", 75: "topic_effect", 113: "ships_direction"}

COMMANDS: dict[int, str] = {
    8: 'manyheads edit MODEL --goal "prefer context" --out obedient',
    9: 'manyheads trace MODEL "prompt" --method contextual',
    17: "manyheads atlas influence texts.jsonl --out scores.parquet",
    30: 'manyheads edit MODEL --goal "learn TASK" --out edit',
    32: "manyheads draft train MODEL --kind clover --out drafter",
    33: "manyheads draft train MODEL --kind chimera --out drafter",
    34: 'manyheads edit MODEL --goal "repair TASK"',
    57: 'manyheads edit MODEL --goal "inject TASK" --out edit',
    59: "manyheads draft train MODEL --kind hydra --out drafter",
    76: "manyheads forecast try tadpole",
    82: 'manyheads edit MODEL --goal "prefer memory" --out stubborn',
    88: "manyheads laws MODEL",
    89: "manyheads laws MODEL",
    110: "manyheads predict reward MODEL --pairs train.jsonl --out reward",
    **{number: f"manyheads {verb} {name}" for verb, names in _EXPERIMENTS.items() for number, name in names.items()},
    **{number: f"manyheads forecast FILE --horizon 24 --method {name}" for number, name in _FORECASTERS.items()},
    **{number: f"manyheads shrink MODEL --method {name}" for number, name in _SHRINK.items()},
    **{number: f"manyheads atlas MODEL --behaviours {name}" for number, name in _BEHAVIOURS.items()},
}
