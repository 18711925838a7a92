"""Every error a user can meet. Each message states the value, the limit and the remedy."""


class NanoVLLMError(Exception):
    """Base of all errors raised on purpose by this package."""


class ConfigError(NanoVLLMError, ValueError):
    """An argument or a model's config is out of range, inconsistent or unsupported."""


class RequestError(NanoVLLMError, ValueError):
    """A prompt or its sampling parameters cannot be served; other requests go on.

    Attributes:
        param: the argument that it is about, such as "temperature" or "prompt"; None if it is about none.
    """

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class WeightsError(NanoVLLMError, ValueError):
    """Weights are missing, left over, of the wrong shape, corrupt or truncated."""


class DeviceError(NanoVLLMError, RuntimeError):
    """The device is missing, too small, or failed; the engine cannot go on."""
