"""What inference builds from parameters once and keeps: a sum of blocks, a shifted weight."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple

from torch import Tensor
from torch.nn import Parameter


class _Entry(NamedTuple):
    settings: Hashable
    # Aliases share the version counter of their source, and hold its storage, so that no other tensor gets its address.
    sources: list[Tensor]
    versions: list[int]
    value: Tensor

    def is_current(self, settings: Hashable, sources: Sequence[Tensor]) -> bool:
        return (
            self.settings == settings
            and len(self.sources) == len(sources)
            and all(
                alias.data_ptr() == source.data_ptr()
                and version == source._version
                and alias.stride() == source.stride()
                for alias, version, source in zip(self.sources, self.versions, sources, strict=True)
            )
        )


class Cache:
    """At most one tensor for each role, rebuilt as soon as a source or a setting differs from what it was built from.

    A change in place is seen by torch's version counter, a tensor that was replaced by its address. What torch itself
    cannot see, an in-place operation on `parameter.data`, is not seen here either; `clear` is for that. A source that
    was replaced is held until the next call or `clear`. Copies and pickles of a cache are empty.

    Attributes:
        keeps_weights: whether tensors as large as a weight are to be kept.
    """

    def __init__(self, keeps_weights: bool = True) -> None:
        self.keeps_weights = keeps_weights
        self._entries: dict[Hashable, _Entry] = {}
        self._parts: dict[Hashable, Cache] = {}

    def part(self, key: Hashable) -> Cache:
        """A cache with roles of its own within this one, cleared with it; there may be many, and none keeps weights."""
        return self._parts.setdefault(key, Cache(keeps_weights=False))

    def get(
        self,
        role: Hashable,
        settings: Hashable,
        sources: Sequence[Tensor],
        build: Callable[[], Tensor],
        keep: bool = True,
    ) -> Tensor:
        """The tensor that `build()` makes from the sources; from the cache if it is there and nothing changed.

        Without `keep`, or with sources that do not count their versions (inference tensors, subclasses), the result
        is not kept.
        """
        entry = self._entries.get(role)
        if entry is not None:
            if entry.is_current(settings, sources):
                return entry.value
            self._entries.pop(role, None)  # before the new one is built: never two at a time
            del entry
        value = build()
        if keep and all(type(s) in (Tensor, Parameter) and not s.is_inference() for s in sources):
            aliases = [source.detach() for source in sources]
            self._entries[role] = _Entry(settings, aliases, [source._version for source in sources], value)
        return value

    def clear(self) -> None:
        """Forget everything."""
        self._entries.clear()
        self._parts.clear()

    def __len__(self) -> int:
        return len(self._entries) + sum(map(len, self._parts.values()))

    def __reduce__(self) -> tuple[type[Cache], tuple[()]]:
        return Cache, ()
