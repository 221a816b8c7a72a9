"""The README: its code run as it stands, its numbers those of the results."""

import re
import shlex

import numpy as np
import pandas as pd
import pytest

from dinv.experiments import paper, table1
from dinv.experiments.profiles import load_profile
from dinv.experiments.results import LEDGER_STATUSES, Claim, ledger_page, read_rows, results_page
from dinv.files import repository_root
from dinv.reproduce import parse

TEXT = (repository_root() / "README.md").read_text(encoding="utf-8")


# Row of the README's findings -> what each number of its second column is: chapter, table, row, column, and
# in front the profile where it is not `cpu`.
SAME, TINY, HALF = "resnet_small->resnet_small", "resnet_small->resnet_tiny", "-50 % filters"
PAIRS = {
    "cifar_resnet34->cifar_resnet18": "ResNet-34 → ResNet-18",
    "cifar_vgg11->cifar_vgg11": "VGG-11 → VGG-11",
}
FINDINGS = {
    "One term": [
        *(
            ("02", table, name, "verifier")
            for table in ("octaves", "figure 3")
            for name in ("DeepDream", "DeepInversion")
        ),
        ("01", "term by term", "+ prior × 2000", "verifier"),
    ],
    "A student": [
        *(("04", "table1", name, SAME) for name in ("DeepDream", "DeepInversion", "teacher")),
        *(("night", "04", "table1", name, SAME) for name in ("DeepDream", "DeepInversion", "ADI")),
    ],
    "Images made": [
        *(("04", "steps", "ADI above DeepInversion", pair) for pair in (SAME, TINY)),
        ("04", "claims", f"ADI above DeepInversion in as many minutes, {TINY}", "≥ 0"),
    ],
    "A pruned": [("05", "table4", name, HALF) for name in ("no fine-tuning", "ADI", "all real")],
    "Old classes": [
        ("06", table, name, "mean")
        for table in ("table7", "alike")
        for name in ("no images", "DeepInversion")
    ],
}


def table_1(profile):
    rows = read_rows(repository_root() / "figures" / profile)
    return rows[rows.table == "table1"].set_index(["row", "column"])


def test_the_code_of_the_readme_and_of_the_library_page_runs_and_prints_what_it_says(capsys):
    library = (repository_root() / "book_source" / "library.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", TEXT + library, re.DOTALL)
    names: dict = {}
    for block in blocks:
        if "my_classes" not in block:  # the reader's own
            exec(compile(block, "README.md", "exec"), names)
    says = re.compile(r"teacher (\d+) %, verifier (\d+) %")
    printed, promised = says.search(capsys.readouterr().out), says.search(blocks[0])
    assert (
        int(printed[1]) >= 95 and abs(int(printed[2]) - int(promised[2])) <= 15
    )  # other roundings elsewhere


@pytest.mark.parametrize("finding", FINDINGS)
def test_a_finding_has_the_numbers_of_the_results_and_no_other(finding):
    values: dict[tuple, str] = {}
    for profile in ("cpu", "gpu", "night"):
        for row in read_rows(repository_root() / "figures" / profile).itertuples():
            values[profile, row.chapter[:2], row.table, row.row, row.column] = row.value
    (line,) = (line for line in TEXT.splitlines() if line.startswith(f"| **{finding}"))
    told = re.findall(r"(-?\d+(?:\.\d+)?)(?= %| points| into)", line.split("|")[2].replace("−", "-"))
    expected = [float(values[key if len(key) == 5 else ("cpu", *key)]) for key in FINDINGS[finding]]
    assert told == [
        f"{value:.{len(number.partition('.')[2])}f}" for number, value in zip(told, expected, strict=True)
    ]


def test_table_1_of_the_papers_networks_is_that_of_the_results_and_of_the_paper():
    card = table_1("gpu").value.astype(float)
    names = ("DeepDream", "DeepInversion", "ADI", "all real", "teacher")
    for pair, called in PAIRS.items():
        lines = TEXT.splitlines()
        at = next(n for n, line in enumerate(lines) if line.startswith(f"| {called}, here |"))
        told, theirs = ([cell.strip() for cell in line.split("|")[2:-1]] for line in lines[at : at + 2])
        assert told == [f"{card[name, pair]:.1f}" if (name, pair) in card else "not run" for name in names]
        known = [paper.TABLE1.get(name) for name in names]
        known = [row and row[paper.PAIRS.index(pair)] for row in known]
        assert theirs == [f"{value[0]:.1f} [{value[1]}]" if value else "" for value in known]


def test_the_scale_that_the_readme_tells_is_that_of_results_and_profiles():
    card = table_1("gpu").value.astype(float)
    gains = [card["ADI", pair] - card["DeepInversion", pair] for pair in PAIRS]
    assert "{:.1f} and {:.1f} points with the paper's networks".format(*gains) in TEXT
    long = table_1("night")["values"]
    without, with_rival = (np.array(long[name, SAME].split(), float) for name in ("DeepInversion", "ADI"))
    gain = Claim("competition", tuple(with_rival - without))
    told = "({:.1f} points on `night`, three seeds, from {:.1f} to {:.1f};".format(
        np.mean(gain.values), *gain.interval
    )
    assert told.replace("-", "−") in TEXT
    theirs, gpu, night, cpu = (load_profile(name) for name in ("paper", "gpu", "night", "cpu"))
    for profile in (theirs, gpu, night, cpu):
        updates = profile.distillation.settings.rounds * profile.distillation.settings.updates
        assert f"{table1.image_count(profile):,} images" in TEXT and f"{updates:,} updates" in TEXT
    cells = table_1("cpu").value.astype(float)
    leads = [
        rows["DeepInversion", SAME] - rows["DeepDream", SAME]
        for rows in (cells, table_1("night").value.astype(float))
    ]
    assert "{:.0f} on `cpu` and {:.0f} on `night`".format(*leads) in TEXT
    few, inverted = cells["1 % real", SAME], cells["DeepInversion", SAME]
    assert f"({few:.1f} % against {inverted:.1f} %)" in TEXT and few > inverted
    assert f"{sum(n for n, _ in gpu.distillation.inversion.stages)} iterations each" in TEXT
    steps = sum(n for n, _ in cpu.distillation.inversion.stages)
    assert f"{steps} iterations (two thirds of them at 8 and 16 pixels)" in TEXT
    assert f"{theirs.inversion.steps:,} iterations" in TEXT


@pytest.mark.parametrize("page", ["README.md", "book_source/running.md", "CONTRIBUTING.md"])
def test_a_command_has_words_and_options_that_exist(page):
    text = (repository_root() / page).read_text(encoding="utf-8")
    commands = re.findall(r"\./reproduce\.sh([^`\n#]*)", text)
    assert commands
    script = (repository_root() / "reproduce.sh").read_text(encoding="utf-8")
    known = re.search(r' words="(.*?)"', script)[1].split()
    for command in commands:
        words = shlex.split(command.replace("DIR", ".").replace("...", "").replace("NN", "04"))
        if not words or words[0] not in known:
            parse(words)


def test_the_page_of_results_is_that_of_the_files():
    figures = repository_root() / "figures"
    assert (figures / "RESULTS.md").read_text(encoding="utf-8") == results_page(figures)


def test_the_ledger_names_every_table_of_the_paper_and_commands_that_exist(tmp_path):
    figures = repository_root() / "figures"
    rows = pd.read_csv(figures / "ledger.csv", dtype=str, keep_default_na=False)
    assert (figures / "LEDGER.md").read_text(encoding="utf-8") == ledger_page(figures)
    numbered = {int(n) for item in rows.item for n in re.findall(r"Table (\d+)", item)}
    shown = {int(n) for item in rows.item if "Figure" in item for n in re.findall(r"\d+", item)}
    assert numbered == set(range(1, 11)) and shown == set(range(3, 9))
    assert set(rows.status) <= set(LEDGER_STATUSES)
    for row in rows.itertuples():
        assert bool(row.command) == (row.status != "not attempted"), row
        if row.command:
            program, *words = shlex.split(row.command.replace("DIR", str(tmp_path)))
            assert program == "./reproduce.sh" and len(parse(words)[2]) == 1, row  # one notebook
