"""The ways in which all workers compute one prediction together."""
from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from ..ways import HEADS, TOKENS
from .families import family
from .group import Exchange
from .heads import HeadParallel
from .pace import Pace
from .parallel import Parallel
from .tokens import TokenParallel, Unsuited

TOGETHER = (HEADS, TOKENS)  # share attention; in other ways each worker computes what it was given as if alone

_OVERRIDE = "optimized_attention_override"


@contextlib.contextmanager
def sharing(way: str, model: Any, arguments: dict[str, Any], group: Exchange,
            shares: Sequence[float], pace: Pace) -> Iterator[Parallel]:
    """Attention of a diffusion model is shared in this way until the end of the `with`.

    Args:
        arguments: of the prediction; its `transformer_options` are replaced.

    Raises:
        Unsuited: not this model, or not with what is patched in it.
    """
    options = arguments["transformer_options"]
    with contextlib.ExitStack() as stack:
        parallel: Parallel
        if way == TOKENS:
            parallel = TokenParallel(group, shares, pace)
            stack.enter_context(_flow(model, options)(model, parallel))
        else:
            parallel = HeadParallel(group, shares)
        arguments["transformer_options"] = {**options, _OVERRIDE: parallel.over(options.get(_OVERRIDE))}
        yield parallel


def _flow(model: Any, options: dict[str, Any]) -> Any:
    found = family(model)
    if found is None:
        raise Unsuited(f"how tokens flow through {type(model).__name__} is not known here")
    patches = [name for kind in ("patches", "patches_replace") for name, those in (options.get(kind) or {}).items() if those]
    if patches:
        raise Unsuited(f"{', '.join(sorted(patches))} may need all tokens")
    return found
