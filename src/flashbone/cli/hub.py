"""Folders on disk or on the hub: what a command was given, as a path."""

from pathlib import Path

from flashbone.errors import FormatError
from flashbone.files.sources import hub_problem, is_hub_id


def looks_like_hub_id(given: str) -> bool:
    """Whether nothing on this disk is meant, as far as the name tells."""
    return not Path(given).exists() and is_hub_id(given)


def folder(given: str, ignored: tuple[str, ...] = ()) -> Path:
    """A local path as it is; what is none and looks like a hub id, from the hub or, offline, from its cache.

    Args:
        given: The path or id.
        ignored: Patterns of files that are not downloaded.

    Raises:
        FormatError: it is neither here nor there, or cannot be had.
    """
    if not looks_like_hub_id(given):
        if not Path(given).exists():
            raise FormatError(f"{given}: no such folder or file; is it spelt right? A path or a hub id was wanted")
        return Path(given)
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        offline = constants.is_offline_mode()
        return Path(snapshot_download(given, local_files_only=offline, ignore_patterns=list(ignored)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        raise FormatError(hub_problem(given, error)) from error


def has_file(hub_id: str, name: str) -> bool:
    """Whether a repository on the hub, or offline in its cache, has a file; it is downloaded."""
    from huggingface_hub import constants, hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError

    try:
        hf_hub_download(hub_id, name, local_files_only=constants.is_offline_mode())
    except (EntryNotFoundError, HfHubHTTPError, HFValidationError):
        return False
    return True
