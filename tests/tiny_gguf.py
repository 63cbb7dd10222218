"""A tiny byte-level Qwen2 as a GGUF file that llama.cpp reads, with the very weights of the PyTorch model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
from odd_models import BYTE_VOCAB, BYTES
from tiny_models import POSITIONS, qwen2

END = 0
"""The end-of-text token's id."""

_LAYER = {
    "input_layernorm.weight": "attn_norm.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    **{f"self_attn.{x}_proj.{kind}": f"attn_{x}.{kind}" for x in "qkv" for kind in ("weight", "bias")},
}


def write_gguf(path: Path) -> Any:
    """Write the file; the model it holds."""
    model = qwen2(vocab=BYTE_VOCAB)
    model.generation_config.eos_token_id = END
    config = model.config
    writer = gguf.GGUFWriter(path, "qwen2")
    writer.add_context_length(POSITIONS)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([*BYTES, "Ġa", "Ġb"])
    writer.add_token_types([gguf.TokenType.CONTROL, *[gguf.TokenType.NORMAL] * (BYTE_VOCAB - 1)])
    writer.add_token_merges(["Ġ a", "Ġ b"])
    writer.add_eos_token_id(END)
    writer.add_add_bos_token(False)
    for name, tensor in model.state_dict().items():
        found = _name(name)
        if found is not None:
            writer.add_tensor(found, np.ascontiguousarray(tensor.float().numpy()))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


def _name(name: str) -> str | None:
    fixed = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
    if name in fixed:
        return fixed[name]
    if not name.startswith("model.layers."):
        return None  # the head, which is tied
    _, _, layer, rest = name.split(".", 3)
    return f"blk.{layer}.{_LAYER[rest]}"
