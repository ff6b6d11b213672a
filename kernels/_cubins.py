"""Which store of compiled kernels PyTorch's ops take their code from.

``FUSEENGINE_CUBINS=FOLDER``, or :func:`use`, names a folder that ``python -m fuseengine.kernels.aot
--out FOLDER`` wrote; then no launch that it covers needs Triton. The folder's form and the rule by
which a launch finds its code are :mod:`fuseengine.runtime.cubins`, which knows no torch.
"""

from __future__ import annotations

import os

from fuseengine.runtime.cubins import Store

CUBINS = "FUSEENGINE_CUBINS"

_unknown = object()
_active: object = _unknown


def use(folder: str | os.PathLike[str] | Store | None) -> Store | None:
    """Take compiled kernels from a store from now on.

    Args:
        folder: of the store, or a loaded one; None for none, whatever FUSEENGINE_CUBINS says.

    Returns:
        The store.

    Raises:
        KernelStoreError: no store there, another schema, a damaged manifest or file.
    """
    global _active
    store = folder if folder is None or isinstance(folder, Store) else Store.load(folder)
    _active = store
    return store


def active() -> Store | None:
    """The store in use; the first call reads FUSEENGINE_CUBINS."""
    if _active is _unknown:
        return use(os.environ.get(CUBINS) or None)
    return _active  # type: ignore[return-value]
