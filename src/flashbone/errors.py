"""The errors that flashbone raises: one root, a subclass for each kind of wrong input; and words for the hub's."""


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


class BackendError(FlashboneError, RuntimeError):
    """A backend that was asked for by name cannot run: its package is missing, or the tensors are on another device."""


def hub_problem(name: str, error: Exception) -> str:
    """Why a repository could not be had from the hub or, offline, from its cache, in one line.

    Args:
        name: The hub id.
        error: Of huggingface_hub.
    """
    from huggingface_hub import constants
    from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError

    if isinstance(error, GatedRepoError):  # first: it is a RepositoryNotFoundError, too
        return f"{name}: access has to be granted on https://huggingface.co/{name}; then run `hf auth login`"
    if constants.is_offline_mode():
        where = "the hub's cache (offline, nothing is downloaded)"
    elif isinstance(error, LocalEntryNotFoundError):
        return f"{name}: no such folder, and the hub could not be reached; is there a network?"
    else:
        where = "the hub"
    return f"{name}: no such folder, and not found in {where}; is it spelt right?"
