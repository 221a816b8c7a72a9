"""The README: its code run as it stands, its numbers those of the results."""

import re
import shlex

import pandas as pd

from dinv.experiments import table1
from dinv.experiments.profiles import load_profile
from dinv.experiments.results import LEDGER_STATUSES, ledger_page, read_rows, results_page, with_deviation
from dinv.figures import label
from dinv.files import repository_root
from dinv.reproduce import parse

TEXT = (repository_root() / "README.md").read_text(encoding="utf-8")


def test_the_code_of_the_readme_runs_and_prints_what_it_says(capsys):
    blocks = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    names: dict = {}
    for block in blocks:
        if "my_net" not in block:  # the reader's own network
            exec(compile(block, "README.md", "exec"), names)
    says = re.compile(r"teacher (\d+) %, verifier (\d+) %")
    printed, promised = says.search(capsys.readouterr().out), says.search(blocks[0])
    assert (
        int(printed[1]) >= 95 and abs(int(printed[2]) - int(promised[2])) <= 15
    )  # other roundings elsewhere


def test_the_numbers_of_the_readme_are_those_of_the_results_and_profiles():
    rows, same = read_rows(repository_root() / "figures" / "cpu"), "resnet_small->resnet_small"
    cells = rows[(rows.table == "table1") & (rows.column.map(label) == label(same))].set_index("row").value
    for name in ("DeepInversion", "ADI", "teacher"):
        assert f"{float(cells[name]):.1f} %" in TEXT, name
    card = read_rows(repository_root() / "figures" / "gpu")
    card = card[card.table == "table1"].set_index(["row", "column"]).value
    for pair in load_profile("gpu").distillation.pairs[:2]:
        for name in ("DeepInversion", "ADI", "teacher"):
            assert f"{float(card[name, pair]):.1f} %" in TEXT, (name, pair)
    shown = {with_deviation(value, sd) for value, sd in zip(rows.value, rows.sd, strict=True)}
    assert {f"{mean} ± {sd}" for mean, sd in re.findall(r"([-\d.]+) ± ([\d.]*\d)", TEXT)} <= shown
    paper, gpu, cpu = (load_profile(name) for name in ("paper", "gpu", "cpu"))
    for profile in (paper, gpu, cpu):
        updates = profile.distillation.settings.rounds * profile.distillation.settings.updates
        for number in (table1.image_count(profile), updates):
            assert f"| {number:,}" in TEXT, number
    steps, on_card = (sum(n for n, _ in each.distillation.inversion.stages) for each in (cpu, gpu))
    assert f"| {on_card}, nearly half of them" in TEXT
    assert f"| {paper.inversion.steps:,}" in TEXT and f"| {steps}, two thirds of them" in TEXT


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
