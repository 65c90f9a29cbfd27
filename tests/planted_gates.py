"""A Llama set by hand whose heads are known: one says the answer, one denies it, one watches for a flag, the rest whisper.

Vocabulary: eight words 0-7, a flag 8, an end mark 9, and what may be said: REFUSE 10, COMPLY 11. Prompts are words (and flags)
and an end mark. Orthogonal coordinates: const 10 everywhere (so that norms change nothing), a one-hot of the word, of the flag
and of the end mark, what is to be said, and noise that nobody reads.
"""

import torch
from transformers import LlamaForCausalLM

import manyheads as mh
from manyheads.lab.small_llama import llama_config
from manyheads.tasks import Example, TaskBatch

WORDS, FLAG, END, REFUSE, COMPLY, VOCABULARY = 8, 8, 9, 10, 11, 12
CONST, IN, OUT, NOISE, WIDTH = 0, 1, 13, 25, 32  # where the coordinates begin
HEAD_DIM = 16


def planted(heads, *, seed=0, n_layers=2, n_heads=4, n_kv_heads=4, comply=0.0):
    """A model with the given heads; all others whisper into coordinates that nobody reads.

    `heads[layer, index]` is `(what, strength)`: "say" and "deny" write +-strength to the answer; where there is a flag, "watch"
    speaks for REFUSE and "excuse" for COMPLY. The answer of a prompt is its word. `comply` is how much the end mark itself
    speaks for COMPLY. "break" speaks for COMPLY everywhere, and twice as loud where nobody listens.
    """
    generator = torch.Generator().manual_seed(seed)
    config = llama_config(
        VOCABULARY,
        WIDTH,
        n_layers,
        n_heads,
        num_key_value_heads=n_kv_heads,
        head_dim=HEAD_DIM,
        rope_parameters={"rope_type": "default", "rope_theta": 1e30},
    )
    module = LlamaForCausalLM(config).eval()
    scale = (101 / WIDTH) ** 0.5  # the norm's denominator for a stream of usual length
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.fill_(scale) if "norm" in name else parameter.zero_()
        embedding = module.model.embed_tokens.weight
        embedding[:, CONST] = 10.0
        embedding[range(10), range(IN, IN + 10)] = 1.0
        embedding[END, OUT + COMPLY] = comply
        module.lm_head.weight[:, OUT : OUT + 12] = torch.eye(12)
        for layer, block in enumerate(module.model.layers):
            attention = block.self_attn
            q, k, v = (
                part.weight.view(-1, HEAD_DIM, WIDTH) for part in (attention.q_proj, attention.k_proj, attention.v_proj)
            )
            out = attention.o_proj.weight.view(WIDTH, n_heads, HEAD_DIM)
            for kv in range(n_kv_heads):
                v[kv, range(9), range(IN, IN + 9)] = 1.0
            for h in range(n_heads):
                what, strength = heads.get((layer, h), ("whisper", 0.3))
                if what == "whisper":
                    out[NOISE:, h] = strength * torch.randn(WIDTH - NOISE, HEAD_DIM, generator=generator)
                elif what in ("watch", "excuse"):
                    slow = HEAD_DIM // 2 - 1  # the rotary pair that hardly turns
                    q[h, slow, CONST], k[h * n_kv_heads // n_heads, slow, IN + FLAG] = 10.0, 4.0
                    out[OUT + (REFUSE if what == "watch" else COMPLY), h, FLAG] = strength
                elif what == "break":
                    out[OUT + COMPLY, h, range(8)], out[NOISE, h, range(8)] = strength, 2 * strength
                else:
                    out[range(OUT, OUT + 8), h, range(8)] = strength if what == "say" else -strength
    return mh.open_model(module)


def prompts(n, words=1, seed=0, flagged=None):
    """`n` prompts of `words` copies of one word and an end mark; the word is the answer.

    With `flagged`, that share of them hold a flag, and the answers are REFUSE and COMPLY.
    """
    generator = torch.Generator().manual_seed(seed)
    word = torch.randint(WORDS, (n,), generator=generator)
    ids = torch.cat([word[:, None].expand(-1, words), torch.full((n, 1), END)], 1).contiguous()
    answers = word
    if flagged is not None:
        marked = torch.rand(n, generator=generator) < flagged
        place = torch.randint(words, (n,), generator=generator)
        ids[torch.arange(n)[marked], place[marked]] = FLAG
        answers = torch.where(marked, REFUSE, COMPLY)
    return task_batch(ids, answers)


def task_batch(ids, answers):
    """Token ids and answers as a TaskBatch."""
    none = torch.full((len(ids),), -1)
    return TaskBatch(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        answer_ids=answers,
        foil_ids=none,
        corrupted_ids=None,
        corrupted_mask=None,
        corrupted_answer_ids=none,
        spans={},
        accepted_ids=[[int(a)] for a in answers],
        examples=[Example("", "")] * len(ids),
        dropped={},
    )
