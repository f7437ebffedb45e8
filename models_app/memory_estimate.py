"""What memory an engine process of llama.cpp will need, from its model's header and its settings. Pure: no file is opened here.

* Weights: exact, from the tensor table. Mapped files are shared (models_app/admission.py); what goes to a GPU is its layers'
  share; tensors of some types are rearranged for the processor (ggml-cpu/repack.cpp) and then belong to the process.
* Context: llama.cpp's own arithmetic (llama-kv-cache.cpp, llama-kv-cache-iswa.cpp, llama-hparams.cpp: n_embd_k_gqa, n_embd_r,
  n_embd_s). Cells per slot are padded to 256; layers with a sliding window hold min(context, window + micro batch), padded too.
* Compute buffers: fitted to what the engine logs. Activations take (3 × feed-forward + 5 × embedding) floats for each token of a
  micro batch; attention a mask of 2 bytes a cell with flash attention, else 4 bytes a cell for the mask and for each head.
* The program itself: what is left of a process's private memory after all that.

Measured against the embedded engine, 19 settings: SmolLM2-135M and Gemma 3 270M, 300 to 16,384 tokens of context, 1 to 4 slots,
micro batches of 32 to 2,048, f16 and q8_0, with and without flash attention, one or several caches, windows bounded or not. The
context equals what its log says; compute is 0 to 13 % above it (0.4 MiB above 1 MiB at a micro batch of 32); private memory used
is 2 to 20 MiB below the estimate without margin and prompt cache, and further where a request left compute buffers untouched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from models_app.engines.gguf import GgufHeader
from models_app.engines.gguf_format import BLOCKS

MIB = 1 << 20
PAD = 256  # cells
# Of an embedded or native llama-server without its model, and per token of the vocabulary (texts, merges, tables).
PROGRAM_BYTES = 30 * MIB
TOKEN_BYTES = 200
MARGIN_SHARE = 0.05  # of what is estimated, not of weights, whose size is exact
MARGIN_LEAST = 16 * MIB
SMALLEST_CTX = 256

CACHE_TYPES = {"f32": 0, "f16": 1, "bf16": 30, "q8_0": 8, "q5_1": 7, "q5_0": 6, "q4_1": 3, "q4_0": 2, "iq4_nl": 20}
# Encoders compute a text in one piece and keep nothing of it.
ENCODERS = frozenset({
    "bert", "nomic-bert", "nomic-bert-moe", "modern-bert", "neo-bert", "jina-bert-v2", "jina-bert-v3", "eurobert", "t5encoder",
    "gemma-embedding", "llama-embed",
})  # fmt: skip
# Every n-th layer attends to everything, the others to a window, where the file does not say itself (set_swa_pattern).
WINDOW_PERIODS = {
    "gemma2": 2, "gemma3": 6, "gemma3n": 5, "gpt-oss": 2, "cohere2": 4, "exaone4": 4, "olmo2": 4, "afmoe": 4, "plamo3": 8,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Run:
    """How one model file is run. Tokens: context of all slots together, micro_batch computed at once.

    outputs: rows of the vocabulary computed at once. mapped: weights come from the page cache. gpu_layers: -1 all; 0 where the
    node has no GPU, whatever is configured.
    """

    context: int
    slots: int = 1
    micro_batch: int = 512
    outputs: int = 1
    gpu_layers: int = 0
    cache_on_gpu: bool = True
    mapped: bool = True
    type_k: str = "f16"
    type_v: str = "f16"
    flash: bool = True
    unified: bool = False  # one cache for all slots
    window_full: bool = False  # layers with a window keep the whole context all the same
    repacked: frozenset[int] = frozenset()  # tensor types that this processor wants rearranged

    @property
    def slot_context(self) -> int:
        """Cells of one cache."""
        return _padded(self.context if self.unified else -(-self.context // self.slots))

    @property
    def caches(self) -> int:
        return 1 if self.unified else self.slots


@dataclass(frozen=True, slots=True)
class Need:
    """Bytes of one process. files: mapped weights by path; the rest of the host's is private. measured: private bytes that an
    earlier run with the same settings held at most, 0 where there was none. pages: of mapped files that a process may have
    seen at once, also of weights that are rearranged or handed to a GPU while it loads.
    """

    files: Mapping[str, int] = field(default_factory=dict)
    weights: int = 0  # read into private memory
    cache: int = 0
    compute: int = 0
    program: int = 0
    prompt_cache: int = 0
    gpu: int = 0
    measured: int = 0
    pages: int = 0

    @property
    def margin(self) -> int:
        return max(MARGIN_LEAST, int(self._private * MARGIN_SHARE))

    @property
    def _private(self) -> int:
        return max(self.weights + self.cache + self.compute + self.program + self.prompt_cache, self.measured)

    @property
    def private(self) -> int:
        """With the margin."""
        return self._private + self.margin

    @property
    def mapped(self) -> int:
        return sum(self.files.values())

    @property
    def host(self) -> int:
        return self.private + self.mapped

    @property
    def total(self) -> int:
        return self.host + self.gpu

    def plus(self, other: Need) -> Need:
        """Both in one process."""
        return Need(
            files={**self.files, **other.files},
            weights=self.weights + other.weights,
            cache=self.cache + other.cache,
            compute=self.compute + other.compute,
            program=self.program + other.program,
            prompt_cache=self.prompt_cache + other.prompt_cache,
            gpu=self.gpu + other.gpu,
            measured=max(self.measured, other.measured),
            pages=self.pages + other.pages,
        )


def estimate(header: GgufHeader, run: Run) -> Need:
    """What running this file takes, without the program and the prompt cache."""
    on_gpu = offloaded(header, run.gpu_layers)
    gpu_weights = _gpu_weights(header, on_gpu)
    host_weights = max(0, header.file_bytes - gpu_weights)
    rearranged = min(host_weights, _rearranged(header, run.repacked, on_gpu)) if run.mapped else 0
    caches = cache_bytes(header, run)
    gpu_cache = sum(caches[layer] for layer in on_gpu) if run.cache_on_gpu else 0
    compute = compute_bytes(header, run)
    return Need(
        files=_by_file(header, host_weights - rearranged) if run.mapped else {},
        weights=rearranged if run.mapped else host_weights,
        cache=sum(caches) - gpu_cache,
        compute=compute,  # the host keeps buffers for what is handed to the GPU and back
        program=header.vocab_size * TOKEN_BYTES,
        gpu=gpu_weights + gpu_cache + (compute if on_gpu else 0),
        pages=header.file_bytes if run.mapped else 0,
    )


def program(prompt_cache_mib: int = 0) -> Need:
    """The process without a model."""
    return Need(program=PROGRAM_BYTES, prompt_cache=prompt_cache_mib * MIB)


def all_of(needs: Iterable[Need]) -> Need:
    total = Need()
    for need in needs:
        total = total.plus(need)
    return total


def offloaded(header: GgufHeader, gpu_layers: int) -> range:
    """Layers on the GPU: the last ones first."""
    count = header.block_count if gpu_layers < 0 else min(gpu_layers, header.block_count)
    return range(header.block_count - count, header.block_count)


def _gpu_weights(header: GgufHeader, on_gpu: range) -> int:
    if not on_gpu:
        return 0
    by_block = header.block_bytes()
    weights = sum(by_block.get(layer, 0) for layer in on_gpu)
    if len(on_gpu) < header.block_count:
        return weights
    outer = {tensor.name: tensor.bytes or 0 for tensor in header.tensors if not tensor.name.startswith("blk.")}
    # A model that shares its embedding with the output computes the output from a copy on the GPU.
    output = outer.get("output.weight", outer.get("token_embd.weight", 0))
    return min(header.tensor_bytes, weights + output)


def _rearranged(header: GgufHeader, types: frozenset[int], on_gpu: range) -> int:
    """Weights that are copied into another order: matrices of these types, except the embedding, which is looked up only."""
    first_on_gpu = on_gpu.start if on_gpu else header.block_count
    return sum(
        tensor.bytes or 0
        for tensor in header.tensors
        if tensor.type in types
        and len(tensor.shape) > 1
        and not tensor.name.startswith("token_embd")
        and tensor.layer < first_on_gpu
    )


def _by_file(header: GgufHeader, host_weights: int) -> dict[str, int]:
    """The mapped bytes under their files' names; several files share them evenly, for who asks them asks for all."""
    share, rest = divmod(host_weights, len(header.files))
    return {str(path): share + (rest if number == 0 else 0) for number, path in enumerate(header.files)}


def cache_bytes(header: GgufHeader, run: Run) -> list[int]:
    """Context memory of every layer, all slots together."""
    if header.architecture in ENCODERS:
        return [0] * header.block_count
    k, v = (element_bytes(name) for name in (run.type_k, run.type_v))
    if _has_latent_cache(header):
        v = 0.0
    found = []
    for layer in range(header.block_count):
        if _is_recurrent(header, layer):
            found.append(_state_bytes(header) * run.slots)
            continue
        heads = header.head_count_kv[layer] if header.head_count_kv else 0
        per_cell = heads * (header.key_length * k + header.value_length * v)
        found.append(int(per_cell * _cells(header, run, layer) * run.caches))
    return found


def unwindable_bytes(header: GgufHeader, run: Run) -> int:
    """Of all slots together, what an engine must copy to be able to return to an earlier place in a prompt."""
    caches = cache_bytes(header, run)
    layers = (layer for layer in range(header.block_count) if _is_recurrent(header, layer) or _is_bounded(header, run, layer))
    return sum(caches[layer] for layer in layers)


def _is_bounded(header: GgufHeader, run: Run, layer: int) -> bool:
    return not run.window_full and has_window(header, layer) and header.architecture not in ENCODERS


def _cells(header: GgufHeader, run: Run, layer: int) -> int:
    """Of one cache: the context, or as far as the layer's window reaches."""
    whole = run.slot_context
    if not _is_bounded(header, run, layer):
        return whole
    window = header.sliding_window * (run.slots if run.unified else 1)
    return _padded(min(whole, window + run.micro_batch))


def has_window(header: GgufHeader, layer: int) -> bool:
    """Whether the layer's attention reaches only so far. Where nothing says so it counts as reaching everywhere."""
    if not header.sliding_window:
        return False
    pattern = header.values.get(f"{header.architecture}.attention.sliding_window_pattern")
    if isinstance(pattern, tuple) and pattern:
        return bool(pattern[layer % len(pattern)])
    period = pattern if isinstance(pattern, int) and pattern > 0 else WINDOW_PERIODS.get(header.architecture, 1)
    return layer % period < period - 1


def _has_latent_cache(header: GgufHeader) -> bool:
    """Multi-head latent attention keeps one compressed vector a token, from which keys and values are computed."""
    return bool(header.number("attention.key_length_mla") and header.number("attention.value_length_mla"))


def _is_recurrent(header: GgufHeader, layer: int) -> bool:
    """A layer that keeps a state of fixed size instead of the context."""
    if not _state_bytes(header):
        return False
    if interval := header.number("full_attention_interval"):
        return (layer + 1) % interval != 0
    return not header.head_count_kv or header.head_count_kv[layer] == 0 or bool(header.number("wkv.head_size"))


def _state_bytes(header: GgufHeader) -> int:
    """State of one recurrent layer for one slot, in 32-bit floats."""
    embedding = header.embedding_length
    if head := header.number("wkv.head_size"):  # RWKV
        return 4 * (header.number("token_shift_count", 2) * embedding + embedding * head)
    if length := header.number("shortconv.l_cache"):  # LFM2
        return 4 * embedding * (length - 1)
    inner, state = header.number("ssm.inner_size"), header.number("ssm.state_size")
    kernel, groups = header.number("ssm.conv_kernel"), header.number("ssm.group_count")
    return 4 * (max(0, kernel - 1) * (inner + 2 * groups * state) + state * inner)


def compute_bytes(header: GgufHeader, run: Run) -> int:
    """Buffers of one computation, and the answers' rows."""
    tokens = min(run.micro_batch, run.context)
    heads = max(header.head_count, default=0)
    activations = 4 * tokens * (3 * _feed_forward(header) + 5 * header.embedding_length)
    cells = _attended(header, run, tokens)
    attention = tokens * (2 * sum(cells) if run.flash else 4 * sum(cells) + 4 * heads * max(cells))
    # Without flash attention the scores lie where activations would.
    together = activations + attention if run.flash else max(activations, activations // 2 + attention)
    return together + 4 * header.vocab_size * (run.outputs + run.slots)


def _attended(header: GgufHeader, run: Run, tokens: int) -> list[int]:
    """Cells that attention looks at, by kind of cache: each has a mask."""
    if header.architecture in ENCODERS:
        return [tokens]
    windows = (_cells(header, run, layer) for layer in range(header.block_count) if has_window(header, layer))
    return [run.slot_context, *list(windows)[:1]]


def _feed_forward(header: GgufHeader) -> int:
    """Width of the widest layer; of a mixture, of the experts that a token goes through."""
    dense = max(header.feed_forward_length, default=0)
    return max(dense, header.number("expert_feed_forward_length") * header.expert_used_count)


class Sized(Protocol):
    """Bytes of host and GPU memory."""

    @property
    def host(self) -> int: ...
    @property
    def gpu(self) -> int: ...


def largest_ctx(needed_at: Callable[[int], Sized], most: int, host_free: int, gpu_free: int) -> int | None:
    """The largest ctx_size up to `most`, in steps of 256, for which there is room; None where not even the smallest has any."""

    def fits(ctx: int) -> bool:
        needed = needed_at(ctx)
        return needed.host <= host_free and needed.gpu <= gpu_free

    low, high = 0, most // SMALLEST_CTX  # in steps; low always fits, or is nothing
    while low < high:
        middle = (low + high + 1) // 2
        if fits(middle * SMALLEST_CTX):
            low = middle
        else:
            high = middle - 1
    return low * SMALLEST_CTX or None


def element_bytes(cache_type: str) -> float:
    """Bytes of one number of the cache."""
    elements, size = BLOCKS[CACHE_TYPES.get(cache_type, 1)]
    return size / elements


def _padded(count: int) -> int:
    return -(-count // PAD) * PAD
