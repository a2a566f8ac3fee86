"""An adapter's folder in the place of a model: it is run on the base that its configuration names."""

from pathlib import Path

from flashbone.errors import ConfigError
from flashbone.files.sources import is_hub_id, read_json

CONFIG = "adapter_config.json"


def is_adapter(model: str) -> bool:
    """Whether a name that a model was wanted by is an adapter's folder."""
    folder = Path(model).expanduser()
    return (folder / CONFIG).is_file() and not (folder / "config.json").is_file()


def base_of(adapter: str) -> str:
    """The model that the configuration of an adapter's folder names.

    Raises:
        ConfigError: it names none, or one that is neither on this disk nor in the hub's cache.
        FormatError: the configuration cannot be read.
    """
    name = read_json(Path(adapter).expanduser() / CONFIG).get("base_model_name_or_path")
    if not isinstance(name, str) or not name:
        raise ConfigError(f"{adapter}: is an adapter whose {CONFIG} names no base; give MODEL --adapter {adapter}")
    if not _exists(name):
        raise ConfigError(
            f"{adapter}: is an adapter for {name}, which is neither a model on this disk, seen from"
            f" {Path.cwd()}, nor in the hub's cache; give the base: MODEL --adapter {adapter}"
        )
    return name


def _exists(name: str) -> bool:
    path = Path(name).expanduser()
    if path.suffix in (".pth", ".gguf"):
        return path.is_file()
    if path.exists():
        return (path / "config.json").is_file()
    if not is_hub_id(name):
        return False
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        return isinstance(try_to_load_from_cache(name, "config.json"), str)
    except HFValidationError:
        return False
