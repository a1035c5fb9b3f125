"""Write the tiny Qwen3-MoE model that the laptop recipes train: its configuration and tokenizer, without weights.

    python tools/make_tiny_model.py [DIRECTORY]

The directory is `recipes/models/tiny_qwen3_moe` where none is given. About 0.9 million parameters, random when a run starts from
this directory.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from transformers import Qwen3MoeConfig

from megatron_gspo.data.tokenizer import build_byte_tokenizer

SHIPPED = Path(__file__).resolve().parents[1] / "recipes/models/tiny_qwen3_moe"


def write_tiny_model(directory: Path) -> None:
    """Write `config.json` and the tokenizer's files."""
    tokenizer = build_byte_tokenizer()
    tokenizer.save_pretrained(directory)
    config = Qwen3MoeConfig(
        architectures=["Qwen3MoeForCausalLM"],
        num_hidden_layers=8,
        hidden_size=64,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        intermediate_size=128,
        num_experts=16,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        norm_topk_prob=True,
        vocab_size=272,  # the tokenizer's 259, padded so that it divides by any tensor-parallel size up to 16
        max_position_embeddings=4096,
        rope_theta=10000.0,
        rms_norm_eps=1e-6,
        initializer_range=0.04,  # at this width the cold start learns from 0.04, and stalls from 0.02 and from 0.1
        tie_word_embeddings=False,
        dtype="float32",
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    config.save_pretrained(directory)


def main() -> None:
    """Write the model's directory and say where it is."""
    parser = argparse.ArgumentParser(description="Write the configuration and tokenizer of the tiny Qwen3-MoE model.")
    parser.add_argument("directory", nargs="?", type=Path, default=SHIPPED)
    directory = parser.parse_args().directory
    write_tiny_model(directory)
    print(f"Wrote {directory}")


if __name__ == "__main__":
    main()
