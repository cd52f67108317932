"""Calls of ComfyUI's models whose tokens are shared out, by what is special: one module for each module of families."""
from __future__ import annotations

from support.families import Family

from . import chroma, cosmos, flux, hidream, hunyuan, kandinsky, ltx, lumina, minimax, qwen, sd3, wan, wan_frames

MODULES = (chroma, cosmos, flux, hidream, hunyuan, kandinsky, ltx, lumina, minimax, qwen, sd3, wan, wan_frames)
CASES: dict[str, Family] = {case: family for module in MODULES for case, family in module.CASES.items()}
