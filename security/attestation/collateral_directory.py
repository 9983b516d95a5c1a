"""The broker's collateral: a directory of vendors' documents, read anew when it changes.

An operator's job keeps it fresh (AMD's revocation lists, Intel's TCB info, NVIDIA's manifests);
write new files beside the old ones and rename them into place. The broker fetches nothing itself.
"""

from __future__ import annotations

import threading
from pathlib import Path

from security.attestation.collateral import Collateral
from security.attestation.document_files import (
    COLLATERAL_FOLDERS,
    DocumentDirectory,
    read_collateral,
)
from security.errors import CollateralUnusable, FileUnusable

__all__ = ["CollateralDirectory"]


class CollateralDirectory:
    """Calling it gives what the directory holds now; safe to use from threads."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._signature: tuple[tuple[str, int, int], ...] | None = None
        self._collateral = Collateral()

    def __call__(self) -> Collateral:
        """The documents as they are now.

        Raises:
            CollateralUnusable: the directory or one of its files cannot be read.
        """
        with self._lock:
            try:
                directory = DocumentDirectory.open(self._path, COLLATERAL_FOLDERS)
                signature = directory.signature()
                if signature != self._signature:
                    self._collateral = read_collateral(directory)
                    self._signature = signature
            except FileUnusable as error:
                raise CollateralUnusable(f"collateral: {error}") from None
            return self._collateral
