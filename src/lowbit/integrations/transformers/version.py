"""The version of transformers that is installed, checked before anything of it is imported."""

from __future__ import annotations

from lowbit.integrations.requirements import require

LEAST = "5.21"  # the first with the hook that keeps scales from being cast; those of 4.x are others altogether
VERSION = require("transformers", LEAST, "lowbit.integrations.transformers")
