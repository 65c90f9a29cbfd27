"""Numbers and folders that drafting is given are used or refused in a sentence: it ends, and gives out nothing stale."""

import json

import pytest
import torch
from architectures import opened
from typer.testing import CliRunner

import manyheads as mh
from manyheads.cli import app
from manyheads.draft.bench import Contender, bench
from manyheads.draft.core.decode import generate
from manyheads.draft.core.growth import BestFirst, Chain, Fixed
from manyheads.draft.core.tree import Ranks
from manyheads.draft.core.trees import best_ranks
from manyheads.draft.core.trunk import DraftTrunk
from manyheads.draft.drafters.chimera import Chimera
from manyheads.draft.drafters.medusa import Medusa
from manyheads.draft.drafters.prompt_lookup import PromptLookup
from manyheads.draft.files.saving import KINDS, load_drafter, save_drafter
from manyheads.draft.training.corpus import Corpus, frequent, from_texts, own_texts, sampled_and_greedy
from manyheads.draft.training.heads import Recipe
from manyheads.errors import InputError
from manyheads.training import TrainSettings

NAN, INF = float("nan"), float("inf")


def run(*args):
    return CliRunner().invoke(app, ["draft", *map(str, args)])


def words(result):
    return " ".join(result.output.split())


@pytest.mark.parametrize(
    "wrong",
    [
        {"minutes": -1.0},
        {"minutes": 0.0},
        {"minutes": NAN},
        {"minutes": INF},
        {"rate": NAN},
        {"rate": -1.0},
        {"rate": INF},
    ],
    ids=str,
)
def test_a_run_has_an_end_and_a_rate(wrong):
    with pytest.raises(InputError, match=next(iter(wrong))):
        TrainSettings(steps=3, **wrong)


@pytest.mark.parametrize(
    "wrong",
    [
        ["--steps", 0],
        ["--steps", -5],
        ["--minutes", -1],
        ["--minutes", "nan"],
        ["--rate", "nan"],
        ["--rate", -1],
        ["--teacher", "nan"],
        ["--data", "inf"],
        ["--teacher", 0],
        ["--threads", 100_000],
        ["--threads", 0],
        ["--heads", 3000],
        ["--length", 5000],
        ["--rows", 10**12],
        ["--seed", 2**70],
        ["--seed", -1],
    ],
    ids=str,
)
def test_training_options_out_of_range_end_at_once_and_write_nothing(wrong, tmp_path):
    steps = [] if "--minutes" in wrong or "--steps" in wrong else ["--steps", 1]
    result = run("train", "ladon", "--n", 10, "--out", tmp_path / "out", "--work", tmp_path / "work", *steps, *wrong)
    assert result.exit_code == 2 and "Traceback" not in result.output, result.output
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("tree", ["chain:99999", "best:1025", "0", "chain:" + "9" * 5000, "chain:-1", "bush"])
def test_trees_have_a_size(tree):
    result = run("generate", "ladon", "Monday", "--tree", tree, "--max-new-tokens", 2)
    assert result.exit_code == 2 and "1 to 1024" in words(result) and "Monday" not in words(result)
    for growth in (Chain, BestFirst, PromptLookup):
        with pytest.raises(InputError, match="1 to 1024"):
            growth(1025)
    with pytest.raises(InputError, match="1 to 1024"):
        best_ranks(torch.ones(2, 3), 1025)


def test_the_longest_chain_is_made_at_once():
    model, ids = opened("llama"), torch.arange(3, 13)[None]
    wanted = generate(model, PromptLookup(), ids, max_new_tokens=8, stop=[]).tokens
    assert generate(model, PromptLookup(1024), ids, max_new_tokens=8, stop=[]).tokens == wanted


@pytest.mark.parametrize("kind", KINDS)
def test_heads_are_counted_in_whole_numbers_and_not_by_the_thousand(kind):
    trunk = DraftTrunk(opened("llama"))
    for heads in (0, 3000, 2.5, "4", True, None):
        with pytest.raises(InputError, match="heads is"):
            KINDS[kind].build(trunk, heads=heads)
    with pytest.raises(InputError, match="distil"):
        Chimera(trunk, distil=NAN)
    for wrong in ({"data": NAN}, {"decay": INF}, {"noise": -1.0}):
        with pytest.raises(InputError, match=next(iter(wrong))):
            Recipe(**wrong)


def test_a_drafters_card_says_what_it_can_mean_or_is_refused(tmp_path):
    trunk = DraftTrunk(opened("llama"))
    save_drafter(Medusa(trunk, heads=2), trunk, tmp_path / "d", acceptance=torch.full((2, 3), 0.2))
    assert load_drafter(tmp_path / "d", trunk).tree(4).ranks.depth >= 1
    path = tmp_path / "d" / "head.json"
    card = json.loads(path.read_text())
    for change in (
        {"settings": card["settings"] | {"heads": 3000}},
        {"settings": card["settings"] | {"sparkle": 1}},
        {"settings": card["settings"] | {"vocabulary": ["x"]}},
        {"about": {"acceptance": [[0.1, 0.2], [0.3]]}},
        {"about": {"acceptance": [0.1]}},
        {"about": {"acceptance": [[0.1, NAN]]}},
        {"about": {"acceptance": "much"}},
    ):
        path.write_text(json.dumps(card | change))
        with pytest.raises(InputError):
            load_drafter(tmp_path / "d", trunk)


def test_texts_that_are_longer_than_the_model_are_refused_before_work(tmp_path):
    model = opened("llama")
    ids = torch.full((1, 120), 5)
    with pytest.raises(InputError, match="128 positions"):
        generate(model, PromptLookup(), ids, max_new_tokens=9)
    with pytest.raises(InputError, match="128 positions"):
        bench(model, [Contender("lookup", PromptLookup())], ids.tolist(), max_new_tokens=9)
    for make in (lambda: own_texts(model, 2, 129), lambda: from_texts(model, ["a"], 2, 129)):
        with pytest.raises(InputError, match="128 positions"):
            make()
    (tmp_path / "prompts.txt").write_text("red " * 5001)
    for arguments in (("generate", "ladon", "red " * 5001), ("bench", "ladon", "--prompts", tmp_path / "prompts.txt")):
        result = run(*arguments)
        assert result.exit_code == 2 and "positions; ask for fewer" in words(result)


@pytest.fixture(scope="module")
def worked(tmp_path_factory):
    """A work folder, the texts that went into it, and the options of the call that made it."""
    folder = tmp_path_factory.mktemp("work")
    (folder / "a.txt").write_text("\n".join(["Monday Tuesday Wednesday " * 40] * 40))
    (folder / "b.txt").write_text("\n".join(["red green blue one two " * 40] * 40))
    given = {"--texts": folder / "a.txt", "--kind": "medusa", "--heads": 1, "--n": 20, "--length": 16, "--steps": 2}
    given |= {"--rows": 2, "--vocabulary": 64, "--seed": 0, "--work": folder / "w"}
    made = run("train", "ladon", *(part for option in given.items() for part in option), "--out", folder / "first")
    assert made.exit_code == 0, made.output
    return folder, given


@pytest.mark.parametrize(
    "other",
    [
        {"--n": 24},
        {"--length": 20},
        {"--vocabulary": 2},
        {"--seed": 1},
        {"--steps": 3},
        {"--rate": 0.01},
        {"--heads": 2},
        {"--texts": "b.txt"},
        {"--texts": None},
        {"--data": 0.5},
    ],
    ids=str,
)
def test_a_work_folder_is_gone_on_with_by_the_same_call_only(worked, other):
    folder, given = worked
    other = {name: folder / value if value == "b.txt" else value for name, value in other.items()}
    options = [part for name, value in (given | other).items() if value is not None for part in (name, value)]
    result = run("train", "ladon", *options, "--out", folder / "other")
    assert result.exit_code == 2 and not (folder / "other").exists()
    assert "was not made of this request: other" in words(result) or "is not the work of this call" in words(result)


def test_the_same_call_gives_the_same_drafter_and_another_kind_may_share_its_texts(worked):
    folder, given = worked
    for name, more in (("again", {}), ("hydra", {"--kind": "hydra"})):
        options = [part for option in (given | more).items() for part in option]
        result = run("train", "ladon", *options, "--out", folder / name)
        assert result.exit_code == 0, result.output
    weights = [(folder / name / "head.safetensors").read_bytes() for name in ("first", "again", "hydra")]
    assert weights[0] == weights[1] != weights[2]
    (folder / "w" / "run-medusa" / "request.json").unlink()  # as folders of earlier versions are
    options = [part for option in given.items() for part in option]
    assert "is not the work of this call" in words(run("train", "ladon", *options, "--out", folder / "stale"))
    model = mh.open_model()
    assert load_drafter(folder / "again", DraftTrunk(model)).card.fingerprint == model.fingerprint


@pytest.mark.usefixtures("any_shape")
@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda m: own_texts(m, 0, 16), "at least one"),
        (lambda m: own_texts(m, 2, 1), "two tokens"),
        (lambda m: own_texts(m, 2, 8, temperature=NAN), "temperature"),
        (lambda m: own_texts(m, 2, 8, rows=0), "one row"),
        (lambda m: own_texts(m, 2, 8, prompts=[]), "give prompts"),
        (lambda m: own_texts(m, 2, 8, prompts=[[]]), "at least one row"),
        (lambda m: own_texts(m, 2, 8, prompts=[[61]]), "out of range"),
        (lambda m: sampled_and_greedy(m, 4, 8, greedy=NAN), "greedy is nan"),
        (lambda m: corpus_of(m).split(NAN), "cannot be split"),
        (lambda m: frequent(corpus_of(m), 0), "guesses nothing"),
        (lambda m: generate(m, PromptLookup(), torch.tensor([[5]]), max_new_tokens=2.5), "whole number"),
        (lambda m: generate(m, PromptLookup(), torch.tensor([[5]]), acceptance="some"), "lossless or typical"),
        (lambda m: generate(m, PromptLookup(), torch.tensor([[5]]), top_k=2.5), "top_k"),
        (lambda m: generate(m, PromptLookup(), torch.tensor([[5]]), temperature="hot"), "temperature"),
        (lambda m: generate(m, PromptLookup(), torch.tensor([[5]]), seed=2**70), "seed"),
        (lambda m: generate(m, PromptLookup(), {}), "input_ids"),
        (lambda m: drafted(m, Fixed([(0, 0, 0)])), "2 tokens ahead, and this tree is 3 deep"),
        (lambda m: drafted(m, Fixed([(61,)])), "beyond the 61 tokens"),
        (lambda m: Ranks.chain(10**6), "longer than 1024"),
        (lambda m: Chain(3, threshold=NAN), "threshold"),
        (lambda m: BestFirst(floor=NAN), "floor"),
        (lambda m: bench(m, [], [[5]], temperature=NAN), "temperature"),
        (lambda m: bench(m, [], [], repeats=1), "at least one of each"),
    ],
)
def test_numbers_that_mean_nothing_are_one_sentence(make, sentence):
    with pytest.raises(InputError, match=sentence):
        make(opened("llama"))


def corpus_of(model):
    ids = torch.full((4, 8), 5)
    return Corpus(ids, torch.ones_like(ids, dtype=torch.bool), model.fingerprint)


def drafted(model, growth):
    return generate(model, Medusa(DraftTrunk(model), heads=2), torch.tensor([[5]]), growth=growth, max_new_tokens=4)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--tree", "chain:99999"], "the tree 'chain:99999' is none of"),
        (["--tree", "16"], "there is no --drafter"),
    ],
)
def test_bench_refuses_a_tree_that_it_would_not_use(arguments, said):
    ran = CliRunner().invoke(app, ["draft", "bench", "ladon", *arguments])
    assert ran.exit_code == 2 and said in ran.stderr


@pytest.mark.parametrize("command", [["train", "ladon", "--steps", "1", "--texts"], ["bench", "ladon", "--prompts"]])
def test_what_is_read_is_not_written_over(command, tmp_path):
    texts = tmp_path / "texts.txt"
    texts.write_text("Monday Tuesday\n")
    ran = CliRunner().invoke(app, ["draft", *command, str(texts), "--out", str(texts), "--force"])
    assert ran.exit_code == 2 and "would be lost" in ran.stderr and texts.read_text() == "Monday Tuesday\n"
