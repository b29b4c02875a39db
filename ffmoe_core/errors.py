"""What can go wrong, by name.

Every error a user's input can cause is one of these. Each also derives from the built-in exception a
Python programmer would expect to catch, so ``except ValueError`` keeps working.
"""


class FFMoEError(Exception):
    """Base of every error raised on purpose by ffmoe."""


class ConfigError(FFMoEError, ValueError):
    """An option has a value that cannot be used, or two options contradict each other."""


class ShapeError(FFMoEError, ValueError):
    """An array has the wrong rank or width."""


class DTypeError(FFMoEError, TypeError):
    """An array has a dtype that is not supported in its place."""


class DeviceError(FFMoEError, ValueError):
    """Arrays live on different devices, or on a device that is not supported."""


class LayoutError(FFMoEError, ValueError):
    """An array is not C-contiguous (or not aligned to its element size)."""


class RoutingError(FFMoEError, ValueError):
    """Routing indices from outside name an expert that does not exist."""


class CapacityError(FFMoEError, RuntimeError):
    """An expert got more rows than its bound while dropping tokens is not allowed."""


class NonFiniteError(FFMoEError, ValueError):
    """Checked mode (``FFMOE_CHECK=1``) found NaN or infinity in the router's logits."""


class MissingDependencyError(FFMoEError, ImportError):
    """A package that this input needs is not installed; the message says which."""


class KernelError(FFMoEError, RuntimeError):
    """A CUDA kernel failed to compile, load or launch."""


class OutOfMemoryError(FFMoEError, MemoryError):
    """The device or host has no room for an array this call needs."""


class UnsupportedError(FFMoEError, NotImplementedError):
    """The combination asked for cannot work (double backward, ``torch.func``, ...)."""


class CommError(FFMoEError, RuntimeError):
    """Ranks of a group did not take part in an exchange: dead, stopped, stuck, or one of them raised.

    ``ranks`` are the ranks to blame, ``step`` is what was being exchanged ("counts", "dispatch", "combine", ...)
    and ``layer`` the name of the layer it was for.
    """

    def __init__(self, message: str, ranks: tuple[int, ...] = (), step: str = "", layer: str = "") -> None:
        super().__init__(message)
        self.ranks = ranks
        self.step = step
        self.layer = layer
