"""What is said of a model that is not there: not on the hub, and not on this disk."""

import json
import re
import types

import pytest
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError

from flashbone.cli import hub, main
from flashbone.errors import ConfigError, FormatError
from flashbone.tuner.model.skeleton import skeleton
from helpers.adapter_folders import blocks_for, tiny_llama, write_adapter
from helpers.fixtures import _own_cache
from helpers.tiny_llama import questions

__all__ = ["_own_cache"]

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
    monkeypatch.setattr("flashbone.tuner.model.skeleton.hf_hub_download", refuse)
    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    with pytest.raises(ConfigError, match=f"^{ID}: .*{message}"):
        skeleton(ID)
    with pytest.raises(FormatError, match=f"^{ID}: .*{message}"):
        hub.folder(ID)


COMMANDS = {
    "inspect": "inspect {}",
    "merge": "merge {} adapter out",
    "convert": "convert adapter out --to lora --base {}",
    "eval": "eval {} --perplexity text.txt",
    "train": "train c.yaml --model {}",
}
LOCAL, IS_FILE = "no such folder( or file)?; .*wanted|no such folder or file; is it spelt right", "is a file; .*wanted"
HUB = "no such folder, and not found in the hub's cache .offline.*; is it spelt right"


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder with everything but a model."""
    folder = tmp_path_factory.mktemp("work")
    write_adapter(folder / "adapter", "bat-col", blocks_for(tiny_llama(), "bat-col", ("q_proj",), 4))
    (folder / "text.txt").write_text("the cat sat")
    (folder / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in questions(12)))
    (folder / "c.yaml").write_text("model: absent\ndata: {path: q.jsonl}\noutput: out\ntraining: {max_steps: 1}\n")
    return folder


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    ("base", "message"),
    [("./modle", LOCAL), ("a/deep/modle", LOCAL), ("modle", HUB), ("somebody/modle", HUB), ("text.txt", IS_FILE)],
)
def test_a_mistyped_base_is_one_line_with_a_remedy(workplace, monkeypatch, capsys, command, base, message):
    monkeypatch.chdir(workplace)
    assert main(COMMANDS[command].format(base).split()) == 1
    said = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("flashbone: ")]
    assert len(said) == 1
    assert re.match(rf"flashbone {command}: error: (model )?{base}: ({message})", said[0])
    assert sorted(path.name for path in workplace.iterdir()) == ["adapter", "c.yaml", "q.jsonl", "text.txt"]
