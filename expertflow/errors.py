"""The exceptions that ExpertFlow adds to Python's own."""


class UnsupportedModelError(ValueError):
    """The model, or an option of loading it, is outside what ExpertFlow can run exactly."""


class CheckpointError(ValueError):
    """A checkpoint file is damaged or disagrees with its config.json."""


class TransferError(OSError):
    """An expert could not be brought into the cache; the message names layer, expert and cause.

    The cache stays consistent: the same forward pass may be tried again.
    """


class CudaError(RuntimeError):
    """A call of the CUDA runtime failed; the message has the error, the call and the sizes."""
