"""A tiny model of every config class of Transformers, and a check of what is read from it against the plain model.

built(type)          the tiny model, in eval mode, with weights large enough for heads to matter
example(model)       inputs for it, by what its forward takes
checked(type)        a Row a part: clean, opens in part, refused, or wrong
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import re
import signal
from collections.abc import Iterator
from typing import Any

import torch
import transformers as tf
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

import manyheads as mh
from manyheads.errors import ManyheadsError
from manyheads.model.headmodel import HeadModel
from manyheads.model.reading import Keep, ReadAttention

SECONDS, PARAMETERS = 300, 20_000_000
TOO_SLOW = ("kimi_linear", "slanext", "vits")  # minutes on one core, however small
LAYERS, HEADS, WIDTH, VOCAB = 3, 4, 32, 61

# In this order: what a user would most likely open a checkpoint of the type as.
_MAPPINGS = (
    "SEQ_TO_SEQ_CAUSAL_LM",
    "SPEECH_SEQ_2_SEQ",
    "CAUSAL_LM",
    "IMAGE_TEXT_TO_TEXT",
    "MASKED_LM",
    "IMAGE_CLASSIFICATION",
    "CTC",
    "AUDIO_CLASSIFICATION",
    "TIME_SERIES_PREDICTION",
    "VIDEO_CLASSIFICATION",
    "MULTIMODAL_LM",
    "TEXT_TO_WAVEFORM",
    "PRETRAINING",
)
_ORDER = tuple(getattr(modeling_auto, f"MODEL_FOR_{name}_MAPPING_NAMES") for name in _MAPPINGS)
_REST = tuple(
    getattr(modeling_auto, name)
    for name in ("MODEL_MAPPING_NAMES", *sorted(n for n in dir(modeling_auto) if n.endswith("_MAPPING_NAMES")))
)

# Sizes by the names that configs have for them.
_SIZES: dict[str, int] = {
    **dict.fromkeys(
        "hidden_size d_model n_embd dim embed_dim embedding_size emb_dim decoder_hidden_size encoder_hidden_size "
        "word_embed_proj_dim projection_dim out_hidden_size text_hidden_size backbone_hidden_size hidden_dim n_embed "
        "output_dim attention_size bottleneck_size encoder_hidden_dim".split(),
        WIDTH,
    ),
    **dict.fromkeys(
        "num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers depth num_encoder_layers "
        "num_decoder_layers encoder_num_hidden_layers decoder_num_hidden_layers num_blocks layers".split(),
        LAYERS,
    ),
    **dict.fromkeys(
        "num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads attention_heads "
        "encoder_num_attention_heads decoder_num_attention_heads encoder_num_key_value_heads heads "
        "decoder_num_key_value_heads".split(),
        HEADS,
    ),
    **dict.fromkeys(
        "intermediate_size encoder_ffn_dim decoder_ffn_dim ffn_dim d_ff mlp_dim moe_intermediate_size "
        "decoder_intermediate_size shared_expert_intermediate_size ffn_hidden_size mlp_hidden_size "
        "intermediate_size_mlp expert_ffn_hidden_size moe_shared_expert_intermediate_size prefix_dense_intermediate_size".split(),
        48,
    ),
    **dict.fromkeys(
        "max_position_embeddings n_positions max_source_positions max_target_positions max_seq_len context_length "
        "max_sequence_length max_audio_positions".split(),
        128,
    ),
    **dict.fromkeys("num_experts num_local_experts n_routed_experts moe_num_experts num_moe_experts".split(), 4),
    **dict.fromkeys("num_experts_per_tok moe_topk moe_k num_experts_per_token top_k".split(), 2),
    **dict.fromkeys("n_group topk_group num_expert_group n_shared_experts".split(), 1),
    **dict.fromkeys("kv_lora_rank q_lora_rank".split(), 16),
    **dict.fromkeys(
        "qk_nope_head_dim qk_rope_head_dim v_head_dim head_dim d_kv global_head_dim kv_channels".split(), 8
    ),
    "vocab_size": VOCAB,
    "image_size": 32,
    "patch_size": 8,
    "num_mel_bins": 16,
    "query_pre_attn_scalar": 8,
    "sliding_window": 6,
    "num_frames": 2,
    "tubelet_size": 1,
    "first_k_dense_replace": 1,
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_d_state": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "index_n_heads": 2,
    "index_head_dim": 8,
}
# What some types need besides.
_HEAD = {"head_dim": 8}
_SERIES = {"prediction_length": 4, "context_length": 16, "lags_sequence": [1, 2, 3]}
_WINDOWS = {"embed_dim": 32, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4, "image_size": 32, "patch_size": 2}
_MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}}
_FIXES: dict[str, dict[str, Any]] = {
    **dict.fromkeys(
        ["qwen2_vl_text", "qwen2_5_vl_text", "qwen2_5_omni_text", "paddleocr_vl_text", "glm46v_text"], _MROPE
    ),
    **dict.fromkeys(["glm4v_text", "glm_image_text"], _MROPE),
    **{name: {**_MROPE, "head_dim": 16} for name in ("glm_ocr_text", "glm4v_moe_text")},
    "luke": {"entity_vocab_size": 20, "entity_emb_size": 32},
    "autoformer": _SERIES | {"d_model": 32, "moving_average": 3},
    "bamba": {"attn_layer_indices": [1]},
    "codegen": {"rotary_dim": 4},
    "deepseek_v2": {"n_routed_experts": 4, "num_experts_per_tok": 2},
    "donut-swin": _WINDOWS,
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1},
    "esm": {"vocab_size": VOCAB, "mask_token_id": 3, "pad_token_id": 0},
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1},
    "gemma3n_text": {"num_kv_shared_layers": 1, "layer_types": ["full_attention"] * 3, "laurel_rank": 8}
    | {
        "hidden_size_per_layer_input": 16,
        "vocab_size_per_layer_input": VOCAB,
        "activation_sparsity_pattern": [0.0] * 3,
    },
    "gemma4_text": {"global_head_dim": 16, "head_dim": 8, "hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0},
    "gpt_neo": {"attention_types": [[["global", "local"], 1], [["global"], 1]], "window_size": 6},
    "gptj": {"rotary_dim": 4},
    "granitemoehybrid": {"layer_types": ["mamba", "attention", "mamba"], "mamba_n_groups": 1},
    "hunyuan_v1_dense": _HEAD,
    "hunyuan_v1_moe": _HEAD | {"moe_topk": 2, "num_experts": 4},
    "hunyuan_vl_text": _HEAD,
    "informer": _SERIES,
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "layoutlmv3": {"coordinate_size": 6, "shape_size": 4, "input_size": 32},
    "lfm2": {"layer_types": ["conv", "full_attention", "conv"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"], "num_dense_layers": 1},
    "lilt": {"channel_shrink_ratio": 4, "hidden_size": 48},
    "llama4_text": {"moe_layers": [2], "attention_chunk_size": 6},
    "maskformer-swin": _WINDOWS,
    "ministral": _HEAD,
    "mobilebert": {"intra_bottleneck_size": 32, "true_hidden_size": 32},
    "nemotron": _HEAD | {"num_key_value_heads": 2},
    "neomme": {},
    "qwen4_exp_text": _HEAD,
    "reformer": {"is_decoder": True, "axial_pos_shape": [8, 16], "axial_pos_embds_dim": [16, 16]},
    "siglip2_vision_model": {"num_patches": 16},
    "swin": _WINDOWS,
    "swin2sr": _WINDOWS,
    "swinv2": _WINDOWS,
    "time_series_transformer": _SERIES,
    "wav2vec2-bert": {"vocab_size": VOCAB, "feature_projection_input_dim": 16},
    "wav2vec2-conformer": {"vocab_size": VOCAB},
    "xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
    "zaya": {"num_experts_per_tok": 1},
}


def model_classes(type_: str) -> list[type[PreTrainedModel]]:
    """The classes that a checkpoint of this type may be opened as, the most likely first."""
    found: list[type[PreTrainedModel]] = []
    for mapping in (*_ORDER, *_REST):
        names = mapping.get(type_, ())
        for name in (names,) if isinstance(names, str) else names:
            cls = getattr(tf, name, None)
            if isinstance(cls, type) and issubclass(cls, PreTrainedModel) and cls not in found:
                found.append(cls)
    return found


def shrunk(config: PretrainedConfig, **more: Any) -> PretrainedConfig:
    """A config of the same class with few layers, heads and features, its sub-configs too."""
    new: dict[str, Any] = {}
    special = iter(range(VOCAB - 1, 0, -1))
    names = {field.name for field in dataclasses.fields(config)} | set(config.sub_configs)
    layers = next((getattr(config, n) for n in ("num_hidden_layers", "n_layer", "num_layers") if hasattr(config, n)), 0)
    for name in sorted(names):
        try:
            value = getattr(config, name, None)
        except Exception:  # an attribute that differs from layer to layer and says so
            continue
        if isinstance(value, PretrainedConfig):
            new[name] = shrunk(value)
        elif isinstance(value, bool) or value is None:
            continue
        elif isinstance(value, int):
            if name in _SIZES:
                new[name] = _SIZES[name]
            elif re.search(r"_token_(id|index)$", name):
                fixed = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
                new[name] = fixed.get(name) if name in fixed else next(special)
            elif name in ("num_key_value_heads", "num_kv_heads", "num_global_key_value_heads"):
                grouped = value < (getattr(config, "num_attention_heads", 0) or 0)
                new[name] = 2 if grouped and value > 1 else 1 if value == 1 else HEADS
        elif isinstance(value, dict) and "mrope_section" in value:
            turned = int(_SIZES["head_dim"] * value.get("partial_rotary_factor", 1.0)) // 2
            new[name] = {**value, "mrope_section": [turned - 2 * (turned // 3), turned // 3, turned // 3]}
        elif isinstance(value, (list, tuple)):
            if name == "eos_token_id":
                new[name] = 2
            elif isinstance(layers, int) and layers > 1 and len(value) == layers:
                kinds = list(dict.fromkeys(value))[:LAYERS]
                new[name] = type(value)((kinds * LAYERS)[:LAYERS])
            elif name in ("image_size", "patch_size") and len(value) == 2:
                new[name] = type(value)([_SIZES[name]] * 2)
    fixes = {**_FIXES.get(config.model_type, {}), **more}
    return type(config)(**{**new, **{k: v for k, v in fixes.items() if v is not ...}})


def tiny_config(type_: str) -> PretrainedConfig:
    return shrunk(getattr(tf, CONFIG_MAPPING_NAMES[type_])())


class TooLong(Exception):
    """A type took more than its time."""


@contextlib.contextmanager
def at_most(seconds: int) -> Iterator[None]:
    def ring(*_: Any) -> None:
        raise TooLong(f"more than {seconds} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def built(type_: str, seed: int = 0) -> PreTrainedModel:
    """The tiny model of a type, in eval mode and float32. `ValueError` says why there is none."""
    error: Exception = ValueError("it is part of another model and has no class of its own")
    for cls in model_classes(type_):
        try:
            return _made(cls, type_, seed)
        except TooLong:
            raise
        except Exception as failed:
            error = failed
    raise error


def _made(cls: type[PreTrainedModel], type_: str, seed: int) -> PreTrainedModel:
    with torch.device("meta"):
        size = sum(p.numel() for p in cls(tiny_config(type_)).parameters())
    if size > PARAMETERS:
        raise ValueError(f"{size / 1e6:.0f} million parameters, however small its config")
    torch.manual_seed(seed)
    model = cls(tiny_config(type_)).eval().float()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.15 if parameter.ndim > 1 else 0.05))
    return model


# Inputs

IDS = range(3, 45)  # no special token among them


def example(model: PreTrainedModel, batch: int = 2, length: int = 9, seed: int = 0) -> dict[str, torch.Tensor]:
    """Inputs that the model's forward takes: the first of some kinds that runs. `ValueError` if none does."""
    generator = torch.Generator().manual_seed(seed)
    error: Exception | None = None
    for shapes in _kinds(model, batch, length):
        inputs = {
            name: torch.randint(IDS.start, IDS.stop, shape, generator=generator)
            if name.endswith("_ids")
            else torch.randn(shape, generator=generator)
            for name, shape in shapes.items()
        }
        for name, value in inputs.items():
            if name == "grid_thw":
                inputs[name] = torch.tensor([[1, 4, 4]])
            elif name == "bbox":
                inputs[name] = torch.arange(1, 5).expand(value.shape)
            elif name.endswith("_mask"):
                inputs[name] = torch.ones_like(value)
        try:
            with torch.no_grad():
                model(**inputs)
            return inputs
        except TooLong:
            raise
        except Exception as failed:
            error = error or failed
    raise ValueError(f"no inputs found: {type(error).__name__}: {str(error).splitlines()[:1]}")


def _kinds(model: PreTrainedModel, batch: int, length: int) -> Iterator[dict[str, tuple[int, ...]]]:
    config, main = model.config, model.main_input_name
    names = _parameters(model)
    vision = next((c for n in ("vision_config", "image_config") if (c := getattr(config, n, None)) is not None), config)
    size = getattr(vision, "image_size", None) or 32
    height, width = (size, size) if isinstance(size, int) else size
    channels = getattr(vision, "num_channels", None) or getattr(vision, "in_channels", None) or 3
    channels = channels if isinstance(channels, int) else 3
    frames = getattr(vision, "num_frames", None) or 2
    audio = next((c for n in ("audio_config", "encoder_config") if (c := getattr(config, n, None)) is not None), config)
    mels = next(
        (
            v
            for n in (
                "num_mel_bins",
                "input_feat_per_channel",
                "feature_projection_input_dim",
                "input_dim",
                "feature_size",
            )
            if isinstance(v := getattr(audio, n, None), int)
        ),
        16,
    )
    time = 2 * (getattr(audio, "max_source_positions", None) or 64)
    decoder = {"decoder_input_ids": (batch, length - 2)} if "decoder_input_ids" in names else {}
    ids, image, video = (
        {"input_ids": (batch, length)},
        (batch, channels, height, width),
        (batch, frames, channels, height, width),
    )
    if "grid_thw" in names:
        patch = getattr(vision, "patch_size", 8)
        wide = channels * patch * patch * (getattr(vision, "temporal_patch_size", None) or 1)
        for name in {"hidden_states", "pixel_values"} & names:
            yield {name: (16, wide), "grid_thw": (1, 3)}
    if "bbox" in names:
        yield {**ids, "bbox": (batch, length, 4), **decoder}
    if main == "input_ids" or ("input_ids" in names and main not in names):
        yield {**ids, **decoder}
    if "pixel_values" in names:
        texts = [ids, {}] if "input_ids" in names else [{}]
        for text in texts:
            yield {"pixel_values": image, **text, **decoder}
            yield {"pixel_values": video, **text, **decoder}
    if main == "pixel_values_videos":
        yield {main: video}
        yield {main: (batch, 2 * frames, channels, height, width)}
    if main == "input_features" or "input_features" in names:
        text = ids if main == "input_ids" else {}
        for shape in ((batch, mels, time), (batch, 64, mels), (batch, 1, 64, mels), (batch, 100, mels)):
            yield {"input_features": shape, **decoder, **text}
    if main == "input_values" or "input_values" in names:
        length_ = getattr(config, "max_length", None) or 100
        for shape in ((batch, 4000), (batch, 1, 4000), (batch, length_, mels), (batch, 4 * length_, mels)):
            yield {"input_values": shape, **decoder}
    if "past_values" in names:
        channels = getattr(config, "num_input_channels", None) or 1
        yield {"past_values": (batch, getattr(config, "context_length", 32), channels)}
        past = getattr(config, "context_length", 32) + max(getattr(config, "lags_sequence", None) or [0])
        series: dict[str, tuple[int, ...]] = {"past_values": (batch, past), "past_observed_mask": (batch, past)}
        series["past_time_features"] = (batch, past, getattr(config, "num_time_features", 0))
        ahead = getattr(config, "prediction_length", None) or 4
        series |= {
            "future_values": (batch, ahead),
            "future_time_features": (batch, ahead, getattr(config, "num_time_features", 0)),
        }
        yield series
    if main == "input_ids":
        yield {**ids, **decoder}


def _parameters(model: PreTrainedModel) -> set[str]:
    return set(inspect.signature(model.forward).parameters)


# The check

TOLERANCE = 2e-4


@dataclasses.dataclass(frozen=True)
class Row:
    """What became of one part of one type. `state` is "clean", "in part", "refused", "wrong", "traceback" or "not built"."""

    type: str
    part: str
    state: str
    words: str = ""


def differ(a: torch.Tensor, b: torch.Tensor) -> float:
    """The largest difference, by the size of what is compared."""
    if a.shape != b.shape:
        return float("inf")
    return float((a - b).abs().max() / (1 + b.abs().max())) if a.numel() else 0.0


def checked(type_: str) -> list[Row]:
    """A row for each part that opens by itself, or one row for the whole."""
    if type_ in TOO_SLOW:
        return [Row(type_, "", "not built", "takes minutes on one core, however small")]
    try:
        with at_most(SECONDS):
            model = built(type_)
            inputs = example(model)
    except Exception as error:
        return [Row(type_, "", "not built", _one_line(error))]
    found: list[Row] = []
    for part in (None, *getattr(mh.model.layout, "parts_of", lambda _: ())(model)):
        try:
            with at_most(SECONDS):
                found.append(_row(type_, model, inputs, part))
        except TooLong as error:
            found.append(Row(type_, part or "", "not built", f"its check takes {error}"))
    if len(found) > 1 and found[0].state == "refused":  # the sentence that names the parts
        found = found[1:]
    return found


def _row(type_: str, model: PreTrainedModel, inputs: dict[str, torch.Tensor], part: Any) -> Row:
    try:
        opened = mh.open_model(model, part=part)
    except ManyheadsError as error:
        return Row(type_, part or "", "refused", str(error))
    except TooLong:
        raise
    except Exception as error:
        return Row(type_, part or "", "traceback", f"opening: {_one_line(error)}")
    if opened.plain is not model:
        try:
            inputs = example(opened.plain)
        except ValueError as error:
            return Row(type_, part or "", "not built", _one_line(error))
    if _drowns(opened, inputs):
        return Row(
            type_, part or "", "not built", "with random weights its stream is a million times what heads add to it"
        )
    refused, wrong = problems(opened, inputs)
    if wrong:
        state = "traceback" if all("Error" in word for word in wrong) else "wrong"
        return Row(type_, part or "", state, "; ".join(wrong))
    sites = [word for word in refused if not word.startswith("padding")]
    if sites:
        return Row(type_, part or "", "in part", "; ".join(sites))
    sides = [site for site in opened.proof.failed if site.startswith("padding")]
    words = [f"{' and '.join(sides)} is refused"] if sides else []
    if opened.proof.gated:
        words.append("a gate or a norm stands between pattern @ v and z")
    return Row(type_, part or "", "clean", "; ".join(words))


def _drowns(opened: HeadModel, inputs: dict[str, torch.Tensor]) -> bool:
    """Whether rounding hides what heads do: no check would fail then."""
    z, resid = Keep("z"), Keep("resid")
    with contextlib.suppress(ManyheadsError):
        opened.read(inputs, z, resid)
    sizes = [max((float(value.abs().max()) for value in keep.values.values()), default=1.0) for keep in (resid, z)]
    return sizes[0] > 1e6 * sizes[1]


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def problems(opened: HeadModel, inputs: dict[str, torch.Tensor]) -> tuple[list[str], list[str]]:
    """What is refused by name, and what is wrong, of all that can be read."""
    refused: list[str] = []
    wrong: list[str] = []
    for name, check in _CHECKS.items():
        try:
            said = check(opened, inputs)
        except ManyheadsError as error:
            refused.append(f"{name}: {error}")
        except TooLong:
            raise
        except Exception as error:
            wrong.append(f"{name}: {_one_line(error)}")
        else:
            if said:
                wrong.append(f"{name}: {said}")
    return refused, wrong


def _plain(opened: HeadModel, inputs: dict[str, torch.Tensor], **more: Any) -> Any:
    with torch.no_grad():
        return opened.plain(**inputs, **more)


def _first(output: Any) -> torch.Tensor:
    logits = getattr(output, "logits", None)
    return logits if isinstance(logits, torch.Tensor) else output[0]


def _logits(opened: HeadModel, inputs: dict[str, torch.Tensor]) -> str:
    plain = _first(_plain(opened, inputs))
    if differ(opened.logits(inputs), plain) > TOLERANCE:
        return "logits differ with nothing active"
    for site in ("z", "q", "k", "v", "attention", "attention_write", "mlp_write", "resid"):
        reader = ReadAttention(lambda call: call.pattern) if site == "attention" else Keep(site)  # type: ignore[arg-type]
        with contextlib.suppress(ManyheadsError):
            gap = differ(opened.read(inputs, reader), plain)
            if gap > TOLERANCE:
                return f"reading {site} moves the logits by {gap:.1e}"
    return ""


def _z(opened: HeadModel, inputs: dict[str, torch.Tensor]) -> str:
    caught: dict[int, torch.Tensor] = {}
    handles = [
        opened.layout.blocks[layer].projection.register_forward_hook(
            lambda _, __, output, layer=layer: caught.__setitem__(layer, _tensor(output))
        )
        for layer in _layers(opened)
    ]
    try:
        keep = Keep("z")
        opened.read(inputs, keep)
    finally:
        for handle in handles:
            handle.remove()
    if sorted(keep.values) != _layers(opened):
        return f"z of layers {sorted(keep.values)} only"
    for layer, z in keep.values.items():
        bias = opened.bias_O(layer)
        made = torch.einsum("...hd,hdm->...m", z, opened.W_O(layer)) + (0 if bias is None else bias)
        if (gap := differ(made.flatten(0, -2), caught[layer].flatten(0, -2))) > TOLERANCE:
            return f"sum of z W_O is not what the projection put out in layer {layer}, by {gap:.1e}"
    return ""


def _layers(opened: HeadModel) -> list[int]:
    """Layers that have heads."""
    return sorted({head.layer for head in opened.heads})


def _pattern(opened: HeadModel, inputs: dict[str, torch.Tensor]) -> str:
    patterns: dict[int, torch.Tensor] = {}
    products: dict[int, torch.Tensor] = {}
    keep = Keep("z")

    def see(call: Any) -> None:
        patterns[call.layer] = call.pattern
        value = call.value.repeat_interleave(call.pattern.shape[1] // call.value.shape[1], 1)
        products[call.layer] = (call.pattern @ value).transpose(1, 2)

    opened.read(inputs, ReadAttention(see), keep)
    if sorted(patterns) != _layers(opened):
        return f"patterns of layers {sorted(patterns)} only"
    for layer, pattern in patterns.items():
        rows = pattern.sum(-1)
        sinks = any("sink" in name for name, _ in opened.layout.blocks[layer].core.named_parameters())
        if not sinks and differ(rows, torch.ones_like(rows)) > TOLERANCE:
            return f"rows of the pattern do not sum to one in layer {layer}"
        z = keep.values[layer]
        made = products[layer]
        gap = differ(made.reshape(z.shape) if made.numel() == z.numel() else made, z)
        if gap > TOLERANCE and not opened.proof.gated:
            return f"pattern @ v is not z in layer {layer}, by {gap:.1e}"
    return _eager(opened, inputs, patterns)


def _eager(opened: HeadModel, inputs: dict[str, torch.Tensor], patterns: dict[int, torch.Tensor]) -> str:
    """Against `output_attentions`, where the model gives one pattern a layer of the shape that was read."""
    before = [(c, c._attn_implementation_internal) for c in _configs(opened.plain.config)]
    try:
        for config, _ in before:
            config._attn_implementation_internal = "eager"
        with torch.no_grad():
            output = opened.plain(**inputs, output_attentions=True)
    except Exception:
        return ""
    finally:
        for config, implementation in before:
            config._attn_implementation_internal = implementation
    for name in ("attentions", "encoder_attentions", "decoder_attentions", "cross_attentions"):
        given = getattr(output, name, None)
        if not isinstance(given, (tuple, list)):
            continue
        given = [a for a in given if isinstance(a, torch.Tensor)]
        ours = [patterns[layer] for layer in sorted(patterns)]
        if len(given) == len(ours) and all(a.shape == b.shape for a, b in zip(given, ours, strict=True)):
            gaps = [differ(a, b) for a, b in zip(ours, given, strict=True)]
            if max(gaps) <= TOLERANCE:
                return ""
            worst = f"patterns are not those of output_attentions, by {max(gaps):.1e}"
            if name == "attentions":
                return worst
    return ""


def _configs(config: Any) -> Iterator[Any]:
    yield config
    for name in getattr(config, "sub_configs", {}):
        if isinstance(sub := getattr(config, name, None), PretrainedConfig):
            yield from _configs(sub)


def _resid(opened: HeadModel, inputs: dict[str, torch.Tensor]) -> str:
    resid, n = Keep("resid"), opened.n_layers
    left: dict[int, tuple[torch.Tensor, ...]] = {}
    handles = [
        block.module.register_forward_hook(lambda _, __, out, at=at: left.__setitem__(at + 1, (_tensor(out).clone(),)))
        for at, block in enumerate(opened.layout.blocks)
    ]
    try:
        opened.read(inputs, resid)
    finally:
        for handle in handles:
            handle.remove()
    if sorted(resid.values) != list(range(n + 1)):
        return f"the residual stream of layers {sorted(resid.values)} only"
    try:
        output = _plain(opened, inputs, output_hidden_states=True)
    except Exception:
        return ""
    names = ("hidden_states", "encoder_hidden_states", "decoder_hidden_states")
    for name in names:
        given = getattr(output, name, None)
        if isinstance(given, (tuple, list)) and len(given) == n + 1 and given[0].shape == resid.values[0].shape:
            # The last may come after a norm; one in between before something that is added between layers (YOLOS).
            gaps = [min(differ(one, given[at]) for one in (resid.values[at], *left.get(at, ()))) for at in range(n)]
            if max(gaps) <= TOLERANCE:
                return ""
            if name == "hidden_states":
                return f"the residual stream is not output_hidden_states, by {max(gaps):.1e}"
    return ""


def _writes(opened: HeadModel, inputs: dict[str, torch.Tensor]) -> str:
    resid, attention, mlp = Keep("resid"), Keep("attention_write"), Keep("mlp_write")
    blocks, layers = opened.layout.blocks, _layers(opened)
    others: dict[tuple[int, int], torch.Tensor] = {}
    handles = [
        module.register_forward_hook(lambda _, __, out, at=(layer, i): others.__setitem__(at, _tensor(out).clone()))
        for layer in layers
        for i, (module, _) in enumerate(blocks[layer].additions)
    ]
    try:
        opened.read(inputs, resid, attention, mlp)
    finally:
        for handle in handles:
            handle.remove()
    for layer in layers:
        block, stream = blocks[layer], resid.values[layer]
        steps = block.additions or ((block.attention_write, None), (block.mlp_write, None))
        for i, (module, norm) in enumerate(steps):
            own = {id(block.attention_write): attention, id(block.mlp_write): mlp}.get(id(module))
            write = (
                others[layer, i].view_as(stream) * opened.layout.residual_scale if own is None else own.values[layer]
            )
            if write.shape != stream.shape:
                return f"layer {layer} writes {tuple(write.shape)}, its stream is {tuple(stream.shape)}"
            with torch.no_grad():
                stream = stream + write if norm is None else _tensor(norm(stream + write))
        after = resid.values[layer + 1]
        added = float((after - resid.values[layer]).abs().max())  # by the size of what was added, not of the stream
        gap = float((stream - after).abs().max()) / (added + 0.01 * float(after.abs().max()) + 1e-9)
        if gap > TOLERANCE:
            return f"resid + attention_write + mlp_write is not the next resid in layer {layer}, by {gap:.1e}"
    return ""


def _tensor(output: Any) -> torch.Tensor:
    return output if isinstance(output, torch.Tensor) else output[0]


def _zeroed(opened: HeadModel, inputs: dict[str, torch.Tensor]) -> str:
    plain = _first(_plain(opened, inputs))
    for layer in _layers(opened):
        projection = opened.layout.blocks[layer].projection
        handle = projection.register_forward_pre_hook(lambda _, args: (torch.zeros_like(args[0]), *args[1:]))
        try:
            mine = _first(_plain(opened, inputs))
        finally:
            handle.remove()
        every = [head for head in opened.heads if head.layer == layer]
        for mode in ("zero", "uniform"):
            with opened.editing(mh.Ablate(every, mode)):  # type: ignore[arg-type]
                edited = opened.logits(inputs)
            if mode == "zero" and (gap := differ(edited, mine)) > TOLERANCE:
                return (
                    f"ablating all heads of layer {layer} is not what zeroing the projection's input does, by {gap:.1e}"
                )
            if mode == "uniform" and not torch.isfinite(edited).all():
                return f"uniform attention in layer {layer} is not finite"
        if differ(mine, plain) == 0 and layer == _layers(opened)[0]:
            return f"zeroing the heads of layer {layer} changes nothing"
    return ""


def _swept(opened: HeadModel, inputs: dict[str, torch.Tensor]) -> str:
    """A sweep over a head of each layer is each of them ablated by itself."""
    heads = [max(head for head in opened.heads if head.layer == layer) for layer in _layers(opened)]
    metric = lambda logits: logits.flatten(1).double().mean(1)  # noqa: E731
    swept = opened.sweep(inputs, [mh.Ablate([head]) for head in heads], metric)
    for head, row in zip(heads, swept, strict=True):
        with opened.editing(mh.Ablate([head])):
            alone = metric(opened.logits(inputs))
        if (gap := differ(torch.as_tensor(row), alone)) > TOLERANCE:
            return f"ablating {head} in a sweep is not what it is by itself, by {gap:.1e}"
    return ""


def _padded(opened: HeadModel, inputs: dict[str, torch.Tensor]) -> str:
    """Each row of a batch padded on either side gives its own logits, as it does alone without padding."""
    if set(inputs) - {"input_ids", "decoder_input_ids"} or "attention_mask" not in _parameters(opened.plain):
        return ""
    ids, rest = inputs["input_ids"], {k: v for k, v in inputs.items() if k != "input_ids"}
    pad = getattr(opened.config.get_text_config(), "pad_token_id", None) or 0
    length = ids.shape[1]
    short = ids[:1, : length - 3]
    alone = _first(_plain(opened, {"input_ids": short, **{k: v[:1] for k, v in rest.items()}}))
    for side in ("right", "left"):
        where = slice(3, None) if side == "left" else slice(None, length - 3)
        batch, mask = ids.clone(), torch.ones_like(ids)
        batch[0], mask[0] = pad, 0
        batch[0, where], mask[0, where] = short[0], 1
        got = opened.logits({"input_ids": batch, "attention_mask": mask, **rest})[:1]
        got = got if rest else got[:, where] if got.ndim > 2 and got.shape[1] == length else got
        if got.shape == alone.shape and (gap := differ(got, alone)) > TOLERANCE:
            return f"a row padded on the {side} does not give its own logits, by {gap:.1e}"
    return ""


_CHECKS = {
    "logits": _logits,
    "z": _z,
    "attention": _pattern,
    "resid": _resid,
    "attention_write, mlp_write": _writes,
    "edits": _zeroed,
    "sweep": _swept,
    "padding": _padded,
}


# The table

_WORDS = {
    "clean": "opens",
    "in part": "in part",
    "refused": "refused",
    "wrong": "wrong",
    "traceback": "wrong",
    "not built": "not tried",
}


def table(rows: list[Row]) -> str:
    """docs/architectures.md: a line for each type and part."""
    tried = [row for row in rows if row.state != "not built"]
    types = {state: {row.type for row in tried if row.state == state} for state in _WORDS}
    rest = {row.type for row in tried} - types["clean"]
    bad = types["wrong"] | types["traceback"]
    lines = [
        "# Architectures",
        "",
        f"What opens of every config class of Transformers {tf.__version__}. Each is built tiny from its own config class,",
        "opened, and read at every site; what is read is compared with the plain model (`tests/zoo.py`). Printed by",
        "`python benchmarks/architectures.py`.",
        "",
        f"**{len(types['clean'])} types open with all identities** (at least one part of them), "
        f"{len(rest & types['in part'])} in part only,",
        f"{len(rest - types['in part'] - bad)} are refused in a sentence. {len(bad)} have a part that is wrong.",
        "",
        "| type | part | opens | which sites do not, or why not |",
        "| --- | --- | --- | --- |",
        *(
            f"| {row.type} | {row.part} | {_WORDS[row.state]} | {_cell(row.words)} |"
            for row in sorted(tried, key=_order)
        ),
        "",
        "## Not tried",
        "",
        "These cannot be built from their config class alone on a plain machine, or take inputs that only their own processor",
        "makes.",
        "",
        *(
            f"- {row.type} {row.part}: {_cell(row.words)}"
            for row in sorted(rows, key=_order)
            if row.state == "not built"
        ),
        "",
    ]
    return "\n".join(lines)


def _order(row: Row) -> tuple[str, str]:
    return row.type.lower(), row.part


def _cell(words: str) -> str:
    """The first 300 characters, without what differs from run to run and what a table cannot hold."""
    plain = re.sub(r"0x[0-9a-f]+", "...", " ".join(words.split())).replace("|", "/").replace("<", "(").replace(">", ")")
    plain = plain.replace("][", "]\\[")  # Markdown would take it for a link
    plain = re.sub(r",? ?\(?\b(by|error) [0-9.einfa+-]*[0-9]\)?", "", plain)  # numbers differ between machines
    return plain if len(plain) <= 300 else plain[:300] + " ..."
