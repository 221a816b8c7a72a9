"""The README's code: run as it stands, one block after the other, as a reader would paste it."""

import re

import dinv
from dinv.profiles import load_profile
from dinv.rows import image_count
from dinv.runs.results import read_rows
from dinv.store import repository_root


def test_the_code_of_the_readme_runs_and_prints_what_it_says(capsys):
    text = (repository_root() / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    blocks = [block for block in blocks if "my_net" not in block]  # the reader's own network
    names: dict = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    printed = capsys.readouterr().out
    says = re.compile(r"teacher (\d+) %, judge (\d+) %")
    measured, promised = (tuple(map(int, says.search(where).groups())) for where in (printed, blocks[0]))
    assert measured[0] >= 95 and abs(measured[1] - promised[1]) <= 15  # other processors, other roundings
    assert len(blocks) >= 4


def test_the_docstring_of_the_package_is_the_code_of_the_readme():
    text = (repository_root() / "README.md").read_text(encoding="utf-8")
    for line in dinv.__doc__.splitlines():
        if line.startswith(("objective =", "images =")):
            assert line in text


def test_the_scale_section_has_the_numbers_of_the_results():
    text = (repository_root() / "README.md").read_text(encoding="utf-8")
    section = text.partition("## The scale")[2].partition("\n## ")[0]
    rows = read_rows(repository_root() / "figures" / "cpu")
    found = {(row["table"], row["row"], row["column"]): row for row in rows}
    same, small = "resnet_small->resnet_small", "resnet_small->resnet_tiny"
    for name in ("deepinversion", "adi", "teacher"):
        assert f"{float(found['table1', name, same]['value']):.1f} %" in section
    for pair in (same, small):
        row = found["steps", "adi - deepinversion", pair]
        assert f"{float(row['value']):.1f} ± {float(row['sd']):.1f}" in section
    paper, cpu = load_profile("paper"), load_profile("cpu")
    for count in (image_count(paper), image_count(cpu), paper.inversion.steps):
        assert f"| {count:,}" in section
    for profile in (paper, cpu):
        updates = profile.distillation.rounds * profile.distillation.updates
        assert f"| {updates:,}" in section
    assert f"| {sum(steps for steps, _ in cpu.distillation.stages)}, two thirds of them" in section
