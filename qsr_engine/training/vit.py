"""The plain ViT of Beyer, Zhai, Kolesnikov (arXiv 2205.01580), made of timm's parts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
from timm.models.vision_transformer import VisionTransformer, init_weights_vit_timm
from torch import Tensor, nn


class FixedPositions(nn.Module):
    """A ViT that holds positions which are not trained, in fp32 whatever type the model is moved to."""

    pos_embed: Tensor  # fp32 [1, patches, embed_dim]

    def _positions(self) -> Tensor:
        raise NotImplementedError

    def reset_parameters(self) -> None:
        """Fill what the model holds itself, the positions."""
        self.pos_embed.copy_(self._positions())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move or convert the model; the positions move, and stay in fp32, from which nothing is lost."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.pos_embed.dtype != torch.float32:
            self.pos_embed = torch.empty_like(self.pos_embed, dtype=torch.float32)
            self.reset_parameters()
        return self


class PlainViT(FixedPositions, VisionTransformer):  # type: ignore[misc]  # timm has no types
    """A ViT with fixed positions, no class token, no dropout, and the mean of the normed tokens before a linear head.

    Made of timm's parts and initialized as timm does: linear layers from a normal of 0.02, cut off at two units, with
    biases of 0; the patch embedding as a torch convolution. (Beyer et al. start the head from 0.) Its state fits
    timm's vit_base_patch16_224 with class_token=False, global_pool="avg", fc_norm=False.

    On the meta device, give `initialize_fsdp(init=fill)`.

    Args:
        img_size, patch_size: of square images and patches, in pixels.
        embed_dim: width, a multiple of 4 from 8 on.
    Raises:
        ValueError: another width.
    """

    def __init__(
        self,
        *,
        img_size: int = 224,
        patch_size: int = 16,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        num_classes: int = 1000,
    ) -> None:
        super().__init__(
            img_size=img_size,
            patch_size=patch_size,
            embed_dim=embed_dim,
            depth=depth,
            num_heads=num_heads,
            mlp_ratio=mlp_ratio,
            num_classes=num_classes,
            class_token=False,
            pos_embed="none",
            global_pool="avg",
            fc_norm=False,  # so the norm comes before the mean
        )
        del self.pos_embed  # timm's None, which would stand before the buffer
        self.register_buffer("pos_embed", self._positions())

    def _positions(self) -> Tensor:
        timms: Any = self  # which has no types
        rows, columns = timms.patch_embed.grid_size
        return sincos_positions(rows, columns, timms.embed_dim)

    def _pos_embed(self, x: Tensor) -> Tensor:
        """Tokens [B, N, D] with their positions, in the tokens' type."""
        return x + self.pos_embed.to(x.dtype)


def sincos_positions(rows: int, columns: int, width: int) -> Tensor:
    """Fixed positions of a grid of patches, row by row: fp32 [1, rows * columns, width].

    A quarter of the width each: sin(x w), cos(x w), sin(y w), cos(y w), where x is the column, y the row, and w goes
    from 1 to 1 / 10,000 in equal steps on a logarithmic scale. Source: big_vision's posemb_sincos_2d, after MoCo v3.

    Raises:
        ValueError: width is not a multiple of 4, or less than 8.
    """
    if width % 4 or width < 8:
        raise ValueError(f"embed_dim is {width}; sin-cos positions need a multiple of 4, from 8 on")
    frequencies = 10_000.0 ** -torch.linspace(0, 1, width // 4, dtype=torch.float64)
    y = torch.arange(rows, dtype=torch.float64).repeat_interleave(columns)[:, None] * frequencies
    x = torch.arange(columns, dtype=torch.float64).repeat(rows)[:, None] * frequencies
    return torch.cat((x.sin(), x.cos(), y.sin(), y.cos()), dim=1).float()[None]


def fill(module: nn.Module) -> None:
    """Give what a module of a PlainViT holds itself its first values: `initialize_fsdp(init=fill)`."""
    if isinstance(module, PlainViT):
        module.reset_parameters()
    else:
        init_weights_vit_timm(module)
