"""A method on a model: an adapter by PEFT, or the model's own parameters that train."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from flashbone.errors import ConfigError, FlashboneError
from flashbone.evaluate.loading import same_compilers

if TYPE_CHECKING:
    from collections.abc import Iterator

    from flashbone.compare.methods.registry import Method

# PEFT finds a classification head by these names (PeftModelForSequenceClassification).
HEADS = ("classifier", "score")
# PEFT says these while it does what was asked.
_NOISE = (
    "fan_in_fan_out is set to",  # it is then set right for the layer
    "Failed to load the CUDA extension",  # BOFT; a butterfly factor that needs it is refused below
    "Setting boft_n_butterfly_factor to 1",
    "`is_gradient_checkpointing` is deprecated",  # PEFT asks transformers by an old name
    "Invalid `oft_block_size`",  # refused below, with the layers' names
    r"Invalid `r` \(",
)


def attach(model: Any, method: Method, config: Any, seed: int) -> Any:
    """Make a model train by this method. The model is changed, also when this fails: load it again then.

    Args:
        model: With its weights. Bounds in half precision become fp32: `full` as a whole, `linear` its head.
        method: Of `METHODS`.
        config: A new one of `method.config`; None of a bound.
        seed: Of the adapter's start; torch is seeded with it.

    Returns:
        A PeftModel; of a bound the model itself.

    Raises:
        ConfigError: the method cannot be attached to this model; in one line, with the method's name.
    """
    torch.manual_seed(seed)
    _refuse_quantised(model, method)
    try:
        if method.is_bound:
            return train_all(model) if method.name == "full" else train_head(model)
        if method.name == "vera" and not config.projection_prng_key:
            config.projection_prng_key = seed  # its random matrices come from a generator of their own
        return with_adapter(model, method, config)
    except FlashboneError as error:
        raise named(method, error) from error


def with_adapter(model: Any, method: Method, config: Any) -> Any:
    """`get_peft_model`, without the warnings that are not the user's, and with errors for what it would adjust."""
    from peft import get_peft_model

    _check_butterflies(config)
    try:
        with warnings.catch_warnings(), same_compilers():
            for text in _NOISE:
                warnings.filterwarnings("ignore", text)
            attached = get_peft_model(model, config)
    except (FlashboneError, torch.OutOfMemoryError):
        raise
    except (ValueError, TypeError, RuntimeError, NotImplementedError, KeyError) as error:
        raise ConfigError(" ".join(str(error).split()) + _remedy(config)) from error
    _check_blocks(attached)
    _check_ranks(attached, method)
    return attached


def named(method: Method, error: FlashboneError) -> ConfigError:
    """The error with the method's name before it, once."""
    prefix = f"{method.name}: "
    return ConfigError(prefix + str(error).removeprefix(prefix))


def tuner_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """The adapted layers of a PeftModel with their names in the base, in the model's order."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            yield name.removeprefix("base_model.model."), module


def train_all(model: Any) -> Any:
    """All parameters train, in fp32 where they are in half precision."""
    if any(p.is_floating_point() and p.element_size() < 4 for p in model.parameters()):
        model.float()
    return model.requires_grad_(True)


def train_head(model: Any) -> Any:
    """The head alone trains: a classifier, or a language model's output projection, untied from the embeddings."""
    model.requires_grad_(False)
    heads = find_heads(model)
    for head in heads:
        _untie(model, head)
        if any(p.element_size() < 4 for p in head.parameters()):
            head.float()
            head.register_forward_pre_hook(_in_fp32)
        head.requires_grad_(True)
    return model


def find_heads(model: Any) -> list[Any]:
    """The modules that linear probing trains.

    Raises:
        ConfigError: the model has none.
    """
    if type(model).__name__.endswith("ForSequenceClassification"):
        heads = [module for name, module in model.named_modules() if name.rsplit(".", 1)[-1] in HEADS]
    else:
        output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
        heads = [] if output is None else [output]
    if not heads:
        raise ConfigError(f"{type(model).__name__} has no head: no classifier, and no output projection")
    return heads


def _untie(model: Any, head: Any) -> None:
    shared = {id(p) for module in model.modules() if module is not head for p in module.parameters(recurse=False)}
    for name, parameter in list(head.named_parameters(recurse=False)):
        if id(parameter) in shared:
            setattr(head, name, nn.Parameter(parameter.detach().clone()))
            model.config.tie_word_embeddings = False


def _in_fp32(head: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(x.float() if torch.is_tensor(x) else x for x in inputs)


def _refuse_quantised(model: Any, method: Method) -> None:
    if not (getattr(model, "is_quantized", False) or getattr(model, "quantization_method", None)):
        return
    reasons = {
        "pissa": "it takes the base's weights apart, which a quantised base does not have",
        "olora": "it changes the base's weights, which would be quantised a second time",
        "hra": "PEFT's HRA reads the base's weights, which a quantised base does not have",
        "linear": "Trainer takes no quantised model without an adapter",
        "full": "the weights of a quantised base cannot be trained",
    }
    if method.name in reasons:
        raise ConfigError(f"{method.name}: {reasons[method.name]}; leave the method or the quantisation out")


def _check_butterflies(config: Any) -> None:
    if getattr(config, "boft_n_butterfly_factor", 1) < 2:
        return
    from peft.tuners.boft.layer import get_fbd_cuda

    with warnings.catch_warnings(), same_compilers():
        warnings.simplefilter("ignore", UserWarning)
        missing = get_fbd_cuda() is None
    if missing:
        raise ConfigError(
            f"boft_n_butterfly_factor={config.boft_n_butterfly_factor} needs PEFT's CUDA extension, which cannot be"
            " built here; PEFT would train one factor instead"
        )


def _check_blocks(model: Any) -> None:
    """PEFT's OFT takes another block where the one that was asked for does not divide."""
    config = model.active_peft_config
    asked = {"oft_block_size": getattr(config, "oft_block_size", 0)}
    if config.peft_type != "OFT":
        return
    if config.r:
        asked = {"r": config.r}
    (field, wanted), *_ = asked.items()
    wrong = {n: m for n, m in tuner_layers(model) if getattr(m, field)[model.active_adapter] != wanted}
    if wrong:
        names = ", ".join(f"{name} ({layer.in_features} inputs)" for name, layer in list(wrong.items())[:3])
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise ConfigError(f"{field}={wanted} does not divide the inputs of {names}{more}; choose one that does")


def _check_ranks(model: Any, method: Method) -> None:
    """PiSSA and OLoRA take parts of W: there are no more of them than its shorter side has entries."""
    if method.name not in ("pissa", "olora"):
        return
    adapter = model.active_adapter
    for name, layer in tuner_layers(model):
        if method.name == "olora" and layer.fan_in_fan_out:
            raise ConfigError(f"{name} is a Conv1D, which PEFT's OLoRA takes for its transpose; leave the method out")
        shorter = min(layer.in_features, layer.out_features)
        if layer.r[adapter] > shorter:
            raise ConfigError(f"r={layer.r[adapter]}, but {name} has only {shorter} directions; choose a smaller r")


def _remedy(config: Any) -> str:
    if config.peft_type == "IA3" and config.feedforward_modules is None:
        return (
            "; name those of target_modules whose input is scaled, such as the last layer of each feedforward part, or"
            " [] for none"
        )
    return ""
