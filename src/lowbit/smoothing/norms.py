"""What the norms of a model type multiply by, as its `config.json` names it.

A scale folded into a norm that multiplies otherwise would break the model without a word, so a type stands here only
when a test has folded scales into every group of such a model of transformers and found its logits unchanged.
"""

from __future__ import annotations

WEIGHT, ONE_PLUS = "weight", "1 + weight"

NORMS = {
    "exaone4": WEIGHT,
    "gemma": ONE_PLUS,
    "gemma2": ONE_PLUS,
    "gemma3_text": ONE_PLUS,
    "glm": WEIGHT,
    "glm4": WEIGHT,
    "granite": WEIGHT,
    "helium": WEIGHT,
    "llama": WEIGHT,
    "ministral": WEIGHT,
    "mistral": WEIGHT,
    "olmo2": WEIGHT,
    "phi3": WEIGHT,
    "qwen2": WEIGHT,
    "qwen3": WEIGHT,
    "seed_oss": WEIGHT,
    "smollm3": WEIGHT,
}
"""By `model_type`. LayerNorms, mixtures of experts and blocks whose MLP reads the attention's norm are not among
them."""
