"""The build backend: scikit-build-core, which also asks for a CUDA compiler and CUTLASS where the machine has none."""

from __future__ import annotations

import os
import sys

import toolchain
from scikit_build_core import build as _build
from scikit_build_core.build import *  # noqa: F403 (the hooks of a backend, as they are)


def get_requires_for_build_wheel(config_settings=None) -> list[str]:
    return _build.get_requires_for_build_wheel(config_settings) + _toolchain()


def get_requires_for_build_editable(config_settings=None) -> list[str]:
    return _build.get_requires_for_build_editable(config_settings) + _toolchain()


def _toolchain() -> list[str]:
    # The same condition as [[tool.scikit-build.overrides]] in pyproject.toml, which leaves the compilation out.
    pure = not sys.platform.startswith("linux") or os.environ.get("FLASH_KDA_BUILD") == "0"
    return [] if pure else toolchain.requirements()
