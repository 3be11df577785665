"""Families of transformers, as tiny models with random weights, computed under `longattn_full` and by their own eager code.

`python packages/attention/tests/transformers_families.py` runs all of it and writes docs/attention/transformers.md.
"""

import sys
from pathlib import Path

import torch

from longattn.attention import use_pattern
from longattn.patterncache import Full

PAGE = Path(__file__).resolve().parents[3] / "docs" / "attention" / "transformers.md"
SMALL = {
    "vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None,
}  # fmt: skip
SEQ2SEQ = {
    "vocab_size": 60, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 128, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": None, "decoder_start_token_id": 1, "forced_eos_token_id": None,
}  # fmt: skip
T5 = {
    "vocab_size": 60, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "pad_token_id": 0, "eos_token_id": None,
    "decoder_start_token_id": 0,
}  # fmt: skip
GPT2 = {"vocab_size": 60, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}  # fmt: skip

# family: (kind, settings, class of the model where the automatic one does not serve); kinds: decoder, encoder, seq2seq, image.
FAMILIES = {
    "llama": ("decoder", SMALL),
    "mistral": ("decoder", SMALL | {"sliding_window": 5}),
    "qwen3": ("decoder", SMALL | {"head_dim": 8}),
    "gemma2": ("decoder", SMALL | {"head_dim": 8}),
    "gemma3_text": ("decoder", SMALL | {"head_dim": 8, "sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]}),
    "gpt_oss": ("decoder", SMALL | {"head_dim": 8, "sliding_window": 5, "num_local_experts": 2, "num_experts_per_tok": 1}),
    "gpt2": ("decoder", GPT2),
    "gpt_neox": ("decoder", SMALL),
    "opt": ("decoder", {k: v for k, v in SMALL.items() if k not in ("num_key_value_heads", "intermediate_size")} | {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    "phi3": ("decoder", SMALL),
    "llama4_text": ("decoder", SMALL | {"head_dim": 8, "intermediate_size_mlp": 48, "attention_chunk_size": 4, "num_local_experts": 2, "num_experts_per_tok": 1, "layer_types": ["chunked_attention", "full_attention"]}),
    "stablelm": ("decoder", SMALL),
    "biogpt": ("decoder", {k: v for k, v in SMALL.items() if k != "num_key_value_heads"}),
    "bloom": ("decoder", {"vocab_size": 60, "hidden_size": 32, "n_layer": 2, "n_head": 4, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}),
    "falcon": ("decoder", {k: v for k, v in SMALL.items() if k != "intermediate_size"}),
    "mpt": ("decoder", {"vocab_size": 60, "d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 128}),
    "gpt_neo": ("decoder", {"vocab_size": 60, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]], "window_size": 4, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}),
    "xglm": ("decoder", {"vocab_size": 60, "d_model": 32, "ffn_dim": 48, "num_layers": 2, "attention_heads": 4, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}),
    "deepseek_v2": ("decoder", SMALL | {"num_key_value_heads": 4, "n_routed_experts": 2, "num_experts_per_tok": 1, "n_group": 1, "topk_group": 1, "kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8, "moe_intermediate_size": 16}),
    "deepseek_v3": ("decoder", SMALL | {"num_key_value_heads": 4, "n_routed_experts": 2, "num_experts_per_tok": 1, "n_group": 1, "topk_group": 1, "kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8, "moe_intermediate_size": 16}),
    "bert": ("encoder", SMALL),
    "roberta": ("encoder", SMALL | {"pad_token_id": 1}),
    "electra": ("encoder", SMALL | {"embedding_size": 32}),
    "albert": ("encoder", SMALL | {"embedding_size": 32}),
    "distilbert": ("encoder", {"vocab_size": 60, "dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4, "pad_token_id": 0}),
    "modernbert": ("encoder", SMALL | {"local_attention": 4, "layer_types": ["full_attention", "sliding_attention"]}),
    "layoutlmv3": ("encoder", SMALL | {"visual_embed": False, "coordinate_size": 4, "shape_size": 8}),
    "mpnet": ("encoder", SMALL),
    "roformer": ("encoder", SMALL),
    "convbert": ("encoder", SMALL | {"embedding_size": 32}),
    "nystromformer": ("encoder", SMALL | {"segment_means_seq_len": 8, "num_landmarks": 4}),
    "deberta-v2": ("encoder", SMALL),
    "xlnet": ("encoder", {"vocab_size": 60, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48}),
    "big_bird": ("encoder", SMALL | {"block_size": 4, "num_random_blocks": 1, "attention_type": "original_full"}),
    "longformer": ("encoder", SMALL | {"attention_window": 4}),
    "bart": ("seq2seq", SEQ2SEQ),
    "mbart": ("seq2seq", SEQ2SEQ),
    "pegasus": ("seq2seq", SEQ2SEQ),
    "marian": ("seq2seq", SEQ2SEQ | {"decoder_vocab_size": 60}),
    "blenderbot": ("seq2seq", SEQ2SEQ),
    "m2m_100": ("seq2seq", SEQ2SEQ),
    "plbart": ("seq2seq", SEQ2SEQ),
    "t5": ("seq2seq", T5),
    "mt5": ("seq2seq", T5),
    "umt5": ("seq2seq", T5),
    "longt5": ("seq2seq", T5 | {"local_radius": 3}),
    "switch_transformers": ("seq2seq", T5 | {"num_experts": 2, "num_decoder_layers": 2, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1}),
    "led": ("seq2seq", {k: v for k, v in SEQ2SEQ.items() if k != "max_position_embeddings"} | {"attention_window": 4, "max_encoder_position_embeddings": 128, "max_decoder_position_embeddings": 128}),
    "nllb-moe": ("seq2seq", SEQ2SEQ | {"num_experts": 2, "expert_capacity": 64}),
    "bigbird_pegasus": ("seq2seq", SEQ2SEQ | {"attention_type": "original_full", "block_size": 4}),
    "vit": ("image", {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 8, "patch_size": 4}),
    "deit": ("image", {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 8, "patch_size": 4}),
}  # fmt: skip
DEFAULT = ("mistral", "deepseek_v3", "bloom", "bert", "deberta-v2", "bart", "t5", "vit")
"""One of each kind, in every run of the tests."""

CASES = ("plain", "padded left", "padded right", "static cache", "beams", "compile", "train")


def build(family, implementation):
    """The same random weights under each implementation."""
    import transformers

    kind, settings = FAMILIES[family]
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(family, **settings)
    auto = {"decoder": "AutoModelForCausalLM", "seq2seq": "AutoModelForSeq2SeqLM"}.get(kind, "AutoModel")
    model = getattr(transformers, auto).from_config(config, attn_implementation="eager").eval()
    torch.manual_seed(1)
    for parameter in model.parameters():
        # Weights of a model's own initialisation are so small that attention would hardly show.
        parameter.data.add_(0.15 * torch.randn_like(parameter))
    if implementation != "eager":
        use_pattern(model, Full())
    return model


def inputs(family, padding=None):
    """Keywords of a call, and which rows of its output are of real tokens."""
    kind = FAMILIES[family][0]
    seed = torch.Generator().manual_seed(2)
    if kind == "image":
        return {"pixel_values": torch.randn(2, 3, 8, 8, generator=seed)}, None
    ids = torch.randint(4, 60, (2, 16), generator=seed)
    mask = torch.ones_like(ids)
    if padding == "left":
        mask[0, :6] = 0
    if padding == "right":
        mask[0, -6:] = 0
    found = {"input_ids": ids, "attention_mask": mask} if padding else {"input_ids": ids}
    if kind == "seq2seq":
        found["decoder_input_ids"] = torch.randint(4, 60, (2, 9), generator=seed)
        return found, None
    return found, mask.bool() if padding else None


def output(model, given, rows):
    """What a call computes, of real tokens."""
    found = model(**given)
    found = found.logits if "logits" in found else found.last_hidden_state
    return found if rows is None else found[rows]


def generated(model, given, **options):
    """Tokens and the scores they were chosen by."""
    found = model.generate(
        **{k: v for k, v in given.items() if k != "decoder_input_ids"}, max_new_tokens=8, do_sample=False, disable_compile=True,
        return_dict_in_generate=True, output_scores=True, **options,
    )  # fmt: skip
    return [found.sequences, *found.scores]


def computed(family, case, implementation):
    """What one case computes, as a list of tensors; None where the family has no such case."""
    kind = FAMILIES[family][0]
    padding = {
        "padded left": "left",
        "padded right": "right",
        "static cache": "left",
        "beams": "left",
        "compile": "left",
    }.get(case)
    if (kind == "image" and padding and case != "compile") or (
        case in ("static cache", "beams") and kind in ("encoder", "image")
    ):
        return None
    model, (given, rows) = build(family, implementation), inputs(family, padding)
    if case == "static cache":
        return generated(model, given, cache_implementation="static")
    if case == "beams":
        return generated(model, given, num_beams=2)
    if case == "train":
        model.train()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
            for name in (
                "dropout",
                "attention_dropout",
                "dropout_prob",
                "layerdrop",
                "activation_dropout",
                "resid_dropout",
            ):
                if isinstance(getattr(module, name, None), float):
                    setattr(module, name, 0.0)
        output(model, given, rows).square().mean().backward()
        return [p.grad for p in model.parameters() if p.grad is not None]
    if case == "compile":
        torch._dynamo.reset()
        model = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        return [output(model, given, rows)]


ERRORS = (ValueError, TypeError, RuntimeError, NotImplementedError, AttributeError, LookupError)
"""What a model's own code may raise where it cannot do a case."""


def verdict(family, case):
    """Equal, refused with its reason, or - where eager has no such case; else how far off it is."""
    try:
        expected = computed(family, case, "eager")
    except ERRORS:
        return "-"
    if expected is None:
        return "-"
    try:
        found = computed(family, case, "longattn")
    except ValueError as error:
        return f"refused: {error}"
    if [x.shape for x in found] != [x.shape for x in expected]:
        return "other shapes"
    off = [0.0]
    for ours, theirs in zip(found, expected, strict=True):
        both = ours.isfinite() & theirs.isfinite()
        if both.any():
            off.append(((ours - theirs)[both].abs().max() / (1 + theirs[both].abs().max())).item())
    return "equal" if max(off) < 1e-4 else f"off by {max(off):.2g}"


def page(rows):
    """The page, from verdicts by family and case."""
    reasons = sorted({said for row in rows.values() for said in row.values() if said.startswith("refused")})
    letters = {said: f"r{at}" for at, said in enumerate(reasons, 1)}
    lines = ["| " + " | ".join(["family", *CASES]) + " |", "| " + " | ".join(["---"] * (1 + len(CASES))) + " |"]
    for family, row in rows.items():
        lines.append("| " + " | ".join([f"`{family}`", *(letters.get(row[case], row[case]) for case in CASES)]) + " |")
    table, notes = "\n".join(lines), "\n".join(f"* {letter}: {said}" for said, letter in letters.items())
    return f"""# Models of transformers under a pattern

Generated by `python packages/attention/tests/transformers_families.py` from what it ran; a test runs some of it every time, all of it every
night, and holds this page to what comes out.

Each family is a tiny model with random weights, given `use_pattern(model, Full())`, and compared with its own eager code: `equal` is within
1e-4 of it, in outputs of real tokens, in generated tokens and the scores they were chosen by, in gradients. `-` is what a family does not
have, or its eager code cannot do. Whatever else is refused, with the reason below. Compiled is the padded call, in one graph. A model that
is not listed is no less served: `use_pattern` refuses where a layer does not call its attention function.

{table}

{notes}
"""


def rows_of(text):
    """Verdicts by family and case, from the page."""
    notes = dict(line[2:].split(": ", 1) for line in text.splitlines() if line.startswith("* r"))
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| `")]
    return {
        family.strip("`"): {case: notes.get(said, said) for case, said in zip(CASES, row, strict=True)}
        for family, *row in cells
    }


if __name__ == "__main__":
    known = rows_of(PAGE.read_text(encoding="utf-8")) if PAGE.exists() else {}
    for name in sys.argv[1:] or FAMILIES:
        known[name] = {case: verdict(name, case) for case in CASES}
    PAGE.write_text(page({name: known[name] for name in FAMILIES if name in known}), encoding="utf-8")
