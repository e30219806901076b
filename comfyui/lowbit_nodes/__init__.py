"""ComfyUI nodes of lowbit: copy this folder into ComfyUI/custom_nodes and install lowbit into ComfyUI's Python."""

from __future__ import annotations

import sys

try:
    import lowbit.integrations.comfyui  # noqa: F401  (only to see whether it is there)
except ImportError as error:
    message = (
        "The lowbit nodes need the package lowbit in the Python that runs ComfyUI, and it cannot be imported "
        f"({error}). In lowbit's folder, run\n    {sys.executable} -m pip install .\nand start ComfyUI again."
    )
    raise ImportError(message) from None

from .nodes import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]
