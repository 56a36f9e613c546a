"""Models by name, with random initial parameters, and batch norm's statistics for a model that was averaged.

Names are timm's, torchvision's, and `qsr/vit_base_patch16_sincos`, the ViT-B/16 of the paper's experiments: the plain
one of Beyer, Zhai, Kolesnikov, "Better plain ViT baselines for ImageNet-1k" (arXiv 2205.01580).
"""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import timm
import torch
import torchvision
from timm.models.vision_transformer import VisionTransformer, init_weights_vit_timm
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import update_bn

from qsr_engine.averaging import average_packed
from qsr_engine.config.recipe import ModelConfig
from qsr_engine.config.strict import ConfigError


class PlainViT(VisionTransformer):  # type: ignore[misc]  # timm has no types
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

    pos_embed: Tensor  # fp32 [1, patches, embed_dim]

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

    def reset_parameters(self) -> None:
        """Fill what the model holds itself, the positions."""
        self.pos_embed.copy_(self._positions())

    def _positions(self) -> Tensor:
        rows, columns = self.patch_embed.grid_size
        return sincos_positions(rows, columns, self.embed_dim)

    def _pos_embed(self, x: Tensor) -> Tensor:
        """Tokens [B, N, D] with their positions, in the tokens' type."""
        return x + self.pos_embed.to(x.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PlainViT:
        """Move or convert the model; the positions move, and stay in fp32, from which nothing is lost."""
        super()._apply(fn, recurse)
        if self.pos_embed.dtype != torch.float32:
            self.pos_embed = torch.empty_like(self.pos_embed, dtype=torch.float32)
            self.reset_parameters()
        return self


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


_OWN = {"vit_base_patch16_sincos": PlainViT}
_NAMES: dict[str, Callable[[], list[str]]] = {
    "timm": timm.list_models,
    "torchvision": lambda: torchvision.models.list_models(torchvision.models),
    "qsr": lambda: list(_OWN),
}


def create_model(config: ModelConfig, classes: int | None, image_size: int) -> nn.Module:
    """Make the model of a recipe.

    Args:
        classes: number of classes of the data, or None where it is not known; `kwargs.num_classes` goes before it.
        image_size: S; the model must turn images of shape [B, 3, S, S] into scores of shape [B, classes].
    Raises:
        ConfigError: no model has this name, it does not take these arguments, or it does not take such images.
    """
    library, _, name = config.name.partition("/")
    known = _NAMES[library]()
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3)
        hint = f"; did you mean {' or '.join(f'{library}/{match}' for match in near)}?" if near else ""
        raise ConfigError(f"model.name: {library} has no model {name!r}{hint}")
    kwargs = dict(config.kwargs)
    if classes is not None:
        kwargs.setdefault("num_classes", classes)
    if classes is not None and kwargs["num_classes"] < classes:
        raise ConfigError(
            f"model.kwargs.num_classes is {kwargs['num_classes']}, and the data has {classes} classes; leave it out"
        )
    if "num_classes" not in kwargs:
        raise ConfigError("model.kwargs.num_classes is missing, and the data's index.json names no classes; write it")
    try:
        model = _make(library, name, kwargs)
    except (TypeError, ValueError, AssertionError, RuntimeError) as error:
        raise ConfigError(f"model.kwargs: {config.name} does not take {kwargs}: {error}") from error
    _check_shapes(model, config, kwargs["num_classes"], image_size)
    return model.to(memory_format=torch.channels_last) if config.channels_last else model


def _make(library: str, name: str, kwargs: dict[str, Any]) -> nn.Module:
    model: nn.Module
    if library == "timm":
        model = timm.create_model(name, pretrained=False, **kwargs)
    elif library == "torchvision":
        model = torchvision.models.get_model(name, weights=None, **kwargs)
    else:
        model = _OWN[name](**kwargs)
    return model


@torch.no_grad()
def _check_shapes(model: nn.Module, config: ModelConfig, classes: int, image_size: int) -> None:
    shape = (1, 3, image_size, image_size)
    model.eval()
    try:
        scores = model(torch.zeros(shape))
    except (AssertionError, RuntimeError, ValueError) as error:
        raise ConfigError(
            f"data.image_size is {image_size}, and {config.name} with model.kwargs {config.kwargs} does not take "
            f"images of shape {shape}: {error}"
        ) from error
    if not isinstance(scores, torch.Tensor) or scores.shape != (1, classes):
        found = tuple(scores.shape) if isinstance(scores, torch.Tensor) else type(scores).__name__
        raise ConfigError(f"model.name: {config.name} gives {found} for one image; needed are scores of (1, {classes})")
    model.train()


# ------------------------------------------------------------------------------------------------- batch norm


def has_batch_norm(model: nn.Module) -> bool:
    """Whether some module keeps running statistics of batches."""
    return any(_keeps_statistics(module) for module in model.modules())


def _keeps_statistics(module: nn.Module) -> bool:
    return isinstance(module, _BatchNorm) and module.running_mean is not None


@contextlib.contextmanager
def reestimated_batch_norm(model: nn.Module, batches: Iterable[Tensor], seed: int) -> Iterator[None]:
    """Inside, batch norm's running statistics are those of the parameters as they are; afterwards nothing has changed.

    Under local steps a worker's running statistics belong to parameters that were its own. Here every rank runs the
    averaged parameters over its batches, as in training but without gradients, and each statistic is the mean over
    its batches and over all ranks. So a variance is the mean of the batches' variances, as in the authors' code: what
    the batches' means differ by is not in it.

    Every rank must enter. Buffers, the modules' training flags and the random states come back bit for bit, also
    after an error.

    Args:
        batches: of images, as the model reads them; the same number on every rank, one at least.
        seed: of what the model draws meanwhile, such as dropout.
    Raises:
        CollectiveError: averaging the statistics failed.
    """
    modules = list(model.modules())
    flags, buffers = [module.training for module in modules], list(model.buffers())
    before = [buffer.clone() for buffer in buffers]
    norms = [module for module in modules if isinstance(module, _BatchNorm) and _keeps_statistics(module)]
    momenta = [norm.momentum for norm in norms]
    try:
        with torch.random.fork_rng(_cuda_devices(buffers)), torch.no_grad():
            torch.manual_seed(seed)
            update_bn(batches, model)
        _average([value for norm in norms for value in (norm.running_mean, norm.running_var) if value is not None])
        yield
    finally:
        for module, flag in zip(modules, flags, strict=True):
            module.training = flag
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        for buffer, value in zip(buffers, before, strict=True):
            buffer.copy_(value)


def _cuda_devices(tensors: Iterable[Tensor]) -> list[torch.device]:
    return list({tensor.device for tensor in tensors if tensor.is_cuda})


@torch.no_grad()
def _average(statistics: list[Tensor]) -> None:
    """Replace them by their mean over all ranks, which is computed in fp64."""
    exact = [value.to(torch.float64, copy=True) for value in statistics]
    average_packed(exact, None)
    for value, mean in zip(statistics, exact, strict=True):
        value.copy_(mean)
