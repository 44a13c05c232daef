"""Drivers: what they refuse, how recipes and comparisons hand them models, what the ledger holds of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dllm_toolkit import cli
from dllm_toolkit.cache.policies import BlockCausalCache, NoCache
from dllm_toolkit.decode import decode
from dllm_toolkit.decoders.autoregressive import autoregressive
from dllm_toolkit.decoders.base import DecodeError, Decoder
from dllm_toolkit.decoders.block import BlockDecoder
from dllm_toolkit.decoders.rules.commit import Gate
from dllm_toolkit.decoders.rules.schedule import SemiAutoregressive
from dllm_toolkit.decoders.rules.sequence import AtSequence
from dllm_toolkit.decoders.rules.stop import AtEos
from dllm_toolkit.decoders.semi_ar import semi_ar
from dllm_toolkit.decoders.vanilla import vanilla
from dllm_toolkit.drivers.base import Denoise
from dllm_toolkit.drivers.external_verify import ExternalVerify
from dllm_toolkit.drivers.staged import Stage, Staged
from dllm_toolkit.evaluation import ledger
from dllm_toolkit.models.base import KVBuffer, Query
from dllm_toolkit.models.fresh import fresh
from dllm_toolkit.recipe_hints import Lazy
from dllm_toolkit.testing import contract
from dllm_toolkit.testing.models import Counting, Oracle, toy_spec

TOYS = {toy.name: toy.model for toy in contract.toys()}
TARGET, FULL = TOYS["causal"], TOYS["full"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ExternalVerify("x", draft_length=0), "draft_length must be 1 or more, got 0"),
        (lambda: ExternalVerify("x", draft=semi_ar(4), draft_steps=0), "draft_steps must be 1 or more, got 0"),
        (lambda: ExternalVerify("x", draft_steps=2), "draft_steps counts steps of the decoder under draft, got 2 and no draft"),
        (lambda: ExternalVerify("x", separator=3), "a separator stands behind the drafted window, got 3 and draft_canvas=answer"),
        (lambda: Staged(()), "stages is empty"),
        (lambda: Staged((Stage(append=(3,)),)), "the last stage appends a text that nobody reads"),
        (lambda: Stage(max_new_tokens=0), "max_new_tokens must be 1 or more, got 0"),
        (lambda: AtSequence((), AtEos()), "ids is empty"),
    ],
)
def test_arguments_that_make_no_sense(make: Any, message: str) -> None:
    with pytest.raises(DecodeError, match=message):
        make()


class OneToken:
    """A tokenizer of one word."""

    def __init__(self, **words: int) -> None:
        self.words = words

    def get_vocab(self) -> dict[str, int]:
        return self.words


@pytest.mark.parametrize(
    ("drafter", "decoder", "options", "message"),
    [
        ("x", autoregressive(), {}, "drafter names a model, got 'x'. Only a comparison knows models by name"),
        (Lazy.of(TOYS["causal"]), autoregressive(), {}, "the drafter must fill masks, got attention=causal"),
        (Lazy.of(FULL), autoregressive(), {"draft_cache": BlockCausalCache()}, "draft_cache does not fit the drafter, got attention=full"),
        (Lazy.of(FULL), autoregressive(), {"draft": autoregressive()}, "the decoder with its part next_token does not fit the model"),
        (Lazy.of(FULL), autoregressive(), {"separator": 29, "draft_canvas": "window"}, "separator is an id outside the vocabulary, got 29"),
        (Lazy.of(Oracle(toy_spec())), vanilla(), {}, "the decoder with its part semi_autoregressive does not fit the model"),
    ],
)
def test_what_cannot_draft_or_verify(drafter: Any, decoder: Decoder, options: dict[str, Any], message: str) -> None:
    with pytest.raises(DecodeError, match=message):
        ExternalVerify(drafter, **options).run(TARGET, decoder, [[3]], max_new_tokens=4)


class Watched(Counting):
    """Keeps what it was asked."""

    def __call__(self, query: Query, kv: KVBuffer | None = None) -> Any:
        assert kv is not None and query.slots is not None
        self.seen = [*self.__dict__.get("seen", []), query.tokens[0][query.slots[0] < kv.slots - 1].tolist()]
        return self.model(query, kv)


@pytest.mark.parametrize(("separator", "behind"), [(None, []), (7, [7])])
def test_a_drafter_sees_what_it_was_trained_on(separator: int | None, behind: list[int]) -> None:
    """A clean prefix, a run of masks and the separator: a row of objective deer_refinement. There is always room for it."""
    drafter = Watched(FULL)
    driver = ExternalVerify(Lazy.of(drafter), draft_length=4, draft_canvas="window", separator=separator)
    output, mask = driver.run(TARGET, autoregressive(), [[3, 5]], max_new_tokens=9), FULL.spec.mask_id
    text = [3, 5, *output.tokens[0]]
    for seen in drafter.seen:
        prefix = seen.index(mask)
        assert seen == [*text[:prefix], *[mask] * min(4, len(text) - prefix - 1), *behind]


def test_deer_verifies_left_to_right_text_only() -> None:
    odd = BlockDecoder(SemiAutoregressive(4), Gate(0.6))
    with pytest.raises(DecodeError, match="deer verifies what an autoregressive model would write token by token, got the decoder BlockD"):
        ExternalVerify(Lazy.of(FULL)).check(FULL, odd, NoCache())


def test_models_of_another_vocabulary_are_refused() -> None:
    smaller = fresh(width=16, layers=1, heads=2)
    with pytest.raises(DecodeError, match=r"target and drafter must share a vocabulary, got 29 and \d+ rows"):
        ExternalVerify(Lazy.of(smaller)).run(TARGET, autoregressive(), [[3]], max_new_tokens=4)
    target, drafter = Oracle(toy_spec("causal", 1)), Oracle(toy_spec())
    target.tokenizer, drafter.tokenizer = OneToken(yes=3, no=4), OneToken(yes=3, no=5, mask=28)
    with pytest.raises(DecodeError, match="got 1 words with other ids, such as 'no' \\(4 and 5\\)"):
        ExternalVerify(Lazy.of(drafter)).run(target, autoregressive(), [[3]], max_new_tokens=4)
    drafter.tokenizer = OneToken(yes=3, no=4, mask=28)  # a word that only the drafter knows is never verified
    ExternalVerify(Lazy.of(drafter)).run(target, autoregressive(), [[3]], max_new_tokens=4)


def test_stages_refuse_templates_texts_without_a_tokenizer_and_ids_outside_the_vocabulary() -> None:
    program = Staged((Stage(max_new_tokens=2, append=(5,)), Stage()))
    with pytest.raises(DecodeError, match="staged takes no templates"):
        program.run(FULL, vanilla(), [[3]], templates=[[None, 4]])
    with pytest.raises(DecodeError, match="stages.0: the model has no tokenizer, got the text 'so'"):
        Staged((Stage(until="so"), Stage())).run(FULL, vanilla(), [[3]], max_new_tokens=4)
    for stage, what in ((Stage(until=(29,)), "ids names"), (Stage(append=(29,)), "append holds")):
        with pytest.raises(DecodeError, match=f"stages.0: {what} an id outside the vocabulary, got 29"):
            Staged((stage, Stage())).run(FULL, vanilla(), [[3]], max_new_tokens=4)
    with pytest.raises(DecodeError, match="prompt 0 is too long"):
        program.run(FULL, vanilla(), [[3]], max_new_tokens=500)


def test_a_row_without_room_for_another_stage_is_finished() -> None:
    program = Staged((Stage(max_new_tokens=3, append=(5, 6)), Stage()))
    output = program.run(FULL, semi_ar(1), [[3, 1], [4]], max_new_tokens=[5, 9])
    plain = decode(FULL, semi_ar(1), [[3, 1]], max_new_tokens=3)
    assert output.tokens[0][:3] == plain.tokens[0] and output.stats.extra["given"] == [0, 2]


# --- recipes


RECIPE = """\
task: {{_component_: stories, size: 3}}
models:
  ar: {{_component_: load, path: "{models}/ar"}}
  drafter: {{_component_: load, path: "{models}/drafter"}}
configurations:
  autoregressive: {{model: ar, decoder: autoregressive, cache: block_causal}}
  named:
    model: ar
    decoder: autoregressive
    cache: block_causal
    driver: {{_component_: deer, drafter: drafter, draft_length: 4}}
  inline:
    model: ar
    decoder: autoregressive
    driver:
      _component_: deer
      drafter: {{_component_: load, path: "{models}/drafter"}}
  staged:
    model: drafter
    decoder: {{_component_: semi_ar, block_length: 4}}
    driver: {{_component_: staged, stages: [{{max_new_tokens: 4, append: [9, 9]}}, {{}}]}}
run: {{max_new_tokens: 12, device: cpu, dtype: float64, threads: 1, warm_up: 0, batch_size: 2}}
output: {output}
report: {{tensorboard: false, html: false}}
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    for name, seed, causal in (("ar", 2, {"attention": "causal", "shift": 1}), ("drafter", 3, {})):
        model = fresh(width=32, layers=2, heads=2, max_positions=128, seed=seed, **causal)
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.data.mul_(8.0)
        model.save_pretrained(tmp_path / name)
    found = tmp_path / "recipe.yaml"
    found.write_text(RECIPE.format(models=tmp_path, output=tmp_path / "run"))
    return found


def test_a_comparison_of_drivers(path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["compare", str(path)]) == 0
    out, _ = capsys.readouterr()
    rows = {row["name"]: row for row in json.loads(out.splitlines()[-1])["rows"]}
    assert list(rows) == ["autoregressive", "named", "inline", "staged"]
    header, records = ledger.read(tmp_path / "run" / "ledger.jsonl")
    by_name = {name: [record for record in records if record.configuration == name] for name in rows}
    for one, two, three in zip(by_name["autoregressive"], by_name["named"], by_name["inline"], strict=True):
        assert one.output == two.output == three.output
        assert two.nfe == two.extra["target_forwards"] + two.extra["draft_forwards"] and two.extra["target_forwards"] <= one.nfe
        assert one.given == two.given == 0 and "steps" in two.extra
    for record in by_name["staged"]:
        assert record.given in (0, 2) and record.commits <= record.canvas_tokens - record.given and "given" not in record.extra
    staged = by_name["staged"]
    assert rows["staged"]["tokens"] == sum(record.tokens - record.given for record in staged)
    assert abs(rows["staged"]["tokens_per_forward"] - rows["staged"]["tokens"] / sum(record.nfe for record in staged)) < 1e-5
    assert {"weights.ar", "weights.drafter", "weights.inline.driver.drafter"} <= set(header.made_of)
    assert header.made_of["weights.drafter"] == header.made_of["weights.inline.driver.drafter"]
    # a driver's argument is part of what a ledger belongs to
    assert cli.main(["compare", str(path), "configurations.named.driver.draft_length=5"]) == 2
    assert "draft_length" in capsys.readouterr().err


def test_equal_recipes_are_one_model(path: Path) -> None:
    from dllm_toolkit import recipe
    from dllm_toolkit.evaluation import compare

    loaded = recipe.load(path).checked(compare.CompareRecipe)
    built = loaded.build(compare.CompareRecipe)
    rows = {row.name: row for row in compare._rows(loaded, built, built.task.problems())}
    named, inline = rows["named"].driver.other("drafter"), rows["inline"].driver.other("drafter")
    assert named is inline is rows["staged"].model and rows["named"].models == [rows["autoregressive"].model, named]
    assert isinstance(rows["autoregressive"].driver, Denoise)


@pytest.mark.parametrize(
    ("old", "new", "place"),
    [
        ("drafter: drafter, draft", "drafter: nobody, draft", ":11: configurations.named.driver.drafter: configurations.named."),
        ("drafter: drafter, draft", "drafter: ar, draft", ":11: configurations.named.driver: the drafter must fill masks"),
        ("_component_: deer, drafter: drafter", "_component_: dear, drafter: drafter", ":11: configurations.named.driver: cannot find"),
        ("append: [9, 9]", "append: [9999]", ":21: configurations.staged.driver: stages.0: append holds an id outside"),
        ("max_new_tokens: 4", "max_new_tokens: 0", ":21: configurations.staged.driver.stages.0.max_new_tokens: max_new_tokens must be"),
    ],
)
def test_refusals_name_their_line(path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], old: str, new: str, place: str) -> None:
    path.write_text(path.read_text().replace(old, new, 1))
    assert cli.main(["compare", str(path)]) == 2
    _, err = capsys.readouterr()
    assert str(path) + place in err
    assert not (tmp_path / "run").exists()


def test_show_and_list_know_drivers(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["show", str(path)]) == 0
    shown = capsys.readouterr().out
    assert "driver: deer(drafter='drafter', draft_length=4" in shown and "driver: staged()" in shown and "driver: denoise()" in shown
    assert cli.main(["list", "driver"]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in ("deer", "denoise", "staged", "2512.15176", "2602.09555"))
