"""The families, listed: a new one is a file beside the others and a name here."""

from __future__ import annotations

from collections.abc import Mapping

from ftjax.models import gemma2, gemma3, llama, mistral, qwen2, qwen3
from ftjax.models.decoder import Family

FAMILIES: Mapping[str, Family] = {module.FAMILY.model_type: module.FAMILY for module in (llama, mistral, qwen2, qwen3, gemma2, gemma3)}
