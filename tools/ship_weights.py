"""Put trained networks into the package: weights as safetensors, a manifest with checksums.

python tools/ship_weights.py --profile cpu     # for maintainers; trains the networks, or finds them trained
"""

import argparse
import json
from pathlib import Path

from safetensors.torch import save_file

from dinv.data import load_dataset
from dinv.experiments import continual, stages
from dinv.experiments.profiles import load_profile
from dinv.files import sha256_file, to_cpu
from dinv.models import Classifier, parameter_count
from dinv.models.zoo import WEIGHTS
from dinv.training import accuracy

LARGEST_FILE = 20_000_000  # bytes; every clone carries them
LARGEST_TOTAL = 32_000_000
HALF = (
    5_000_000  # larger ones keep their matrices and filters in float16, which `load_model` reads as float32
)


def ship(
    model: Classifier,
    domain: str,
    accuracy: float,
    history: list[dict[str, float]],
    folder: Path = WEIGHTS,
    name: str = "",
) -> Path:
    """Write `model` and its entry in the manifest; returns the path of the weights.

    Args:
        accuracy: top-1 in percent on the whole test set of `domain`, or on its part with these classes.
        history: one record per epoch, as `training.train` returns them.
        name: what `load_model` will find it by; by default the network's own name.

    Raises:
        ValueError: the file, or all together, would be larger than what is shipped.
    """
    folder.mkdir(parents=True, exist_ok=True)
    name = name or model.name
    path, manifest_path = folder / f"{domain}-{name}.safetensors", folder / "manifest.json"
    state = to_cpu(model.state_dict())
    size = sum(value.nbytes for value in state.values())
    if size > HALF:
        matrices = {key for key, value in model.named_parameters() if value.dim() > 1}
        state = {key: value.half() if key in matrices else value for key, value in state.items()}
        size = sum(value.nbytes for value in state.values())
    others = sum(file.stat().st_size for file in folder.glob("*.safetensors") if file != path)
    if size > LARGEST_FILE or size + others > LARGEST_TOTAL:
        limits = f"{LARGEST_FILE / 1e6:.0f} MB per file and {LARGEST_TOTAL / 1e6:.0f} MB in all"
        raise ValueError(
            f"{name} has {size / 1e6:.1f} MB beside {others / 1e6:.1f} MB: at most {limits} are shipped"
        )
    save_file(state, path)
    path.chmod(0o644)  # safetensors writes files that only their owner can read
    manifest = json.loads(manifest_path.read_text()) if manifest_path.is_file() else {}
    manifest[name] = {
        "network": model.name,
        "domain": domain,
        "classes": list(model.classes),
        "file": path.name,
        "sha256": sha256_file(path),
        "parameters": parameter_count(model),
        "accuracy": round(accuracy, 2),
        "history": [{key: round(value, 4) for key, value in record.items()} for record in history],
    }
    manifest_path.write_text(json.dumps(manifest, indent=1, sort_keys=True) + "\n")
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description="ship a profile's networks")
    parser.add_argument("--profile", default="cpu")
    profile = load_profile(parser.parse_args().profile)
    test_set = load_dataset(profile.dataset, "test")
    networks = [(*stages.trained(profile, role), test_set, "") for role in ("teacher", "verifier")]
    for count in sorted({counts[0] for counts in profile.continual.splits}):
        part, name = continual.part_of(test_set, 0, count), f"{profile.teacher}-{count}-classes"
        networks.append((*continual.trained_on_part(profile, count), part, name))
    for model, history, data, name in networks:
        score = accuracy(model, data.images, data.labels)
        try:
            print(f"{ship(model, profile.dataset, score, history, name=name).name}: {score:.2f} %")
        except ValueError as reason:
            print(f"not shipped: {reason}")


if __name__ == "__main__":
    main()
