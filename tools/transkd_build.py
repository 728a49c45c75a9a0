"""In-tree PEP 517 backend: setuptools, building against the torch that is already installed.

pip builds in an isolated environment. Asking for torch there would download gigabytes again and might compile against
another version than the one in use, so the requirement is made only where the environment has no torch that is new
enough. setup.py is never run to find the requirements, because it imports torch.
"""

from __future__ import annotations

import importlib.util
import site
import sys
from pathlib import Path
from typing import Any

from setuptools import build_meta
from setuptools.build_meta import build_sdist  # noqa: F401  (a hook of the backend)

MINIMUM_TORCH = (2, 11)


def _site_folders() -> list[Path]:
    """The folders this interpreter imports packages from; pip hides them from sys.path, but site still knows them."""
    folders = site.getsitepackages()
    if sys.prefix == sys.base_prefix:  # a virtual environment does not look into the user's folder
        folders = [site.getusersitepackages(), *folders]
    return [Path(folder) for folder in folders]


def installed_torch() -> tuple[Path, str] | None:
    """Find a torch that is new enough in the environment pip was started from: (its folder, its version)."""
    for folder in _site_folders():
        for info in folder.glob("torch-*.dist-info"):
            version = info.name.removeprefix("torch-").removesuffix(".dist-info")
            release = version.split("+")[0].split(".")[:2]
            if all(part.isdigit() for part in release) and tuple(map(int, release)) >= MINIMUM_TORCH:
                return folder, version
    return None


def _torch_requirement() -> list[str]:
    if importlib.util.find_spec("torch") is not None:  # pip install --no-build-isolation
        return []
    found = installed_torch()
    if found is None:
        return [f"torch>={MINIMUM_TORCH[0]}.{MINIMUM_TORCH[1]}"]
    print(f"transkd_fast: building against the installed torch {found[1]}")
    return []


def _expose_torch() -> None:
    if importlib.util.find_spec("torch") is None:
        found = installed_torch()
        if found is not None:
            sys.path.append(str(found[0]))  # last, so that the isolated build tools keep precedence


def get_requires_for_build_sdist(config_settings: Any = None) -> list[str]:
    return []


def get_requires_for_build_wheel(config_settings: Any = None) -> list[str]:
    return _torch_requirement()


def get_requires_for_build_editable(config_settings: Any = None) -> list[str]:
    return _torch_requirement()


def prepare_metadata_for_build_wheel(*args: Any, **kwargs: Any) -> str:
    _expose_torch()
    return build_meta.prepare_metadata_for_build_wheel(*args, **kwargs)


def prepare_metadata_for_build_editable(*args: Any, **kwargs: Any) -> str:
    _expose_torch()
    return build_meta.prepare_metadata_for_build_editable(*args, **kwargs)


def build_wheel(*args: Any, **kwargs: Any) -> str:
    _expose_torch()
    return build_meta.build_wheel(*args, **kwargs)


def build_editable(*args: Any, **kwargs: Any) -> str:
    _expose_torch()
    return build_meta.build_editable(*args, **kwargs)
