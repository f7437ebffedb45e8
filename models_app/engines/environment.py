"""What of our environment an engine, or a program asked about itself, may see. Pure."""

from __future__ import annotations

from collections.abc import Mapping

# No database, broker or secret setting is among it.
ALLOWED = frozenset({"PATH", "HOME", "LANG", "LANGUAGE", "TZ", "TMPDIR", "LD_LIBRARY_PATH", "WASMEDGE_PLUGIN_PATH"})
ALLOWED_PREFIXES = ("LC_", "OMP_", "GGML_", "LLAMA_LOG", "CUDA_", "NVIDIA_", "HIP_", "ROCR_", "HSA_", "VK_", "GPU_")


def engine_environment(own: Mapping[str, str]) -> dict[str, str]:
    """The allowed part of an environment."""
    return {name: value for name, value in own.items() if name in ALLOWED or name.startswith(ALLOWED_PREFIXES)}
