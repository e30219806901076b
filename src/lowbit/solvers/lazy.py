"""`lazy`: a property that is computed once for each instance, in several threads side by side."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    lazy = cached_property
else:

    class lazy(cached_property):  # noqa: N801  (used as cached_property is)
        """`functools.cached_property` as it is from Python 3.12 on.

        Before, one lock for all instances of a class is held while a value is computed: layers that are solved in
        threads would wait for each other's Cholesky factors. Without it a value that two threads ask one instance for
        at once may be computed twice.
        """

        def __get__(self, instance: Any, owner: type | None = None) -> Any:
            if instance is None:
                return self
            found = vars(instance)
            if self.attrname not in found:
                found[self.attrname] = self.func(instance)
            return found[self.attrname]
