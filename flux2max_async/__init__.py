"""An asyncio-native client for the FLUX.2 [max] image API: submit many tasks, poll each, stream each outcome.

    async with FluxSession() as session:
        picture = await session.generate("a lighthouse at dawn")
        await session.save(picture.images[0], "lighthouse.jpeg")

Names are imported on first use (PEP 562): pytest imports this package for its plugin at every start, which must not
cost the import of an HTTP client.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flux2max_async import journal as journal
    from flux2max_async import limits as limits
    from flux2max_async import storage as storage
    from flux2max_async import webhooks as webhooks
    from flux2max_async._public import *
    from flux2max_async._version import __version__ as __version__

_SUBPACKAGES = ("journal", "limits", "storage", "webhooks")


def __getattr__(name: str) -> Any:
    if name in _SUBPACKAGES:
        return import_module(f"{__name__}.{name}")
    if name.startswith("_") and name not in {"__all__", "__version__"}:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    public = vars(import_module(f"{__name__}._public"))
    names = [public_name for public_name in public if public_name[0].isalpha()]
    globals().update({public_name: public[public_name] for public_name in names})
    globals().update(__all__=[*sorted(names), "__version__"], __version__=public["__version__"])
    if name not in globals():
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return globals()[name]


def __dir__() -> list[str]:
    return sorted({*globals(), *__getattr__("__all__")})
