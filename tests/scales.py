"""Attention over features with three scales, side by side: python tests/scales.py [scale ...]

Trains two layers of the flat model for one epoch with each scale and the seeds 0, 1 and 2, and
tests on the 5,000 held-out digits. One thread, so that the numbers repeat; about 80 seconds a line
on a core.
"""

import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import common
import mini_vit

SCALES = {"784^-0.5": 784**-0.5, "1": 1.0, "learned": None}


class ScaledAttention(common.FeatureAttention):
    """Attention over features with the class's `scale`; None normalises query and key to a root
    mean square of 1 in each head and learns a scale for it. (XCiT normalises over tokens: with one,
    only signs stay.)"""

    scale: float | None = None

    def __init__(self, dim: int, heads: int, qkv_bias: bool = False) -> None:
        super().__init__(dim, heads, qkv_bias)
        self.learned = nn.Parameter(torch.ones(heads, 1, 1)) if self.scale is None else None

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        query = self.split(self.query(x))  # (B, H, d, 1)
        key, value = self.split(self.key(context)), self.split(self.value(context))
        if self.scale is None:
            root = query.shape[-2] ** 0.5
            query, key = (F.normalize(part, dim=-2) * root for part in (query, key))
            query = query * self.learned
        scale = self.scale or 1.0
        out = F.scaled_dot_product_attention(query, key, value, scale=scale)
        if not self.training:
            log_weights = (scale * query[:64] @ key[:64].mT).log_softmax(dim=-1)
            entropy = -(log_weights.exp() * log_weights).sum(dim=-1).mean()
            self.attended = entropy.exp().item()
        return self.proj(out.flatten(1))


def measure(name: str, seed: int) -> None:
    ScaledAttention.scale = SCALES[name]
    recipe = replace(mini_vit.FULL, layers=2, adversarial=0.0, epochs=1, batch_size=256,
                     weight_decay=0.05, seed=seed, device="cpu", dataset="MNIST", validate=True)
    digits, held_out = common.load_digits(recipe)
    torch.manual_seed(seed)
    model = mini_vit.ViT(**recipe.sizes())

    def attended() -> str:
        common.predict(model, held_out.images[:64], "cpu")
        return ", ".join(f"{block.attention.attended:.1f}" for block in model.blocks)

    before, steps = attended(), len(digits.images) // recipe.batch_size
    batches = common.plain_batches(digits, recipe, 0)
    training_step = common.TrainingStep(model, common.make_optimizers(model, recipe), recipe)
    common.train_epoch(training_step, batches, steps, recipe, 0)
    probabilities = common.predict(model, held_out.images, "cpu")
    accuracy = (probabilities.argmax(dim=1) == held_out.labels).float().mean()
    loss = F.nll_loss(probabilities.log(), held_out.labels)
    print(f"scale {name}, seed {seed}: {accuracy:.2%}, loss {loss:.4f}, features attended in the "
          f"two layers: {before} before, {attended()} after", end="")
    if SCALES[name] is None:
        means = [block.attention.learned.mean().item() for block in model.blocks]
        print(", learned scales:", *(f"{mean:.3f}" for mean in means), end="")
    print(flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    common.FeatureAttention = ScaledAttention  # which Block makes
    for seed in range(3):
        for name in sys.argv[1:] or SCALES:
            measure(name, seed)
