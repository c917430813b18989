"""nanoGPT's published recipe for a CPU, written out from its description: model, batch and schedule.

The model is GPT-2's: learned positions, layers that normalize before attention and before a feed-forward network of
four times the width with GELU, no biases, the output head tied to the embedding. A token is a character. Training draws
random windows from the first 90 % of the text, and updates by AdamW with linear warm-up and cosine decay.

Letters: B sequences, S positions, V vocab_size, D hidden_size, H num_attention_heads
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Recipe:
    """The values of nanoGPT's README for a CPU ("lower the iterations and the size of everything")."""

    block: int = 64
    batch: int = 12
    layers: int = 4
    heads: int = 4
    width: int = 128
    steps: int = 2000
    warmup_steps: int = 100
    learning_rate: float = 1e-3
    min_learning_rate: float = 1e-4
    beta1: float = 0.9
    beta2: float = 0.99
    weight_decay: float = 0.1
    max_grad_norm: float = 1.0
    train_share: float = 0.9

    def rate(self, step: int) -> float:
        """Return the learning rate of a step."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / (self.warmup_steps + 1)
        done = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        falling = 0.5 * (1 + math.cos(math.pi * done))
        return self.min_learning_rate + falling * (self.learning_rate - self.min_learning_rate)


class Layer(nn.Module):
    """Attention and a feed-forward network, each added to what it reads."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        width, self.heads = recipe.width, recipe.heads
        self.attention_norm, self.mlp_norm = (nn.LayerNorm(width, bias=False) for _ in range(2))
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)

    def forward(self, hidden_BSD: Tensor) -> Tensor:
        """Return the layer's output."""
        query, key, value = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in self.qkv(self.attention_norm(hidden_BSD)).chunk(3, dim=-1)
        )
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        hidden_BSD = hidden_BSD + self.out(attended.transpose(1, 2).flatten(2))
        return hidden_BSD + self.down(F.gelu(self.up(self.mlp_norm(hidden_BSD))))


class GPT(nn.Module):
    """The language model."""

    def __init__(self, recipe: Recipe, vocab_size: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocab_size, recipe.width)
        self.positions = nn.Embedding(recipe.block, recipe.width)
        self.layers = nn.ModuleList(Layer(recipe) for _ in range(recipe.layers))
        self.norm = nn.LayerNorm(recipe.width, bias=False)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                is_residual = name.endswith(("out.weight", "down.weight"))
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * recipe.layers) if is_residual else 0.02)

    def forward(self, ids_BS: Tensor) -> Tensor:
        """Return the logits of the next token at every position, (B, S, V)."""
        hidden_BSD = self.tokens(ids_BS) + self.positions(torch.arange(ids_BS.shape[1], device=ids_BS.device))
        for layer in self.layers:
            hidden_BSD = layer(hidden_BSD)
        return F.linear(self.norm(hidden_BSD), self.tokens.weight)


def character_ids(text: str) -> tuple[Tensor, int]:
    """Return the text's characters as ids, and how many different ones there are."""
    ids = {character: number for number, character in enumerate(sorted(set(text)))}
    return torch.tensor([ids[character] for character in text]), len(ids)


def batches(ids: Tensor, recipe: Recipe, generator: torch.Generator) -> Iterator[Tensor]:
    """Yield random windows of one token more than the block, (B, S + 1), without end."""
    while True:
        start_B1 = torch.randint(len(ids) - recipe.block, (recipe.batch, 1), generator=generator)
        yield ids[start_B1 + torch.arange(recipe.block + 1)]


def train(ids: Tensor, vocab_size: int, recipe: Recipe, seed: int) -> GPT:
    """Return the trained model."""
    torch.manual_seed(seed)
    model = GPT(recipe, vocab_size).train()
    groups = [
        {"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": recipe.weight_decay},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, recipe.learning_rate, (recipe.beta1, recipe.beta2), fused=True)
    drawn = batches(ids, recipe, torch.Generator().manual_seed(seed))
    for step in range(recipe.steps):
        for group in optimizer.param_groups:
            group["lr"] = recipe.rate(step)
        tokens = next(drawn)
        loss = F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), recipe.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return model.eval()


@torch.inference_mode()
def nats_per_char(model: GPT, ids: Tensor, block: int) -> float:
    """Return the mean cross-entropy of `ids` in windows that don't overlap; what does not fill one is left out."""
    count = (len(ids) - 1) // block
    inputs, targets = (ids[shift : shift + count * block].view(count, block) for shift in (0, 1))
    total = sum(
        F.cross_entropy(model(x).flatten(0, 1), y.flatten(), reduction="sum").item()
        for x, y in zip(inputs.split(256), targets.split(256), strict=True)
    )
    return total / (count * block)
