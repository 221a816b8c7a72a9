"""`./reproduce.sh clean`: remove what runs have made; standard library only."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

CACHES = (".pytest_cache", ".ruff_cache")


def clean(root: Path, dry_run: bool = False) -> list[Path]:
    """Remove runs/, the executed notebooks figures/*/notebooks, and the tools' caches.

    Data, .venv and every committed figure and table stay. So does what lies outside the repository:
    a DINV_CACHE of the user's own may hold more than ours.

    Returns:
        The folders removed, or with `dry_run` those that would be.
    """
    folders = [root / "runs", *sorted(root.glob("figures/*/notebooks"))]
    folders = [path for path in (*folders, *(root / name for name in CACHES)) if path.is_dir()]
    for path in folders:
        print(f"{'would remove' if dry_run else 'removing'} {path.relative_to(root)}/")
        if dry_run:
            continue
        if path.is_symlink():
            path.unlink()  # what it points to is the user's
        else:
            shutil.rmtree(path)
    if not folders:
        print("nothing to remove")
    for variable in ("DINV_CACHE", "DINV_FIGURES"):
        if os.environ.get(variable):
            print(f"kept: {variable}={os.environ[variable]}, which this command does not touch")
    kept = [name for name in ("data", ".venv") if (root / name).is_dir()]
    if kept:
        print(f"kept: {', '.join(kept)} (to remove: rm -rf {' '.join(kept)})")
    return folders
