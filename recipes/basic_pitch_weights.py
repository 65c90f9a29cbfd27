"""Converts the published weights of Basic Pitch (#64) into the file that ships, and writes outputs of theirs for our tests.

    python recipes/basic_pitch_weights.py basic_pitch-0.4.0-py2.py3-none-any.whl

The wheel is PyPI's `basic-pitch` (`pip download --no-deps basic-pitch==0.4.0`), of Spotify, under Apache-2.0. Needs `onnx` and
`onnxruntime` besides. In the published file two batch norms are already multiplied into the layers before them; ours then change
nothing (scale 1, shift 0, mean 0, variance 1 - epsilon), as in the published file.
"""

from __future__ import annotations

import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import numpy_helper
from safetensors.torch import save_file

from manyheads.audio.notes.network import WEIGHTS, BasicPitch
from manyheads.audio.notes.transcribing import WINDOW

HELD = "basic_pitch/saved_models/icassp_2022/nmp.onnx"
PARITY = Path(__file__).parents[1] / "tests" / "basic_pitch_parity.safetensors"
LAYERS = ("contour.0", "contour.3", "note.0", "note.2", "onset.0", "onset_out")
OUTPUTS = {
    "contours": "StatefulPartitionedCall:0",
    "notes": "StatefulPartitionedCall:1",
    "onsets": "StatefulPartitionedCall:2",
}


def main(wheel: str) -> None:
    """Write both files."""
    published = zipfile.ZipFile(wheel).read(HELD)
    state = converted(onnx.load_from_string(published))
    card = {
        "what": "Basic Pitch, trained weights, converted from nmp.onnx of basic-pitch 0.4.0 by recipes/basic_pitch_weights.py",
        "copyright": "Copyright 2022 Spotify AB",
        "licence": "Apache-2.0",
        "source": "https://github.com/spotify/basic-pitch",
        "paper": "arXiv:2203.09893",
    }
    save_file(state, WEIGHTS, metadata=card)
    time = torch.arange(WINDOW) / 22_050
    sound = torch.randn(1, WINDOW, generator=torch.Generator().manual_seed(0)) * 0.003
    for pitch in (220.0, 277.18, 329.63):  # a chord that begins after half a second, in a little noise
        for harmonic in range(1, 6):
            wave = torch.sin(2 * torch.pi * pitch * harmonic * time) / harmonic
            sound += 0.1 * wave * torch.exp(-time) * (time > 0.5)
    kept = (sound * 32767).round().to(torch.int16)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "nmp.onnx"
        path.write_bytes(published)
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        found = session.run(
            list(OUTPUTS.values()), {"serving_default_input_2:0": (kept.float() / 32768)[..., None].numpy()}
        )
    theirs = {
        name: torch.from_numpy(np.ascontiguousarray(one[:, ::8])) for name, one in zip(OUTPUTS, found, strict=True)
    }
    save_file({"sound": kept, **theirs}, PARITY)


def converted(model: onnx.ModelProto) -> dict[str, torch.Tensor]:
    """The published numbers under our names."""
    held = {one.name: torch.from_numpy(numpy_helper.to_array(one).copy()) for one in model.graph.initializer}
    state = BasicPitch().state_dict()
    norms = {}
    for name in list(state):
        if name.endswith("num_batches_tracked"):
            state[name] = torch.zeros_like(state[name])
        elif name.endswith("running_var"):
            state[name] = torch.full_like(state[name], 1 - 1e-3)
        elif name.endswith("running_mean"):
            state[name] = torch.zeros_like(state[name])
    nodes = [node for node in model.graph.node if node.op_type == "Conv" and "cq_t2010v2" not in node.output[0]]
    for node in nodes:
        weight, bias = (held[name] for name in node.input[1:3])
        [layer] = [one for one in LAYERS if state[f"{one}.weight"].shape == weight.shape]
        state[f"{layer}.weight"], state[f"{layer}.bias"] = weight, bias
    scale, shift = (held[name] for name in _norm_names(held))
    state["norm.weight"], state["norm.bias"] = scale, shift
    for name in ("contour.1", "onset.1"):
        norms[f"{name}.weight"] = torch.ones_like(state[f"{name}.weight"])
        norms[f"{name}.bias"] = torch.zeros_like(state[f"{name}.bias"])
    return {name: value.contiguous() for name, value in (state | norms).items()}


def _norm_names(held: dict[str, torch.Tensor]) -> tuple[str, str]:
    """What the first batch norm multiplies by and adds."""
    first = "model_1/batch_normalization/FusedBatchNormV3"
    return f"{first};{first}", f"{first};{first}1"


if __name__ == "__main__":
    main(sys.argv[1])
