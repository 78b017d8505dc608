"""Train the demo model, examples/models/tiny-moe, from nothing: `python train_tiny_moe.py`.

The training takes less than 30 minutes on two cores and ends with the score on the held-out
questions. The data are drawn on the fly from tiny_moe/tasks.py, without the held-out problems. The
same seed, PyTorch version and number of threads give the same weights.
"""

import argparse
import itertools
import random
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from tiny_moe import model as network
from tiny_moe import tasks, tokenizer
from tiny_moe.muon import Muon
from tokenizers import Tokenizer
from torch import Tensor, nn

from lvllm.evaluation import ask_transformers, load_questions, score

MODEL = Path(__file__).parent / "models" / "tiny-moe"
ROW = 192  # Tokens in a row. A row is packed with chats that do not attend to each other.
ROWS = 24  # Rows in a step.
WARM_UP = 50  # Steps.
DECAY = 0.6  # Share of the steps in which the learning rate falls.
BALANCE = 0.03  # Weight of the load-balancing loss.


def rows(vocabulary: Tokenizer, seed: int) -> Iterator[tuple[list[int], list[int], list[bool]]]:
    """Yield packed rows: token ids, the number of each token's chat, and which tokens are learnt.

    A token is learnt if it is part of an answer or ends one. The last chat is cut at the row's end.
    """
    rng = random.Random(seed)
    while True:
        ids: list[int] = []
        chats: list[int] = []
        learnt: list[bool] = []
        for number in itertools.count():
            for message in tasks.conversation(rng):
                text = f"<|{message['role']}|>{message['content']}{tokenizer.END}"
                encoded = vocabulary.encode(text).ids
                ids += encoded
                chats += [number] * len(encoded)
                learnt += [False] + [message["role"] == "assistant"] * (len(encoded) - 1)
            if len(ids) >= ROW:
                break
        yield ids[:ROW], chats[:ROW], learnt[:ROW]


def batches(vocabulary: Tokenizer, seed: int, size: int) -> Iterator[tuple[Tensor, ...]]:
    """Yield inputs [size, ROW-1], the attention mask, the learnt positions and their targets."""
    source = rows(vocabulary, seed)
    causal = torch.ones(ROW - 1, ROW - 1, dtype=torch.bool).tril()
    while True:
        ids, chats, learnt = map(
            torch.tensor, zip(*(next(source) for _ in range(size)), strict=True)
        )
        same = chats[:, :-1, None] == chats[:, None, :-1]
        wanted = learnt[:, 1:]
        yield ids[:, :-1], (same & causal)[:, None], wanted, ids[:, 1:][wanted]


def optimizers(model: network.TinyMoE) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers, AdamW for all other parameters."""
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        inner = name.startswith("layers.") and parameter.dim() > 1 and "mlp.gate." not in name
        (matrices if inner else others).append(parameter)
    return [Muon(matrices, lr=0.02), torch.optim.AdamW(others, lr=3e-3, betas=(0.9, 0.98))]


def train(model: network.TinyMoE, vocabulary: Tokenizer, steps: int, seed: int) -> None:
    """Train with a short warm-up, a constant learning rate, and then a linear fall to zero."""
    steppers = optimizers(model)
    peaks = [[group["lr"] for group in stepper.param_groups] for stepper in steppers]
    source = batches(vocabulary, seed, ROWS)
    started = time.monotonic()
    for step in range(steps):
        rate = min((step + 1) / WARM_UP, 1.0, (steps - step) / (steps * DECAY))
        for stepper, peak in zip(steppers, peaks, strict=True):
            for group, lr in zip(stepper.param_groups, peak, strict=True):
                group["lr"] = lr * rate
            stepper.zero_grad()
        ids, mask, wanted, targets = next(source)
        logits, balance = model(ids, mask, wanted)
        loss = F.cross_entropy(logits, targets)
        (loss + BALANCE * balance).backward()
        for stepper in steppers:
            stepper.step()
        if step % 50 == 49:
            right = (logits.argmax(-1) == targets).float().mean()
            print(
                f"step {step + 1}/{steps}  loss {loss.item():.4f}  tokens right {right:.2%}  "
                f"balance {balance.item():.3f}  {time.monotonic() - started:.0f} s",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=MODEL)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()

    torch.manual_seed(arguments.seed)
    vocabulary = tokenizer.build(tasks.vocabulary_texts())
    model = network.TinyMoE(vocabulary.get_vocab_size())
    train(model, vocabulary, arguments.steps, arguments.seed)
    arguments.output.mkdir(parents=True, exist_ok=True)
    token_ids = vocabulary.get_vocab()
    end, pad = token_ids[tokenizer.END], token_ids[tokenizer.PAD]
    network.save(model, arguments.output, end=end, pad=pad)
    tokenizer.save(vocabulary, arguments.output, network.MAX_LENGTH)

    questions = load_questions()
    result = score(questions, ask_transformers(questions, arguments.output))
    for task, tally in {**result.by_task, "all": result.total}.items():
        print(f"{task:10} {tally.right}/{tally.asked}  {tally.accuracy:.1%}")


if __name__ == "__main__":
    main()
