"""Drafters as files, in our layout and in others'; and the commands."""

import json
import re

import pytest
import torch
from architectures import opened
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F
from typer.testing import CliRunner

import manyheads as mh
from manyheads.cli import app
from manyheads.draft.core.trunk import DraftTrunk
from manyheads.draft.drafters.hydra import Hydra
from manyheads.draft.drafters.medusa import Medusa
from manyheads.draft.files.exchange import export_hydra, export_medusa, import_hydra, import_medusa
from manyheads.draft.files.saving import KINDS, load_drafter, save_drafter
from manyheads.draft.training.corpus import trunk_states
from manyheads.errors import InputError, MismatchError, UnsupportedError

IDS = torch.randint(3, 61, (2, 9), generator=torch.Generator().manual_seed(0))


def far(drafter, noise=0.2):
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in drafter.parameters():
            weight.add_(noise * torch.randn_like(weight))
    return drafter.eval()


def said(trunk, drafter):
    with torch.no_grad():
        return drafter.teacher_forced(trunk, trunk_states(trunk.model, IDS)[0], IDS)


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize(("kind", "words"), [*((kind, None) for kind in KINDS), ("medusa", [5, 9]), ("hydra", [5, 9])])
def test_a_saved_drafter_says_the_same(kind, words, tmp_path):
    trunk = DraftTrunk(opened("llama"))
    drafter = far(KINDS[kind].build(trunk, heads=3, **({} if words is None else {"vocabulary": words})))
    measured = torch.tensor([[0.6, 0.2], [0.5, 0.1], [0.3, 0.3]], dtype=torch.double)
    save_drafter(drafter, trunk, tmp_path / "d", acceptance=measured)
    back = load_drafter(tmp_path / "d", trunk)
    assert same(said(trunk, drafter), said(trunk, back.drafter))
    assert torch.equal(back.acceptance, measured) and len(back.tree(5).ranks) == 5
    assert {path.name for path in (tmp_path / "d").iterdir()} == {"head.json", "head.safetensors"}
    with pytest.raises(InputError):
        save_drafter(drafter, trunk, tmp_path / "d")


def test_a_drafter_is_refused_beside_another_model(tmp_path):
    trunk, other = DraftTrunk(opened("llama")), DraftTrunk(opened("qwen2"))
    save_drafter(Medusa(trunk, heads=2), trunk, tmp_path / "d")
    with pytest.raises(MismatchError, match="learned beside"):
        load_drafter(tmp_path / "d", other)
    assert load_drafter(tmp_path / "d", other, force=True).card.kind == "medusa"
    with pytest.raises(MismatchError, match="does not fit"):
        load_drafter(tmp_path / "d", DraftTrunk(mh.open_model()), force=True)
    with pytest.raises(InputError, match="no drafter"):
        load_drafter(tmp_path / "nothing", trunk)


class VllmBlock(nn.Module):
    """What vLLM computes with the layout: all layers of a head in turn, SiLU added to the residual."""

    def __init__(self, tensors, head, layers):
        super().__init__()
        name = f"blocks.{head}.layers."
        self.layers = [(tensors[f"{name}{i}.weight"], tensors[f"{name}{i}.bias"]) for i in range(layers)]

    def forward(self, x):
        for weight, bias in self.layers:
            x = x + F.silu(F.linear(x, weight, bias))
        return x


@pytest.mark.parametrize(("own", "words"), [(True, None), (False, None), (True, [4, 7, 8, 20, 33])])
def test_medusa_heads_in_vllms_layout_compute_the_same_there_and_come_back(own, words, tmp_path):
    trunk = DraftTrunk(opened("llama"))
    drafter = far(Medusa(trunk, heads=3, layers=2, own_readout=own, vocabulary=words))
    export_medusa(drafter, trunk, tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    tensors = load_file(tmp_path / "m" / "model.safetensors")
    assert (
        config["architectures"] == ["MedusaModel"]
        and config["medusa_fc_bias"]
        and config["original_lm_head"] is not own
    )
    assert config["num_heads"] == 3 and config["num_hidden_layers"] == 2 and config["vocab_size"] == 61
    assert config["truncated_vocab_size"] == (61 if words is None else 5)
    assert ("token_map" in tensors) is (words is not None) and (not words or tensors["token_map"].tolist() == words)
    hidden = trunk_states(trunk.model, IDS)[0]
    for k, ours in enumerate(said(trunk, drafter)):
        readout = tensors[f"lm_heads.{k if own else 0}.weight"]
        theirs = F.linear(VllmBlock(tensors, k, 2)(hidden[:, : 7 - k]), readout)
        assert torch.allclose(ours, theirs, atol=1e-5)
    back = import_medusa(tmp_path / "m", trunk)
    assert same(said(trunk, drafter), said(trunk, back)) and back.settings == drafter.settings
    if words is not None:  # vLLM picks the rows itself where all are there
        whole = {f"lm_heads.{k}.weight": torch.zeros(61, trunk.width) for k in range(3)}
        for k in range(3):
            whole[f"lm_heads.{k}.weight"][words] = tensors[f"lm_heads.{k}.weight"]
        save_file(tensors | whole, tmp_path / "m" / "model.safetensors")
        assert same(said(trunk, drafter), said(trunk, import_medusa(tmp_path / "m", trunk)))


def published_hydra(tensors, hidden, ids, embed, heads, layers, prefix):
    """The published modules' arithmetic, from their names alone; `hidden` is what the prefix layer made, if there is one."""
    out = []
    for k in range(heads):
        end = ids.shape[1] - 2 - k
        y = torch.cat([hidden[:, :end], *(embed[ids[:, 1 + j : 1 + j + end]] for j in range(k + 1))], -1)
        for place in range(layers):
            name = f"hydra_mlp.{k}.{2 * place + 1 if prefix else place}."
            residual = y
            if place == 0:
                residual = F.linear(y, tensors[name + "res_connection.weight"], tensors[name + "res_connection.bias"])
            y = residual + F.silu(F.linear(y, tensors[name + "linear.weight"], tensors[name + "linear.bias"]))
        head = f"hydra_lm_head.{k}." + ("1." if prefix else "")
        out.append(F.linear(y, tensors[head + "weight"], tensors[head + "bias"]))
    return out


@pytest.mark.parametrize("prefix", [True, False])
def test_hydra_heads_under_the_published_names_compute_the_same_there_and_come_back(prefix, tmp_path):
    trunk = DraftTrunk(opened("llama"))
    drafter = far(Hydra(trunk, heads=3, layers=3, prefix=prefix))
    export_hydra(drafter, trunk, tmp_path / "h")
    tensors = load_file(tmp_path / "h" / "hydra_lm_head.safetensors")
    if prefix:
        layer = {name for name in tensors if name.startswith("prefix_embeding_layer.layers.0.")}
        assert len(layer) == 9 and "prefix_embeding_layer.norm.weight" in tensors
    hidden = trunk_states(trunk.model, IDS)[0]
    with torch.no_grad():
        known = drafter.prefix(hidden) if prefix else hidden
        theirs = published_hydra(tensors, known, IDS, trunk.embed(torch.arange(61)), 3, 3, prefix)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(said(trunk, drafter), theirs, strict=True))
    assert same(said(trunk, drafter), said(trunk, import_hydra(tmp_path / "h", trunk)))


def test_a_published_checkpoint_whose_blocks_are_one_module_is_read_with_blocks_of_their_own(tmp_path):
    """`[block] * n` in the published code: the same tensor under every place."""
    trunk = DraftTrunk(opened("llama"))
    drafter = far(Hydra(trunk, heads=2, layers=4, prefix=True))
    export_hydra(drafter, trunk, tmp_path / "h")
    file = tmp_path / "h" / "hydra_lm_head.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    for name in list(tensors):
        if found := re.fullmatch(r"(hydra_mlp\.\d+)\.[57]\.linear\.(\w+)", name):
            tensors[name] = tensors[f"{found[1]}.3.linear.{found[2]}"].clone()
    save_file(tensors, file)
    back = import_hydra(tmp_path / "h", trunk)
    blocks = [block.linear.weight for block in back.blocks[0]]
    assert torch.equal(blocks[0], blocks[2]) and blocks[0].data_ptr() != blocks[2].data_ptr()


def test_pickles_are_not_read_and_what_has_no_published_form_is_not_written(tmp_path):
    trunk = DraftTrunk(opened("llama"))
    (tmp_path / "hydra_lm_head.pt").write_bytes(b"")
    with pytest.raises(InputError, match="pickle"):
        import_hydra(tmp_path, trunk)
    for settings in ({"own_readout": False}, {"vocabulary": [3, 4]}):
        with pytest.raises(UnsupportedError, match="own_readout"):
            export_hydra(Hydra(trunk, **settings), trunk, tmp_path / "h")


# The commands


def run(*args):
    return CliRunner().invoke(app, ["draft", *map(str, args)])


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("drafts")
    small = [
        "--n",
        12,
        "--length",
        24,
        "--steps",
        3,
        "--rows",
        4,
        "--heads",
        2,
        "--through-stops",
        "--work",
        folder / "work",
    ]
    made = run("train", "ladon", "--kind", "medusa", "--out", folder / "medusa", "--vllm", folder / "vllm", *small)
    assert made.exit_code == 0, made.output
    return folder, made.output, small


def test_train_writes_a_drafter_and_vllms_layout(trained):
    folder, output, small = trained
    assert "best guess" in output and "After" not in output
    assert (folder / "medusa" / "head.json").is_file() and (folder / "vllm" / "config.json").is_file()
    assert (folder / "work" / "corpus" / "corpus.safetensors").is_file()
    again = run("train", "ladon", "--kind", "medusa", "--out", folder / "medusa", *small)
    assert again.exit_code == 2
    wrong = run("train", "ladon", "--kind", "eagle", "--out", folder / "x", "--vllm", folder / "y", *small)
    assert wrong.exit_code == 2


def test_generate_writes_the_models_own_texts(trained):
    folder = trained[0]
    model = mh.open_model()
    prompt = "Q: What is 12 plus 5? A:"
    ids = model.inputs(prompt)["input_ids"]
    own = model.module.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
    text = model.tokenizer.decode(own[0, ids.shape[1] :], skip_special_tokens=True)
    for more in (["--drafter", folder / "medusa", "--tree", "chain:2"], ["--drafter", folder / "medusa"], []):
        said = run("generate", "ladon", prompt, "--max-new-tokens", 12, *more)
        assert said.exit_code == 0, said.output
        assert text.strip() in said.output and "a pass" in said.output


def test_heads_of_frequent_tokens_are_trained_in_bfloat16_and_write_beside_lookup(trained, tmp_path):
    small = trained[2]
    made = run("train", "ladon", "--kind", "hydra++", "--vocabulary", 64, "--bf16", "--out", tmp_path / "h", *small)
    assert made.exit_code == 0, made.output
    settings = json.loads((tmp_path / "h" / "head.json").read_text())["settings"]
    words = load_drafter(tmp_path / "h", DraftTrunk(mh.open_model())).drafter.vocabulary
    assert settings["layers"] == 4 and settings["vocabulary"] == words.tolist() and len(words) == 64
    start = ("generate", "ladon", "red green red green red", "--max-new-tokens", 12)
    heads = ("--drafter", tmp_path / "h")
    said = [run(*start), run(*start, *heads), run(*start, *heads, "--lookup")]
    words = [re.search(r"red green red.*\n", shown.output)[0] for shown in said]
    assert len(set(words)) == 1 and all("a pass" in shown.output for shown in said)
    for wrong in (["--kind", "eagle"], ["--kind", "hydra", "--published", tmp_path / "p"]):
        refused = run("train", "ladon", "--vocabulary", 64, "--out", tmp_path / "x", *wrong, *small)
        assert refused.exit_code == 2 and "leave" in refused.output


def test_bench_prints_one_table_and_writes_a_page(trained, tmp_path):
    folder = trained[0]
    shown = run(
        *("bench", "ladon", "--drafter", folder / "medusa", "--tree", "chain:2", "--tree", "best:4", "--n", 1),
        *("--max-new-tokens", 8, "--repeats", 1, "--lookup", "--out", tmp_path / "b"),
    )
    assert shown.exit_code == 0, shown.output
    rows = {row["name"]: row for row in json.loads((tmp_path / "b" / "bench.json").read_text())}
    assert {"generate", "prompt lookup", "medusa, chain:2", "medusa, best:4", "medusa, best:4, lookup"} <= set(rows)
    assert all(row["same"] in (None, 1.0) for row in rows.values())
    assert "How far guesses are accepted" in (tmp_path / "b" / "bench.html").read_text()
    wrong = run("bench", "ladon", "--drafter", folder / "medusa", "--tree", "bush")
    assert wrong.exit_code == 2


@pytest.mark.parametrize("kind", ["medusa", "hydra"])
def test_damaged_heads_of_other_programs_are_one_sentence(kind, tmp_path):
    trunk = DraftTrunk(opened("llama"))
    drafter = KINDS[kind].build(trunk, heads=2)
    export, read = (export_medusa, import_medusa) if kind == "medusa" else (export_hydra, import_hydra)
    folder = export(drafter, trunk, tmp_path / kind)
    file = next(folder.glob("*.safetensors"))
    config, weights = (folder / "config.json").read_bytes(), file.read_bytes()
    count = "num_heads" if kind == "medusa" else "hydra_num_heads"
    for change in ({count: 3000}, {count: "two"}, {count: None}, {count: 3}, {"hydra_head_arch": [1]}):
        if "arch" not in next(iter(change)) or kind == "hydra":
            (folder / "config.json").write_text(json.dumps(json.loads(config) | change))
            with pytest.raises((InputError, MismatchError, UnsupportedError)):
                read(folder, trunk)
    for broken in (b"", b"{", b"[]", b"[" * 100_000, b"{}", b"\xff"):
        (folder / "config.json").write_bytes(broken)
        with pytest.raises((InputError, UnsupportedError)):
            read(folder, trunk)
    (folder / "config.json").write_bytes(config)
    for broken in (b"", weights[:9], weights[: len(weights) // 2], b"\xff" * 64):
        file.write_bytes(broken)
        with pytest.raises(InputError):
            read(folder, trunk)
