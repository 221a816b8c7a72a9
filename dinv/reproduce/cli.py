"""The words and options of ./reproduce.sh; standard library only.

A misspelt word must end before minutes of installation: so this file also runs by its path, where
nothing is installed and `import dinv` would fail.
"""

from __future__ import annotations

import argparse
import difflib
import os
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NoReturn

if __package__:
    from dinv import devices, profiles
else:  # run by path: this folder is on the path, the package is not
    sys.path.insert(1, str(Path(__file__).resolve().parents[1]))
    import devices
    import profiles

WORDS = ("reproduce", "test", "bench", "lab", "clean")
PROFILES = ("auto", *profiles.PROFILES)
NOTEBOOKS = Path(__file__).resolve().parents[2] / "notebooks"

_USAGE = "./reproduce.sh [reproduce|test|bench|lab|clean] [options]"
_DESCRIPTION = """\
Reproduces the paper. Sets up what is missing on the first call: an active environment that already
satisfies requirements.lock is used as it is, otherwise .venv is made beside this file.

words:
  reproduce   run the notebooks in order; make figures, tables and the report (the default)
  test        ruff, pytest and the notebooks' outputs by nbval
  bench       speed and memory, side by side with a plain loop
  lab         JupyterLab on notebooks/, its Python kernel this environment; what stands after -- is
              handed on to it
  clean       remove runs/ and the executed notebooks in figures/*/notebooks; keeps data/, .venv and
              every committed figure and table
"""
_EPILOG = """\
examples:
  ./reproduce.sh                                   all notebooks, the profile that fits this machine
  ./reproduce.sh --only 02 --profile smoke         one notebook, in a minute
  ./reproduce.sh --budget 9m                       stop after nine minutes; the same line goes on
  ./reproduce.sh --set inversion.steps=400         one setting changed
  ./reproduce.sh test                              all checks
  ./reproduce.sh lab -- --no-browser --port 8899   the notebooks, to read and to change
  DINV_DEVICE=cpu ./reproduce.sh                   on the CPU although there is a card

exit status: 0 all well; 1 a check or notebook failed; 2 misspelt, or it cannot run on this machine;
75 the budget is used up. Stages are cached: what is done is not done again.

environment variables:
  DINV_DEVICE auto, cpu or cuda. auto is CUDA where it is, else the CPU; with profile cpu it is the
              CPU. Profiles gpu and paper need CUDA, unless this says cpu.
  DINV_PYTHON=/path/to/python runs in that environment although it differs from the lock; nothing is
              installed then.
"""
# Options that belong to one word; the others go with every word but `clean`.
_ONLY_WITH = {"slow": "test", "in_place": "reproduce"}


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Read the words and options of ./reproduce.sh.

    Returns:
        word (one of WORDS), profile (one of PROFILES), only (notebooks' names, all of them if
        empty), seeds (0: the profile's number), budget (seconds or None), set (texts by dotted
        name), force (stages' patterns), list, dry_run, slow, in_place, handed_on (what stands after
        --).

    Raises:
        SystemExit: 2 with a message on stderr for anything misspelt, DINV_DEVICE too; 0 after --help.
    """
    parser = _parser()
    ours = list(argv[: argv.index("--")] if "--" in argv else argv)
    chosen, extra = parser.parse_known_args(ours)
    if extra:
        parser.error(_unexpected(extra[0]))
    if chosen.word not in WORDS:
        parser.error(_unknown_word(chosen.word))
    _check_variables(parser)
    for option, word in _ONLY_WITH.items():
        if getattr(chosen, option) and chosen.word != word:
            flag = "--" + option.replace("_", "-")
            parser.error(f"{flag} goes with `{word}`, not with `{chosen.word}`")
    if chosen.word == "clean":
        plain = parser.parse_args(["clean"])
        plain.dry_run = chosen.dry_run
        if chosen != plain:
            parser.error("`clean` takes no option but --dry-run")
    if chosen.word == "lab" and chosen != parser.parse_args(["lab"]):
        parser.error("`lab` takes none of these options; JupyterLab's stand after --: lab -- --port 8899")
    chosen.handed_on = list(argv[len(ours) + 1 :])
    if chosen.handed_on and chosen.word != "lab":
        parser.error(f"what stands after -- is for `lab`, not for `{chosen.word}`")
    only = (name for text in chosen.only for name in _notebooks(parser, text))
    chosen.only = list(dict.fromkeys(only))
    chosen.force = [name for text in chosen.force for name in _split(text)]
    chosen.set = dict(chosen.set)
    if chosen.imagenet:
        chosen.set["imagenet.folder"] = chosen.imagenet
    try:
        profiles.load_profile(PROFILES[1], chosen.set)  # every profile has the same settings
    except ValueError as error:
        parser.error(f"--set: {error}")
    return chosen


def _check_variables(parser: argparse.ArgumentParser) -> None:
    try:
        devices.wanted()
    except ValueError as error:
        parser.error(str(error))
    processes = os.environ.get("WORLD_SIZE") or "1"
    if processes != "1":
        parser.error(
            f"torchrun: not yet (WORLD_SIZE={processes}). One process on one device does it all: call "
            "./reproduce.sh by itself"
        )


def seconds(text: str) -> float:
    """A span of time in seconds: "9m", "540s", "1h30m", "540"."""
    number = r"(\d+(?:\.\d+)?)"
    match = re.fullmatch(rf"(?:{number}h)?(?:{number}m)?(?:{number}s?)?", text.strip().lower())
    parts = [float(part or 0) for part in match.groups()] if match else []
    total = sum(part * unit for part, unit in zip(parts, (3600, 60, 1), strict=False))
    if not total > 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no span of time; write 9m, 540s or 1h30m")
    return total


def _folder(text: str) -> str:
    if not Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is no folder")
    return str(Path(text).resolve())


def near(name: str, known: Iterable[str]) -> str:
    """": did you mean KNOWN?" where something is near, else "."."""
    found = difflib.get_close_matches(name, list(known), 1)
    return f": did you mean {found[0]}?" if found else "."


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"reproduce.sh: error: {message}\n")


def _parser() -> _Parser:
    parser = _Parser(
        prog="./reproduce.sh",
        usage=_USAGE,
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, 2, 28, 100),
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("word", nargs="?", default="reproduce", help=argparse.SUPPRESS)
    add("--profile", type=_profile, default="auto", metavar="NAME",
        help=f"{', '.join(PROFILES)}; auto is gpu where CUDA is, else cpu")  # fmt: skip
    add("--only", action="append", default=[], metavar="02,04", help="only these notebooks")
    add("--seeds", type=_seeds, default=0, metavar="N", help="seeds, instead of the profile's")
    add("--budget", type=seconds, metavar="TIME",
        help="stop cleanly after 9m, 540s, 1h30m ... and say what is left")  # fmt: skip
    add("--set", action="append", type=_assignment, default=[], metavar="KEY=VALUE",
        help="change one setting of the profile; may be repeated")  # fmt: skip
    add("--imagenet", type=_folder, metavar="DIR",
        help="a folder of ImageNet's validation images, one folder a class, for 05 and 07")  # fmt: skip
    add("--force", action="append", default=[], metavar="STAGE",
        help="make this stage again although it is cached; may be repeated")  # fmt: skip
    add("--list", action="store_true", help="show notebooks, stages, what is cached, expected time")
    add("--dry-run", action="store_true", help="show what would be done")
    add("--slow", action="store_true", help="test: the slow tests as well")
    add("--in-place", action="store_true",
        help="reproduce: write the executed notebooks over notebooks/")  # fmt: skip
    return parser


def _unexpected(word: str) -> str:
    if not word.startswith("-"):
        return f"unexpected {word!r}: one word is enough, and lists are written with commas: 02,04"
    options = [name for name in _parser()._option_string_actions if name.startswith("--")]
    word = word.partition("=")[0]
    return f"unknown option {word}{near(word, options)} The options are {', '.join(options)}"


def _unknown_word(word: str) -> str:
    hint = f": did you mean --profile {word}?" if word in PROFILES else near(word, WORDS)
    return f"unknown word {word!r}{hint} The words are {', '.join(WORDS)}"


def _profile(text: str) -> str:
    if text not in PROFILES:
        known = ", ".join(PROFILES)
        raise argparse.ArgumentTypeError(
            f"unknown profile {text!r}{near(text, PROFILES)} The profiles are {known}"
        )
    return text


def _seeds(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of seeds; write 1, 2, 3, ...")
    return int(text)


def _assignment(text: str) -> tuple[str, str]:
    key, equals, value = (part.strip() for part in text.partition("="))
    if not (key and equals and value):
        raise argparse.ArgumentTypeError(f"{text!r} is not KEY=VALUE, such as inversion.steps=400")
    return key, value


def _split(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _notebooks(parser: argparse.ArgumentParser, text: str) -> list[str]:
    """Full names ("02_feature_statistics") of what `--only` names by number or name."""
    known = sorted(path.stem for path in NOTEBOOKS.glob("[0-9]*.ipynb"))
    found = []
    for given in _split(text) or [text]:
        wanted = given.removesuffix(".ipynb")
        wanted = wanted.zfill(2) if wanted.isdigit() else wanted
        hits = [name for name in known if wanted in (name, name.partition("_")[0])]
        if not hits:
            names = known + [name.partition("_")[2] for name in known]
            hint = near(wanted, names)
            parser.error(f"--only: unknown notebook {given!r}{hint} There are {', '.join(known)}")
        found += hits
    return found


if __name__ == "__main__":
    parse(sys.argv[1:])
