"""Early commits, cuts, end-of-text in its variants, and the files of a trained filter, on canvases small enough to check by hand."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from dllm_toolkit import recipe
from dllm_toolkit.cache.policies import NoCache
from dllm_toolkit.decode import decode
from dllm_toolkit.decoders.base import DecodeError, Decoder, check
from dllm_toolkit.decoders.block import BlockDecoder
from dllm_toolkit.decoders.learn2pd import Filter, LearnedFilter, block_windows, filter_logits, learn2pd, load_filter, save_filter, traits
from dllm_toolkit.decoders.prophet import PhasedMargin, answer_region, prophet
from dllm_toolkit.decoders.rules.commit import Gate, Quota
from dllm_toolkit.decoders.rules.early import Margins, gaps
from dllm_toolkit.decoders.rules.propose import Sample
from dllm_toolkit.decoders.rules.schedule import Pipelined, SemiAutoregressive
from dllm_toolkit.decoders.rules.stop import AnyOf, AtEos, CutAtEos, StepLimit
from dllm_toolkit.decoders.sched import ScheduledMargin
from dllm_toolkit.decoders.semi_ar import semi_ar
from dllm_toolkit.decoders.vanilla import vanilla
from dllm_toolkit.ops.masks import answer_blocks
from dllm_toolkit.state import Proposal, State, Verdict, begin_state
from dllm_toolkit.testing.cases_stops import toy_filter
from dllm_toolkit.testing.models import EOS, MASK, VOCABULARY, Scripted, tiny_transformer, toy_spec
from dllm_toolkit.types import Result


def fresh() -> State:
    """Row 0: prompt 1 2, answer of five with a pinned 9. Row 1: prompt 3, answer of three, padding."""
    rows: list[tuple[list[int], list[int | None]]] = [([1, 2], [None, 9, None, None, None]), ([3], [None, None, None])]
    return begin_state(toy_spec(), rows, [0, 1], length=7, device="cpu")


def proposed(read: list[list[int]], token: int = 7) -> Proposal:
    """`token` with probability one at the given positions of each row; 7 is the length of the canvas, a dead lane."""
    positions = torch.tensor([row + [7] * (7 - len(row)) for row in read])
    logits = torch.zeros(2, 7, VOCABULARY, dtype=torch.float64)
    logits[..., token] = 50.0
    from dllm_toolkit.state import Answer

    return Sample()(Answer(logits, positions), fresh())


def mask(*places: tuple[int, int]) -> torch.Tensor:
    where = torch.zeros(2, 7, dtype=torch.bool)
    for row, place in places:
        where[row, place] = True
    return where


NOBODY = torch.tensor([False, False])


def verdict(**said: object) -> Verdict:
    return Verdict(**{"done": NOBODY, "end": fresh().end, "result": Result.END_OF_TEXT, **said})  # type: ignore[arg-type]


# ---- Verdict.commit_all


def test_an_early_commit_writes_the_rest_and_ends_the_row() -> None:
    state = replace(fresh().write(mask((0, 2)), torch.full((2, 7), 5)), step=torch.tensor([3, 3]))
    after = state.finish(verdict(commit_all=torch.tensor([True, False])), proposed([[2, 4, 5, 6], [1]]))
    assert after.tokens.tolist()[0] == [1, 2, 5, 9, 7, 7, 7], "decided and pinned tokens stay"
    assert after.born.tolist()[0] == [-1, -1, 0, -1, 3, 3, 3]
    assert torch.equal(after.tokens[1], state.tokens[1]) and after.masked[1].sum() == 3
    assert after.done.tolist() == [True, False] and after.result.tolist() == [Result.EARLY_COMMIT, Result.RUNNING]
    assert after.step.tolist() == [4, 3] and after.forced.tolist() == [0, 0]
    closed = after.advance((), NOBODY)
    assert closed.end.tolist() == [7, 4] and closed.result.tolist() == [Result.EARLY_COMMIT, Result.RUNNING]
    assert closed.step.tolist() == [4, 4] and not bool(closed.filled.any())


def test_what_has_no_proposal_is_never_written() -> None:
    after = fresh().finish(verdict(commit_all=torch.tensor([True, True])), proposed([[2, 4, 6], []]))
    assert after.tokens.tolist() == [[1, 2, 7, 9, 7, MASK, 7], [3, MASK, MASK, MASK, 26, 26, 26]]
    closed = after.advance((), NOBODY)
    assert closed.end.tolist() == [5, 1], "such a row ends before its first mask"
    assert bool((closed.tokens != MASK).all()) and closed.tokens[0].tolist() == [1, 2, 7, 9, 7, EOS, EOS]


def test_an_early_commit_leaves_alone_what_lies_behind_its_end_and_finished_rows() -> None:
    state = replace(fresh(), done=torch.tensor([False, True]))
    said = verdict(commit_all=torch.tensor([True, True]), end=torch.tensor([5, 2]))
    after = state.finish(said, proposed([[2, 4, 5, 6], [1, 2, 3]]))
    assert after.tokens[0].tolist() == [1, 2, 7, 9, 7, MASK, MASK] and torch.equal(after.tokens[1], state.tokens[1])
    assert after.end.tolist() == [5, 4] and after.result.tolist() == [Result.EARLY_COMMIT, Result.RUNNING]
    with pytest.raises(ValueError, match="needs the proposal"):
        state.finish(said)


def test_a_reason_for_each_row() -> None:
    reasons = torch.tensor([int(Result.FULL), int(Result.END_OF_TEXT)])
    after = fresh().finish(verdict(done=torch.tensor([True, True]), result=reasons))
    assert after.result.tolist() == [Result.FULL, Result.END_OF_TEXT]


def test_a_step_limit_completes_the_text_and_says_so() -> None:
    """7.4: the argmax everywhere, counted as forced, with the reason; a row that is full in that step needs no completion."""
    logits = torch.zeros(8, VOCABULARY, dtype=torch.float64)
    logits[torch.arange(8), torch.arange(8)] = 9.0
    decoder = BlockDecoder(SemiAutoregressive(4), Quota(), stop=AnyOf((AtEos(), StepLimit(3))))
    output = decode(Scripted([logits]), decoder, [[1], [1], [1]], max_new_tokens=[7, 3, 4])
    assert output.tokens == [[1, 2, 3, 4, 5, 6, 7], [1, 2, 3], [1, 2, 3, 4]]
    assert output.stats.nfe == [3, 3, 3] and output.stats.forced == [4, 0, 1]
    assert output.result == [Result.MAX_STEPS, Result.FULL, Result.MAX_STEPS]
    gated = replace(decoder, commit=Gate(2.0))  # nothing ever passes
    assert decode(Scripted([logits]), gated, [[1]], max_new_tokens=7).stats.forced == [7]
    held = replace(decoder, schedule=SemiAutoregressive(4, hold=60), commit=Gate(2.0))  # nothing must move either
    assert decode(Scripted([logits]), held, [[1]], max_new_tokens=7).tokens == output.tokens[:1]


# ---- Verdict.cut


def test_a_cut_shortens_the_canvas_of_rows_that_go_on() -> None:
    state = fresh().write(mask((0, 4)), torch.full((2, 7), EOS))
    after = state.finish(verdict(cut=torch.tensor([5, 3])))
    assert after.end.tolist() == [5, 3] and not bool(after.done.any())
    assert after.tokens.tolist() == [[1, 2, MASK, 9, EOS, EOS, EOS], [3, MASK, MASK, EOS, 26, 26, 26]]
    assert after.inside.sum(1).tolist() == [3, 2] and bool((after.born[mask((0, 5), (0, 6), (1, 3))] == -1).all())
    again = after.finish(verdict(cut=torch.tensor([7, 4])))
    assert again.end.tolist() == [5, 3], "an end never moves to the right"
    ended = after.finish(verdict(done=torch.tensor([True, False]), end=torch.tensor([3, 3]), cut=torch.tensor([2, 2])))
    assert ended.end.tolist() == [3, 2], "a row that is finished ends where its rule says"


def test_a_cut_drops_no_token_that_says_something() -> None:
    """The released EoTP cuts committed tokens that stand behind an end-of-text."""
    state = fresh().write(mask((0, 2), (1, 1)), torch.full((2, 7), EOS)).write(mask((0, 5), (1, 3)), torch.full((2, 7), 8))
    after = state.finish(verdict(cut=torch.tensor([3, 2])))
    assert after.end.tolist() == [6, 4] and after.tokens[0].tolist() == [1, 2, EOS, 9, MASK, 8, EOS]
    pinned = fresh().finish(verdict(cut=torch.tensor([2, 1])))
    assert pinned.end.tolist() == [4, 1], "a pinned token stays, and so does the prompt"


# ---- end-of-text, 7.1 and 7.3


def said(tokens: list[int | None]) -> State:
    """A row with prompt 1 2 and these answer tokens, None where it is masked."""
    state = begin_state(toy_spec(), [([1, 2], [None] * len(tokens))], [0], length=2 + len(tokens), device="cpu")
    values = torch.tensor([[1, 2, *(0 if token is None else token for token in tokens)]])
    return state.write(torch.tensor([[False, False, *(token is not None for token in tokens)]]), values)


def judged(rule: AtEos | CutAtEos, state: State, confident: dict[int, float] | None = None) -> Verdict:
    schedule = SemiAutoregressive(None)
    region = schedule.region(state.with_part(schedule=schedule.init(state)))
    region = replace(region, block=answer_blocks(state.begin, state.tokens.shape[1], 3))
    confidence = torch.full(state.tokens.shape, -math.inf)
    for place, value in (confident or {}).items():
        confidence[0, place] = value
    positions = torch.arange(state.tokens.shape[1]).unsqueeze(0)
    tokens = torch.where(confidence > -math.inf, EOS, 5)
    proposal = Proposal(tokens, confidence, confidence, torch.zeros(1, positions.shape[1], VOCABULARY), positions)
    return rule.check(proposal, region, state.with_part(stop=rule.init(state)))


@pytest.mark.parametrize(
    ("tokens", "prefix", "block", "whole_block"),
    [
        ([4, EOS, None, None, None, None], 4, None, None),
        ([4, EOS, 5, None, None, None], 4, 4, None),
        ([None, EOS, 5, 6, 6, 6], None, None, None),
        ([4, EOS, 5, EOS, EOS, EOS], 4, 4, 6),
        ([4, EOS, None, EOS, EOS, EOS], 4, None, None),
        ([4, 5, 6, EOS, None, EOS], 6, None, None),
        ([4, 5, 6, EOS, EOS, EOS], 6, 6, 6),
        ([EOS, EOS, EOS, None, None, None], 3, 3, 3),
    ],
)
def test_what_an_end_of_text_waits_for(tokens: list[int | None], prefix: int | None, block: int | None, whole_block: int | None) -> None:
    for how, end in (("prefix", prefix), ("block", block), ("whole_block", whole_block)):
        found = judged(AtEos(wait_for=how), said(tokens))  # type: ignore[arg-type]
        assert (int(found.end) if bool(found.done) else None) == end, how


@pytest.mark.parametrize(
    ("tokens", "confident", "committed", "predicted"),
    [
        ([4, EOS, None, None], {}, 4, 4),
        ([4, None, EOS, None], {3: 0.9}, 5, 5),
        ([4, None, None, None], {}, 7, 7),
        ([4, None, None, None], {3: 0.2, 4: 0.7, 5: 0.7}, 7, 5),
        ([4, None, None, None], {2: 0.9, 3: 0.1}, 7, 4),
    ],
)
def test_where_a_canvas_is_cut(tokens: list[int | None], confident: dict[int, float], committed: int, predicted: int) -> None:
    """The first committed one, else the surest that a masked position proposes, leftmost on ties; a decided position proposes nothing."""
    for rule, cut in ((CutAtEos(), committed), (CutAtEos(predicted=True), predicted)):
        found = judged(rule, said(tokens), confident)
        assert not bool(found.done.any()) and found.cut is not None and int(found.cut) == cut


def test_nothing_is_cut_while_tokens_may_still_change() -> None:
    state = replace(said([4, EOS, None, None]), settled=torch.tensor([False]))
    assert int(judged(CutAtEos(), state).cut) == 7  # type: ignore[arg-type]


def test_the_first_rule_that_ends_a_row_says_why() -> None:
    rule = AnyOf((AtEos(), PhasedMargin(-math.inf, -math.inf, -math.inf, "answer")))
    logits = torch.zeros(4, VOCABULARY, dtype=torch.float64)
    logits[:, 3] = 9.0
    rows = {"ends": EOS, "goes on": 3}
    results = []
    for token in rows.values():
        script = logits.clone()
        script[1, token] = 20.0
        script[3, 5] = 7.0
        model = Scripted([script])
        output = decode(model, BlockDecoder(SemiAutoregressive(None), Quota(), stop=rule), [[1]], max_new_tokens=3)
        results.append((output.result[0], output.tokens[0], output.stats.nfe[0]))
    assert results == [(Result.END_OF_TEXT, [EOS] * 3, 1), (Result.EARLY_COMMIT, [3, 3, 3], 1)]


# ---- logit gaps, regions and bounds


def test_the_gap_counts_no_mask_token() -> None:
    logits = torch.tensor([[[1.0, 7.0, 4.0, 9.0], [9.0, 5.0, 1.0, 7.0], [3.0, 2.0, 1.0, 0.0]]])
    assert gaps(logits, mask_id=3).tolist() == [[3.0, 4.0, 1.0]]
    assert gaps(logits, mask_id=99).tolist() == [[2.0, 2.0, 1.0]]
    assert gaps(torch.tensor([[[2.0, 2.0, -math.inf, 0.0]]]), mask_id=3).tolist() == [[0.0]]


@pytest.mark.parametrize(
    ("where", "positions", "first", "second"),
    [
        ("answer", None, [2, 4, 5, 6], [1, 2, 3]),
        ("last", 2, [5, 6], [2, 3]),
        ("last", 9, [2, 4, 5, 6], [1, 2, 3]),
        ("after_pinned", 2, [4, 5], [1, 2, 3]),
        ("after_pinned", None, [4, 5, 6], [1, 2, 3]),
    ],
)
def test_answer_regions(where: str, positions: int | None, first: list[int], second: list[int]) -> None:
    """Pinned positions count nowhere; the second row has no pinned token and is judged by its whole answer."""
    state = fresh()
    region = Margins.begin(state, answer_region(state, where, positions)).region  # type: ignore[arg-type]
    assert [row.nonzero().flatten().tolist() for row in region] == [first, second]


def test_a_decided_position_keeps_the_gap_of_its_last_reading() -> None:
    state = fresh()
    own = Margins.begin(state, state.inside)
    first = own.after(proposed([[2, 4, 5, 6], [1, 2, 3]]), state)
    assert first.mean(state).tolist() == [50.0, 50.0]
    assert own.after(proposed([[2, 4, 5], [1, 2, 3]]), state).mean(state).tolist() == [-math.inf, 50.0], "never read: never sure"
    later = first.after(proposed([[4], []]), state)
    assert later.mean(state).tolist() == [50.0, 50.0]
    filled = state.finish(verdict(fill=mask((0, 6)))).write(mask((0, 2)), torch.full((2, 7), 5))
    assert first.progress(filled).tolist() == [0.5, 0.0] and first.mean(filled).tolist() == [50.0, 50.0]


@pytest.mark.parametrize("steps", [None, 4])
@pytest.mark.parametrize("gap", [2.4, 2.6, 4.9, 5.1, 7.4, 7.6])
def test_prophet_exits_in_the_step_of_the_released_loop(gap: float, steps: int | None) -> None:
    """A model that says the same in every forward: step t of T is sure once the gap reaches the bound of t / T."""
    length = 8
    logits = torch.zeros(length + 1, VOCABULARY, dtype=torch.float64)
    logits[torch.arange(length + 1), torch.arange(length + 1)] = gap
    output = decode(Scripted([logits]), prophet(steps, region="last", positions=3), [[1]], max_new_tokens=length)
    total = steps or length
    sure = [t for t in range(1, total) if gap >= (7.5 if t / total < 0.33 else 5.0 if t / total < 0.67 else 2.5)]
    assert output.stats.nfe == [min([*sure, total])]
    assert output.result == [Result.EARLY_COMMIT if sure else Result.FULL]
    assert output.tokens[0] == list(range(1, length + 1))


def test_an_early_commit_ends_the_text_where_it_is_told_to() -> None:
    logits = torch.zeros(7, VOCABULARY, dtype=torch.float64)
    logits[torch.arange(7), torch.tensor([0, 4, 5, EOS, 6, 8, 9])] = 9.0
    whole = decode(Scripted([logits]), prophet(), [[1]], max_new_tokens=6)
    assert whole.tokens[0] == [4, 5, EOS, 6, 8, 9] and whole.end.tolist() == [7] and whole.stats.commits == [6]
    ended = decode(Scripted([logits]), prophet(stop_at_eos=True), [[1]], max_new_tokens=6)
    assert ended.tokens[0] == [4, 5, EOS, EOS, EOS, EOS] and ended.end.tolist() == [4] and ended.stats.commits == [3]
    assert whole.result == ended.result == [Result.EARLY_COMMIT] and whole.stats.nfe == ended.stats.nfe == [1]


def test_the_shapes_of_a_falling_bound() -> None:
    progress = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)
    linear, cosine, exponential = (ScheduledMargin(8.0, 2.0, shape, 2.0).bound(progress) for shape in ("linear", "cosine", "exponential"))
    assert linear.tolist() == [8.0, 5.0, 2.0]
    assert cosine.tolist() == pytest.approx([8.0, 5.0, 2.0])
    assert exponential.tolist() == pytest.approx([8.0, 2 + 6 * math.exp(-1), 2 + 6 * math.exp(-2)])
    fine = torch.linspace(0, 1, 50, dtype=torch.float64)
    for shape in ("linear", "cosine", "exponential"):
        assert bool((ScheduledMargin(8.0, 2.0, shape).bound(fine).diff() <= 0).all())  # type: ignore[arg-type]
    assert ScheduledMargin(math.inf, math.inf).bound(progress).tolist() == [math.inf] * 3


def test_compiled_decoding_reads_as_much_as_the_answer_is_long() -> None:
    assert semi_ar(4).max_reads(20) == 4 and vanilla().max_reads(20) == 20
    assert prophet(block_length=4).max_reads(20) == prophet(block_length=4, stop_at_eos=True).max_reads(20) == 20
    nested = BlockDecoder(SemiAutoregressive(4), Quota(), stop=AnyOf((AtEos(), AnyOf((PhasedMargin(),)))))
    assert nested.wants_answer and nested.max_reads(20) == 20


# ---- the filter


def test_windows_of_blocks() -> None:
    block = answer_blocks(torch.tensor([2, 1]), 9, 3)
    values = torch.arange(18.0).view(2, 9)
    windows, place = block_windows(values, block, 3, -1.0)
    assert windows[0, 1:4].tolist() == [[2, 3, 4], [5, 6, 7], [8, -1, -1]]
    assert windows[1, 1:4].tolist() == [[10, 11, 12], [13, 14, 15], [16, 17, -1]]
    back = torch.cat((windows.flatten(1), torch.full((2, 1), -9.0)), dim=1).gather(1, place)
    assert torch.equal(back, values)
    _, place = block_windows(values, torch.zeros(2, 9, dtype=torch.long), 3, 0.0)
    assert bool((place[:, 3:] == windows.flatten(1).shape[1]).all()), (
        "a longer run, such as the prompt, goes nowhere behind its third place"
    )


def test_the_published_filter_has_2112_weights() -> None:
    """I14."""
    layers = tuple((torch.zeros(32, 32), torch.zeros(32)) for _ in range(2))
    assert sum(part.numel() for layer in Filter(layers, 32).layers for part in layer) == 2112


def test_a_filter_is_written_and_read(tmp_path: Path) -> None:
    made = Filter(toy_filter().layers, 4, "gelu", traits(toy_spec()), "asset:teacher")
    save_filter(made, tmp_path / "filter")
    read = load_filter(str(tmp_path / "filter"))
    assert (read.block_length, read.activation, read.model, read.source) == (4, "gelu", traits(toy_spec()), "asset:teacher")
    x = torch.rand(3, 4)
    assert torch.equal(filter_logits(read.layers, read.activation, x), filter_logits(made.layers, made.activation, x))
    assert hash(read) != hash(made) and read != made, "filters are told apart by identity"
    assert learn2pd(str(tmp_path / "filter")).schedule.block_length == 4  # type: ignore[attr-defined]


def test_a_recipe_names_a_filter_in_two_ways(tmp_path: Path) -> None:
    save_filter(toy_filter(), tmp_path / "filter")
    path = str(tmp_path / "filter")
    for filter_ in (path, {"_component_": "load_filter", "path": path}):
        built = recipe.build({"_component_": "learn2pd", "filter": filter_}, Decoder)
        assert built.commit.filter.block_length == 4
    rule = {"_component_": "learned_filter", "filter": {"_component_": "load_filter", "path": path}, "accept": 0.9}
    built = recipe.build(
        {"_component_": "block", "schedule": {"_component_": "semi_autoregressive", "block_length": 4}, "commit": rule}, Decoder
    )
    assert decode(tiny_transformer(), built, [[1, 2]], max_new_tokens=6).stats.nfe[0] <= 6
    assert "weight" not in recipe.describe(built)
    with pytest.raises(ValueError, match="no filter at asset:nothing"):
        recipe.build({"_component_": "learn2pd", "filter": "asset:nothing"}, Decoder)


def test_a_damaged_filter_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DecodeError, match=r"filter\.json and filter\.safetensors"):
        load_filter(str(tmp_path))
    save_filter(toy_filter(), tmp_path)
    signature = json.loads((tmp_path / "filter.json").read_text())
    for change in ({"block_length": 8}, {"hidden": [4, 4]}, {"block_length": None}):
        (tmp_path / "filter.json").write_text(json.dumps({**signature, **change}))
        with pytest.raises(DecodeError, match=r"recipes/train/filter\.yaml"):
            load_filter(str(tmp_path))
    (tmp_path / "filter.json").write_text("{}")
    with pytest.raises(DecodeError, match="is no filter, got KeyError"):
        load_filter(str(tmp_path))
    (tmp_path / "filter.json").write_text(json.dumps(signature))
    save_file({"other": torch.zeros(1)}, tmp_path / "filter.safetensors")
    with pytest.raises(DecodeError, match="is no filter, got KeyError"):
        load_filter(str(tmp_path))
    (tmp_path / "filter.safetensors").write_text("no tensors")
    with pytest.raises(DecodeError, match="is no filter"):
        load_filter(str(tmp_path))


def test_a_filter_fits_one_block_length_and_one_model() -> None:
    spec, rule = toy_spec(), LearnedFilter(toy_filter())
    check(spec, BlockDecoder(SemiAutoregressive(4), rule), NoCache())
    check(spec, BlockDecoder(Pipelined(4), rule), NoCache())
    for length in (8, None):
        with pytest.raises(DecodeError, match=f"block_length must be that of the filter, 4, got {length}"):
            check(spec, BlockDecoder(SemiAutoregressive(length), rule), NoCache())
    absolute = replace(spec, block_anchor="absolute", block_size=4, attention="block_causal")
    check(absolute, BlockDecoder(SemiAutoregressive(None), rule), NoCache())
    mine = LearnedFilter(Filter(toy_filter().layers, 4, model=traits(spec), source="toy"))
    check(spec, BlockDecoder(SemiAutoregressive(4), mine), NoCache())
    with pytest.raises(DecodeError, match=r"another model \(toy\)"):
        check(replace(spec, attention="block_causal"), BlockDecoder(SemiAutoregressive(4), mine), NoCache())


def test_a_short_last_block_is_padded_with_sureness() -> None:
    """The features of positions behind the end are 1, whatever the rest of the batch is."""
    seen = Filter(((torch.ones(4, 4), torch.full((4,), -3.5)),), 4)  # final: the confidences of the block add up to 3.5 or more
    logits = torch.zeros(8, VOCABULARY, dtype=torch.float64)
    logits[torch.arange(8), torch.arange(8)] = 3.4  # probability 0.52
    decoder = BlockDecoder(SemiAutoregressive(4), LearnedFilter(seen, 0.5), stop=AtEos())
    for length, steps in ((1, 1), (2, 2), (4, 4)):  # 3.52; 3.04 then 3.04; 2.08, ...
        output = decode(Scripted([logits]), decoder, [[1]], max_new_tokens=length)
        assert output.stats.nfe == [steps]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AnyOf(()), "at least one stop rule"),
        (lambda: StepLimit(0), "steps must be 1 or more, got 0"),
        (lambda: AtEos(skip_first=True), "nothing to skip"),
        (lambda: PhasedMargin(positions=0), "positions must be 1 or more, got 0"),
        (lambda: PhasedMargin(region="last", positions=None), "how many with region last"),
        (lambda: ScheduledMargin(2.0, 3.0), "low must be at most high"),
        (lambda: ScheduledMargin(rate=0.0), "rate must be above 0"),
        (lambda: LearnedFilter(toy_filter(), -0.1), "accept must be 0 or more"),
        (lambda: Filter((), 4), "leads from block_length numbers"),
        (lambda: Filter(((torch.zeros(4, 3), torch.zeros(4)),), 4), "leads from block_length numbers"),
    ],
)
def test_settings_that_make_no_sense_are_refused(make: object, message: str) -> None:
    with pytest.raises(DecodeError, match=message):
        make()  # type: ignore[operator]
