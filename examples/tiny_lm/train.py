"""Train the small language model that ships with Penstock, on the standard library's sources.

GPT-2 architecture (6 layers, 4 heads, d_model 192, context 256, tied embeddings), byte-level BPE of
4,096 tokens. Matrices are trained by Muon (momentum orthogonalised by Newton-Schulz iterations;
Jordan et al. 2024), everything else by AdamW, both under one warm-up and cosine schedule.

    python examples/tiny_lm/train.py OUT --compile

writes an ordinary Hugging Face directory (config, bf16 safetensors, tokenizer, model card) to OUT.
Which files are held out is decided by `penstock.common.documents.is_held_out`.
"""

import argparse
import json
import math
import platform
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from baselines import interpolated_bigram, unigram
from model_card import write_model_card
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from penstock.common.documents import Document, is_held_out, read_documents, standard_library_paths

END_OF_TEXT = "<|endoftext|>"
VOCABULARY = 4096
CONTEXT = 256


def train_tokenizer(documents: list[Document]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((d.text for d in documents), trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, documents: list[Document]) -> np.ndarray:
    """All documents as one stream of token ids, each followed by the end-of-text token."""
    end = tokenizer.token_to_id(END_OF_TEXT)
    stream: list[int] = []
    for encoding in tokenizer.encode_batch_fast([d.text for d in documents]):
        stream += encoding.ids
        stream.append(end)
    return np.asarray(stream, dtype=np.int64)


def pack(stream: np.ndarray, offset: int = 0) -> np.ndarray:
    """[n, CONTEXT] sequences that start with end-of-text (id 0), as the corpus packs them."""
    body = stream[offset:]
    n = len(body) // (CONTEXT - 1)
    packed = np.zeros((n, CONTEXT), dtype=np.int64)
    packed[:, 1:] = body[: n * (CONTEXT - 1)].reshape(n, CONTEXT - 1)
    return packed


def batches(stream: np.ndarray, size: int, seed: int) -> Iterator[Tensor]:
    """Batches of packed sequences for ever; each pass cuts the stream at another offset."""
    epoch = 0
    while True:
        rng = np.random.default_rng([seed, epoch])
        packed = pack(stream, int(rng.integers(CONTEXT)))
        order = rng.permutation(len(packed))
        for start in range(0, len(order) - size + 1, size):
            yield torch.from_numpy(packed[order[start : start + size]])
        epoch += 1


def orthogonalise(matrix: Tensor, iterations: int = 5) -> Tensor:
    """The nearest (semi-)orthogonal matrix, roughly, by the quintic Newton-Schulz iteration."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrix / (matrix.norm() + 1e-7)
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    for _ in range(iterations):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if tall else x


class Muon(torch.optim.Optimizer):
    """Momentum, then orthogonalised; fp32 throughout because bf16 products are slow on most CPUs."""

    def __init__(self, parameters, lr: float, momentum: float = 0.95, decay: float = 0.0) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "decay": decay})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for weight in group["params"]:
                state = self.state.setdefault(weight, {})
                momentum = state.setdefault("momentum", torch.zeros_like(weight))
                momentum.lerp_(weight.grad, 1 - group["momentum"])
                update = weight.grad.lerp(momentum, group["momentum"])
                # the fused query-key-value matrix is three matrices side by side
                parts = 3 if weight.shape[1] == 3 * weight.shape[0] else 1
                update = torch.cat([orthogonalise(u) for u in update.chunk(parts, dim=1)], dim=1)
                scale = max(1.0, weight.shape[1] / parts / weight.shape[0]) ** 0.5
                weight.mul_(1 - group["lr"] * group["decay"])
                weight.add_(update, alpha=-group["lr"] * scale)


@torch.no_grad()
def held_out_loss(model: GPT2LMHeadModel, packed: np.ndarray, size: int = 32) -> float:
    """Mean cross-entropy in nats per token, over every token but the first of each sequence."""
    model.eval()
    total, count = 0.0, 0
    for start in range(0, len(packed), size):
        tokens = torch.from_numpy(packed[start : start + size])
        total += float(loss_of(model, tokens)) * tokens[:, 1:].numel()
        count += tokens[:, 1:].numel()
    model.train()
    return total / count


def loss_of(model: GPT2LMHeadModel, tokens: Tensor) -> Tensor:
    logits = model(tokens[:, :-1]).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def learning_rate_factor(step: int, steps: int, warmup: int) -> float:
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress))


def save(model: GPT2LMHeadModel, tokenizer: Tokenizer, out: Path) -> None:
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        unk_token=END_OF_TEXT,
        model_max_length=CONTEXT,
    )
    fast.save_pretrained(out)
    state = {k: v.to(torch.bfloat16) for k, v in model.state_dict().items()}
    copy = GPT2LMHeadModel(model.config).to(torch.bfloat16)
    copy.load_state_dict(state)
    copy.save_pretrained(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch", type=int, default=16, help="sequences of 256 tokens")
    parser.add_argument("--d-model", type=int, default=192)
    parser.add_argument("--adam-lr", type=float, default=3e-3)
    parser.add_argument("--muon-lr", type=float, default=2e-2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--compile", action="store_true", help="needs a C++ compiler")
    parser.add_argument("--eval-every", type=int, default=200, help="steps")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)

    documents = list(read_documents(standard_library_paths()))
    training = [d for d in documents if not is_held_out(d.path)]
    held_out = [d for d in documents if is_held_out(d.path)]
    tokenizer = train_tokenizer(training)
    stream, held_stream = encode(tokenizer, training), encode(tokenizer, held_out)
    held_packed = pack(held_stream)
    figures = {
        "python": platform.python_version(),
        "training_files": len(training),
        "held_out_files": len(held_out),
        "training_tokens": len(stream),
        "held_out_tokens": len(held_stream),
        "unigram": unigram(stream, held_packed, VOCABULARY),
        "interpolated_bigram": interpolated_bigram(stream, held_packed, VOCABULARY),
    }
    print(json.dumps(figures), flush=True)

    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCABULARY,
            n_positions=CONTEXT,
            n_embd=args.d_model,
            n_layer=6,
            n_head=4,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=0,
            eos_token_id=0,
        )
    )
    # Orthogonalised updates act on directions, so every matrix of the blocks is Muon's; the
    # embeddings, norms and biases are not matrices in that sense and stay with AdamW.
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and ".h." in n]
    others = [p for n, p in model.named_parameters() if not (p.ndim == 2 and ".h." in n)]
    optimizers = [
        Muon(matrices, lr=args.muon_lr, decay=0.01),
        torch.optim.AdamW(others, lr=args.adam_lr, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    base = [args.muon_lr, args.adam_lr]
    fast = torch.compile(model) if args.compile else model
    source = batches(stream, args.batch, args.seed)
    started = time.time()
    for step in range(args.steps):
        factor = learning_rate_factor(step, args.steps, warmup=min(50, args.steps // 10))
        for optimizer, lr in zip(optimizers, base, strict=True):
            optimizer.param_groups[0]["lr"] = lr * factor
        loss = loss_of(fast, next(source))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        if step % 20 == 0:
            rate = (step + 1) * args.batch * CONTEXT / (time.time() - started)
            left = (args.steps - step) * args.batch * CONTEXT / rate
            print(
                f"step {step} loss {loss:.3f} {rate:.0f} tokens/s {left / 60:.0f} min left",
                flush=True,
            )
        if (step + 1) % args.eval_every == 0 or step + 1 == args.steps:
            figures |= {"steps": step + 1, "batch_tokens": args.batch * CONTEXT, "seed": args.seed}
            save(model, tokenizer, args.out)
            # what is measured is what ships: the bf16 weights
            shipped = GPT2LMHeadModel.from_pretrained(args.out, dtype=torch.float32)
            figures["held_out_cross_entropy"] = held_out_loss(shipped, held_packed)
            print(json.dumps(figures), flush=True)
            write_model_card(args.out, figures, args.d_model)


if __name__ == "__main__":
    main()
