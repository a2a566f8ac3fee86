"""What is said when the hub does not give what was named."""

import types

import pytest
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError

from flashbone.cli import hub
from flashbone.errors import ConfigError, FormatError
from flashbone.tuner.skeleton import skeleton

ID = "somebody/model"
REPLY = types.SimpleNamespace(headers={}, request=None, status_code=403)


@pytest.mark.parametrize(
    ("error", "offline", "message"),
    [
        (GatedRepoError("gated", response=REPLY), False, "access has to be granted on .*; then run `hf auth login`"),
        (RepositoryNotFoundError("no", response=REPLY), False, "not found in the hub; is it spelt right"),
        (LocalEntryNotFoundError("no connection"), False, "the hub could not be reached"),
        (LocalEntryNotFoundError("not cached"), True, "not found in the hub's cache"),
    ],
    ids=["gated", "misspelt", "no network", "offline"],
)
def test_why_the_hub_gives_nothing_is_told_apart(monkeypatch, error, offline, message):
    def refuse(*args, **kwargs):
        raise error

    monkeypatch.setattr("huggingface_hub.constants.is_offline_mode", lambda: offline)
    monkeypatch.setattr("flashbone.tuner.skeleton.hf_hub_download", refuse)
    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    with pytest.raises(ConfigError, match=f"^{ID}: .*{message}"):
        skeleton(ID)
    with pytest.raises(FormatError, match=f"^{ID}: .*{message}"):
        hub.folder(ID)
