"""Blocks of the KV cache: who holds them, and which hold a prefix that another request can share.

A block is free when no block table holds it. Free blocks keep their content and their hash until they are
taken again, least recently freed first, so a finished request's prefix stays useful while there is room.
A full block's hash is SHA-256 over all token ids up to its end, after the salt: equal hashes mean equal prefixes, and
nobody can craft a prompt that collides with another's.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from hashlib import sha256

from nanovllm_jax.engine.request import Request


class BlockManager:
    """Hands out blocks 0 to `num_blocks` - 1 with reference counts and a prefix cache.

    Attributes:
        num_blocks: blocks in the cache.
        block_size: tokens (slots) in a block.
        num_queried_tokens: prompt tokens looked up in the prefix cache so far.
        num_hit_tokens: those of them that were found.
    """

    def __init__(self, num_blocks: int, block_size: int, enable_prefix_caching: bool = True) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.enable_prefix_caching = enable_prefix_caching
        self.num_queried_tokens = 0
        self.num_hit_tokens = 0
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))  # next to take is first
        self._reference_counts = [0] * num_blocks
        self._hash_of: list[bytes | None] = [None] * num_blocks
        self._block_with: dict[bytes, int] = {}

    @property
    def num_free_blocks(self) -> int:
        """Blocks that no block table holds."""
        return len(self._free)

    def num_blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold `num_tokens` tokens."""
        return -(-num_tokens // self.block_size)

    def match_prefix(self, request: Request) -> list[int]:
        """Blocks of the longest cached prefix; at least one token of the request is left to compute.

        When every token is cached, the last block is left out: its tokens are computed into a block of their
        own, since no slot of a shared block may be written again.
        """
        if not self.enable_prefix_caching or request.skip_prefix_cache_read:
            return []
        hits: list[int] = []
        hashes = self._hashes(request, request.num_tokens // self.block_size)
        for digest in hashes[: (request.num_tokens - 1) // self.block_size]:
            block_id = self._block_with.get(digest)
            if block_id is None:
                break
            hits.append(block_id)
        return hits

    def count_hits(self, request: Request, to_come: set[bytes]) -> int:
        """Tokens of the request that hit once the blocks with the hashes `to_come` are cached too; adds its own."""
        if not self.enable_prefix_caching:
            return 0
        hashes, num_hits = self._hashes(request, request.num_tokens // self.block_size), 0
        if not request.skip_prefix_cache_read:
            for digest in hashes[: (request.num_tokens - 1) // self.block_size]:
                if digest not in to_come and digest not in self._block_with:
                    break
                num_hits += 1
        to_come.update(hashes)
        return num_hits * self.block_size

    def can_allocate(self, hits: list[int], num_tokens: int, reserve: int = 0) -> bool:
        """Whether blocks for `num_tokens`, `hits` among them, leave at least `reserve` blocks free."""
        lacking = self.num_blocks_for(num_tokens) + reserve - len(self._free)
        # Hits that others hold are not taken from the free ones.
        return lacking <= 0 or lacking <= sum(self._reference_counts[block_id] > 0 for block_id in hits)

    def allocate(self, request: Request, hits: list[int], num_tokens: int) -> None:
        """Gives the request a block table for `num_tokens` that starts with the blocks in `hits`."""
        for block_id in hits:
            if self._reference_counts[block_id] == 0:
                del self._free[block_id]
            self._reference_counts[block_id] += 1
        request.block_ids = list(hits)
        request.num_registered_blocks = len(hits)
        self.append_blocks(request, self.num_blocks_for(num_tokens) - len(hits))

    def append_blocks(self, request: Request, count: int) -> None:
        """Adds the least recently freed blocks to the request's table; their old content is forgotten."""
        take, hash_of, counts = self._free.popitem, self._hash_of, self._reference_counts
        taken = [take(False)[0] for _ in range(count)]
        for block_id in taken:
            if hash_of[block_id] is not None:
                self._forget(block_id)
            counts[block_id] = 1
        request.block_ids += taken

    def register_full_blocks(self, request: Request) -> None:
        """Offers the blocks that the request has filled: all ids known, K and V computed or in flight.

        Every step writes K and V of all its tokens before it reads any, layer by layer, so a block may be
        shared from the moment the step that fills it is scheduled, also within that step.
        """
        if not self.enable_prefix_caching:
            return
        num_full = min(request.num_computed_tokens, len(request.token_ids)) // self.block_size
        if num_full <= request.num_registered_blocks:
            return
        hashes, block_ids, block_with = self._hashes(request, num_full), request.block_ids, self._block_with
        for index in range(request.num_registered_blocks, num_full):
            if (digest := hashes[index]) not in block_with:  # of two equal blocks, the first serves
                block_with[digest] = block_ids[index]
                self._hash_of[block_ids[index]] = digest
        request.num_registered_blocks = num_full

    def unregister_blocks(self, block_ids: Iterable[int]) -> None:
        """Takes blocks out of the prefix cache that a failed step did not fill."""
        for block_id in block_ids:
            self._forget(block_id)

    def free(self, request: Request) -> None:
        """Returns the request's blocks, tail first, so that the head of its prefix is reused last."""
        for block_id in reversed(request.block_ids):
            self._reference_counts[block_id] -= 1
            if self._reference_counts[block_id] == 0:
                self._free[block_id] = None
        request.block_ids = []

    def reset_prefix_cache(self) -> bool:
        """Forgets all cached prefixes. Returns False, and does nothing, while a request holds a block."""
        if len(self._free) != self.num_blocks:
            return False
        self._block_with.clear()
        self._hash_of = [None] * self.num_blocks
        return True

    def check_integrity(self, requests: Iterable[Request]) -> None:
        """Checks every count and hash against the block tables of `requests`, all that hold blocks.

        Raises:
            RuntimeError: if the bookkeeping is wrong, which is a bug in this package.
        """
        counts = [0] * self.num_blocks
        for request in requests:
            for block_id in request.block_ids:
                counts[block_id] += 1
            num_registered = request.num_registered_blocks if self.enable_prefix_caching else 0
            for block_id, digest in zip(request.block_ids, self._hashes(request, num_registered), strict=False):
                if self._hash_of[block_id] not in (None, digest):
                    raise RuntimeError(f"Block {block_id} is cached under another prefix's hash.")
        if counts != self._reference_counts:
            wrong = [i for i in range(self.num_blocks) if counts[i] != self._reference_counts[i]]
            raise RuntimeError(f"Reference counts of the blocks {wrong} differ from the block tables.")
        if set(self._free) != {block_id for block_id, count in enumerate(counts) if count == 0}:
            raise RuntimeError("The free blocks are not those that no block table holds.")
        registered = {digest: block_id for block_id, digest in enumerate(self._hash_of) if digest is not None}
        if registered != self._block_with:
            raise RuntimeError("The prefix cache's two directions, block to hash and hash to block, differ.")

    def _forget(self, block_id: int) -> None:
        digest = self._hash_of[block_id]
        if digest is not None:
            del self._block_with[digest]
            self._hash_of[block_id] = None

    def _hashes(self, request: Request, count: int) -> list[bytes]:
        """Digests of the request's tokens up to each full block's end, at least `count`, kept on the request."""
        hashes, block_size = request.block_hashes, self.block_size
        if len(hashes) >= count:
            return hashes
        if request.hasher is None:
            salt = request.cache_salt
            request.hasher = sha256(b"" if salt is None else sha256(salt.encode()).digest())
        hasher, token_ids = request.hasher, request.token_ids
        for start in range(len(hashes) * block_size, count * block_size, block_size):
            hasher.update(token_ids[start : start + block_size])
            hashes.append(hasher.digest())
        return hashes
