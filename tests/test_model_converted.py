"""Models whose layers were rebuilt are ordinary folders: they open again, by us and by plain Transformers."""

import json
import subprocess
import sys

import pytest
import torch
import transformers as tf
from architectures import build, inputs_for, opened
from torch import nn
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import manyheads as mh
from manyheads.errors import InputError, UnsupportedError
from manyheads.model.weights import registering
from manyheads.model.weights.converted import conversion, conversions_of, converted, submodule


class Gained(nn.Module):
    """A module whose output is multiplied by learned numbers, which begin at one."""

    def __init__(self, inner, width):
        super().__init__()
        self.inner = inner
        self.gain = nn.Parameter(torch.ones(width))

    def forward(self, *args, **kwargs):
        return self.inner(*args, **kwargs) * self.gain


@conversion("gained")
def install(module, settings):
    for path in settings["paths"]:
        owner, _, name = path.rpartition(".")
        inner = submodule(module, path)
        setattr(submodule(module, owner), name, Gained(inner, settings["width"]))


def gained(model):
    """`model` with the MLPs of its first two layers converted, and their gains no longer one."""
    names = {id(part): name for name, part in model.plain.named_modules()}
    paths = [names[id(block.mlp_write)] for block in model.layout.blocks[:2]]
    made = converted(model, "gained", {"paths": paths, "width": model.layout.hidden_size})
    return made, [submodule(made.plain, path) for path in paths]


def moved(gains):
    with torch.no_grad():
        for one in gains:
            one.gain.copy_(torch.linspace(0.5, 2, len(one.gain)))


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma3", "gpt2", "mixtral", "qwen3_moe", "opt", "bert"])
def test_a_converted_model_is_the_same_and_opens_again_as_it_was_saved(name, tmp_path):
    model, inputs = opened(name), inputs_for(name)
    before, kind = model.fingerprint, type(model.plain)
    made, gains = gained(model)
    assert torch.equal(made.logits(inputs), model.logits(inputs))
    assert (model.fingerprint, type(model.plain)) == (before, kind) and not hasattr(model.config, "manyheads")
    moved(gains)
    wanted = made.logits(inputs)
    assert not torch.allclose(wanted, model.logits(inputs))
    made.save_pretrained(tmp_path / "m")
    again = mh.open_model(tmp_path / "m")
    assert torch.equal(again.logits(inputs), wanted) and again.fingerprint == made.fingerprint
    auto = tf.AutoModelForMaskedLM if name == "bert" else tf.AutoModelForCausalLM
    plain, info = auto.from_pretrained(tmp_path / "m", output_loading_info=True)
    assert isinstance(plain, kind) and not info["missing_keys"] and not info["unexpected_keys"]
    with torch.no_grad():
        assert torch.equal(plain.eval()(**inputs).logits, wanted)


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_the_trunk_alone_and_a_classifier_on_it_are_converted_once(name, tmp_path):
    made, gains = gained(opened(name))
    moved(gains)
    made.save_pretrained(tmp_path / "m")
    whole = mh.open_model(tmp_path / "m").plain
    with torch.no_grad():
        states = whole(**inputs_for(name), output_hidden_states=True).hidden_states[-1]
    for auto in (tf.AutoModel, tf.AutoModelForSequenceClassification):
        found = auto.from_pretrained(tmp_path / "m").eval()
        trunk = found if auto is tf.AutoModel else getattr(found, found.base_model_prefix)
        with torch.no_grad():
            assert torch.equal(trunk(**inputs_for(name)).last_hidden_state, states)
        assert sum(isinstance(part, Gained) for part in found.modules()) == 2


def test_conversions_follow_one_another_and_shards_and_half_precision_hold_them(tmp_path):
    build("llama").save_pretrained(tmp_path / "f")
    model = mh.open_model(tmp_path / "f", dtype=torch.bfloat16)
    once, gains = gained(model)
    assert all(one.gain.dtype == torch.bfloat16 for one in gains)
    twice = converted(once, "gained", {"paths": ["model.layers.2.mlp"], "width": 32})
    moved([submodule(twice.plain, "model.layers.2.mlp")])
    assert [step["settings"]["paths"][-1] for step in conversions_of(twice.config)] == [
        "model.layers.1.mlp",
        "model.layers.2.mlp",
    ]
    twice.plain.save_pretrained(tmp_path / "m", max_shard_size="20KB")
    assert len(list((tmp_path / "m").glob("*.safetensors"))) > 1
    again = mh.open_model(tmp_path / "m", dtype="auto", device_map="cpu")
    assert torch.equal(again.logits(inputs_for("llama")), twice.logits(inputs_for("llama")))


def test_a_converted_model_is_read_edited_baked_and_generates(tmp_path):
    made, gains = gained(opened("llama"))
    moved(gains)
    inputs = inputs_for("llama")
    assert made.read_z(inputs).shape[:1] == (3,)
    with made.editing(mh.Scale(["L1H2"], 0.0)):
        edited = made.logits(inputs)
    baked = made.bake(mh.Scale(["L1H2"], 0.0))
    baked.save_pretrained(tmp_path / "b")
    assert (mh.open_model(tmp_path / "b").logits(inputs) - edited).abs().max() <= 1e-5
    # A constant needs a bias, and so a module made anew under another config.
    made.bake(mh.Offset(["L1H2"], torch.ones(1, made.head_dim))).save_pretrained(tmp_path / "c")
    assert conversions_of(mh.open_model(tmp_path / "c").config) == conversions_of(made.config)
    cached, uncached = (made.generate(inputs["input_ids"], max_new_tokens=8, use_cache=use) for use in (True, False))
    assert torch.equal(cached, uncached)


def saved(tmp_path):
    made, _ = gained(opened("llama"))
    made.save_pretrained(tmp_path / "m")
    return tmp_path / "m" / "config.json"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda steps: None, "manyheads in the config is None"),
        (lambda steps: "x" * 999, "a list of .* was expected"),
        (lambda steps: [{"conversion": "gained"}], "a list of .* was expected"),
        (lambda steps: [{**steps[0], "conversion": "no_such"}], "knows no conversion 'no_such'"),
        (lambda steps: [{**steps[0], "conversion": "../../os"}], "knows no conversion"),
        (lambda steps: [{**steps[0], "conversion": "pruning"}], "knows no conversion"),
        (lambda steps: [{"conversion": "gained", "settings": {}}], "'gained' do not fit .*'paths' is missing"),
        (lambda steps: [{"conversion": "gained", "settings": {"paths": ["model.layers.9"], "width": 32}}], r"no model\.l"),
        (lambda steps: [{"conversion": "gained", "settings": {**steps[0]["settings"], "width": 9}}], "has shape"),
        (lambda steps: [{"conversion": "gained", "settings": {**steps[0]["settings"], "width": 1 << 40}}], "has shape|describes"),
    ],
)  # fmt: skip
def test_a_config_that_is_damaged_is_one_sentence(change, reason, tmp_path):
    file = saved(tmp_path)
    config = json.loads(file.read_text())
    config["manyheads"] = change(config["manyheads"])
    file.write_text(json.dumps(config))
    with pytest.raises(InputError, match=reason) as caught:
        mh.open_model(file.parent)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


def test_what_cannot_be_converted_is_refused_before_work():
    model = opened("llama")
    with pytest.raises(InputError, match="knows no conversion 'nothing'"):
        converted(model, "nothing", {})
    with pytest.raises(InputError, match="no JSON"):
        converted(model, "gained", {"paths": torch.ones(2)})
    with pytest.raises(InputError, match="no JSON"):
        converted(model, "gained", {"paths": [], "width": float("nan")})

    class Mine(tf.LlamaConfig):
        model_type = "mine"

    module = build("llama")
    module.config.__class__ = Mine
    module.config.__dict__.pop("model_type", None)
    with pytest.raises(UnsupportedError, match="no model that Transformers opens by its type"):
        converted(mh.open_model(module), "gained", {"paths": [], "width": 3})


@conversion("forgetful")
def forgets(module, settings):
    if not next(module.parameters()).is_meta:  # so it is not done when the model is reopened
        module.model.norm = Gained(module.model.norm, 32)


def test_a_conversion_that_the_config_does_not_make_again_is_refused():
    with pytest.raises(UnsupportedError, match="could not be opened again"):
        converted(opened("llama"), "forgetful", {})


def test_transformers_knows_converted_types_where_manyheads_is_imported_first():
    program = """
import sys, manyheads
assert not {"torch", "transformers", "numpy"} & set(sys.modules)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
assert "manyheads_llama" in CONFIG_MAPPING and "manyheads_nothing" not in CONFIG_MAPPING and 3 not in CONFIG_MAPPING
assert CONFIG_MAPPING["manyheads_llama"].__mro__[1].__name__ == "LlamaConfig"
try:
    CONFIG_MAPPING["manyheads_nothing"]
except KeyError:
    print("right")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.stdout == "right\n", done.stderr


def test_transformers_knows_converted_types_where_it_was_imported_first(monkeypatch):
    monkeypatch.setattr(CONFIG_MAPPING, "_extra_content", {"mine": tf.LlamaConfig})
    assert "manyheads_qwen2" not in CONFIG_MAPPING
    registering.install()
    assert CONFIG_MAPPING["manyheads_qwen2"].model_type == "manyheads_qwen2"
    assert CONFIG_MAPPING["mine"] is tf.LlamaConfig and CONFIG_MAPPING["qwen2"] is tf.Qwen2Config
