"""Chat templates in the manner of published ones, each cut down to what sets it apart, and tokenizers with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast, Qwen3Config

from dasd_megatron.models.tiny import character_tokenizer

DATED = (
    "{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
    "{% for m in messages %}<|user|>Today: {{ date_string }}\n{{ m['content'] }}<|end|>{% endfor %}<|assistant|>"
)
"""As Llama 3.2's and Granite's: the prompt begins with today's date."""

THINKING = (
    "{% for m in messages %}<|user|>{{ m.content }}<|end|>{% endfor %}"
    "{%- if add_generation_prompt %}\n    {{- '<|assistant|>' }}\n"
    "    {%- if enable_thinking is defined and enable_thinking is false %}\n        {{- '[]' }}\n    {%- endif %}\n"
    "{%- endif %}"
)
"""As Qwen3's: an empty thought stands in the prompt with enable_thinking=false."""

PARTS = (
    "{% for m in messages %}<|user|>{% for c in m['content'] %}{% if c['type'] == 'text' %}{{ c['text'] }}{% endif %}"
    "{% endfor %}<|end|>{% endfor %}<|assistant|>"
)
"""As those of vision-language models: of a text that is no list of parts nothing is shown."""


def tokenizer_with(template: object) -> PreTrainedTokenizerFast:
    """Return a tokenizer of characters with another chat template."""
    tokenizer = character_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def save_model_files(path: Path, template: object, **fields: Any) -> PreTrainedTokenizerFast:
    """Write the config, with changed ``fields``, and the tokenizer of a model without weights; return the tokenizer."""
    tokenizer = tokenizer_with(template)
    sizes = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "eos_token_id": tokenizer.eos_token_id,
    }
    path.mkdir()
    Qwen3Config(**sizes | fields).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return tokenizer
