"""The errors that flashbone raises: one root, one subclass for each kind of wrong input."""


class FlashboneError(Exception):
    """Root of all errors raised on purpose; the message says where, what was got, what was wanted, and the remedy."""


class ShapeError(FlashboneError, ValueError):
    """A tensor or a layer has sizes that do not fit."""


class FormatError(FlashboneError, ValueError):
    """A file is not what it should be: missing, truncated, of another layout, or with unknown keys."""


class ConfigError(FlashboneError, ValueError):
    """A configuration field is unknown, out of range, or contradicts another."""


class NonFiniteError(FlashboneError, ValueError):
    """A result that is to be written holds NaN or infinity."""


class OutdatedPackageError(FlashboneError, ImportError):
    """Another package is missing, or older than flashbone can work with."""


class BackendError(FlashboneError, RuntimeError):
    """A backend that was asked for by name cannot run: its package is missing, or the tensors are on another device."""
