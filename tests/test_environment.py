"""The three lists of packages agree; the checker of environments; the words of reproduce.sh."""

import argparse
import re
import subprocess
import sys
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import pytest
import yaml
from packaging.markers import Marker
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from dinv.reproduce import cli, environment

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
LOCK = ROOT / "requirements.lock"
CONDA = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
PYTHONS = ("3.11", "3.12", "3.13", "3.14")
EXTRAS = PROJECT["optional-dependencies"]
DECLARED = [Requirement(line) for line in (*PROJECT["dependencies"], *sum(EXTRAS.values(), []))]


def applies(marker: str, python: str, system: str) -> bool:
    platform = {"Linux": "linux", "Darwin": "darwin"}[system]
    machine = {"Linux": "x86_64", "Darwin": "arm64"}[system]
    return not marker or Marker(marker).evaluate(
        {
            "python_version": python,
            "python_full_version": f"{python}.5",
            "platform_system": system,
            "sys_platform": platform,
            "platform_machine": machine,
        }
    )


# ---------------------------------------------------------------- one list of versions


@pytest.mark.parametrize("system", ["Linux", "Darwin"])
@pytest.mark.parametrize("python", PYTHONS)
def test_lock_pins_what_pyproject_declares(python, system):
    pinned = {}
    for pin in environment.pins(LOCK):
        if applies(pin.marker, python, system):
            assert pin.name not in pinned, f"{pin.name} is pinned twice"
            pinned[pin.name] = pin.version
    for wanted in DECLARED:
        name = canonicalize_name(wanted.name)
        assert name in pinned, f"{name} is declared but not locked"
        assert wanted.specifier.contains(pinned[name]), f"{wanted} but {pinned[name]} is locked"


def test_pyproject_admits_an_older_torch():
    versions = {"torch": "2.11.0", "torchvision": "0.26.0"}
    for wanted in DECLARED:
        if wanted.name in versions:
            assert wanted.specifier.contains(versions.pop(wanted.name))
    assert not versions
    assert SpecifierSet(PROJECT["requires-python"]).contains("3.12.0")


def test_every_locked_package_has_hashes_and_nothing_names_a_place():
    text = LOCK.read_text(encoding="utf-8")
    found = environment.pins(LOCK)
    assert len(found) == len(re.findall(r"^[^\s#]", text, re.MULTILINE)), "an entry was not read"
    for pin in found:
        assert re.search(r"--hash=sha256:[0-9a-f]{64}\b", pin.text), f"{pin.name} has no hash"
    text = text.replace("    --hash=", "")
    assert not re.search(r"://|file:|(^|\s)/|^\s*-", text, re.MULTILINE)


def test_lock_says_how_it_is_made():
    command = LOCK.read_text(encoding="utf-8").splitlines()[1]
    assert command.lstrip("# ").startswith("uv pip compile --universal ")
    assert "--generate-hashes" in command
    assert command.endswith("pyproject.toml -o requirements.lock")


def test_conda_takes_the_lock():
    *packages, pip = CONDA["dependencies"]
    names = {re.split(r"[=<>\s]", package)[0]: package for package in packages}
    assert CONDA["name"] == "dinv"
    assert set(names) == {"python", "nodejs", "pip"}
    assert pip == {"pip": ["-r requirements.lock"]}, "one list of versions, and no second"
    assert names["python"].partition("=")[2] in PYTHONS


def test_the_oldest_python_is_the_same_everywhere():
    oldest, newest = PYTHONS[0], PYTHONS[-1]
    assert PROJECT["requires-python"] == f">={oldest}"
    script = (ROOT / "reproduce.sh").read_text(encoding="utf-8")
    ends = [f"({version.replace('.', ', ')})" for version in (oldest, newest)]
    assert f"{ends[0]} <= sys.version_info[:2] <= {ends[1]}" in script
    assert f"no Python {oldest} to {newest}" in script


def test_package_data_covers_every_file():
    tools = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]
    patterns = tools["setuptools"]["package-data"]["dinv"]
    package = ROOT / "dinv"
    for path in package.rglob("*"):
        if path.is_file() and path.suffix not in (".py", ".pyc") and path.name[0] != ".":
            name = path.relative_to(package).as_posix()
            assert any(fnmatch(name, pattern) for pattern in patterns), f"{name} is not packaged"


# ---------------------------------------------------------------- the checker


def lock(folder: Path, *lines: str) -> Path:
    path = folder / "some.lock"
    path.write_text("\n".join(f"{line} \\\n    --hash=sha256:{64 * '0'}" for line in lines))
    return path


@pytest.fixture
def installed(monkeypatch):
    """Makes the checker see these packages and no others."""

    def use(**versions):
        def version(name):
            try:
                return versions[name.replace("-", "_")]
            except KeyError:
                raise environment.metadata.PackageNotFoundError(name) from None

        monkeypatch.setattr(environment.metadata, "version", version)

    return use


def test_checker_is_content_with_the_locked_versions(tmp_path, installed):
    installed(torch="2.15.0+cu132", scikit_learn="1.9.1")
    path = lock(tmp_path, "torch==2.15.0", "scikit-learn==1.9.1")
    assert environment.differences(path) == []


def test_checker_names_what_differs(tmp_path, installed):
    installed(torch="2.11.0")
    path = lock(tmp_path, "torch==2.15.0", "nbval==0.11.0")
    assert environment.differences(path) == [
        "torch is 2.11.0, the lock has 2.15.0",
        "nbval is missing",
    ]


def test_checker_honours_markers(tmp_path, installed):
    installed()
    path = lock(
        tmp_path,
        "colorama==0.4.6 ; sys_platform == 'win32'",
        "old==1 ; python_full_version < '3.9'",
        "here==1 ; python_full_version >= '3.9'",
    )
    assert environment.differences(path) == ["here is missing"]


def test_torch_for_the_cpu_needs_no_cuda(tmp_path, installed):
    path = lock(tmp_path, "torch==2.15.0", "nvidia-cublas==13.4", "cuda-toolkit==13.2", "triton==3")
    installed(torch="2.15.0+cpu")
    assert environment.differences(path) == []
    installed(torch="2.15.0")
    assert len(environment.differences(path)) == 3


def test_a_missing_or_empty_lock_is_named(tmp_path):
    with pytest.raises(environment.SetupError, match=r"cannot read .*absent.lock: No such file"):
        environment.pins(tmp_path / "absent.lock")
    (tmp_path / "empty.lock").write_text("# nothing\n")
    with pytest.raises(environment.SetupError, match="empty.lock names no package; restore it"):
        environment.pins(tmp_path / "empty.lock")


def test_folders_for_tools_only_where_home_is_not_writable(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert environment._homeless({}) == {}
    monkeypatch.setenv("HOME", str(tmp_path / "absent"))
    chosen = environment._homeless({"MPLCONFIGDIR": "mine"})
    assert "MPLCONFIGDIR" not in chosen
    assert chosen["JUPYTER_DATA_DIR"].startswith(str(ROOT / "runs"))


# ---------------------------------------------------------------- the words


def test_start_needs_only_the_standard_library():
    script = ROOT / "dinv" / "reproduce" / "environment.py"
    command = [sys.executable, "-S", "-s", "-E", str(script), "--help"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "./reproduce.sh test" in done.stdout


def test_defaults():
    assert vars(cli.parse([])) == {
        "word": "reproduce", "profile": "auto", "only": [], "seeds": 0, "budget": None, "set": {},
        "force": [], "list": False, "dry_run": False, "slow": False, "in_place": False,
        "imagenet": None, "handed_on": [],
    }  # fmt: skip


def test_everything_given(tmp_path, monkeypatch):
    for name in ("02_feature_statistics", "04_knowledge_distillation", "05_pruning"):
        (tmp_path / f"{name}.ipynb").touch()
    monkeypatch.setattr(cli, "NOTEBOOKS", tmp_path)
    line = (
        "--profile cpu --only 4,02_feature_statistics --only 02 --seeds 5 --budget 1h30m --dry-run "
        "--set inversion.steps=400 --set dataset=mnist --force pool,teacher --force student --list"
    )
    chosen = cli.parse(line.split())
    assert chosen.only == ["04_knowledge_distillation", "02_feature_statistics"]
    assert chosen.set == {"inversion.steps": "400", "dataset": "mnist"}
    assert chosen.force == ["pool", "teacher", "student"]
    assert (chosen.profile, chosen.seeds, chosen.budget) == ("cpu", 5, 5400)
    assert chosen.dry_run and chosen.list


def test_the_lab_is_handed_on_what_stands_after_the_dashes():
    assert cli.parse(["lab"]).handed_on == []
    assert cli.parse(["lab", "--", "--port", "8899", "--", "x"]).handed_on == ["--port", "8899", "--", "x"]


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("9m", 540), ("540s", 540), ("540", 540), ("1h30m", 5400), ("1.5h", 5400), ("1h2m3s", 3723)],
)
def test_budget(text, seconds):
    assert cli.seconds(text) == seconds
    assert cli.parse(["--budget", text]).budget == seconds


@pytest.mark.parametrize("text", ["", "0", "m", "9x", "-5", "30m1h", "nan", "inf", "9 m"])
def test_no_budget(text):
    with pytest.raises(argparse.ArgumentTypeError, match="is no span of time; write 9m"):
        cli.seconds(text)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--profil smoke", "unknown option --profil: did you mean --profile? The options are --h"),
        ("--dryrun", "unknown option --dryrun: did you mean --dry-run?"),
        ("--seeds=x", "argument --seeds: 'x' is no number of seeds; write 1, 2, 3"),
        ("--seeds 0", "'0' is no number of seeds"),
        ("--profile gpuu", "unknown profile 'gpuu': did you mean gpu? The profiles are auto, smo"),
        ("tset", "unknown word 'tset': did you mean test? The words are reproduce, test, be"),
        ("test -- --port 8899", "what stands after -- is for `lab`, not for `test`"),
        ("lab --port 8899", "unknown option --port"),
        ("lab --seeds 2 -- --port 8899", "JupyterLab's stand after --: lab -- --port 8899"),
        ("smoke", "unknown word 'smoke': did you mean --profile smoke?"),
        ("test notebooks", "unexpected 'notebooks': one word is enough"),
        ("--budget soon", "'soon' is no span of time"),
        ("--set steps", "'steps' is not KEY=VALUE, such as inversion.steps=400"),
        ("--set inversion.step=4", "'inversion.step': did you mean inversion.steps? The settings"),
        ("--set inversion.steps=x", "setting inversion.steps='x' must be int"),
        ("--only 02,77", "unknown notebook '77'. There are 02_feature_statistics"),
        ("--only feature_statistic", "did you mean feature_statistics?"),
        ("--slow", "--slow goes with `test`, not with `reproduce`"),
        ("bench --in-place", "--in-place goes with `reproduce`, not with `bench`"),
        ("clean --only 02", "`clean` takes no option but --dry-run"),
    ],
)
def test_misspelt(line, message, tmp_path, monkeypatch, capsys):
    (tmp_path / "02_feature_statistics.ipynb").touch()
    monkeypatch.setattr(cli, "NOTEBOOKS", tmp_path)
    with pytest.raises(SystemExit) as error:
        cli.parse(line.split())
    assert error.value.code == 2
    assert message in capsys.readouterr().err
