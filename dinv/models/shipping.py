"""Put trained networks into the package: weights as safetensors, a manifest with checksums.

    python -m dinv.models.shipping --profile cpu     # for maintainers; trains, or finds it trained
"""

from __future__ import annotations

import argparse
import hashlib
import json
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from dinv.models.classifier import Classifier, parameter_count
from dinv.models.registry import WEIGHTS

LARGEST_FILE = 5_000_000  # bytes; every clone carries them
LARGEST_TOTAL = 12_000_000


def ship(
    model: Classifier,
    domain: str,
    accuracy: float,
    history: list[dict[str, float]],
    folder: Path = WEIGHTS,
    name: str | None = None,
) -> Path:
    """Write `model` and its entry in the manifest.

    Args:
        accuracy: top-1 in percent on the whole test set of `domain`, or on its part with these classes.
        history: one record an epoch, as `training.train` returns them.
        name: by which `load_model` finds it; the network's own, where not given.

    Raises:
        ValueError: the file, or all together, would be larger than what is shipped.
    """
    folder.mkdir(parents=True, exist_ok=True)
    name = name or model.name
    path = folder / f"{domain}-{name}.safetensors"
    state = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    size = sum(value.nbytes for value in state.values())
    others = sum(f.stat().st_size for f in folder.glob("*.safetensors") if f != path)
    if size > LARGEST_FILE or size + others > LARGEST_TOTAL:
        raise ValueError(
            f"{name} has {size / 1e6:.1f} MB beside {others / 1e6:.1f} MB: at most "
            f"{LARGEST_FILE / 1e6:.0f} MB a file and {LARGEST_TOTAL / 1e6:.0f} MB in all are shipped"
        )
    save_file(state, path)
    path.chmod(0o644)  # safetensors writes files that only their owner can read
    manifest_path = folder / "manifest.json"
    manifest: dict[str, Any] = json.loads(manifest_path.read_text()) if manifest_path.is_file() else {}
    manifest[name] = {
        "network": model.name,
        "domain": domain,
        "classes": list(model.classes),
        "file": path.name,
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "parameters": parameter_count(model),
        "accuracy": round(accuracy, 2),
        "history": [{key: round(value, 4) for key, value in record.items()} for record in history],
    }
    manifest_path.write_text(json.dumps(manifest, indent=1, sort_keys=True) + "\n")
    return path


def main() -> None:
    from dinv import chapters, increments
    from dinv.datasets import load_dataset
    from dinv.metrics import accuracy

    parser = argparse.ArgumentParser(description="ship a profile's networks")
    parser.add_argument("--profile", default="cpu")
    run = chapters.start("00_teacher", parser.parse_args().profile)
    domain, test_set = run.profile.dataset, load_dataset(run.profile.dataset, "test")
    parts = sorted({counts[0] for counts in run.profile.continual.splits})
    networks = [(*chapters.trained(run, role), test_set, None) for role in ("teacher", "judge")]
    networks += [
        (*increments.trained_on_part(run, count), increments.part_of(test_set, 0, count),
         increments.name_of_part(run, count))
        for count in parts
    ]  # fmt: skip
    for model, result, data, name in networks:
        score = accuracy(model, data.images, data.labels)
        print(f"{ship(model, domain, score, result.meta['history'], name=name).name}: {score:.2f} %")


if __name__ == "__main__":
    main()
