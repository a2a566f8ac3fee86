"""RWKV-7 and RWKV-6 as models of transformers: their computation, files and tokenizer.

`import flashbone` is enough for AutoConfig, AutoModelForCausalLM and AutoTokenizer to know them.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flashbone.rwkv.config import Rwkv6Config as Rwkv6Config
    from flashbone.rwkv.config import Rwkv7Config as Rwkv7Config
    from flashbone.rwkv.files import from_pth as from_pth
    from flashbone.rwkv.files import read_config as read_config
    from flashbone.rwkv.files import to_pth as to_pth
    from flashbone.rwkv.loss import l2_wrap as l2_wrap
    from flashbone.rwkv.state import RwkvState as RwkvState
    from flashbone.rwkv.tokenizer import RwkvTokenizer as RwkvTokenizer
    from flashbone.rwkv.v6 import Rwkv6ForCausalLM as Rwkv6ForCausalLM
    from flashbone.rwkv.v7 import Rwkv7ForCausalLM as Rwkv7ForCausalLM

_PUBLIC = {
    "Rwkv6Config": "config",
    "Rwkv7Config": "config",
    "Rwkv6ForCausalLM": "v6",
    "Rwkv7ForCausalLM": "v7",
    "RwkvState": "state",
    "RwkvTokenizer": "tokenizer",
    "from_pth": "files",
    "l2_wrap": "loss",
    "read_config": "files",
    "to_pth": "files",
}
__all__ = [
    "Rwkv6Config",
    "Rwkv6ForCausalLM",
    "Rwkv7Config",
    "Rwkv7ForCausalLM",
    "RwkvState",
    "RwkvTokenizer",
    "from_pth",
    "l2_wrap",
    "read_config",
    "to_pth",
]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'flashbone.rwkv' has no attribute {name!r}")
    return getattr(import_module(f"flashbone.rwkv.{_PUBLIC[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC])
