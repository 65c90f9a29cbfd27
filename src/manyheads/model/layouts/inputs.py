"""Inputs small enough to try a model with: ids, pixels, sound or a series, as its forward takes them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from manyheads.errors import ManyheadsError, UnsupportedError
from manyheads.model.inputs import forward_takes

_FOUND: WeakKeyDictionary[Any, int] = WeakKeyDictionary()  # which kind a module's forward ran on
_BESIDES_IDS = frozenset({"pixel_values", "pixel_values_videos", "input_features", "input_values", "bbox", "grid_thw"})
_LENGTH, _DECODED = 5, 4  # not the same, so that self-attention and cross-attention differ in shape


def tiny_inputs(module: Any) -> dict[str, Tensor]:
    """A row of tokens, an image, a second of sound or a series: the first of these that the module's forward runs on.

    `UnsupportedError` if it runs on none of them.
    """
    takes = forward_takes(module)
    if "input_ids" in takes and not set(takes) & _BESIDES_IDS and not _is_sequence_to_sequence(module):
        return next(_kinds(module))  # nothing else to try
    kinds = list(_kinds(module))  # made anew: the module may have moved since
    if module in _FOUND:
        return kinds[_FOUND[module]]
    reason = ""
    for which, inputs in enumerate(kinds):
        try:
            with torch.no_grad():
                module(**inputs)
            _FOUND[module] = which
            return inputs
        except Exception as error:  # whatever a forward raises: the next kind is tried
            reason = reason or (" ".join(str(error).split())[:200] or type(error).__name__)
    raise UnsupportedError(
        f"cannot try {type(module).__name__}: its forward ran on neither token ids, pixels, sound nor a series"
        + (f" ({reason})." if reason else ".")
    )


def _is_sequence_to_sequence(module: Any) -> bool:
    return "decoder_input_ids" in forward_takes(module)


@contextlib.contextmanager
def plain_pass(module: nn.Module, inputs: Iterable[str]) -> Iterator[None]:
    """Around a pass over plain inputs: whatever an architecture raises there, it cannot be read, and one sentence says so."""
    try:
        yield
    except ManyheadsError:
        raise
    except Exception as error:
        raise UnsupportedError(
            f"cannot read {type(module).__name__}: a pass over {' and '.join(inputs)} fails with {type(error).__name__}: "
            f"{' '.join(str(error).split())[:200]}"
        ) from error


def decoded(module: Any, batch: dict[str, Any]) -> dict[str, Any]:
    """What the decoder of an encoder-decoder reads where nobody said: the inputs, shifted right behind its start token."""
    if not _is_sequence_to_sequence(module) or {"decoder_input_ids", "decoder_inputs_embeds", "labels"} & set(batch):
        return batch
    ids = batch.get("input_ids")
    some = next(value for value in batch.values() if isinstance(value, Tensor))
    places = (getattr(module, "generation_config", None), module.config, module.config.get_text_config(decoder=True))
    names = ("decoder_start_token_id", "bos_token_id", "pad_token_id")
    stated = (getattr(place, name, None) for name in names for place in places)
    start = next((value for value in stated if isinstance(value, int)), 0)
    first = torch.full((len(some), 1), start, dtype=torch.long, device=some.device)
    return {**batch, "decoder_input_ids": first if ids is None else torch.cat([first, ids[:, :-1]], 1)}


def _kinds(module: Any) -> Iterator[dict[str, Tensor]]:
    takes, some = forward_takes(module), next(module.parameters())
    dtype = some.dtype if some.dtype.is_floating_point else torch.float32
    device = torch.device("cpu") if some.is_meta else some.device
    generator = torch.Generator().manual_seed(0)

    def made(**shapes: tuple[int, ...]) -> dict[str, Tensor]:
        return {
            name: _ids(module, shape).to(device)
            if name.endswith("_ids")
            else torch.tensor([[1, 4, 4]], device=device)
            if name == "grid_thw"
            else torch.arange(1, 5, device=device).expand(shape)
            if name == "bbox"
            else torch.ones(shape, dtype=dtype, device=device)
            if name.endswith("_mask")
            else torch.randn(shape, generator=generator).to(device, dtype)
            for name, shape in shapes.items()
        }

    decoder = {"decoder_input_ids": (1, _DECODED)} if "decoder_input_ids" in takes else {}
    tokens = {"input_ids": (1, _LENGTH)} if "input_ids" in takes else {}
    if tokens:
        yield made(**tokens, **decoder)
    if tokens and "bbox" in takes:
        yield made(**tokens, bbox=(1, _LENGTH, 4), **decoder)
    if "grid_thw" in takes:  # one image of 4 x 4 patches, cut up already
        channels, patch = _image(module.config)[0], _number(module.config, "patch_size", default=14)
        wide = channels * patch * patch * _number(module.config, "temporal_patch_size", default=1)
        for name in ("hidden_states", "pixel_values"):
            if name in takes:
                yield made(**{name: (16, wide)}, grid_thw=(1, 3))
    if "pixel_values" in takes or "pixel_values_videos" in takes:
        name = "pixel_values" if "pixel_values" in takes else "pixel_values_videos"
        channels, height, width, frames = _image(module.config)
        pixels: tuple[tuple[int, ...], ...] = ((1, channels, height, width), (1, frames, channels, height, width))
        for shape in pixels:
            for more in ({}, tokens) if tokens else ({},):
                yield made(**{name: shape}, **more, **decoder)
    features, frames = _sound(module.config)
    if "input_features" in takes:
        spectra: tuple[tuple[int, ...], ...] = ((1, features, frames), (1, 64, features), (1, 1, 64, features))
        for shape in spectra:
            for more in ({}, tokens) if tokens else ({},):
                yield made(input_features=shape, **more, **decoder)
    if "input_values" in takes:
        length = getattr(module.config, "max_length", None) or 100
        waves: tuple[tuple[int, ...], ...] = ((1, 4000), (1, 1, 4000), (1, length, features))
        for shape in waves:
            yield made(input_values=shape, **decoder)
    if "past_values" in takes:
        yield from (made(**shapes) for shapes in _series(module.config))


def _ids(module: Any, shape: tuple[int, ...]) -> Tensor:
    size = getattr(module.config.get_text_config(), "vocab_size", None) or 8
    # Not the first few ids: padding, beginning and end are among them.
    return (torch.arange(shape[-1]) + min(5, max(0, size - shape[-1]))).expand(shape) % size


def _sub(config: Any, *names: str) -> Any:
    return next((sub for name in names if (sub := getattr(config, name, None)) is not None), config)


def _number(config: Any, *names: str, default: int) -> int:
    return next((value for name in names if isinstance(value := getattr(config, name, None), int)), default)


def _image(config: Any) -> tuple[int, int, int, int]:
    vision = _sub(config, "vision_config", "image_config", "encoder")
    size = getattr(vision, "image_size", None) or 32
    height, width = (size, size) if isinstance(size, int) else size
    return (
        _number(vision, "num_channels", "in_channels", default=3),
        height,
        width,
        _number(vision, "num_frames", default=2),
    )


def _sound(config: Any) -> tuple[int, int]:
    audio = _sub(config, "audio_config", "encoder_config")
    names = "num_mel_bins", "input_feat_per_channel", "feature_projection_input_dim", "input_dim", "feature_size"
    return _number(audio, *names, default=80), 2 * _number(audio, "max_source_positions", default=64)


def _series(config: Any) -> Iterator[dict[str, tuple[int, ...]]]:
    context, lags = _number(config, "context_length", default=32), getattr(config, "lags_sequence", None) or [0]
    yield {"past_values": (1, context, _number(config, "num_input_channels", default=1))}
    past, ahead = context + max(lags), _number(config, "prediction_length", default=4)
    times = _number(config, "num_time_features", default=0)
    yield {
        "past_values": (1, past),
        "past_time_features": (1, past, times),
        "past_observed_mask": (1, past),
        "future_values": (1, ahead),
        "future_time_features": (1, ahead, times),
    }
