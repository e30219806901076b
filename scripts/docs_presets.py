"""The table of model families from the presets."""

from __future__ import annotations

from docs_text import table

from lowbit.checkpoint.presets import presets


def every_preset() -> str:
    """One row a family: how to name it, what it is, and what it keeps."""
    rows = []
    for name, preset in presets().items():
        kept = f"{len(preset.keep)} rules"
        for edge, place in ((preset.keep_first_blocks, "first"), (preset.keep_last_blocks, "last")):
            kept += f", the {place} {edge.count} blocks" if edge else ""
        found = "by itself" if preset.detect_all else "by its name"
        rows.append((f"`{name}`", preset.title, found, kept, f"{len(preset.drop)} rules" if preset.drop else ""))
    return table(("preset", "models", "found", "keeps", "could leave out"), rows)
