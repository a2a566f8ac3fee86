"""The adapters of a merge on its base, all of them active and unmerged, as PEFT holds them."""

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from flashbone.errors import ConfigError
from flashbone.files import names, peft, reading
from flashbone.files.adapter import Adapter
from flashbone.files.placing import shaped
from flashbone.merge.verify.running import naming


class Held(NamedTuple):
    """An adapter, where it came from, and how much of it went in."""

    path: Path
    adapter: Adapter
    weight: float


def read(adapters: Sequence[str | Path], weights: Sequence[float] | None) -> list[Held]:
    """The adapters, once it is known that PEFT can hold them side by side."""
    weights = [1.0] * len(adapters) if weights is None else list(weights)
    if len(weights) != len(adapters) or not adapters:
        raise ConfigError(f"weights: got {len(weights)} for {len(adapters)} adapters, wanted one for each")
    paths = [Path(adapter) for adapter in adapters]
    held = [Held(path, reading.read_adapter(path), weight) for path, weight in zip(paths, weights, strict=True)]
    replacing = dict.fromkeys(str(one.path) for one in held if one.adapter.replacements)
    if len(held) > 1 and replacing:
        raise ConfigError(
            f"{', '.join(replacing)}: holds values that take the place of the base's (biases, modules to save), which"
            " PEFT cannot load beside another adapter; such a merge cannot be verified"
        )
    return held


def attach(model: nn.Module, held: Sequence[Held]) -> Any:
    """Put the adapters on the model in place, all of them active and unmerged."""
    from peft import PeftConfig, PeftModel

    attached: Any = None
    for n, (path, adapter, weight) in enumerate(held):
        name = f"adapter{n}"
        with naming(path), tempfile.TemporaryDirectory() as folder:
            peft.write(_fitted(adapter, weight, model), Path(folder))
            if attached is None:
                config = PeftConfig.from_pretrained(folder)
                config.task_type = None  # a plain PeftModel, whatever the model can do
                attached = PeftModel.from_pretrained(_root(model, adapter), folder, name, config=config)
            else:
                attached.load_adapter(folder, name)
        attached.base_model.set_scale(name, weight)
    attached.base_model.set_adapter(list(attached.peft_config))
    attached.base_model.cache_in_inference(False)
    return attached.eval()


def _fitted(adapter: Adapter, weight: float, model: nn.Module) -> Adapter:
    """The adapter whose values are those that a merge moves the base's to, since the scale of PEFT leaves values alone;
    in the shapes that the model has them in, of which RWKV's files have others."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    found, _ = names.locate(adapter.replacements, parameters)  # loading names the others
    values = dict(adapter.replacements)
    for name, parameter in found.items():
        stored = parameters[parameter].detach()
        value = shaped(values[name], tuple(stored.shape))
        is_moved = weight != 1 and value.shape == stored.shape
        values[name] = stored + weight * (value.to(stored.dtype) - stored) if is_moved else value
    return replace(adapter, replacements=values)


def _root(model: nn.Module, adapter: Adapter) -> nn.Module:
    """Where the adapter's names begin: the model, what is in it (`model.`), or a box around it (`bert.`)."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    found, lost = names.locate([adapter.parameter(name) for name in adapter.blocks], parameters)
    shifted = [(wanted, name) for wanted, name in found.items() if wanted != name]
    if lost or not shifted:
        return model  # loading names what does not fit
    wanted, name = shifted[0]
    if len(name) > len(wanted):
        return model.get_submodule(name.removesuffix(f".{wanted}"))
    box = nn.Module()
    box.add_module(wanted.removesuffix(f".{name}"), model)
    return box
