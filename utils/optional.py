"""Packages that only some commands need."""

from __future__ import annotations

import importlib.util

from utils.errors import UserError


def require(*packages: str) -> None:
    """Make sure, without importing them, that packages are installed.

    Raises:
        UserError: one is not. Says how to install it.
    """
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        names = " ".join(missing)
        raise UserError(f"{names}: not installed; pip install {' '.join(packages)}")
