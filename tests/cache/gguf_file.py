"""A GGUF file of a small Llama, with blocks of 8 bits and the byte tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ddk_cache.testing import VOCAB, byte_tokenizer

NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def write_gguf(model: Path, path: Path) -> Path:
    """Write the checkpoint of a Llama with tied embeddings as a GGUF file."""
    import gguf
    from safetensors.numpy import load_file
    from transformers import LlamaConfig

    config = LlamaConfig.from_pretrained(model)
    out = gguf.GGUFWriter(path, "llama")
    out.add_context_length(config.max_position_embeddings)
    out.add_embedding_length(config.hidden_size)
    out.add_block_count(config.num_hidden_layers)
    out.add_feed_forward_length(config.intermediate_size)
    out.add_head_count(config.num_attention_heads)
    out.add_head_count_kv(config.num_key_value_heads)
    out.add_layer_norm_rms_eps(config.rms_norm_eps)
    out.add_rope_dimension_count(config.head_dim)
    out.add_vocab_size(VOCAB)
    write_tokenizer(out)
    eight = gguf.GGMLQuantizationType.Q8_0
    for name, tensor in load_file(model / "model.safetensors").items():
        where, _, rest = name.removesuffix(".weight").removeprefix("model.layers.").partition(".")
        if not where.isdigit():
            kind = "token_embd" if "embed_tokens" in name else "output_norm"
            out.add_tensor(f"{kind}.weight", tensor)
            continue
        if "q_proj" in rest or "k_proj" in rest:  # rotary pairs lie side by side in GGUF
            heads = config.num_attention_heads if "q_proj" in rest else config.num_key_value_heads
            pairs = tensor.reshape(heads, 2, -1, tensor.shape[1])
            tensor = pairs.swapaxes(1, 2).reshape(tensor.shape)
        place = f"blk.{where}.{NAMES[rest]}.weight"
        if tensor.ndim == 1:
            out.add_tensor(place, tensor)
        else:
            out.add_tensor(place, gguf.quants.quantize(tensor, eight), raw_dtype=eight)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    return path


def write_tokenizer(out: Any) -> None:
    """Write the byte tokenizer, with one merge, which a reader of GGUF expects."""
    ids = byte_tokenizer().get_vocab()
    tokens = [*sorted(ids, key=ids.__getitem__), "ab"]
    out.add_tokenizer_model("gpt2")
    out.add_token_list(tokens)
    out.add_token_types([1] * len(tokens))
    out.add_token_merges(["a b"])
    out.add_bos_token_id(0)
    out.add_eos_token_id(0)
