"""Every error a user can meet. Each message states the value, the limit and the remedy."""


class NanoVLLMError(Exception):
    """Base of all errors raised on purpose by this package."""


class ConfigError(NanoVLLMError, ValueError):
    """An argument or a model's config is out of range, inconsistent or unsupported."""


class RequestError(NanoVLLMError, ValueError):
    """A prompt or its sampling parameters cannot be served; other requests go on."""


class WeightsError(NanoVLLMError, ValueError):
    """Weights are missing, left over, of the wrong shape, corrupt or truncated."""


class DeviceError(NanoVLLMError, RuntimeError):
    """The device is missing, too small, or failed; the engine cannot go on."""
