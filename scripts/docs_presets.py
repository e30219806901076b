"""The table of model families from the presets."""

from __future__ import annotations

from docs_text import table

from lowbit.checkpoint.presets import presets


def every_preset() -> str:
    """One row a family: how to name it, what it is, and what is special."""
    rows = []
    for name, preset in presets().items():
        edges = ((preset.keep_first_blocks, "first"), (preset.keep_last_blocks, "last"))
        kept = ", ".join(f"the {place} {edge.count}" for edge, place in edges if edge)
        found = "by itself" if preset.detect_all else "by its name"
        rows.append((f"`{name}`", preset.title, found, kept, " ".join(rule.why for rule in preset.drop)))
    return table(("preset", "models", "found", "blocks that stay", "what could be left out"), rows)
