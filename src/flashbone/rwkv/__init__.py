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
    from flashbone.rwkv.time_state import add_time_state as add_time_state
    from flashbone.rwkv.time_state import load_time_state as load_time_state
    from flashbone.rwkv.time_state import save_time_state as save_time_state
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
    "add_time_state": "time_state",
    "from_pth": "files",
    "l2_wrap": "loss",
    "load_time_state": "time_state",
    "read_config": "files",
    "save_time_state": "time_state",
    "to_pth": "files",
}
__all__ = [
    "Rwkv6Config",
    "Rwkv6ForCausalLM",
    "Rwkv7Config",
    "Rwkv7ForCausalLM",
    "RwkvState",
    "RwkvTokenizer",
    "add_time_state",
    "from_pth",
    "l2_wrap",
    "load_time_state",
    "read_config",
    "save_time_state",
    "to_pth",
]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'flashbone.rwkv' has no attribute {name!r}")
    return getattr(import_module(f"flashbone.rwkv.{_PUBLIC[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC])
