"""Stands in for SGLang's CUDA kernels on a machine without a CUDA driver.

SGLang's CPU engine imports names from `sgl_kernel` that it never calls unless a CUDA-only feature
is switched on. The real package cannot be imported without `libcuda.so.1`. Here every name exists,
in every submodule, and raises NotImplementedError only when it is called.

`sglang_multipole.cpu_host.prepare` puts this folder on `sys.path`; nothing else may import it.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from types import ModuleType


class MissingKernel:
    """A name of `sgl_kernel` that exists and cannot be used."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __call__(self, *args: object, **kwargs: object) -> None:
        raise NotImplementedError(
            f"{self._name}: needs SGLang's CUDA kernels, got a machine without a CUDA driver; "
            "switch off the feature that calls it"
        )

    def __getattr__(self, attribute: str) -> MissingKernel:
        if attribute.startswith("__"):
            raise AttributeError(attribute)
        return MissingKernel(f"{self._name}.{attribute}")

    def __repr__(self) -> str:
        return f"<{self._name}, missing>"


class _SubmoduleFinder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Makes any `sgl_kernel.x` importable: SGLang imports from the submodules as well."""

    def find_spec(
        self, fullname: str, path: object, target: object = None
    ) -> importlib.machinery.ModuleSpec | None:
        if not fullname.startswith(f"{__name__}."):
            return None
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        module.__getattr__ = lambda attribute: _missing(module.__name__, attribute)


def _missing(module: str, attribute: str) -> MissingKernel:
    # import machinery and inspection probe for dunders: they must look absent
    if attribute.startswith("__"):
        raise AttributeError(f"module {module!r} has no attribute {attribute!r}")
    return MissingKernel(f"{module}.{attribute}")


def __getattr__(attribute: str) -> MissingKernel:
    return _missing(__name__, attribute)


sys.meta_path.append(_SubmoduleFinder())
