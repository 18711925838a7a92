"""How the server is set up."""

from __future__ import annotations

from dataclasses import dataclass

from nanovllm_jax.errors import ConfigError


@dataclass(frozen=True)
class ServeConfig:
    """Settings of the server, apart from the engine's.

    Attributes:
        model_name: what clients call the model.
        api_keys: a request has to bring one of them; none lets everybody in.
        max_queue: samples that may wait for a row before requests are answered with 503; None for no limit.
        max_body_size: bytes of a request's body.

    Raises:
        ConfigError: if a value is out of range.
    """

    model_name: str
    api_keys: tuple[str, ...] = ()
    max_queue: int | None = None
    max_body_size: int = 4 * 2**20

    def __post_init__(self) -> None:
        if self.max_queue is not None and self.max_queue < 0:
            raise ConfigError(f"max_queue is {self.max_queue}; it must be at least 0, or None for no limit.")
        if self.max_body_size < 1:
            raise ConfigError(f"max_body_size is {self.max_body_size} bytes; it must be at least 1.")
        if any(not key for key in self.api_keys):
            raise ConfigError("An API key is empty; give at least 1 character, or none at all.")
