"""The rules of a model's generation config while drafting: each is applied as plain `generate` applies it, or refused.

Rules that change logits are Transformers' own processors, made for each row as if it were alone and without padding. What
ends a row are token ids, strings and the clock. A setting that is neither applied nor known to leave every token as it is,
such as one of a later version of Transformers, is an error that names it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    GenerationMixin,
    LogitsProcessorList,
    StopStringCriteria,
    SynthIDTextWatermarkingConfig,
)

from manyheads.draft.core.target import Target
from manyheads.errors import InputError, UnsupportedError
from manyheads.model.headmodel import HeadModel
from manyheads.model.inputs import unwrapped

_SAMPLING = (
    "temperature top_k top_p min_p top_h typical_p epsilon_cutoff eta_cutoff"  # in the order of `generate`
).split()
_OF_LOGITS = (
    "sequence_bias encoder_repetition_penalty repetition_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size "
    "bad_words_ids min_length min_new_tokens forced_bos_token_id forced_eos_token_id remove_invalid_values "
    "exponential_decay_length_penalty suppress_tokens begin_suppress_tokens watermarking_config renormalize_logits"
).split()
_OF_THE_CALL = "max_length max_new_tokens do_sample eos_token_id stop_strings max_time".split()
# Memory, speed, what is reported, tokens that only padding or an empty prompt needs, and settings of beams and assistants,
# which are at work only with what `_OFF` names or with an assistant.
_SAME_TOKENS = (
    "use_cache cache_implementation cache_config max_cache_len prefill_chunk_size compile_config disable_compile low_memory "
    "output_attentions output_hidden_states output_scores output_logits return_dict_in_generate "
    "pad_token_id bos_token_id decoder_start_token_id transformers_version early_stopping length_penalty "
    "num_assistant_tokens num_assistant_tokens_schedule assistant_confidence_threshold prompt_lookup_num_tokens "
    "max_matching_ngram_size assistant_early_exit assistant_lookbehind target_lookbehind assistant_ensemble_weight "
    "speculation_type use_mtp"
).split()
_KNOWN = frozenset([*_SAMPLING, *_OF_LOGITS, *_OF_THE_CALL, *_SAME_TOKENS])
# The values at which other settings do nothing, beside None and False.
_OFF = {
    "num_beams": 1,
    "num_beam_groups": 1,
    "num_return_sequences": 1,
    "guidance_scale": 1,
    "penalty_alpha": 0,
    "diversity_penalty": 0,
}
# The settings of `draft.generate` that stand for one of the config's. Its temperature is an argument: greedy, unless given.
_ARGUMENTS = {
    "top_k": "top_k",
    "top_p": "top_p",
    "repetition_penalty": "repetition_penalty",
    "no_repeat_ngram": "no_repeat_ngram_size",
}


@dataclass(frozen=True)
class Ends:
    """What ends a row: one of `ids`, or a string that `strings` finds to end with the text's last token; and `seconds`."""

    ids: frozenset[int]
    strings: Callable[[Tensor, None], Tensor] | None = None
    seconds: float | None = None

    def here(self, text: Sequence[int]) -> bool:
        """Whether the text ends with its last token."""
        if text[-1] in self.ids:
            return True
        return self.strings is not None and bool(self.strings(torch.tensor([list(text)]), None)[0])


def generation_config(model: HeadModel) -> GenerationConfig:
    """The model's own, or an empty one. `UnsupportedError` names settings that drafting cannot follow."""
    module = unwrapped(model.plain)
    if any(getattr(type(module), name) is not getattr(GenerationMixin, name) for name in ("generate", "_sample")):
        raise UnsupportedError(
            f"{type(module).__name__} has a generate of its own, whose rules drafting does not know."
        )
    own = getattr(module, "generation_config", None)
    config = GenerationConfig() if own is None else copy.deepcopy(own)
    known = vars(GenerationConfig())  # `generate` does not look at others, which some checkpoints have
    wrong = [
        f"{name}={value}"
        for name, value in vars(config).items()
        if name in known and not name.startswith("_") and name not in _KNOWN
        # Compared by type as well: 0 is no False here, and a guidance scale of 0 is at work.
        if not (value is None or value is False or (name in _OFF and value == _OFF[name]))
    ]
    if config.cache_implementation == "quantized":
        wrong.append("cache_implementation=quantized")
    if isinstance(config.watermarking_config, SynthIDTextWatermarkingConfig):
        wrong.append("watermarking_config=SynthID")
    if wrong:
        raise UnsupportedError(
            f"this model's generation config sets {', '.join(wrong)}, which drafting cannot follow; draft with a "
            "generation config without it, or use generate."
        )
    return config


def ends_of(model: HeadModel, config: GenerationConfig, stop: Sequence[int | str] | str | None) -> Ends:
    """What ends a row: `stop` (see `draft.generate`), and what the config says in its place or beside it."""
    given = [stop] if isinstance(stop, str) else list(stop or [])
    if any(isinstance(end, bool) or not isinstance(end, int | str) or end == "" for end in given):
        raise InputError(f"stop is {given}; give token ids, or strings such as ['Sunday'].")
    ids = [end for end in given if isinstance(end, int)]
    strings = [end for end in given if isinstance(end, str)]
    nothing = stop is not None and not given
    if not ids and not nothing:
        ids = _listed(config.eos_token_id)
    if not strings and not nothing:
        strings = _listed(config.stop_strings)
    if strings and model.tokenizer is None:
        raise InputError(
            f"{strings} end the text, and this model was opened without a tokenizer; open it with tokenizer=."
        )
    criteria: Any = StopStringCriteria(stop_strings=strings, tokenizer=model.tokenizer) if strings else None
    return Ends(frozenset(ids), criteria, config.max_time)


def governed(
    model: HeadModel,
    ends: Ends,
    config: GenerationConfig,
    sampling: Mapping[str, Any],
    prompts: Sequence[list[int]],
    max_new_tokens: int,
    device: torch.device,
) -> Target:
    """The target of a generation that continues `prompts`: the settings in `sampling`, else the config's, and all its rules.

    `InputError` for unknown settings and for values that Transformers refuses; `UnsupportedError` for a watermark where
    tokens are sampled.
    """
    given: dict[str, Any] = {
        name: getattr(config, of) for name, of in _ARGUMENTS.items() if getattr(config, of) is not None
    }
    if given.get("no_repeat_ngram", 0) < 0:
        del given["no_repeat_ngram"]  # for `generate` that is none
    try:
        target = Target(**{**given, **sampling})
    except TypeError as error:
        known = ", ".join(name for name, part in Target.__dataclass_fields__.items() if part.repr)
        raise InputError(f"{str(error).split('__init__() ')[-1]}; sampling knows {known}.") from None
    for name, of in _ARGUMENTS.items():
        setattr(config, of, getattr(target, name))
    if config.watermarking_config is not None and not target.greedy:
        raise UnsupportedError(
            "this model's generation config sets a watermark, which drafting follows at temperature 0 only."
        )
    eos = torch.tensor(sorted(ends.ids), device=device) if ends.ids else None
    if eos is None:
        config.exponential_decay_length_penalty = None  # it makes the end likelier, and there is none
    try:
        for prompt in prompts:
            own = copy.deepcopy(config)
            own.do_sample, own._eos_token_tensor = False, eos
            own.max_length = len(prompt) + max_new_tokens
            target.rules.append(_processors(model, own, prompt, device, target.processors))
        if not target.greedy:
            settings = {name: getattr(config, name) for name in _SAMPLING} | {"temperature": float(target.temperature)}
            own = GenerationConfig(do_sample=True, **settings)
            target.warpers = _processors(model, own, prompts[0], device)
    except (ValueError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"this model's generation config cannot be applied: {reason}") from error
    return target.on(device)


def _processors(
    model: HeadModel, config: GenerationConfig, prompt: list[int], device: torch.device, more: Sequence[Any] = ()
) -> LogitsProcessorList:
    module = unwrapped(model.plain)
    made: LogitsProcessorList = module._get_logits_processor(
        generation_config=config,
        input_ids_seq_length=len(prompt),
        encoder_input_ids=torch.tensor([prompt], device=device),
        logits_processor=LogitsProcessorList(more),
        device=device,
        model_kwargs={},
    )
    return made


def _listed(value: Any) -> list[Any]:
    return [] if value is None else list(value) if isinstance(value, list | tuple) else [value]
