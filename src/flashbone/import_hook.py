"""Run a function as soon as a module has been imported, at once if it has been.

Written here although wrapt offers it: wrapt 2.5 imports asyncio, 66 to 99 ms on two cores, and `import flashbone` is to
take less than 50 ms.
"""

import importlib.util
import sys
from _thread import get_ident
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from types import ModuleType


def when_imported(name: str, function: Callable[[ModuleType], None]) -> None:
    """Call `function(module)` once the module is imported; what it raises, the import raises."""
    if (module := sys.modules.get(name)) is not None:
        function(module)
    else:
        sys.meta_path.insert(0, _AfterImport(name, function))  # pyright: ignore[reportArgumentType]


class _AfterImport:
    """A finder of `sys.meta_path`: finds one module as the others would, whose loader calls the function after it.

    It stays in place until the module has been loaded, since others look for specs without loading, and imports fail.
    """

    def __init__(self, name: str, function: Callable[[ModuleType], None]) -> None:
        self.name, self.function = name, function
        self._searching: set[int] = set()  # threads that are asking the other finders

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> ModuleSpec | None:
        if fullname != self.name or get_ident() in self._searching:
            return None
        self._searching.add(get_ident())
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self._searching.discard(get_ident())
        if spec is not None and spec.loader is not None:
            load = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                load(module)
                self.function(module)
                sys.meta_path.remove(self)  # pyright: ignore[reportArgumentType]

            spec.loader.exec_module = exec_module
        return spec
