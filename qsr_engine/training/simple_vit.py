"""The ViT that the authors of QSR trained: vit-pytorch 1.2.8's SimpleViT."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from qsr_engine.training.vit import FixedPositions, sincos_positions


class SimpleViT(FixedPositions):
    """As the class of that name in vit-pytorch 1.2 (github.com/lucidrains/vit-pytorch), with the names of its state.

    Where it differs from the plain ViT of Beyer et al. (arXiv 2205.01580), and so from vit.PlainViT: layer norms before
    and after the patch embedding (on a patch's pixels, and on its token), no bias in the projections of attention, the
    mean of the tokens first and the norm of it then, and torch's own initialization of linear layers. Since vit-pytorch
    1.4 its SimpleViT, too, has the norm before the mean.

    The positions are computed in fp64, and vit-pytorch's in fp32; they are no part of the state. On the meta device
    initialize_fsdp() needs no `init`.

    Args:
        img_size, patch_size: of square images and patches, in pixels.
        embed_dim: width, a multiple of 4 from 8 on.
        head_dim: width of a head of attention, whatever embed_dim is.
    Raises:
        ValueError: another width, or patches that do not fill the image.
    """

    def __init__(
        self,
        *,
        img_size: int = 224,
        patch_size: int = 16,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        head_dim: int = 64,
        mlp_ratio: float = 4.0,
        num_classes: int = 1000,
    ) -> None:
        super().__init__()
        sizes = {"img_size": img_size, "patch_size": patch_size, "embed_dim": embed_dim, "num_heads": num_heads}
        for name, size in {**sizes, "depth": depth, "head_dim": head_dim, "mlp_ratio": mlp_ratio}.items():
            if not size > 0:
                raise ValueError(f"{name} is {size}; write a number above 0")
        if img_size % patch_size:
            raise ValueError(f"img_size is {img_size}, which patches of {patch_size} pixels do not fill")
        self.img_size, self.grid, self.embed_dim = img_size, img_size // patch_size, embed_dim
        pixels = 3 * patch_size**2
        self.to_patch_embedding = nn.Sequential(
            Patches(patch_size), nn.LayerNorm(pixels), nn.Linear(pixels, embed_dim), nn.LayerNorm(embed_dim)
        )
        self.register_buffer("pos_embed", self._positions(), persistent=False)
        hidden = int(embed_dim * mlp_ratio)
        self.transformer = Transformer(
            [Block(Attention(embed_dim, num_heads, head_dim), FeedForward(embed_dim, hidden)) for _ in range(depth)]
        )
        self.linear_head = nn.Sequential(nn.LayerNorm(embed_dim), nn.Linear(embed_dim, num_classes))

    def _positions(self) -> Tensor:
        return sincos_positions(self.grid, self.grid, self.embed_dim)

    def forward(self, images: Tensor) -> Tensor:
        """Scores [B, num_classes] of images [B, 3, img_size, img_size]. Raises ValueError for another size."""
        if images.shape[-2:] != (self.img_size, self.img_size):
            raise ValueError(f"img_size is {self.img_size}, and the images are {tuple(images.shape[-2:])}")
        tokens = self.to_patch_embedding(images)
        tokens = self.transformer(tokens + self.pos_embed.to(tokens.dtype))
        scores: Tensor = self.linear_head(tokens.mean(1))
        return scores


class Patches(nn.Module):
    """Images [B, 3, S, S] into patches [B, N, P * P * 3], row by row; in each the pixels likewise, colours last."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def forward(self, images: Tensor) -> Tensor:
        size = self.size
        rows = images.unfold(2, size, size).unfold(3, size, size)  # [B, 3, rows, columns, P, P]
        return rows.permute(0, 2, 3, 4, 5, 1).flatten(3).flatten(1, 2)


class Attention(nn.Module):
    """Tokens and their self-attention, [B, N, D]; the norm comes first."""

    def __init__(self, width: int, heads: int, head_dim: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.to_qkv = nn.Linear(width, 3 * heads * head_dim, bias=False)
        self.to_out = nn.Linear(heads * head_dim, width, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        parts = self.to_qkv(self.norm(tokens)).chunk(3, dim=-1)
        query, key, value = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
        seen = F.scaled_dot_product_attention(query, key, value)
        mixed: Tensor = self.to_out(seen.transpose(1, 2).flatten(2))
        return tokens + mixed


class FeedForward(nn.Module):
    """Tokens and two linear layers of each, [B, N, D]; the norm comes first."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))

    def forward(self, tokens: Tensor) -> Tensor:
        added: Tensor = self.net(tokens)
        return tokens + added


class Block(nn.Sequential):
    """Attention, then the feed-forward part."""


class Transformer(nn.Module):
    """Blocks, one after the other, without a norm at the end."""

    def __init__(self, blocks: list[Block]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(blocks)

    def forward(self, tokens: Tensor) -> Tensor:
        for block in self.layers:
            tokens = block(tokens)
        return tokens
