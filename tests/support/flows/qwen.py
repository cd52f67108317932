"""Qwen-Image: a mask of the text, a ControlNet; and Qwen-Image-Edit: reference images, of no time."""
from __future__ import annotations

from typing import Any

from support.families import FAMILIES, STEP, Family, padded, random


def _call(**more: Any) -> Any:
    return lambda model, options: model(random(1, 4, 1, 14, 18), STEP, random(1, 13, 48, seed=2), transformer_options=options,
                                        **more)


_BUILD = FAMILIES["qwen with a mask"].build
_REFERENCES = {"ref_latents": [random(1, 4, 1, 8, 8, seed=5), random(1, 4, 1, 6, 10, seed=6)]}

CASES = {
    "qwen": Family(_BUILD, _call()),
    "qwen with a mask": Family(_BUILD, _call(attention_mask=padded())),
    "qwen with a control": Family(_BUILD, _call(control={"input": [random(1, 63, 160, seed=20), random(1, 63, 160, seed=21)]})),
    "qwen with references": Family(_BUILD, _call(**_REFERENCES)),
    "qwen with references of no time": Family(_BUILD, _call(**_REFERENCES, ref_latents_method="index_timestep_zero")),
}
