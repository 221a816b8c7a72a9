"""Results: rows, their merging, the tables, the README, the bands, the provenance."""

import csv
import json
import re
from dataclasses import replace

import pytest
import torch

from dinv import runs
from dinv.profiles import load_profile
from dinv.runs import Run, machine, results
from dinv.runs.results import COLUMNS, README_BEGIN, README_END, Table, read_rows, update_readme


@pytest.fixture(autouse=True)
def figures(tmp_path, monkeypatch):
    for name in ("DEADLINE", "FORCE", "PROGRESS", "PROFILE"):
        monkeypatch.delenv(f"DINV_{name}", raising=False)
    monkeypatch.setenv("DINV_CACHE", str(tmp_path / "runs"))
    monkeypatch.setenv("DINV_FIGURES", str(tmp_path / "figures"))
    return tmp_path / "figures"


def new_run(chapter="02_example", profile="smoke", **overrides) -> Run:
    return Run(chapter, load_profile(profile, overrides))


def recorded(*values, **more) -> dict[str, str]:
    run = new_run()
    run.record("table1", "adi", "resnet34->resnet18", "top1", values, **more)
    run.finish()
    return read_rows(run.folder)[0]


# ---- rows ----------------------------------------------------------------------------------------


def test_a_row_as_it_is_written(figures):
    row = recorded(93.1, 93.4, 93.0, paper=93.26, paper_mark="V", claim="ADI wins", holds=True)
    header = (figures / "smoke" / "results.csv").read_text().splitlines()[0]
    assert header == (
        "chapter,table,row,column,metric,value,sd,n,paper,paper_mark,claim,holds,seconds,command"
    )
    assert row == {
        "chapter": "02_example", "table": "table1", "row": "adi", "column": "resnet34->resnet18",
        "metric": "top1", "value": "93.1667", "sd": "0.208", "n": "3", "paper": "93.26",
        "paper_mark": "V", "claim": "ADI wins", "holds": "yes", "seconds": "",
        "command": "./reproduce.sh --profile smoke --only 02",
    }  # fmt: skip


def test_a_claim_is_one_line():
    assert recorded(1.0, claim="one\n  sentence ")["claim"] == "one sentence"


def test_one_value_has_no_deviation_and_an_open_claim():
    row = recorded(0.5, seconds=123.456)
    assert (row["sd"], row["n"], row["holds"], row["seconds"]) == ("", "1", "open", "123")


@pytest.mark.parametrize(
    "value, digits, text",
    [
        (91.43000001, 6, "91.43"), (256000, 3, "256000"), (0.000012345, 3, "1.23e-05"),
        (0, 3, "0"), (1234567, 6, "1234570"), (-0.25, 3, "-0.25"),
    ],
)  # fmt: skip
def test_numbers_are_short_and_plain(value, digits, text):
    assert results.number(value, digits) == text


@pytest.mark.parametrize(
    "values, more, message",
    [
        ([], {}, "table1, adi, resnet34->resnet18, top1: no values"),
        ([1, float("nan")], {}, "not all finite"),
        ([1], {"paper": 2.0}, "mark .* go together"),
        ([1], {"paper_mark": "V"}, "mark .* go together"),
        ([1], {"paper": 2.0, "paper_mark": "X"}, "paper_mark='X'; expected V, S, M"),
        ([1], {"holds": "yes"}, "holds='yes'; expected True, False or None"),
    ],
)
def test_rows_that_cannot_stand(values, more, message):
    with pytest.raises(ValueError, match=message):
        recorded(*values, **more)


def test_recording_again_replaces_in_place():
    run = new_run()
    for value in (1.0, 2.0):
        run.record("own", "a", "", "top1", [value])
        run.record("own", "b", "", "top1", [3.0])
    run.finish()
    assert [(row["row"], row["value"]) for row in read_rows(run.folder)] == [("a", "2"), ("b", "3")]


def test_the_command_holds_every_changed_setting():
    run = new_run(**{"inversion.steps": 7, "seeds": 5})
    run.record("own", "a", "", "top1", [1.0])
    row = str(run.table(columns=["command"])).splitlines()[-1]
    assert "--profile smoke --only 02" in row
    assert "--seeds 5" in row and "--set inversion.steps=7" in row


# ---- files ---------------------------------------------------------------------------------------


def test_chapters_replace_their_own_rows_only():
    def chapter(name, *rows):
        run = new_run(name)
        for row in rows:
            run.record("own", row, "", "top1", [1.0])
        run.finish()
        return run

    chapter("02_b", "z", "a")
    chapter("01_a", "q", "p")
    run = chapter("02_b", "y", "x")
    found = [(row["chapter"], row["row"]) for row in read_rows(run.folder)]
    assert found == [("01_a", "q"), ("01_a", "p"), ("02_b", "y"), ("02_b", "x")]
    assert list(results.read_provenance(run.folder)) == ["01_a", "02_b"]
    assert sorted(p.name for p in run.folder.iterdir()) == ["provenance.json", "results.csv"]


def test_the_same_results_are_the_same_bytes(figures):
    recorded(1.0, 2.0)
    first = (figures / "smoke" / "results.csv").read_bytes()
    recorded(1.0, 2.0)
    assert (figures / "smoke" / "results.csv").read_bytes() == first and b"\r" not in first


@pytest.mark.parametrize("text", ["a,b\n1,2\n", ",".join(COLUMNS) + "\n" + "x," * 20 + "\n"])
def test_a_broken_results_file_is_told_before_anything_runs(figures, text):
    new_run()
    (figures / "smoke" / "results.csv").write_text(text)
    with pytest.raises(ValueError, match=r"results\.csv does not hold the columns chapter,table"):
        new_run()


def test_a_broken_provenance_is_told_before_anything_runs(figures):
    new_run()
    (figures / "smoke" / "provenance.json").write_text("{")
    with pytest.raises(ValueError, match=r"provenance\.json is not JSON .* restore it, or delete"):
        new_run()


def test_provenance(figures):
    run = new_run(**{"inversion.steps": 7})
    stage = run.stage("pool", "a", {"x": 1}, lambda _: ({"x": torch.zeros(2)}, {}))
    run.finish()
    entry = json.loads((figures / "smoke" / "provenance.json").read_text())["02_example"]
    assert entry["profile"] == "smoke" and entry["configuration"]["inversion"]["steps"] == 7
    assert entry["seeds"] == load_profile("smoke").seeds
    assert set(entry["versions"]) == {"python", "torch", "torchvision", "numpy"}
    assert entry["versions"]["torch"] == torch.__version__
    assert entry["threads"] == torch.get_num_threads() and entry["device"]
    assert 50 < entry["peak_memory_mb"] < 100_000
    assert entry["seconds"] >= entry["stages"][0]["seconds"]
    assert entry["stages"][0]["sha256"] == stage.key
    assert stage.path.name == f"pool-a-{entry['stages'][0]['key'][:12]}"


def test_the_commit_is_none_outside_a_checkout(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "repository_root", lambda: tmp_path)
    assert machine.commit_of_package() == (None, None)


# ---- tables --------------------------------------------------------------------------------------


def example_run() -> Run:
    run = new_run()
    run.record("table1", "noise", "", "top1", [13.2], paper=13.61, paper_mark="M")
    run.record(
        "table1", "adi", "", "top1", [93.1, 93.4], paper=93.26, paper_mark="S+M",
        claim="ADI > DI | by far", holds=False,
    )  # fmt: skip
    run.record("own", "judge", "", "top1", [0.5])
    return run


def test_a_table_shows_ours_beside_the_paper_with_its_mark():
    text = str(example_run().table("table1"))
    assert text.splitlines()[0].split("  ")[0] == "row"
    assert re.search(r"noise +top1 +13\.61 \[M\] +13\.2 \(1\) +open", text)
    assert re.search(r"adi +top1 +93\.26 \[S\]\+\[M\] +93\.25 ± 0\.21 \(2\) +no +ADI > DI", text)
    assert "judge" not in text and "table1" not in text and "column" not in text
    assert "judge" in str(example_run().table())
    assert repr(example_run().table("table1")) == text


def test_a_table_in_a_notebook():
    table = example_run().table()
    assert "<td>93.25 ± 0.21 (2)</td>" in table._repr_html_()
    assert "<td>ADI &gt; DI | by far</td>" in table._repr_html_()
    lines = table._repr_markdown_().splitlines()
    assert lines[0] == "| table | row | metric | paper | ours, mean ± sd (n) | holds? | claim |"
    assert "ADI > DI \\| by far" in lines[3] and len(lines) == 5


@pytest.mark.parametrize(
    "value, sd, text",
    [
        ("91.4333", "0.273", "91.43 ± 0.27 (3)"), ("4512.3", "312", "4512 ± 312 (3)"),
        ("0.91432", "0.0123", "0.914 ± 0.012 (3)"), ("0.5", "0", "0.5000 ± 0.0000 (3)"),
        ("91.4333", "", "91.43 (3)"), ("0", "0", "0.0 ± 0.0 (3)"),
    ],
)  # fmt: skip
def test_mean_and_deviation_have_the_same_decimals(value, sd, text):
    assert results.mean_and_deviation({"value": value, "sd": sd, "n": "3"}) == text


def test_tables_and_columns_that_are_not_there():
    with pytest.raises(ValueError, match="no table 'table9' was recorded; there are: own, table1"):
        example_run().table("table9")
    with pytest.raises(ValueError, match="no column top1 in a table; there are: profile, table, row"):
        Table([], ["top1"])


# ---- bands ---------------------------------------------------------------------------------------


def test_check_prints_no_number_unless_out_of_band(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(runs, "repository_root", lambda: tmp_path)
    run = new_run()
    run.check("accuracy", 0.5)
    (tmp_path / "tests").mkdir()
    bands = {"smoke": {"accuracy": [0.4, 0.6]}, "cpu": {"other": [0, 1]}}
    (tmp_path / "tests" / "bands.json").write_text(json.dumps(bands))
    for value in (0.5, torch.tensor(0.4), 0.7, float("nan")):
        run.check("accuracy", value)
    run.check("other", 0.5)
    assert capsys.readouterr().out.splitlines() == [
        "accuracy: no band",
        "accuracy: within band",
        "accuracy: within band",
        "accuracy: OUT OF BAND (0.7, band 0.4 to 0.6)",
        "accuracy: OUT OF BAND (nan, band 0.4 to 0.6)",
        "other: no band",
    ]


# ---- README --------------------------------------------------------------------------------------


def test_the_readme_shows_the_richest_profile(tmp_path, figures):
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{README_BEGIN}\nstale\n{README_END}\nafter\n")
    assert update_readme(readme, figures)
    assert "No results yet" in readme.read_text()
    for profile, value in (("smoke", 1.0), ("cpu", 57.5)):
        run = new_run(profile=profile)
        run.record("own", "judge", "", "top1", [value], claim="rises", holds=True)
        run.record("own", "detail", "", "top1", [value])
        run.finish()
    assert update_readme(readme, figures)
    text = readme.read_text()
    assert text.startswith(f"before\n{README_BEGIN}\nProfile `cpu` on ")
    assert text.endswith(f"\n{README_END}\nafter\n")
    assert "| judge | top1 | 57.5 (1) | yes | rises |" in text
    assert "detail" not in text and "stale" not in text and "| profile |" not in text
    assert not update_readme(readme, figures)


def test_the_readme_takes_every_chapter_from_its_richest_profile(figures):
    def chapter(name, profile, value):
        run = new_run(name, profile)
        run.record("own", "judge", "", "top1", [value], claim="rises", holds=True)
        run.finish()

    for name, profile, value in (
        ("01_a", "cpu", 1.0), ("02_b", "cpu", 2.0), ("bench_inversion", "cpu", 3.0),
        ("02_b", "smoke", 4.0), ("03_c", "smoke", 5.0), ("bench_inversion", "gpu", 6.0),
    ):  # fmt: skip
        chapter(name, profile, value)
    text = results.readme_results(figures)
    above, table = text.split("\n\n| profile |")
    assert [line.split("`")[1::2] for line in above.split("\n\n")] == [
        [name, f"./reproduce.sh --profile {name}"] for name in ("gpu", "cpu", "smoke")
    ]
    shown = [line.split(" | ") for line in table.splitlines()[2:]]
    assert [(cells[0].strip("| "), cells[3]) for cells in shown] == [
        ("cpu", "1 (1)"), ("cpu", "2 (1)"), ("smoke", "5 (1)"), ("gpu", "6 (1)"),
    ]  # fmt: skip


@pytest.mark.parametrize("text", ["", f"{README_END}", f"{README_BEGIN}{README_BEGIN}{README_END}"])
def test_a_readme_without_the_markers(tmp_path, figures, text):
    (tmp_path / "README.md").write_text(text)
    with pytest.raises(ValueError, match="must hold the lines <!-- results:begin --> and"):
        update_readme(tmp_path / "README.md", figures)


def test_an_overridden_profile_keeps_its_name(figures):
    run = Run("01_a", replace(load_profile("smoke"), seeds=9))
    run.record("own", "a", "", "top1", [1.0])
    run.finish()
    with open(figures / "smoke" / "results.csv", newline="") as file:
        assert next(csv.DictReader(file))["command"].endswith("--only 01 --seeds 9")


def test_a_benchmark_is_not_reproduced_but_run(figures):
    run = new_run("bench_inversion")
    run.record("own", "a", "", "rate", [1.0])
    run.finish()
    (row,) = read_rows(figures / "smoke")
    assert row["command"] == "./reproduce.sh bench"
