"""Train the small language model that `small_llama` measures on: Python's own standard library, minutes on a CPU.

    python -m benchmarks.small_llama_train DIR [--steps 1000] [--seed 0]

A Llama of 6 layers and 256 channels (4.8 M weights in its 42 linears) with 4096 byte-pair tokens of its own, AdamW, in
bfloat16 where that is fast. Every tenth module of the library is left out, for calibration and test. The text is that
of the Python that runs this, so weights repeat on one machine, one Python and one torch, and elsewhere in quality. The
loss on what was left out goes into training.json beside the model, which is a folder as transformers writes it.
"""

from __future__ import annotations

import argparse
import json
import math
import sysconfig
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

TOKENS = 256  # of a window
BATCH = 16
RATE = 2e-3
WARMUP = 100
VOCABULARY = 4096
_LEFT_OUT = 10  # one in so many modules


def modules(*, left_out: bool) -> list[str]:
    """The text of the library's modules, tests and packages that are installed into it aside."""
    root = Path(sysconfig.get_path("stdlib"))
    paths = sorted(path for path in root.rglob("*.py") if not {"test", "tests", "site-packages"} & set(path.parts))
    return [
        path.read_text(encoding="utf-8", errors="replace")
        for number, path in enumerate(paths)
        if (number % _LEFT_OUT == 0) == left_out
    ]


def make_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Byte pairs of these texts."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=special, initial_alphabet=alphabet)
    made.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>", pad_token="</s>")


def windows(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> Tensor:
    """All texts, one after the other, as [windows, TOKENS]."""
    ids = [number for text in texts for number in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]]
    count = len(ids) // TOKENS
    return torch.tensor(ids[: count * TOKENS]).view(count, TOKENS)


def loss_of(model: LlamaForCausalLM, batch: Tensor) -> Tensor:
    """Cross entropy of the next token, in nats."""
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(input_ids=batch[:, :-1]).logits
    return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())


def train(data: Tensor, steps: int, seed: int) -> LlamaForCausalLM:
    """The model after `steps` steps over windows [W, TOKENS], each batch at random."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=256,
            intermediate_size=704,
            num_hidden_layers=6,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=TOKENS,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=1,
            use_cache=False,
            tie_word_embeddings=False,
        )
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.1)
    losses, began = [], time.perf_counter()
    for step in range(steps):
        rate = RATE * min(1.0, (step + 1) / WARMUP) * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / steps)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss = loss_of(model, data[torch.randint(len(data), (BATCH,))])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        if (step + 1) % 25 == 0:
            seconds = time.perf_counter() - began
            print(f"step {step + 1:5d}  loss {sum(losses[-25:]) / 25:.3f}  {seconds:.0f} s", flush=True)
    return model.requires_grad_(False).eval()


def train_to(directory: Path, steps: int = 1000, seed: int = 0) -> None:
    """Write the model folder."""
    known = modules(left_out=False)
    tokenizer = make_tokenizer(known)
    data = windows(tokenizer, known)
    model = train(data, steps, seed)
    unseen = windows(tokenizer, modules(left_out=True))
    with torch.no_grad():
        parts = [loss_of(model, batch).item() for batch in unseen[:: max(1, len(unseen) // 256)].split(BATCH)]
    facts = {"steps": steps, "seed": seed, "tokens": data.numel(), "unseen_loss": sum(parts) / len(parts)}
    print(json.dumps(facts))
    model.to(torch.bfloat16).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    (directory / "training.json").write_text(json.dumps(facts, indent=1) + "\n")


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    train_to(chosen.directory, chosen.steps, chosen.seed)


if __name__ == "__main__":
    main()
