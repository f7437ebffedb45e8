"""What memory a process of each engine will need: from what it would be launched with to the estimate. Reads headers alone."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from models_app import memory_estimate
from models_app.engines import gguf, llama_model, wasmedge_launch
from models_app.engines.base import ModelSpec
from models_app.memory_estimate import Need, Run

CACHE_RAM_MIB = 256  # what our adapters of llama.cpp's server ask for
MICRO_BATCH = 512
CHECKPOINTS = 32
CHECKPOINT_STEP = 8192  # tokens
# Which tensor types ggml rearranges: by processor, as ggml_repack_get_optimal_repack_type decides.
_X86 = frozenset({2, 10, 12, 20, 39})  # Q4_0, Q2_K, Q4_K, IQ4_NL, MXFP4
_ARM = _X86 | {8, 13, 14}  # and Q8_0, Q5_K, Q6_K


def need_of_spec(engine: str, spec: ModelSpec, has_gpu: bool) -> Need:
    """What one process of this spec needs. Raises PreflightError where a file is not there or is no model."""
    if engine == "wasmedge":
        return _wasmedge(spec, has_gpu)
    return _llama(spec, has_gpu) if engine in ("embedded", "llama-server") else _other(spec, has_gpu)


def _llama(spec: ModelSpec, has_gpu: bool) -> Need:
    """llama.cpp's server: embedded or native."""
    served = llama_model.served(spec)
    extra, sizes = served.extra_args, served.sizes
    batch = sizes.micro_batch or min(sizes.batch, extra.get("n_ubatch", MICRO_BATCH))
    run = _run(spec, extra, has_gpu, context=sizes.context, micro_batch=batch)
    needs = [memory_estimate.program(0 if served.embedding else extra.get("cache_ram_mib", CACHE_RAM_MIB))]
    header = gguf.read_header(served.path)
    needs.append(memory_estimate.estimate(header, run))
    if not served.embedding:
        needs.append(_checkpoints(header, run, extra))
    if "draft_model" in extra:
        needs.append(_draft(extra, run, has_gpu))
    needs += [_whole_file(Path(path)) for path in _further_files(extra)]
    return memory_estimate.all_of(needs)


def _run(spec: ModelSpec, extra: Mapping[str, Any], has_gpu: bool, *, context: int, micro_batch: int) -> Run:
    return Run(
        context=context,
        slots=spec.slots,
        micro_batch=micro_batch,
        gpu_layers=spec.gpu_layers if has_gpu else 0,
        cache_on_gpu=not extra.get("no_kv_offload", False),
        mapped=extra.get("load_mode", "auto") not in ("none", "direct_io", "mlock") and not extra.get("no_mmap", False),
        type_k=extra.get("cache_type_k", "f16"),
        type_v=extra.get("cache_type_v", "f16"),
        flash=extra.get("flash_attn_type") != "disabled",
        unified=extra.get("kv_unified", False),
        window_full=extra.get("swa_full", False),
        repacked=_repacked(extra),
    )


def _repacked(extra: Mapping[str, Any]) -> frozenset[int]:
    if extra.get("no_extra_bufts"):
        return frozenset()
    return _ARM if platform.machine() in ("aarch64", "arm64") else _X86


def _checkpoints(header: gguf.GgufHeader, run: Run, extra: Mapping[str, Any]) -> Need:
    """Copies of what cannot be wound back (windows, recurrent states), kept while a prompt is read: one per so many tokens."""
    step = extra.get("checkpoint_min_step", CHECKPOINT_STEP) or MICRO_BATCH
    count = min(extra.get("n_ctx_checkpoints", CHECKPOINTS), run.slot_context // step + 1)
    return Need(prompt_cache=count * memory_estimate.unwindable_bytes(header, run))


def _draft(extra: Mapping[str, Any], run: Run, has_gpu: bool) -> Need:
    """The small model that guesses ahead has a context as long as the other's."""
    own = {"cache_type_k": extra.get("draft_cache_type_k", "f16"), "cache_type_v": extra.get("draft_cache_type_v", "f16")}
    draft = Run(
        context=run.context,
        slots=run.slots,
        micro_batch=run.micro_batch,
        gpu_layers=extra.get("draft_gpu_layers", 0) if has_gpu else 0,
        mapped=run.mapped,
        type_k=own["cache_type_k"],
        type_v=own["cache_type_v"],
        flash=run.flash,
        unified=run.unified,
        repacked=run.repacked,
    )
    return memory_estimate.estimate(gguf.read_header(Path(extra["draft_model"])), draft)


def _further_files(extra: Mapping[str, Any]) -> list[str]:
    named = [extra[name] for name in ("mmproj", "mmproj_path", "codec_model_path") if name in extra]
    return [*named, *(one["path"] for one in extra.get("lora", []))]


def _whole_file(path: Path) -> Need:
    """A projector, adapter or codec: read into the process, with buffers about its own size."""
    size = gguf.read_header(path).file_bytes
    return Need(weights=size, compute=size // 2)


def _wasmedge(spec: ModelSpec, has_gpu: bool) -> Need:
    """The plugin computes a row of the vocabulary for every token of a micro batch, and has no flash attention by itself."""
    trained = gguf.read_header(spec.embedding_model_path).context_length if spec.embedding_model_path else None
    sizes = wasmedge_launch.sizes(spec, trained)
    needs = [memory_estimate.program()]
    for kind, path in wasmedge_launch.models_of(spec).items():
        size = sizes[kind]
        run = Run(
            context=size.ctx,
            micro_batch=size.ubatch,
            outputs=size.ubatch,
            gpu_layers=spec.gpu_layers if has_gpu else 0,
            mapped=not spec.extra_args.get("no_mmap", False),
            flash=False,
            repacked=_repacked(spec.extra_args),
        )
        needs.append(memory_estimate.estimate(gguf.read_header(path), run))
    needs += [_whole_file(Path(path)) for path in _further_files(spec.extra_args)]
    return memory_estimate.all_of(needs)


def _other(spec: ModelSpec, has_gpu: bool) -> Need:
    """An engine of which nothing is known here: as if llama.cpp did it."""
    run = _run(spec, {}, has_gpu, context=spec.ctx_size * spec.slots, micro_batch=min(spec.batch_size, MICRO_BATCH))
    paths = filter(None, (spec.chat_model_path, spec.embedding_model_path, spec.tts_model_path))
    return memory_estimate.all_of(
        [memory_estimate.program(), *(memory_estimate.estimate(gguf.read_header(path), run) for path in paths)]
    )
