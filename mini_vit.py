"""mini_vit.py: a transformer that sees the whole digit as one vector.

    python mini_vit.py             16 layers, 14 heads x 56 = 784 wide, 118M parameters, for a GPU
    python mini_vit.py --small     the paper's ViT with patches of 7 x 7 pixels, 0.3M parameters, for a CPU

The flat 28 x 28 image goes into the first block as it is, with no projection. A transformer works on a sequence
of tokens, and this is a sequence of one: so attention is not over tokens here but over features (see Attention in
common.py). With patches the same class is the Vision Transformer of "An Image is Worth 16x16 Words" (Dosovitskiy
et al., 2020, arXiv 2010.11929).
"""

from torch import Tensor, nn

from common import Block, Head, Recipe, embedding, run

FULL = Recipe(layers=16, heads=14, dim=784, patch_size=28, dropout=0.1,
              epochs=50, batch_size=512, lr=3e-4, weight_decay=0.05)
SMALL = Recipe(small=True, layers=6, heads=4, dim=64, patch_size=7,
               epochs=20, batch_size=128, lr=2e-3, weight_decay=0.05)


class ViT(nn.Module):
    """Images (B, channels, image_size, image_size) to logits (B, classes).

    With a patch as big as the image it is flat: a block sees (B, D). With smaller ones it is the paper's ViT: a
    block sees (B, N, D). ViT-B/16 is layers=12, heads=12, dim=768, patch_size=16, image_size=224, channels=3,
    classes=1000.
    """

    def __init__(self, *, layers: int, heads: int, dim: int, patch_size: int, dropout: float = 0.0,
                 image_size: int = 28, channels: int = 1, classes: int = 10) -> None:
        super().__init__()
        self.embed = embedding(dim, patch_size, image_size, channels)
        qkv_bias = patch_size < image_size  # the paper's has one
        self.blocks = nn.Sequential(*(Block(dim, heads, dropout, qkv_bias) for _ in range(layers)))
        self.head = Head(dim, classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.blocks(self.embed(images)))


def main() -> None:
    run(__file__, __doc__, ViT, FULL, SMALL)


if __name__ == "__main__":
    main()
