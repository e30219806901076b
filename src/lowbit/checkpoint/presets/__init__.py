"""Model families as data: which layers of a checkpoint stay in high precision, found by the names of its tensors.

One JSON file here is one family; `base.json` holds the rules of every family. `base.py` describes their fields and
`registry.py` reads them.
"""

from __future__ import annotations

from .base import BoundPreset, Decision, EdgeBlocks, Preset, Rule
from .registry import GENERIC, detect_preset, get_preset, presets

__all__ = [
    "GENERIC",
    "BoundPreset",
    "Decision",
    "EdgeBlocks",
    "Preset",
    "Rule",
    "detect_preset",
    "get_preset",
    "presets",
]
