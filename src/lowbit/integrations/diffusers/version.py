"""The versions of diffusers and of what it loads models with, checked before anything of them is imported."""

from __future__ import annotations

from lowbit.integrations.requirements import require

LEAST = "0.42"  # earlier ones show a quantizer no single file before its names are converted
VERSION = require("diffusers", LEAST, "lowbit.integrations.diffusers")
ACCELERATE = require("accelerate", "0.31", "lowbit.integrations.diffusers")
