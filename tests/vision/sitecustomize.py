"""Makes a torchvision that was built for CUDA importable beside a torch for the CPU, in the tests of image models.

A package index may hold no other pair. Such a torchvision cannot load its compiled operators, and its Python part asks
for the declaration of two of them; nothing here calls either. Put this folder on the PYTHONPATH of tests alone.
"""

from __future__ import annotations

import ctypes
import importlib.abc
import importlib.machinery
import sys
from pathlib import Path

DECLARED = ("nms", "qnms")
kept = []  # a declaration lives as long as its library object


class DeclareOperators(importlib.abc.MetaPathFinder):
    """Acts when torchvision is first looked for, so that Python starts without torch."""

    def find_spec(self, fullname, path=None, target=None):
        """Finds nothing itself."""
        if fullname == "torchvision" and not kept:
            kept.append(None)  # the look-ups below come here again
            found = importlib.machinery.PathFinder.find_spec("torchvision")
            if found and found.submodule_search_locations and not self._loads(found.submodule_search_locations[0]):
                self._declare()
        return

    def _loads(self, folder: str) -> bool:
        import torch  # noqa: F401  its libraries first

        try:
            for library in Path(folder).glob("_C*.so"):
                ctypes.CDLL(str(library))
        except OSError:
            return False
        return True

    def _declare(self) -> None:
        import torch

        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in DECLARED:
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        kept.append(library)


sys.meta_path.insert(0, DeclareOperators())
