"""A Llama of transformers with a dilated pattern: training, generation, saving: `./run python examples/llama.py`.

The model is tiny and has random weights; a pretrained one is used in the same way.
"""

import argparse
import tempfile

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from longattn.attention import register_with_transformers, use_pattern
from longattn.patterncache import Dilated, Window


def main(argv: list[str] | None = None) -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--steps", type=int, default=20)
    given = parser.parse_args(argv)

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2 * given.length,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config)
    pattern = Dilated((given.length,), (8,)) + Window(16)
    for name in use_pattern(model, pattern):
        print(f"{name} attends by {pattern}")

    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    losses = []
    for _ in range(given.steps):
        start = torch.randint(1, 32, (4, 1))
        tokens = 1 + (start + torch.arange(given.length)) % 31  # counts up, modulo 31
        loss = model(tokens, labels=tokens).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    print(f"loss {losses[0]:.2f} -> {losses[-1]:.2f}")
    assert losses[-1] < 0.8 * losses[0]

    model.eval()
    prompts = torch.tensor([[0, 0, 3, 4, 5], [8, 9, 10, 11, 12]])  # the first is padded on the left
    options = {"attention_mask": prompts != 0, "max_new_tokens": 6, "do_sample": False}
    generated = model.generate(prompts, **options)
    alone = model.generate(prompts[:1, 2:], max_new_tokens=6, do_sample=False)
    assert torch.equal(generated[0, 2:], alone[0]), "a padded prompt generates what it generates alone"
    print(f"generated: {generated[:, 5:].tolist()}")

    register_with_transformers()  # before a checkpoint that has a pattern is loaded
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        again = LlamaForCausalLM.from_pretrained(folder).eval()
    torch.testing.assert_close(again(prompts[1:]).logits, model(prompts[1:]).logits)
    print("saved and loaded, with its pattern")


if __name__ == "__main__":
    main()
