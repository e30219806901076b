"""The version of transformers that is installed, checked before anything of it is imported."""

from __future__ import annotations

from lowbit.integrations.requirements import require

LEAST = "5.0"  # the hooks of 4.x are others
VERSION = require("transformers", LEAST, "lowbit.integrations.transformers")
