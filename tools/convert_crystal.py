"""Write LLM360's CrystalCoder, once, as a directory with the names that this repository reads.

    python tools/convert_crystal.py LLM360/CrystalCoder hub/crystal

Names and shapes are those of LLM360's conversion (crystalcoder-train, finetune/Megatron-LM).
"""
import re
import shutil
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))
from torch import Tensor  # noqa: E402

from checkpoint import hugging_face_config, read_tensors, write_safetensors  # noqa: E402
from configs import Config, UserError, run_command, with_recorded  # noqa: E402
from data import read_json, write_json  # noqa: E402
from model import meta_model  # noqa: E402

STEMS = {"transformer.wte": "model.embed_tokens", "transformer.ln_f": "model.norm"}
LAYER_STEMS = {"ln_1": ["input_layernorm"], "ln_2": ["post_attention_layernorm"],
               "attn.c_attn": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
               "attn.c_proj": ["self_attn.o_proj"], "mlp.c_fc2": ["mlp.gate_proj"],
               "mlp.c_fc": ["mlp.up_proj"], "mlp.c_proj": ["mlp.down_proj"], "attn": []}
SETTINGS = {"n_embd": "hidden_size", "n_inner": "intermediate_size", "n_layer": "num_hidden_layers",
            "n_head": "num_attention_heads", "vocab_size": "vocab_size", "rotary_dim": "rotary_dim",
            "layer_norm_epsilon": "rms_norm_eps", "tie_word_embeddings": "tie_word_embeddings",
            "mup_embeddings_scale": "embedding_scale", "mup_output_alpha": "logit_scale"}


def convert_config(theirs: dict[str, Any]) -> Config:
    """The settings of a CrystalCoder's config.json, by our names."""
    if (theirs["activation_function"], theirs["position_embedding_type"]) != ("swiglu", "rotary"):
        raise UserError("Only a CrystalCoder with SwiGLU and rotary positions can be converted.")
    ours = {our: theirs[their] for their, our in SETTINGS.items()} | {
        "num_key_value_heads": 0, "seq_len": theirs.get("n_positions", 2048), "norm": "layernorm",
        "bias": True, "rotary_interleaved": True,
        "attention_scale_power": 1.0 if theirs["mup_scale_qk_dot_by_d"] else 0.5,
        "base_hidden_size": round(theirs["mup_width_scale"] * theirs["n_embd"])}
    return with_recorded(Config(), ours)


def convert_tensor(name: str, values: Tensor) -> list[tuple[str, Tensor]]:
    """CrystalCoder's tensor as ours, float32: three of q, k and v, none of attention's mask."""
    stem, kind = name.rsplit(".", 1)  # kind: weight, bias
    match = re.fullmatch(r"transformer\.h\.(\d+)\.(.+)", stem)
    if not match:
        return [(f"{STEMS.get(stem, stem)}.{kind}", values.float())]
    names = [f"model.layers.{match[1]}.{our}.{kind}" for our in LAYER_STEMS[match[2]]]
    values = values.float().T if values.dim() == 2 else values.float()  # (in, out) -> (out, in)
    # q, k and v are one below another; a mask may have no dimension at all
    return list(zip(names, values.chunk(len(names)))) if names else []


def main(argv: list[str]) -> None:
    if len(argv) != 2 or not Path(argv[0], "config.json").is_file():
        raise UserError("Give the directory of CrystalCoder's weights, and a new directory.")
    source, out = map(Path, argv)
    theirs, weight_map = read_json(source / "config.json"), {}
    model = meta_model(convert_config(theirs))
    out.mkdir(parents=True)  # an error if it exists
    for i, (name, values) in enumerate(read_tensors(source)):  # a file for each: little memory
        hashes = write_safetensors(out / f"model-{i}.safetensors", convert_tensor(name, values))
        weight_map |= dict.fromkeys(hashes, f"model-{i}.safetensors")
    write_json(out / "model.safetensors.index.json", {"weight_map": weight_map})
    for file in source.glob("*token*.json"):
        shutil.copy(file, out)
    write_json(out / "config.json", hugging_face_config(model, theirs["eos_token_id"]))  # the last


if __name__ == "__main__":
    run_command(main)
