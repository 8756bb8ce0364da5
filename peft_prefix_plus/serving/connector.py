"""
Prefixes in vLLM's cache of keys and values, by its KV-connector interface.

A request that names a prefix gets `num_virtual_tokens` placeholders before its prompt. The scheduler takes them for tokens whose keys
and values come from elsewhere; before the forward that first reads them, each worker writes its heads of the prefix into their slots.
From then on they are ordinary cached tokens: with prefix caching, later requests of the same adapter find the full blocks there.
"""

from __future__ import annotations

import secrets
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    SupportsHMA,
)
from vllm.distributed.parallel_state import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.logger import init_logger
from vllm.model_executor.models.utils import extract_layer_index

from .store import PrefixStore


if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.forward_context import ForwardContext
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.request import Request


logger = init_logger(__name__)

PARAMETER = "prefix_plus"
"""The entry of a request's `kv_transfer_params` that names a prefix by its digest."""

PLACEHOLDER = 0
"""The token id that stands for a virtual token. It is never embedded: its keys and values are there before any forward."""

MOST_IN_MEMORY = 256
"""How many prefixes a worker keeps beside the cache."""

LayerKeyValues = dict[int, tuple[torch.Tensor, torch.Tensor]]
"""Keys and values, (tokens, heads of this rank, dim) each, by layer."""


@dataclass
class Load:
    """
    The part of a prefix that a request needs written.

    Attributes:
        digest (`str`): The prefix.
        start (`int`): The first virtual token to write; those before are cached.
        block_ids (`list[int]`): The blocks from the one that holds that token to the one that holds the prefix's last.
    """

    digest: str
    start: int
    block_ids: list[int]


@dataclass
class Loads(KVConnectorMetadata):
    """
    What the workers are to do before a forward.

    Attributes:
        loads (`list[Load]`): What to write.
        refused (`set[int]`): Blocks of requests that are to fail.
    """

    loads: list[Load] = field(default_factory=list)
    refused: set[int] = field(default_factory=set)


class PrefixConnector(KVConnectorBase_V1, SupportsHMA):
    """
    Writes prefixes into vLLM's cache. `kv_connector_extra_config` names the adapters' folder as `store`.

    Args:
        vllm_config (`VllmConfig`): The engine's configuration.
        role (`KVConnectorRole`): Whether this is the scheduler's part or a worker's.
        kv_cache_config (`KVCacheConfig`): The cache's.

    Raises:
        ValueError: If the model's cache cannot take a prefix, or the folder does not exist.
    """

    def __init__(self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig) -> None:
        super().__init__(vllm_config=vllm_config, role=role, kv_cache_config=kv_cache_config)
        directory = self._kv_transfer_config.get_from_extra_config("store", None)
        if directory is None:
            raise ValueError(
                'PrefixConnector needs the adapters\' folder: --kv-transfer-config \'{…, "kv_connector_extra_config": '
                '{"store": "FOLDER"}}\'. `prefix-plus serve` sets it.'
            )
        _check_cache(vllm_config, kv_cache_config)
        self._store = PrefixStore(directory)
        self._block_size: int = vllm_config.cache_config.block_size
        self._max_model_len: int = vllm_config.model_config.max_model_len
        # the scheduler's: the length of each waiting or running request's prefix, and what its next step is to write
        self._lengths: dict[str, int] = {}
        self._refused: set[str] = set()
        self._pending = Loads()
        # in every salt, so that no client can write blocks that a prefix's requests would take for theirs
        self._secret = secrets.token_hex(16)
        # a worker's
        self._in_memory: OrderedDict[str, LayerKeyValues] = OrderedDict()
        self._failed: set[int] = set()

    @property
    def requires_kv_delivery(self) -> bool:
        return False  # nothing is handed to another engine

    # ------------------------------------------------------------------------------------------------ scheduler

    def on_new_request(self, request: Request) -> None:
        digest = (request.kv_transfer_params or {}).get(PARAMETER)
        if digest is None:
            return
        try:
            length = self._store.num_virtual_tokens(digest)
            _check_request(request, length, self._max_model_len)
        except ValueError as error:
            logger.error("Request %s is refused: %s", request.request_id, error)
            self._refused.add(request.request_id)
            # one token that fails to load makes it fail; at least one other must remain for vLLM to schedule
            length, digest = int(request.num_tokens == 1), request.request_id
            request.skip_reading_prefix_cache = False
        else:
            self._lengths[request.request_id] = length
        _put_before(request, length)
        request.cache_salt = f"{self._secret}{digest}{request.cache_salt or ''}"
        request.block_hashes.clear()
        request.update_block_hashes()

    def get_num_new_matched_tokens(self, request: Request, num_computed_tokens: int) -> tuple[int, bool]:
        if request.request_id in self._refused:
            return 1, False
        return max(self._lengths.get(request.request_id, 0) - num_computed_tokens, 0), False

    def update_state_after_alloc(self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int) -> None:
        if not num_external_tokens:
            return
        (block_ids,) = blocks.get_block_ids()
        if request.request_id in self._refused:
            self._pending.refused.add(block_ids[0])
            return
        assert request.kv_transfer_params is not None
        length = self._lengths[request.request_id]
        start = length - num_external_tokens
        covering = block_ids[start // self._block_size : -(-length // self._block_size)]
        self._pending.loads.append(Load(request.kv_transfer_params[PARAMETER], start, list(covering)))

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> Loads:
        pending, self._pending = self._pending, Loads()
        return pending

    def request_finished(self, request: Request, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        self._lengths.pop(request.request_id, None)
        self._refused.discard(request.request_id)
        return False, None

    def request_finished_all_groups(
        self, request: Request, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        return self.request_finished(request, block_ids[0])

    # ------------------------------------------------------------------------------------------------ worker

    def start_load_kv(self, forward_context: ForwardContext, **kwargs: Any) -> None:
        metadata = self._get_connector_metadata()
        assert isinstance(metadata, Loads)
        self._failed |= metadata.refused
        for load in metadata.loads:
            try:
                self._write(load, forward_context.no_compile_layers)
            except ValueError as error:
                logger.error("%s", error)
                self._failed.update(load.block_ids)

    def _write(self, load: Load, modules: dict[str, Any]) -> None:
        """Write a part of a prefix into the blocks of every layer of this worker."""
        layers = attention_layers(modules)
        prefix = self._prefix(load.digest, layers)
        tokens = torch.arange(load.start, next(iter(prefix.values()))[0].shape[0])
        first = load.start - load.start % self._block_size  # the first token of the first block
        blocks = torch.tensor(load.block_ids)[(tokens - first) // self._block_size]
        slots = blocks * self._block_size + tokens % self._block_size
        for index, (key, value) in prefix.items():
            layer = layers[index]
            device = layer.kv_cache.device
            layer.impl.do_kv_cache_update(
                layer,
                key[load.start :].to(device, non_blocking=True),
                value[load.start :].to(device, non_blocking=True),
                layer.kv_cache,
                slots.to(device, non_blocking=True),
            )

    def _prefix(self, digest: str, layers: dict[int, Any]) -> LayerKeyValues:
        """Return a prefix's keys and values for the layers and heads of this worker."""
        if digest in self._in_memory:
            self._in_memory.move_to_end(digest)
            return self._in_memory[digest]
        loaded = self._store.load(digest)
        dtype = self._vllm_config.model_config.dtype
        num_layers = self._vllm_config.model_config.hf_text_config.num_hidden_layers
        if sorted(loaded) != list(range(num_layers)):
            raise ValueError(f"The prefix {digest} is of a model with {len(loaded)} layers, this one has {num_layers}.")
        prefix = {}
        for index in sorted(set(loaded).intersection(layers)):
            key, value = (heads_of_rank(tensor, layers[index].num_kv_heads) for tensor in loaded[index])
            if key.shape[2] != layers[index].head_size or value.shape[2] != layers[index].head_size:
                raise ValueError(
                    f"The prefix {digest} has keys of {key.shape[2]} and values of {value.shape[2]} dims; layer {index} "
                    f"of the served model has {layers[index].head_size}."
                )
            prefix[index] = key.transpose(0, 1).to(dtype).contiguous(), value.transpose(0, 1).to(dtype).contiguous()
        self._in_memory[digest] = prefix
        if len(self._in_memory) > MOST_IN_MEMORY:
            self._in_memory.popitem(last=False)
        return prefix

    def get_block_ids_with_load_errors(self) -> set[int]:
        failed, self._failed = self._failed, set()
        return failed

    def wait_for_layer_load(self, layer_name: str) -> None:
        pass  # all is written before the forward

    def save_kv_layer(self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any) -> None:
        pass  # nothing leaves the cache

    def wait_for_save(self) -> None:
        pass


def attention_layers(modules: dict[str, Any]) -> dict[int, Any]:
    """Return vLLM's attention layers with a cache by the index of the model's layer."""
    return {
        extract_layer_index(name): module
        for name, module in modules.items()
        if isinstance(getattr(module, "kv_cache", None), torch.Tensor) and hasattr(module, "num_kv_heads")
    }


def heads_of_rank(tensor: torch.Tensor, num_heads: int) -> torch.Tensor:
    """
    Return the heads of a prefix's keys or values that this tensor-parallel rank has.

    Args:
        tensor (`torch.Tensor`): All heads, (kv_heads, tokens, dim).
        num_heads (`int`): How many of them the rank has.

    Raises:
        ValueError: If the model has another number of them.
    """
    rank, size, total = get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size(), tensor.shape[0]
    if max(total // size, 1) != num_heads:
        raise ValueError(
            f"The prefix has {total} heads of keys and values; the served model has {num_heads} on each of {size} ranks."
        )
    first = rank * num_heads if total >= size else rank * total // size  # with fewer heads than ranks, several have the same
    return tensor[first : first + num_heads]


def _put_before(request: Request, length: int) -> None:
    """Put placeholders before a prompt, as if it had come with them."""
    placeholder = PLACEHOLDER
    if request.sampling_params is not None and request.sampling_params.repetition_penalty != 1.0:
        # the penalty is on what is in the prompt: a token that is there anyway changes nothing
        placeholder = request.prompt_token_ids[0]  # type: ignore[index]
    placeholders = [placeholder] * length
    request.prompt_token_ids = placeholders + list(request.prompt_token_ids or [])
    request._all_token_ids[:0] = placeholders
    request.num_prompt_tokens += length


def _check_request(request: Request, length: int, max_model_len: int) -> None:
    """
    Raise if a request cannot have a prefix of a length.

    Raises:
        ValueError: With the reason.
    """
    if request.prompt_token_ids is None or request.prompt_embeds is not None or request.mm_features:
        raise ValueError("a prefix needs a prompt of tokens; this one has embeddings or media.")
    if request.sampling_params is None or request.sampling_params.prompt_logprobs is not None:
        raise ValueError("a prefix is not computed, so there are no log-probabilities of a prompt behind it.")
    if request.num_tokens + length >= max_model_len:
        raise ValueError(
            f"{length} virtual tokens and {request.num_tokens} of the prompt leave no room in {max_model_len} (max_model_len)."
        )


def _check_cache(vllm_config: VllmConfig, kv_cache_config: KVCacheConfig) -> None:
    """
    Raise if a prefix cannot be written into the cache of a model.

    Raises:
        ValueError: With the reason.
    """
    kinds = {type(group.kv_cache_spec).__name__ for group in kv_cache_config.kv_cache_groups}
    if kinds != {"FullAttentionSpec"}:
        raise ValueError(
            f"A prefix can be served only in models all of whose layers have full attention; this one's caches are {sorted(kinds)}."
        )
    parallel = vllm_config.parallel_config
    if parallel.decode_context_parallel_size > 1 or parallel.prefill_context_parallel_size > 1:
        raise ValueError("A prefix cannot be served with context parallelism, which spreads a request's tokens over ranks.")
