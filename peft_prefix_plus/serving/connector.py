"""
Prefixes in vLLM's cache of keys and values, through its KV-connector interface.

A request for a joint prefix gets `num_virtual_tokens` placeholders before its prompt. For the scheduler these are tokens whose keys and
values come from elsewhere. Before the first forward that reads them, each worker writes its heads of the prefix into their slots. From
then on they are ordinary cached tokens. With prefix caching, later requests of the same adapter find the full blocks in the cache.

Prefixes of the other forms are added to the output of attention (`additive`), and their requests have no placeholders.
"""

from __future__ import annotations

import secrets
from collections import OrderedDict
from collections.abc import Callable
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

from ..attention import Prefix
from .additive import AddedPrefix, AddedPrefixes
from .store import FoldedPrefix, PrefixStore


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
"""The token id of a placeholder. It is never embedded, because its keys and values are in the cache before any forward."""

MOST_IN_MEMORY = 256
"""How many prefixes a worker keeps in memory beside the cache."""

LayerKeyValues = dict[int, tuple[torch.Tensor, torch.Tensor]]
"""Keys and values, (tokens, heads of this rank, dim) each, by layer."""


@dataclass
class Load:
    """
    The part of a prefix to write for a request.

    Attributes:
        digest (`str`): The prefix.
        start (`int`): The first virtual token to write; the ones before are in the cache.
        block_ids (`list[int]`): The blocks from that token to the prefix's last.
    """

    digest: str
    start: int
    block_ids: list[int]


@dataclass
class Loads(KVConnectorMetadata):  # type: ignore[misc]
    """
    The scheduler's instructions to the workers before a forward.

    Attributes:
        loads (`list[Load]`): The parts of prefixes to write.
        refused (`set[int]`): A block of each request that must fail.
        added (`dict[int, str | None]`): The additive prefix, or `None`, of each request that starts, by its first block.
    """

    loads: list[Load] = field(default_factory=list)
    refused: set[int] = field(default_factory=set)
    added: dict[int, str | None] = field(default_factory=dict)


class PrefixConnector(KVConnectorBase_V1, SupportsHMA):  # type: ignore[misc]
    """
    A KV connector that writes prefixes into vLLM's cache.

    `kv_connector_extra_config` gives the folder of the adapters as `store`. If its `may_add` is false, decoupled and gated prefixes are
    refused, and a CUDA graph may contain a whole forward.

    Args:
        vllm_config (`VllmConfig`): The engine's configuration.
        role (`KVConnectorRole`): Whether this is the scheduler's part or a worker's.
        kv_cache_config (`KVCacheConfig`): The configuration of the cache.

    Raises:
        ValueError: If the model's cache cannot take a prefix, or the folder is not given or does not exist.
    """

    def __init__(self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig) -> None:
        super().__init__(vllm_config=vllm_config, role=role, kv_cache_config=kv_cache_config)
        directory = self._kv_transfer_config.get_from_extra_config("store", None)
        if directory is None:
            raise ValueError(
                "PrefixConnector needs the adapters' folder: --kv-transfer-config '{…, \"kv_connector_extra_config\": "
                '{"store": "FOLDER"}}\'. `prefix-plus serve` sets it.'
            )
        _check_cache(vllm_config, kv_cache_config)
        self._store = PrefixStore(directory)
        self._may_add = bool(self._kv_transfer_config.get_from_extra_config("may_add", True))
        self._block_size: int = vllm_config.cache_config.block_size
        self._max_model_len: int = vllm_config.model_config.max_model_len
        # the scheduler's: the length of each waiting or running request's prefix, and what its next step is to write
        self._lengths: dict[str, int] = {}
        self._added_digests: dict[str, str] = {}
        self._checked: dict[str, tuple[str, int]] = {}
        self._refused: set[str] = set()
        self._pending = Loads()
        # in every salt, so that no client can write blocks that a prefix's requests would take for theirs
        self._secret = secrets.token_hex(16)
        # a worker's
        self._layers: dict[int, Any] = {}
        self._in_memory: OrderedDict[str, LayerKeyValues | AddedPrefix] = OrderedDict()
        self._failed: set[int] = set()
        self._added = AddedPrefixes(self._added_prefix)

    @property
    def requires_kv_delivery(self) -> bool:
        return False  # nothing is handed to another engine

    @classmethod
    def requires_piecewise_for_cudagraph(cls, extra_config: dict[str, Any]) -> bool:
        return bool(extra_config.get("may_add", True))  # what is added to attention runs outside graphs

    # ------------------------------------------------------------------------------------------------ scheduler

    def on_new_request(self, request: Request) -> None:
        digest = (request.kv_transfer_params or {}).get(PARAMETER)
        if digest is None:
            return
        try:
            form, length = self._checked_prefix(digest)
            if form == "joint":
                _check_request(request, length, self._max_model_len)
            elif not self._may_add:
                raise ValueError("this server was started without decoupled and gated prefixes (`may_add`).")
        except ValueError as error:
            logger.error("Request %s is refused: %s", request.request_id, error)
            self._refused.add(request.request_id)
            # a token that fails to load makes the request fail; vLLM schedules it only if another token remains
            length, digest = int(request.num_tokens == 1), request.request_id
            request.skip_reading_prefix_cache = False
        else:
            self._lengths[request.request_id] = length
            if form != "joint":
                self._added_digests[request.request_id] = digest
        _put_before(request, length)
        request.cache_salt = f"{self._secret}{digest}{request.cache_salt or ''}"
        request.block_hashes.clear()
        request.update_block_hashes()

    def _checked_prefix(self, digest: str) -> tuple[str, int]:
        """
        Return a prefix's form and how many tokens of the context it takes, after a check that it fits the model.

        Raises:
            ValueError: If no prefix has this digest, or it is of another model.
        """
        if digest in self._checked:
            return self._checked[digest]
        prefix, model = self._store.load(digest), self._vllm_config.model_config
        num_layers, layers = model.get_total_num_hidden_layers(), set(prefix.key_values)
        if not layers <= set(range(num_layers)) or (prefix.form == "joint" and len(layers) != num_layers):
            raise ValueError(
                f"The prefix {digest} is of a model with {len(layers)} layers, this one has {num_layers}."
            )
        heads, dim = model.get_total_num_kv_heads(), model.get_head_size()
        for key, value in prefix.key_values.values():
            if {(tensor.shape[0], tensor.shape[2]) for tensor in (key, value)} != {(heads, dim)}:
                raise ValueError(
                    f"The prefix {digest} has keys of {key.shape[0]} heads and {key.shape[2]} dims; the served model has {heads} "
                    f"of {dim}."
                )
        self._checked[digest] = prefix.form, prefix.num_cached_tokens
        return self._checked[digest]

    def get_num_new_matched_tokens(self, request: Request, num_computed_tokens: int) -> tuple[int, bool]:
        if request.request_id in self._refused:
            return 1, False
        return max(self._lengths.get(request.request_id, 0) - num_computed_tokens, 0), False

    def update_state_after_alloc(self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int) -> None:
        (block_ids,) = blocks.get_block_ids()
        self._pending.added[block_ids[0]] = self._added_digests.get(request.request_id)
        if not num_external_tokens:
            return
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
        self._added_digests.pop(request.request_id, None)
        self._refused.discard(request.request_id)
        return False, None

    def request_finished_all_groups(
        self, request: Request, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        return self.request_finished(request, block_ids[0])

    # ------------------------------------------------------------------------------------------------ worker

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        self._layers = attention_layers(self._vllm_config.compilation_config.static_forward_context)
        if self._may_add:
            self._added.follow(self._layers)

    def bind_connector_metadata(self, connector_metadata: KVConnectorMetadata) -> None:
        super().bind_connector_metadata(connector_metadata)
        assert isinstance(connector_metadata, Loads)
        self._added.admit(connector_metadata.added)

    def start_load_kv(self, forward_context: ForwardContext, **kwargs: Any) -> None:
        metadata = self._get_connector_metadata()
        assert isinstance(metadata, Loads)
        self._failed |= metadata.refused
        for load in metadata.loads:
            try:
                self._write(load)
            except ValueError as error:
                logger.error("%s", error)
                self._failed.update(load.block_ids)

    def _write(self, load: Load) -> None:
        """Write a part of a prefix into the blocks of every layer of this worker."""
        prefix = self._key_values(load.digest)
        tokens = torch.arange(load.start, next(iter(prefix.values()))[0].shape[0])
        first = load.start - load.start % self._block_size  # the first token of the first block
        blocks = torch.tensor(load.block_ids)[(tokens - first) // self._block_size]
        slots = blocks * self._block_size + tokens % self._block_size
        for index, (key, value) in prefix.items():
            layer = self._layers[index]
            device = layer.kv_cache.device
            layer.impl.do_kv_cache_update(
                layer,
                key[load.start :].to(device, non_blocking=True),
                value[load.start :].to(device, non_blocking=True),
                layer.kv_cache,
                slots.to(device, non_blocking=True),
            )

    def _key_values(self, digest: str) -> LayerKeyValues:
        """Return a joint prefix's keys and values for the layers and heads of this worker, in the order of tokens."""
        return self._kept(digest, self._as_key_values)

    def _added_prefix(self, digest: str) -> AddedPrefix:
        """Return an additive prefix for the layers and heads of this worker."""
        return self._kept(digest, self._as_added)

    def _kept(self, digest: str, make: Callable[[FoldedPrefix], Any]) -> Any:
        if digest in self._in_memory:
            self._in_memory.move_to_end(digest)
            return self._in_memory[digest]
        made = self._in_memory[digest] = make(self._of_this_worker(self._store.load(digest)))
        if len(self._in_memory) > MOST_IN_MEMORY:
            self._in_memory.popitem(last=False)
        return made

    def _of_this_worker(self, loaded: FoldedPrefix) -> FoldedPrefix:
        """Take the layers and heads of this worker, in the model's dtype."""
        dtype = self._vllm_config.model_config.dtype
        key_values, gates = {}, {}
        for index in sorted(set(loaded.key_values).intersection(self._layers)):
            layer = self._layers[index]
            pair = tuple(heads_of_rank(tensor, layer.num_kv_heads).to(dtype) for tensor in loaded.key_values[index])
            key_values[index] = pair[0], pair[1]
            if index in loaded.gates:
                gates[index] = heads_of_rank(loaded.gates[index], layer.num_heads).to(dtype)
        return FoldedPrefix(key_values, loaded.form, gates, loaded.turning)

    def _as_key_values(self, prefix: FoldedPrefix) -> LayerKeyValues:
        return {
            index: (key.transpose(0, 1).contiguous(), value.transpose(0, 1).contiguous())
            for index, (key, value) in prefix.key_values.items()
        }

    def _as_added(self, prefix: FoldedPrefix) -> AddedPrefix:
        devices = {index: layer.kv_cache.device for index, layer in self._layers.items()}
        return AddedPrefix(
            {
                index: Prefix(
                    key.to(devices[index]),
                    value.to(devices[index]),
                    gate=prefix.gates[index].to(devices[index]) if index in prefix.gates else None,
                    is_decoupled=prefix.form == "decoupled",
                )
                for index, (key, value) in prefix.key_values.items()
            },
            prefix.turning,
        )

    def get_block_ids_with_load_errors(self) -> set[int]:
        failed, self._failed = self._failed, set()
        return failed

    def wait_for_layer_load(self, layer_name: str) -> None:
        pass  # everything is written before the forward

    def save_kv_layer(self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any) -> None:
        pass  # nothing leaves the cache

    def wait_for_save(self) -> None:
        pass


def attention_layers(modules: dict[str, Any]) -> dict[int, Any]:
    """Return vLLM's attention layers that have a cache, by the index of their layer in the model."""
    return {
        extract_layer_index(name): module
        for name, module in modules.items()
        if isinstance(getattr(module, "kv_cache", None), torch.Tensor) and hasattr(module, "num_kv_heads")
    }


def heads_of_rank(tensor: torch.Tensor, num_heads: int) -> torch.Tensor:
    """
    Return this tensor-parallel rank's heads of a prefix's keys, values or gates.

    Args:
        tensor (`torch.Tensor`): All heads, (heads, …).
        num_heads (`int`): The number of heads of the rank.

    Returns:
        `torch.Tensor`: The rank's heads, (num_heads, …).

    Raises:
        ValueError: If the model has another number of heads.
    """
    rank, size, total = get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size(), tensor.shape[0]
    if max(total // size, 1) != num_heads:
        raise ValueError(f"The prefix has {total} heads; the served model has {num_heads} on each of {size} ranks.")
    # with fewer heads than ranks, several ranks share a head
    first = rank * num_heads if total >= size else rank * total // size
    return tensor[first : first + num_heads]


def _put_before(request: Request, length: int) -> None:
    """Put placeholders before a prompt, as if the client had sent them."""
    placeholder = PLACEHOLDER
    if request.sampling_params is not None and request.sampling_params.repetition_penalty != 1.0:
        # the penalty applies to every token of the prompt; one that it has anyway changes nothing
        placeholder = request.prompt_token_ids[0]
    placeholders = [placeholder] * length
    request.prompt_token_ids = placeholders + list(request.prompt_token_ids or [])
    # vLLM offers no way to change a request's tokens; the list that it looks at is changed in place
    vars(request)["_all_token_ids"][:0] = placeholders
    request.num_prompt_tokens += length


def _check_request(request: Request, length: int, max_model_len: int) -> None:
    """
    Raise if a request cannot have a prefix in the cache.

    Raises:
        ValueError: If it has no plain prompt of tokens, asks for the prompt's log-probabilities, or leaves no room.
    """
    if request.prompt_token_ids is None or request.prompt_embeds is not None or request.mm_features:
        raise ValueError("a prefix in the cache needs a prompt of tokens; this one has embeddings or media.")
    if request.sampling_params is None or request.sampling_params.prompt_logprobs is not None:
        raise ValueError(
            "with a prefix in the cache there are no log-probabilities of the prompt; leave out `prompt_logprobs`."
        )
    if request.num_tokens + length >= max_model_len:
        raise ValueError(
            f"{length} virtual tokens and {request.num_tokens} prompt tokens leave no room in {max_model_len} (max_model_len). Shorten "
            "the prompt."
        )


def _check_cache(vllm_config: VllmConfig, kv_cache_config: KVCacheConfig) -> None:
    """
    Raise if prefixes cannot be written into a model's cache.

    Raises:
        ValueError: If a layer has a cache of another kind, or the cache is spread over ranks.
    """
    kinds = {type(group.kv_cache_spec).__name__ for group in kv_cache_config.kv_cache_groups}
    if kinds != {"FullAttentionSpec"}:
        raise ValueError(
            f"Prefixes need a model with full attention in every layer; this one's caches are {sorted(kinds)}."
        )
    parallel = vllm_config.parallel_config
    if parallel.decode_context_parallel_size > 1 or parallel.prefill_context_parallel_size > 1:
        raise ValueError("Prefixes cannot be served with context parallelism. Leave out its options.")
