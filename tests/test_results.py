"""Results: tables, claims, their files, the README, the provenance."""

import json
import re

import numpy
import pytest
import torch

from dinv.experiments import cache, results
from dinv.experiments.overrides import flat
from dinv.experiments.profiles import load_profile, with_seeds
from dinv.experiments.results import COLUMNS, Claim, Run, read_rows, write_pages

pytestmark = pytest.mark.usefixtures("apart")


def new_run(chapter="02_example", profile="smoke", **overrides) -> Run:
    return Run(chapter, load_profile(profile, overrides))


def finished(chapter="02_example", profile="smoke", value=1.0) -> Run:
    run = new_run(chapter, profile)
    run.table("own", {"a": {"x": value}})
    run.claim("it rises", [value] * 3, at_least=0)
    run.finish()
    return run


# ---- tables and claims -----------------------------------------------------------------------------
def test_a_table_is_shown_as_a_pivot_and_kept_as_rows():
    run = new_run()
    cells = {
        "noise": {"A": 13.2, "B": numpy.array([9.0, 10.0])},
        "ADI": {"A": (93.1, 93.4, 93.0), "B": torch.tensor([1.0, 3.0])},
    }
    table = run.table("table1", cells, metric="top-1 %")
    assert list(table) == ["A", "B"] and list(table.index) == ["noise", "ADI"]
    assert table.loc["ADI", "A"] == "93.17 ± 0.21" and table.loc["noise", "A"] == "13.2"
    assert table.columns.name == "top-1 % (n = 1 to 3)"
    run.table("table1", {"noise": {"A": 14.0}}, metric="top-1 %")  # the same cell again replaces
    run.finish()
    rows = read_rows(run.folder).to_dict("records")
    assert len(rows) == 4 and rows[-1]["value"] == "14"  # in the order in which they were told last
    assert ",".join(rows[1].values()) == (
        "02_example,table1,ADI,A,top-1 %,93.1667,0.208,3,93.1 93.4 93,,"
        "./reproduce.sh --profile smoke --only 02"
    )


def test_a_table_is_in_the_file_before_the_run_is_over():
    finished()
    run = new_run()
    run.table("own", {"b": {"x": 2.0}})
    run.table("own", {"a": {"x": 3.0}})  # what an earlier run left there
    rows = read_rows(run.folder)
    assert rows[rows.table == "own"].value.tolist() == ["2", "3"] and "claims" in rows.table.tolist()
    run.finish()
    assert read_rows(run.folder).value.tolist() == ["2", "3"]


@pytest.mark.parametrize("values", [[], [1, float("nan")], float("inf")])
def test_a_cell_without_a_finite_number_is_refused_by_name(values):
    with pytest.raises(ValueError, match="table1, ADI, A: got .* expected one finite number per seed"):
        new_run().table("table1", {"ADI": {"A": values}})


@pytest.mark.parametrize(
    "values, bounds, holds, direction, text",
    [
        ([48.3, 48.1, 47.9], {"at_least": 40}, True, True,
         r"^holds: gains: 48\.10 ± 0\.20 \(n = 3\), 95 % interval 47\.6 to 48\.6$"),
        ([50.0, 45.0, 39.0], {"at_least": 40}, False, True, "^does not hold: gains: .*, 95 % interval"),
        ([1.0, 2.0], {"at_most": 0}, False, False, "^does not hold"),
        ([0.1, -0.1, 0.0], {"at_least": -1, "at_most": 1}, True, True, "^holds"),
        ([41.0], {"at_least": 40}, None, True, r"^open: gains: 41 \(n = 1\)$"),
        (39.0, {"at_least": 40}, False, False, r"^does not hold: gains: 39 \(n = 1\)$"),
    ],
)  # fmt: skip
def test_one_rule_says_whether_a_claim_holds(values, bounds, holds, direction, text):
    claim = new_run().claim("gains", values, **bounds)
    assert (claim.holds, claim.direction) == (holds, direction)
    assert re.search(text, repr(claim)) and claim._repr_markdown_() == repr(claim)


def test_the_interval_is_students():
    low, high = Claim("x", (1.0, 2.0, 3.0)).interval
    assert (low, high) == pytest.approx((2 - 4.302653 / 3**0.5, 2 + 4.302653 / 3**0.5), abs=1e-5)


def test_claims_are_listed_and_their_directions_printed(capsys):
    run = new_run()
    run.claim("first", [1.0, 2.0], at_least=5)
    run.claim("first", [1.0, 2.0], at_least=0)
    run.claim("second", [0.3], at_most=0.1)
    assert run.claims().reset_index().values.tolist() == [
        ["first", "≥ 0", "1.50 ± 0.71", "2", "no"], ["second", "≤ 0.1", "0.3", "1", "no"],
    ]  # fmt: skip
    run.directions("first", "second")
    assert capsys.readouterr().out == "first: yes\nsecond: NO\n"
    with pytest.raises(ValueError, match="no claim 'frist' was made: did you mean first"):
        run.directions("frist")
    with pytest.raises(ValueError, match="'third' needs a bound"):
        run.claim("third", [1.0])


@pytest.mark.parametrize(
    "value, sd, text",
    [
        ("91.4333", "0.273", "91.43 ± 0.27"), ("4512.3", "312", "4512 ± 312"), ("256000", "", "256000"),
        ("0.91432", "0.0123", "0.914 ± 0.012"), ("0.5", "0", "0.5000 ± 0.0000"), ("91.4333", "", "91.43"),
        ("0", "0", "0.0 ± 0.0"), (1.23e-5, "", "1.23e-05"),
    ],
)  # fmt: skip
def test_mean_and_deviation_have_the_same_decimals(value, sd, text):
    assert results.with_deviation(value, sd) == text


# ---- files -----------------------------------------------------------------------------------------
def test_chapters_replace_their_own_rows_only_and_equal_results_are_equal_bytes():
    for chapter in ("02_b", "01_a", "02_b"):
        run = finished(chapter)
    rows, path = read_rows(run.folder), run.folder / "results.csv"
    assert rows.chapter.to_list() == ["01_a", "01_a", "02_b", "02_b"]
    assert list(results.read_provenance(run.folder)) == ["01_a", "02_b"]
    before = path.read_bytes()
    assert finished("02_b") and path.read_bytes() == before and b"\r" not in before
    assert sorted(p.name for p in run.folder.iterdir()) == ["provenance.json", "results.csv"]


def test_a_run_of_some_columns_keeps_the_others():
    for pairs, value in (("a->a,a->b", 1.0), ("a->a", 2.0)):
        run = new_run("04_x", **{"distillation.pairs": pairs})
        run.table("table1", {"ADI": {pair: value for pair in pairs.split(",")}})
        run.finish()
    rows = read_rows(run.folder)
    assert rows.column.tolist() == ["a->b", "a->a"] and rows.value.tolist() == ["1", "2"]
    command = rows.command.tolist()[1]
    assert command == "./reproduce.sh --profile smoke --only 04 --set 'distillation.pairs=a->a'"
    new_run("04_x").finish()  # of all columns
    assert not len(read_rows(run.folder))


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("results.csv", "a,b\n1,2\n", "does not hold the columns chapter,table"),
        ("results.csv", COLUMNS + "\n" + "x," * 20 + "\n", "does not hold the columns"),
        ("results.csv", COLUMNS + "\nx\n", "does not hold the columns"),
        ("provenance.json", "{", "is not JSON .* restore it, or delete"),
    ],
)
def test_a_broken_file_is_told_before_anything_runs(name, text, message):
    (new_run().folder / name).write_text(text)
    with pytest.raises(ValueError, match=f"{name} {message}"):
        new_run()


def test_a_file_where_a_folder_should_be(apart, monkeypatch):
    (apart / "file").write_text("")
    for variable in ("DINV_CACHE", "DINV_FIGURES"):
        monkeypatch.setenv(variable, str(apart / "file" / "below"))
        with pytest.raises(NotADirectoryError, match=f"is a file, but a folder should be .*{variable}"):
            new_run()
        monkeypatch.setenv(variable, str(apart))


def test_provenance_is_short_and_the_ledger_goes_to_the_cache(apart, ledger):
    run = new_run(**{"inversion.steps": 7})
    ledger.append({"kind": "pool", "seconds": 100.0, "cached": True, "folder": "pool-1"})
    assert cache.ledger is ledger
    run.finish()
    entry = json.loads((run.folder / "provenance.json").read_text())["02_example"]
    assert entry["settings"] == {"inversion.steps": 7} and entry["seconds"] >= 100
    assert entry["command"] == "./reproduce.sh --profile smoke --only 02 --set inversion.steps=7"
    assert entry["versions"].keys() == {"python", "torch", "torchvision", "numpy"} and entry["device"]
    assert (
        entry["processes"] == 1
        and entry["threads"] == torch.get_num_threads()
        and entry["precision"] == "float32"
    )
    assert 50 < entry["peak_memory_mb"] < 100_000 and len(json.dumps(entry)) < 1000
    kept = json.loads((apart / "runs" / "chapters" / "smoke-02_example.json").read_text())
    assert kept == {"seconds": entry["seconds"], "stages": ledger}


def test_a_stage_that_is_asked_for_twice_counts_once(apart, ledger):
    run, stage = new_run(), {"kind": "pool", "seconds": 100.0}
    ledger += [stage | {"cached": True, "folder": "pool-found"}] * 3
    ledger += [stage | {"cached": cached, "folder": "pool-made"} for cached in (False, True, True)]
    run.finish()  # what was made has been waited for: the clock has it
    entry = json.loads((run.folder / "provenance.json").read_text())["02_example"]
    assert 100 <= entry["seconds"] < 200


def test_the_commit_is_none_outside_a_checkout(apart, monkeypatch):
    monkeypatch.setattr(results, "repository_root", lambda: apart)
    assert results.provenance("01_a", load_profile("smoke"))["commit"] is None


def test_the_command_holds_every_changed_setting_and_gives_the_profile_again():
    profile = with_seeds(load_profile("smoke", {"sweep.real": (10, 20), "imagenet.folder": "a b"}), 9)
    words = results.command_line("01_a", profile)
    assert words.endswith("--only 01 --seeds 9 --set 'sweep.real=(10, 20)' --set 'imagenet.folder=a b'")
    again = load_profile("smoke", {"sweep.real": "(10, 20)", "imagenet.folder": "a b"})
    assert flat(with_seeds(again, 9)) == flat(profile)
    some = load_profile("smoke", {"octaves.seeds": 5})
    assert results.command_line("01_a", some).endswith("--set octaves.seeds=5")
    assert results.command_line("bench_inversion", some) == "./reproduce.sh bench"


# ---- pages ------------------------------------------------------------------------------------------
def test_the_page_shows_every_chapter_by_all_its_profiles_but_smoke(apart):
    page = apart / "figures" / "RESULTS.md"
    page.parent.mkdir()
    write_pages(page.parent)
    assert "No results yet" in page.read_text() and not (apart / "figures" / "LEDGER.md").exists()
    for chapter, profile, value in (
        ("02_b", "smoke", 1),
        ("02_b", "cpu", 2),
        ("02_b", "gpu", 4),
        ("03_c", "smoke", 3),
    ):
        finished(chapter, profile, value)
    run = new_run("04_d", "cpu")
    run.table("table1", {"z": {"A|B": [1.0, 2.0]}, "a": {"A|B": 3.0}})
    run.finish()
    write_pages(page.parent)
    text = page.read_text()
    headings = [line for line in text.splitlines() if line.startswith("## ")]
    assert headings == ["## 02_b, gpu", "## 02_b, cpu", "## 03_c, smoke", "## 04_d, cpu"]
    assert "`./reproduce.sh --profile gpu --only 02" in text
    claims = [line for line in text.splitlines() if line.startswith("| it rises")]
    assert claims == [f"| it rises | ≥ 0 | {n}.000 ± 0.000 | 3 | yes |" for n in (4, 2, 3)]
    assert "| method | A\\|B |\n| --- | --- |\n| z | 1.50 ± 0.71 |\n| a | 3 |" in text and "yet" not in text
