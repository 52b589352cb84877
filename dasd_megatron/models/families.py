"""The table of model families that can be trained: all that the rest of the package needs to know of an architecture.

Reading of config.json, conversion, planning and the layers built in Megatron take their facts from :data:`FAMILIES`, so
nothing else compares ``model_type``. To support another family, write its :class:`Family` here and a preset under
``conf/model``; what Megatron cannot represent of it must be refused by ``read_hf_config``. Imports neither torch nor
transformers.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Family:
    """One architecture as config.json names it, and how its layers differ from those of the others."""

    model_type: str
    """``model_type`` in config.json."""
    architecture: str
    """The class that transformers makes of it."""
    qkv_bias: bool = False
    """The projections to queries, keys and values have biases."""
    qk_layernorm: bool = False
    """Queries and keys are normalised in each head."""
    heads_divide_width: bool = True
    """True: ``head_dim`` is ``hidden_size / num_attention_heads`` where config.json has none. False: the family has a
    number of its own."""
    refused_biases: tuple[str, ...] = ()
    """Switches in config.json of biases that Megatron's layers of this family do not have, and that would be lost."""
    rope_types: tuple[str, ...] = ("default", "linear", "llama3")
    """Kinds of RoPE scaling that Megatron-Core represents."""
    mbridge_module: str | None = None
    """Module of ``mbridge.models`` whose mapping of weights fits. None: the one that is named like ``model_type``."""


FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        Family("qwen2", "Qwen2ForCausalLM", qkv_bias=True),
        Family(
            "qwen3",
            "Qwen3ForCausalLM",
            qk_layernorm=True,
            heads_divide_width=False,
            refused_biases=("attention_bias",),
        ),
        Family("llama", "LlamaForCausalLM", refused_biases=("attention_bias", "mlp_bias")),
    )
}
"""Every family by its ``model_type``, in the order in which messages list them."""
