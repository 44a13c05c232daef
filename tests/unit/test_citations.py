"""The bibliography knows every paper that the package names, and `cite` prints what a recipe uses."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from dllm_toolkit import citations, cli, recipe, registry
from dllm_toolkit.generate import GenerateRecipe

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "dllm_toolkit"


def classes() -> list[type]:
    registry.load_all()
    found: list[type] = []
    for kind in registry.kinds():
        queue = [registry.base_of(kind)] if kind in registry._bases else []
        while queue:
            one = queue.pop()
            queue += [] if getattr(one, "_is_protocol", False) else one.__subclasses__()
            found += [one] if one.__module__.startswith("dllm_toolkit.") else []
    return found


def test_every_cited_number_has_an_entry() -> None:
    cited = {name for one in classes() for name in getattr(one, "cite", ())}
    numbers = {name for name in cited if citations.NUMBER.fullmatch(name)}
    assert len(numbers) >= 15 and numbers - set(citations.BIBLIOGRAPHY) == set()
    assert all(re.fullmatch(r"\w+", name) for name in cited - numbers), "an arXiv number, or the name of a repository"


def test_every_number_in_code_and_recipes_has_an_entry() -> None:
    files = [
        path for folder in ("dllm_toolkit", "recipes", "examples") for path in (ROOT / folder).rglob("*") if path.suffix in (".py", ".yaml")
    ]
    named = {number for path in files for number in citations.NUMBER.findall(path.read_text(encoding="utf-8"))}
    assert named - set(citations.BIBLIOGRAPHY) == set()


@pytest.mark.parametrize("number", citations.BIBLIOGRAPHY)
def test_entries_are_well_formed(number: str) -> None:
    reference, text = citations.BIBLIOGRAPHY[number], citations.bibtex(number)
    assert (
        citations.NUMBER.fullmatch(number)
        and reference.title[0].isupper() | (reference.title[0] == "d")
        and not reference.title.endswith(".")
    )
    assert "," not in reference.authors, "names stand as `First Last and First Last`"
    assert text.count("{") == text.count("}") and text.endswith("\n}") and f"eprint        = {{{number}}}" in text
    assert f"year          = {{20{number[:2]}}}" in text and ("author" in text) == bool(reference.authors)


def test_a_repository_without_a_paper_is_a_note() -> None:
    assert citations.bibtex("some-code") == "@misc{some_code,\n  note          = {repository some-code}\n}"


def test_cite_prints_the_parts_and_the_presets(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["cite", str(ROOT / "recipes/decode/deer_stories.yaml")]) == 0
    out, err = capsys.readouterr()
    assert err == "" and out.startswith("@software{dllm_toolkit,")
    keys = re.findall(r"^@\w+\{(\S+),$", out, re.MULTILINE)
    assert len(set(keys)) == len(keys) and {"arxiv2512_15176", "arxiv2211_17192", "arxiv2508_09192"} <= set(keys)
    assert "% driver deer\n@misc{arxiv2512_15176,\n  title         = {{DEER: Draft with Diffusion" in out
    assert cli.main(["cite", str(ROOT / "recipes/compare/commit_rules.yaml")]) == 0
    out = capsys.readouterr().out
    # dparallel is a preset of shared rules: its paper is that of the preset
    assert "% decoder dparallel\n@misc{arxiv2509_26488" in out and "decoder local_leap" in out


def test_cite_takes_training_recipes_and_model_wrappers(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["cite", str(ROOT / "recipes/train/d2f.yaml")]) == 0
    out = capsys.readouterr().out
    assert "objective d2f" in out and "schedule pipelined" not in out
    assert cli.main(["cite", str(ROOT / "recipes/decode/llada_guided.yaml")]) == 0
    assert "% model guided\n@misc{arxiv2410_18514" in capsys.readouterr().out


def test_a_paper_of_your_own_gets_number_and_year(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "cited_rule.py").write_text(
        "from dataclasses import dataclass\nfrom dllm_toolkit.decoders.base import Commit\n\n\n@dataclass(frozen=True)\n"
        "class Nothing(Commit):\n    cite = ('2701.00001',)\n\n"
        "    def select(self, proposal, region, state):\n        return region.eligible\n"
    )
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.yaml").write_text(
        "model: {_component_: fresh}\ndecoder: {_component_: block, schedule: whole_answer, commit: cited_rule.Nothing}\nprompt: x\n"
    )
    assert cli.main(["cite", "own.yaml"]) == 0
    out, err = capsys.readouterr()
    assert "% commit cited_rule.Nothing, Nothing" in out or "% commit cited_rule.Nothing" in out
    assert "@misc{arxiv2701_00001,\n  year          = {2027}" in out and "no title is known for 2701.00001" in err


def test_what_a_default_brings_is_cited_too() -> None:
    loaded = recipe.Recipe.from_tree({"model": {"_component_": "fresh"}, "decoder": "d2f"}).checked(GenerateRecipe)
    papers = citations.papers_in(loaded.tree, GenerateRecipe, loaded.build(GenerateRecipe))
    assert papers["2508.09192"] == ["decoder d2f", "pipelined"] and "sample" in papers["2502.09992"]
