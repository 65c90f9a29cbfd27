"""Memory planned by a config alone: the bytes are those that are really there, and no weight is made."""

from __future__ import annotations

import json
import os

import pytest
import torch
from typer.testing import CliRunner

import manyheads as mh
from manyheads.cli import app
from manyheads.errors import InputError
from manyheads.model.loading.memory import here, plan_memory
from manyheads.model.replay.recording import record

LLAMA70 = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}
GB = 10**9


@pytest.fixture
def large(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(LLAMA70))
    return path


def test_what_is_planned_is_what_is_there():
    model = mh.open_model()
    rows, tokens = 3, 40
    plan = plan_memory("ladon", rows=rows, tokens=tokens)
    weights = list(model.plain.parameters())
    buffers = sum(one.nbytes for one in model.plain.buffers())
    assert plan.parameters == sum(one.numel() for one in weights)
    assert plan.needs["weights"] == sum(one.nbytes for one in weights) + buffers
    assert plan.heads == (model.n_layers, model.n_heads, model.n_kv_heads, model.head_dim)
    ids = torch.randint(0, 1000, (rows, tokens))
    kept = record(model.plain, model.layout, {"input_ids": ids})
    parts = [*kept.outputs, *kept.z, *kept.mlp, kept.logits]
    tensors = [one if isinstance(one, torch.Tensor) else one[0] for one in parts]
    assert plan.needs["recording"] == pytest.approx(sum(one.nbytes for one in tensors), rel=0.02)
    assert plan.needs["logits"] == kept.logits.nbytes
    cache = model.plain(ids, use_cache=True).past_key_values
    assert plan.needs["cache"] == sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert plan_memory("ladon", dtype="bfloat16").needs["weights"] < 0.51 * plan.needs["weights"]


def test_seventy_billion_weights_are_planned_on_paper(large):
    one = plan_memory(large, dtype="bfloat16", devices={"0": 180 * GB, "cpu": 64 * GB})
    assert one.parameters == 70_553_706_496 and one.heads == (80, 64, 8, 128)
    assert one.placed == {"0": 2 * one.parameters, "cpu": 0, "disk": 0} and "fits on device 0" in one.says
    two = plan_memory(large, dtype="bfloat16", devices={"0": 90 * GB, "1": 90 * GB, "cpu": 64 * GB})
    assert two.placed["cpu"] == two.placed["disk"] == 0 and sum(two.placed.values()) == 2 * one.parameters
    assert max(two.placed["0"], two.placed["1"]) < 90 * GB and "needs 2 devices" in two.says
    little = plan_memory(large, devices={"0": 24 * GB, "cpu": 64 * GB})
    assert little.placed["disk"] > 0 and sum(little.placed.values()) == 4 * one.parameters
    assert "slow" in little.says and "bfloat16" in little.says


def test_this_machine_has_some_memory():
    assert 0 < here()["cpu"] <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


@pytest.mark.parametrize(
    "change, said",
    [
        ({"num_hidden_layers": 10**9}, "mend it"),
        ({"num_attention_heads": None}, "cannot read a config"),
        ({"model_type": "nothing-we-know"}, "cannot read a config"),
        ({"model_type": "resnet"}, "no model can be made"),
    ],
)
def test_configs_that_cannot_be_planned_are_one_sentence(large, change, said):
    large.write_text(json.dumps(LLAMA70 | change))
    with pytest.raises(InputError, match=said):
        plan_memory(large)


def test_the_command_says_what_it_takes_and_what_to_use(large):
    told = ["plan", str(large), "--dtype", "bfloat16", "--memory", "80GB,80GiB", "--cpu", "64GB"]
    found = CliRunner().invoke(app, told)
    assert found.exit_code == 0 and "70.55 billion" in found.output and "device_map" in found.output, found.output
    facts = json.loads(CliRunner().invoke(app, [*told, "--json"]).output)
    assert facts["devices"] == {"0": 80 * GB, "1": 80 * 2**30, "cpu": 64 * GB} and facts["says"]
    for bad, said in [
        (["--memory", "much"], "no size of a memory"),
        (["--cpu", "1GB"], "goes with --memory"),
        (["--dtype", "int3"], "dtype"),
    ]:
        failed = CliRunner().invoke(app, ["plan", str(large), *bad])
        assert failed.exit_code == 2 and said in failed.output, failed.output
    for name in ("./nowhere", str(large.parent / "none.json"), "somebody/none"):
        assert CliRunner().invoke(app, ["plan", name]).exit_code == 2
