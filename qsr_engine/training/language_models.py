"""Causal language models by the type of their configuration, with random initial parameters: transformers' own.

The library is optional (`pip install 'qsr-engine[text]'`), and imported where such a model is made.
"""

from __future__ import annotations

import difflib
from typing import Any

import torch
from torch import Tensor, nn

from qsr_engine.config.recipe import ModelConfig
from qsr_engine.config.strict import ConfigError
from qsr_engine.data.index import TextData


def create_language_model(config: ModelConfig, text: TextData) -> nn.Module:
    """Make the model of a recipe.

    Args:
        config: of the name `transformers/TYPE`; its kwargs are those of the type's configuration.
        text: the data's vocabulary and context; `kwargs.vocab_size` goes before the vocabulary.
    Returns:
        A model from tokens [B, context] to an object whose `logits` are [B, context, vocabulary].
    Raises:
        ConfigError: transformers is missing, or has no such model; it does not take these arguments or blocks.
    """
    try:
        from transformers import AutoConfig, AutoModelForCausalLM
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    except ImportError as error:
        raise ConfigError(
            f"model.name is {config.name!r}, and the package transformers is missing: pip install 'qsr-engine[text]'"
        ) from error
    kind, known = config.name.partition("/")[2], list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    if kind not in known:
        near = difflib.get_close_matches(kind, known, n=3)
        hint = f"; did you mean {' or '.join(f'transformers/{match}' for match in near)}?" if near else ""
        raise ConfigError(f"model.name: transformers has no causal language model {kind!r}{hint}")
    vocabulary = _vocabulary(config, text)
    _check_keys(kind, config)
    kwargs = {"bos_token_id": text.end, "eos_token_id": text.end, **config.kwargs, "vocab_size": vocabulary}
    try:
        made: Any = AutoConfig.for_model(kind, **{**kwargs, "use_cache": False})
        model: nn.Module = AutoModelForCausalLM.from_config(made)  # type: ignore[no-untyped-call]
    except Exception as error:  # checks of the library raise its own types
        raise ConfigError(f"model.kwargs: {config.name} does not take {config.kwargs}: {error}") from error
    _check_shapes(model, config, (2, text.context), vocabulary)
    return model


def _vocabulary(config: ModelConfig, text: TextData) -> int:
    """How many scores the model gives for a token, which may be more than the data has tokens."""
    wanted = config.kwargs.get("vocab_size", text.vocabulary)
    if isinstance(wanted, bool) or not isinstance(wanted, int) or wanted < text.vocabulary:
        raise ConfigError(
            f"model.kwargs.vocab_size is {wanted!r}, and the data has {text.vocabulary} tokens; leave it out"
        )
    return wanted


def _check_keys(kind: str, config: ModelConfig) -> None:
    """Raises ConfigError for a key that the configuration does not have: the library takes any in silence."""
    from transformers import AutoConfig

    plain = AutoConfig.for_model(kind)
    known = {*plain.to_dict(), *plain.attribute_map}
    for key in config.kwargs:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else "leave it out"
            raise ConfigError(f"model.kwargs: {config.name} has no {key!r} in its configuration; {hint}")


_POSITIONS = "max_position_embeddings"


def _key_of_positions(made: Any, config: ModelConfig) -> str:
    """What the recipe calls them, or else the type's own configuration: older types have a name of their own."""
    own: str = made.attribute_map.get(_POSITIONS, _POSITIONS)
    return _POSITIONS if _POSITIONS in config.kwargs else own


@torch.no_grad()
def _check_shapes(model: Any, config: ModelConfig, shape: tuple[int, int], vocabulary: int) -> None:
    most = getattr(model.config, _POSITIONS, None)
    if isinstance(most, int) and most < shape[1]:
        raise ConfigError(
            f"the blocks of the shards have {shape[1]} tokens, and {config.name} has {most} positions; write "
            f"model.kwargs.{_key_of_positions(model.config, config)} {shape[1]}, or shards of a shorter --context"
        )
    if next(model.parameters()).is_meta:  # where the library's masks cannot be made
        return
    model.eval()
    tokens = torch.zeros(shape, dtype=torch.long)
    tokens[1, -1] = 1
    try:
        scores = getattr(model(tokens), "logits", None)
    except (IndexError, RuntimeError, ValueError) as error:
        raise ConfigError(
            f"{config.name} with model.kwargs {config.kwargs} does not take {shape[1]} tokens: {error}"
        ) from error
    if not isinstance(scores, Tensor) or scores.shape != (*shape, vocabulary):
        found: Any = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
        raise ConfigError(f"{config.name} gives {found} for two blocks; needed are scores of {(*shape, vocabulary)}")
    if not torch.allclose(scores[0, :-1], scores[1, :-1], atol=1e-5):
        raise ConfigError(
            f"{config.name} with model.kwargs {config.kwargs} sees the tokens that it is to predict; write a causal "
            "model, or the key that makes it one (such as is_decoder: true)"
        )
    model.train()
