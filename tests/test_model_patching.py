"""Activation and path patching on replay equal the naive computation, written here with plain hooks on full passes."""

import contextlib

import numpy as np
import pytest
import torch
from architectures import DECODERS, EXTRA, inputs_for, opened, padded

import manyheads as mh
from manyheads.errors import InputError
from manyheads.model.replay.patching import Mlp, activation_patching, path_patching

SOME = [
    "gpt2",
    "llama",
    "gemma2",
    "gpt_neox",
    "opt",
    "bloom",
    "falcon_alibi",
    "gpt_oss",
    "olmo2",
    "mixtral",
    "modernbert",
    "bert",
]


def metric(logits):
    return logits[:, -1, 3] - logits[:, -1, 4]


class Naive:
    """Path patching as the papers define it: whole forward passes, every intervention an explicit hook."""

    def __init__(self, name, clean, corrupted):
        self.model = opened(name)
        self.clean, self.corrupted = clean, corrupted
        self.runs = {key: self.run(inputs) for key, inputs in (("clean", clean), ("corrupted", corrupted))}

    def run(self, inputs, z_edit=None, mlp_edit=None):
        z, mlp = {}, {}

        def before(layer):
            def hook(_, args):
                old = args[0].unflatten(-1, (self.model.n_heads, -1))
                new = old if z_edit is None else z_edit(layer, old.clone())
                z[layer] = new.detach().clone()
                return (new.flatten(-2), *args[1:])

            return hook

        def after(layer):
            def hook(_, args, out):
                old = out if isinstance(out, torch.Tensor) else out[0]
                new = old if mlp_edit is None else mlp_edit(layer, old.clone())
                mlp[layer] = new.detach().clone()
                return new if isinstance(out, torch.Tensor) else (new, *out[1:])

            return hook

        with contextlib.ExitStack() as stack, torch.no_grad():
            for layer, block in enumerate(self.model.layout.blocks):
                stack.callback(block.projection.register_forward_pre_hook(before(layer)).remove)
                stack.callback(block.mlp_write.register_forward_hook(after(layer)).remove)
            logits = self.model.plain(**inputs).logits
        return z, mlp, logits

    def step_one(self, sender, frozen_mlps, positions=None):
        """Every head frozen to clean, the sender's output corrupted."""
        clean_z, clean_mlp, _ = self.runs["clean"]
        bad_z, bad_mlp, _ = self.runs["corrupted"]
        at = slice(None) if positions is None else positions

        def z_edit(layer, z):
            z[:] = clean_z[layer]
            if isinstance(sender, mh.Head) and layer == sender.layer:
                z[:, at, sender.index] = bad_z[layer][:, at, sender.index]
            return z

        def mlp_edit(layer, out):
            shape = out.shape
            if frozen_mlps:
                out = clean_mlp[layer].clone()
            if isinstance(sender, Mlp) and layer == sender.layer:
                out = out.reshape(3, -1, shape[-1])
                out[:, at] = bad_mlp[layer].reshape(3, -1, shape[-1])[:, at]
            return out.reshape(shape)

        return z_edit, mlp_edit

    def to_logits(self, sender, frozen_mlps=False, positions=None):
        return metric(self.run(self.clean, *self.step_one(sender, frozen_mlps, positions))[2]).double().numpy()

    def to_heads(self, sender, receivers, frozen_mlps=False, positions=None):
        from manyheads.model.editing.edits import Swap
        from manyheads.model.reading.readers import ReadAttention

        got = {}

        def note(call):
            group = self.model.n_heads // call.key.shape[1]
            got[call.layer] = {
                "query": call.query,
                "key": call.key.repeat_interleave(group, 1),
                "value": call.value.repeat_interleave(group, 1),
            }

        with self.model.reading(ReadAttention(note)):
            self.run(self.clean, *self.step_one(sender, frozen_mlps))
        swaps = [
            Swap([head], part, {layer: parts[part] for layer, parts in got.items()}, positions=positions)
            for head, part in receivers
        ]
        with self.model.editing(*swaps):
            return metric(self.run(self.clean)[2]).double().numpy()


def pair(name):
    return inputs_for(name, seed=0), inputs_for(name, seed=5)


@pytest.mark.parametrize("name", [*DECODERS, *EXTRA])
def test_activation_patching_equals_patching_whole_runs(name):
    clean, corrupted = pair(name)
    naive = Naive(name, clean, corrupted)
    effects = activation_patching(opened(name), clean, corrupted, metric, positions=[4, 10])
    for sender, value in zip(effects.senders, effects.values, strict=True):

        def z_edit(layer, z, sender=sender):
            if layer == sender.layer:
                z[:, [4, 10], sender.index] = naive.runs["corrupted"][0][layer][:, [4, 10], sender.index]
            return z

        assert np.abs(value - metric(naive.run(clean, z_edit)[2]).double().numpy()).max() <= 1e-4
    assert np.abs(effects.values - effects.clean).max() > 1e-2


@pytest.mark.parametrize("mlps", ["recomputed", "frozen"])
@pytest.mark.parametrize("name", SOME)
def test_paths_to_the_logits_equal_the_naive_computation(name, mlps):
    clean, corrupted = pair(name)
    naive = Naive(name, clean, corrupted)
    senders = [mh.Head(0, 1), mh.Head(0, 3), mh.Head(1, 2), mh.Head(2, 0), Mlp(0), Mlp(1), Mlp(2)]
    for positions in (None, [10]):
        expected = np.stack([naive.to_logits(sender, mlps == "frozen", positions) for sender in senders])
        how = {"senders": senders, "mlps": mlps, "positions": positions, "max_tokens": 70}
        for keep in (None, 1):  # MLPs need not run where no logits are asked for
            effects = path_patching(opened(name), clean, corrupted, metric, keep=keep, **how)
            assert np.abs(effects.values - expected).max() <= 1e-4
            assert np.abs(effects.values - effects.clean).max() > 1e-2


@pytest.mark.parametrize("name", SOME)
def test_paths_to_queries_keys_and_values_equal_the_naive_computation(name):
    clean, corrupted = pair(name)
    naive = Naive(name, clean, corrupted)
    senders = [mh.Head(0, 1), mh.Head(0, 2), mh.Head(1, 3), Mlp(0)]
    for receivers in (
        [(mh.Head(2, 1), "query")],
        [(mh.Head(1, 0), "key")],
        [(mh.Head(2, 3), "value"), (mh.Head(1, 2), "query"), (mh.Head(2, 0), "key")],
    ):
        for positions in (None, [10]):
            effects = path_patching(
                opened(name), clean, corrupted, metric, senders=senders, receivers=receivers, positions=positions
            )
            for sender, value in zip(senders, effects.values, strict=True):
                above = [r for r in receivers if r[0].layer > sender.layer]
                expected = naive.to_heads(sender, above, positions=positions) if above else effects.clean
                assert np.abs(value - expected).max() <= 1e-4
            assert np.abs(effects.values - effects.clean).max() > 1e-4


def test_rows_of_a_batch_can_have_receivers_at_places_of_their_own():
    model, (clean, corrupted) = opened("llama"), pair("llama")
    senders, receivers = [mh.Head(0, 1), mh.Head(0, 2), mh.Head(1, 0)], [(mh.Head(2, 1), "query")]
    rows = len(clean["input_ids"] if isinstance(clean, dict) else clean)
    places = torch.arange(8, 8 + rows)
    several = path_patching(
        model, clean, corrupted, metric, senders=senders, receivers=receivers, positions=places[:, None]
    )
    for row, place in enumerate(places.tolist()):
        alone = path_patching(model, clean, corrupted, metric, senders=senders, receivers=receivers, positions=[place])
        assert np.allclose(several.values[:, row], alone.values[:, row], atol=1e-5)
    assert np.abs(several.values - several.clean).max() > 1e-4


def test_a_pass_that_is_read_at_few_places_computes_mlps_there_alone():
    model, (clean, other) = opened("llama"), pair("llama")
    rows, length = (clean["input_ids"] if isinstance(clean, dict) else clean).shape
    at = torch.arange(length - rows, length)[:, None]
    widths = []
    last = model.n_layers - 1
    mlp = model.layout.blocks[1].mlp_write
    whole = model.layout.blocks[1].mlp_write.register_forward_hook(lambda _, args, out: widths.append(out.shape[1]))
    inner = next(part for part in mlp.modules() if isinstance(part, torch.nn.Linear))
    narrow = inner.register_forward_hook(lambda _, args, out: widths.append(args[0].shape[1]))
    path_patching(model, clean, other, metric, senders=[(0, 0)], receivers=[((last, 0), "query")], positions=at)
    whole.remove()
    narrow.remove()
    assert 1 in widths  # of a pass to the receivers; recordings and the pass after it are whole
    assert length in widths


def test_under_grouped_queries_only_the_named_query_head_sees_the_patched_key():
    model, (clean, corrupted) = opened("llama"), pair("llama")
    one = path_patching(model, clean, corrupted, metric, senders=["L0H1"], receivers=[("L2H0", "key")])
    both = path_patching(
        model, clean, corrupted, metric, senders=["L0H1"], receivers=[("L2H0", "key"), ("L2H1", "key")]
    )
    assert np.abs(one.values - both.values).max() > 1e-5


def test_without_mlps_and_norms_a_path_to_the_logits_is_the_heads_own_write():
    """#34 (a): patching to the logits equals `(z_corrupted - z_clean) W_O W_U`, for every head."""
    model, (clean, corrupted) = opened("llama"), pair("llama")
    identity = model.bake(mh.Scale([], 1.0))
    for block in identity.plain.model.layers:
        block.mlp.down_proj.weight.data.zero_()
        block.input_layernorm = torch.nn.Identity()
    identity.plain.model.norm = torch.nn.Identity()
    identity = mh.open_model(identity.plain)
    z = [identity.read_z(inputs) for inputs in (clean, corrupted)]
    W_U = identity.layout.unembedding.weight
    effects = path_patching(identity, clean, corrupted, metric)
    for head, value in zip(effects.senders, effects.values, strict=True):
        write = (z[1] - z[0])[head.layer][:, -1, head.index] @ identity.W_O(head.layer)[head.index]
        assert np.abs((value - effects.clean) - (write @ (W_U[3] - W_U[4])).detach().numpy()).max() <= 1e-5


def test_a_sender_at_or_above_its_receivers_changes_nothing():
    model, (clean, corrupted) = opened("llama"), pair("llama")
    effects = path_patching(model, clean, corrupted, metric, senders=["L1H0", "L2H0"], receivers=[("L1H1", "query")])
    assert np.array_equal(effects.values, np.stack([effects.clean] * 2))


def test_patching_a_run_into_itself_changes_nothing_also_in_a_padded_batch():
    model = opened("llama")
    clean = model.inputs(padded("llama", "left"))
    same = activation_patching(model, clean, clean, metric)
    assert np.abs(same.values - same.clean).max() <= 1e-5
    assert np.abs(same.by_head(*model.shape)).max() <= 1e-5


def test_patching_leaves_no_trace_and_refuses_what_does_not_fit():
    model, (clean, corrupted) = opened("llama"), pair("llama")
    before = model.logits(clean)
    path_patching(model, clean, corrupted, metric, receivers=[("L2H1", "query")])
    assert torch.equal(model.logits(clean), before)
    with pytest.raises(InputError, match="one shape"):
        activation_patching(model, clean, inputs_for("llama", length=9), metric)
    with pytest.raises(InputError, match="out of range"):
        path_patching(model, clean, corrupted, metric, senders=["L9H0"])
    with pytest.raises(InputError, match="no receivers"):
        path_patching(model, clean, corrupted, metric, receivers=[])
