"""What branches and shadows are made of: rows of trees, masks of sheets, the engine's promises, and what is refused."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from dllm_toolkit.cache.base import Cache, Plan
from dllm_toolkit.cache.policies import DualCache, NoCache, PrefixCache
from dllm_toolkit.decode import decode
from dllm_toolkit.decoders.base import DecodeError
from dllm_toolkit.decoders.freedave import SelfDraft, freedave
from dllm_toolkit.decoders.pc_sampler import pc_sampler
from dllm_toolkit.decoders.semi_ar import semi_ar
from dllm_toolkit.decoders.wino import NarrowOut, WideIn, wino
from dllm_toolkit.engine import Engine
from dllm_toolkit.ops import lanes, masks, trees
from dllm_toolkit.state import Region, State
from dllm_toolkit.testing.models import VOCABULARY, tiny_transformer
from dllm_toolkit.testing.record import record, unequal
from dllm_toolkit.types import Canvas, PyTree


class Pair(NamedTuple):
    one: Tensor
    other: Tensor | None


@dataclass(frozen=True)
class Leaf:
    table: Tensor
    number: int


def tree() -> Any:
    rows = torch.arange(3)
    leaf = Leaf(torch.arange(5.0).unsqueeze(0), 7)
    return {"a": Pair(rows, None), "b": [leaf, (rows[:, None] * torch.ones(3, 2),)], "c": torch.tensor(4)}


def test_rows_of_a_tree() -> None:
    """Tensors with rows follow, what holds for all rows stays, and so does everything that is no tensor."""
    picked = trees.pick(tree(), torch.tensor([2, 0, 0, 1]), 3)
    assert picked["a"].one.tolist() == [2, 0, 0, 1] and picked["a"].other is None and isinstance(picked["a"], Pair)
    leaf, (inner,) = picked["b"]
    assert leaf.table.shape == (1, 5) and leaf.number == 7 and inner[:, 1].tolist() == [2, 0, 0, 1] and int(picked["c"]) == 4
    other = trees.over(lambda one: one + 10, tree())
    both = trees.interleave([tree(), other], 3)
    assert both["a"].one.tolist() == [0, 10, 1, 11, 2, 12] and both["b"][0].table.shape == (1, 5)
    mixed = trees.choose(torch.tensor([True, False, True]), tree(), other)
    assert mixed["a"].one.tolist() == [0, 11, 2] and mixed["b"][1][0][:, 0].tolist() == [0.0, 11.0, 2.0]


@pytest.mark.parametrize("rows", [[0], [0, 1, 2, 3]])
def test_rows_of_a_state(rows: list[int]) -> None:
    """Everything of a row goes with it, its parts too; positions hold for all rows, also when there is one."""
    state = record(tiny_transformer(), pc_sampler(4), NoCache(), unequal().take(rows)).moments[0].after
    three = state.branch(3)
    assert three.positions.shape == (1, state.tokens.shape[1])
    back = three.pick(torch.arange(len(rows)) * 3 + 1)
    for name in ("tokens", "masked", "begin", "end", "seed", "step"):
        assert torch.equal(getattr(back, name), getattr(state, name))
    assert torch.equal(back.parts.schedule.block, state.parts.schedule.block)
    assert back.parts.propose.surprise.shape[-1] == VOCABULARY and back.spec is state.spec
    other = state.write(state.masked, torch.full_like(state.tokens, 5))
    where = torch.arange(len(rows)) == 0
    mixed = state.replace_rows(where, other)
    assert torch.equal(mixed.tokens[0], other.tokens[0]) and torch.equal(mixed.tokens[1:], state.tokens[1:])
    both = State.interleave([state, other])
    assert torch.equal(both.pick(torch.arange(len(rows)) * 2 + 1).tokens, other.tokens)


def may_see(attention: str, lane: lanes.SheetLanes, scratch: int, visible: Tensor, moved: Tensor, block: Tensor) -> Tensor:
    """`sheets_allow` as sentences: a loop over lanes and keys."""
    rows, width = lane.positions.shape
    length = visible.shape[2]
    allow = torch.zeros(rows, width, length + scratch, dtype=torch.bool)

    def rule(row: int, sheet: int, key: int, query: int) -> bool:
        if attention == "causal":
            return key <= query
        return attention == "full" or bool(block[row, sheet, key] <= block[row, sheet, query])

    for row in range(rows):
        for w in range(width):
            query, sheet, shadow = int(lane.positions[row, w]), int(lane.sheet[row, w]), bool(lane.shadow[row, w])
            if query == length:
                continue
            for key in range(length):
                seen = visible[row, sheet, key] & ~moved[row, sheet, key] & (not (shadow and key == query))
                allow[row, w, key] = bool(seen) and rule(row, sheet, key, query)
            for other in range(width):
                slot, key = int(lane.scratch[row, other]), int(lane.positions[row, other])
                if slot == scratch or int(lane.sheet[row, other]) != sheet:
                    continue
                theirs = bool(lane.shadow[row, other])
                seen = shadow if theirs else not (shadow and key == query)
                allow[row, w, length + slot] = seen and rule(row, sheet, key, query)
    return allow


@pytest.mark.parametrize("attention", ["full", "block_causal", "causal"])
@pytest.mark.parametrize("shadowed", [False, True])
def test_masks_of_sheets(attention: str, shadowed: bool) -> None:
    generator = torch.Generator().manual_seed(3)
    for sheets in (1, 2, 3):
        shape = (4, sheets, 6)
        visible = torch.rand(shape, generator=generator) < 0.8
        wanted = visible & (torch.rand(shape, generator=generator) < 0.6)
        shadows = visible & (torch.rand(shape, generator=generator) < 0.5) if shadowed else None
        in_place = torch.tensor([True, True, True, True]) if sheets == 1 else torch.tensor([False, True, False, False])
        wanted[1, 1:] = False
        block = torch.randint(0, 3, shape, generator=generator).sort(dim=2).values
        lane = lanes.pack_sheets(wanted, shadows, in_place, 40, 33)
        assert int((lane.positions < 6).sum()) == int(wanted.sum()) + (0 if shadows is None else int(shadows.sum()))
        moved = wanted & ~in_place[:, None, None]
        allow = masks.sheets_allow(attention, visible, moved, block, lane, 33)  # type: ignore[arg-type]
        live = (lane.positions < 6).unsqueeze(2)
        assert torch.equal(allow & live, may_see(attention, lane, 33, visible, moved, block))


def test_a_branch_must_be_kept_before_the_next_forward() -> None:
    model, batch = tiny_transformer(), unequal()
    first = record(model, semi_ar(4), NoCache(), batch).first
    for form in ("rows", "lanes"):
        engine = Engine(model, NoCache(), first, branches=2, form=form)  # type: ignore[arg-type]
        every = first.branch(2)
        region = semi_ar(4).region(every)
        engine.ask(every, region)
        with pytest.raises(AssertionError, match="keep"):
            engine.ask(every, region)
        engine.keep(torch.zeros(4, dtype=torch.long))
        engine.ask(every, region)
        # One forward for a row, whatever the number of branches; lanes count all of them.
        assert engine.nfe.tolist() == [2, 2, 2, 2]
        assert engine.lanes.tolist() == (4 * region.visible.view(4, 2, -1)[:, 0].sum(1)).tolist()


def test_an_ordinary_decoder_pays_nothing_for_branches() -> None:
    """No scratch slots, no second path: the buffer is a canvas and a trash slot, and `keep` does nothing."""
    model, batch = tiny_transformer(), unequal()
    first = record(model, semi_ar(4), NoCache(), batch).first
    engine = Engine(model, DualCache(), first)
    engine.ask(first, semi_ar(4).region(first))
    before = engine.kv
    engine.keep(torch.zeros(4, dtype=torch.long))
    assert engine.kv is before and engine.kv.slots == first.tokens.shape[1] + 1 and engine.kv.rows == 4


def test_the_tree_form_holds_less() -> None:
    """With the dual cache: as many scratch slots as the drafts of a block need, in powers of two, not a canvas for each."""
    model, prompt = tiny_transformer(), [3] * 60
    batch = replace(unequal(), prompts=(tuple(prompt),), templates=((None,) * 16,), seeds=(0,))
    rows, shared = (record(model, freedave(8, 4, form=form), DualCache(), batch).slots for form in ("batch", "tree"))  # type: ignore[arg-type]
    assert rows == 4 * 77 and shared == 76 + 32 + 1


@dataclass(frozen=True)
class Counts(Cache):
    """A cache whose keys depend on every forward: it refreshes in each second one."""

    def init(self, state: State) -> PyTree:
        return torch.zeros_like(state.begin)

    def plan(self, region: Region, state: State, own: PyTree, dirty: Canvas) -> Plan:
        return Plan(region.visible & (region.read | (own % 2 == 0).unsqueeze(1)), region.visible)

    def update(self, plan: Plan, region: Region, state: State, own: PyTree, dirty: Canvas) -> PyTree:
        return own + 1


def test_a_cache_that_counts_forwards_is_refused() -> None:
    assert PrefixCache.path_free and DualCache.path_free and not Counts.path_free
    with pytest.raises(DecodeError, match="skips forwards"):
        decode(tiny_transformer(), freedave(4), [[3, 1]], max_new_tokens=4, cache=Counts())
    assert decode(tiny_transformer(), semi_ar(4), [[3, 1]], max_new_tokens=4, cache=Counts()).stats.nfe[0] == 4


def test_shadows_need_a_model_without_shift() -> None:
    for shift in (0, 1):
        model = tiny_transformer(2, "full", shift)  # type: ignore[arg-type]
        if shift:
            with pytest.raises(DecodeError, match="shift=1"):
                decode(model, wino(4), [[3, 1]], max_new_tokens=4)
        else:
            decode(model, wino(4), [[3, 1]], max_new_tokens=4)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: freedave(4, drafts=0),
        lambda: freedave(4, form="forest"),  # type: ignore[arg-type]
        lambda: freedave(4, match="most"),  # type: ignore[arg-type]
        lambda: SelfDraft(semi_ar(4), eager=True, official_loop=True),
        lambda: WideIn(share=0.0),
        lambda: WideIn(least=6, most=5),
        lambda: WideIn(least=0),
        lambda: NarrowOut(1.5),
    ],
)
def test_settings_that_make_no_sense(wrong: Any) -> None:
    with pytest.raises(DecodeError, match=r"got .*\. Write|got both"):
        wrong()


def test_wide_in_is_capped_by_a_share_of_the_masks() -> None:
    """All 12 masks pass; 0.5 of them, between 2 and 4, are committed, the surest first."""
    from dllm_toolkit.decoders.block import BlockDecoder
    from dllm_toolkit.decoders.rules.schedule import SemiAutoregressive

    batch = replace(unequal(), prompts=((3, 1),), templates=((None,) * 12,), seeds=(0,))
    decoder = BlockDecoder(SemiAutoregressive(None), WideIn(0.0, share=0.5, least=2, most=4))
    recording = record(tiny_transformer(), decoder, NoCache(), batch)
    given = [int((moment.before.masked & ~moment.after.masked & ~moment.after.filled).sum()) for moment in recording.moments]
    left = 12
    for count in given[:-1]:
        assert count == min(max(left // 2, 2), 4)
        left -= count
