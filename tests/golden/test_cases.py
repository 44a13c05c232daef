"""Every recorded decode of the official implementations: ids, forwards, commit order and query tokens, alone and among strangers."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from dllm_toolkit.testing import golden
from dllm_toolkit.testing.case import structure
from dllm_toolkit.testing.golden_plan import Case, Declined, plan, prompts
from dllm_toolkit.testing.golden_replay import WHAT, compare, replay

# Strangers that share a batch with a recorded prompt: one shorter, one longer than any of them, with other budgets.
COMPANY = (([17, 4, 230], 13), ([(7 * place) % 250 for place in range(23)], 31))
FILES = {path.stem: golden.load_cases(path) for path in sorted((golden.SHIPPED / "cases").glob("*.json"))}
DECLINED = {"freedave_llada_tree_prefix_d4_eager", "freedave_dream_tree_prefix_d4_eager"}
NAMED = {
    f"{file}/{case['name'].removeprefix(file).strip('_')}": case
    for file, cases in FILES.items()
    for case in cases
    if case["name"] not in DECLINED
}
BUILT = [pytest.param(case, id=name) for name, case in NAMED.items()]


def companies() -> list[Any]:
    """Every case; the first one of each kind of model, structure of decoder, cache and number of rows runs under shape checks."""
    params, seen = [], set()
    for name, case in NAMED.items():
        planned = plan(case, golden.SHIPPED)
        spec = planned.model.spec
        kind = (type(planned.model), spec.attention, spec.shift, structure(planned.decoder), structure(planned.cache), len(prompts(case)))
        params.append(pytest.param(case, id=name, marks=[] if kind in seen else [pytest.mark.shapes]))
        seen.add(kind)
    return params


@pytest.mark.parametrize("case", BUILT)
def test_exact(case: Case) -> None:
    assert golden.run_case(case) == {}


@pytest.mark.parametrize("case", companies())
def test_a_row_does_not_notice_its_company(case: Case) -> None:
    planned = plan(case, golden.SHIPPED)
    assert compare(case, replay(case, planned, COMPANY), planned) == {}


def test_what_is_declined_says_why_and_nothing_waits() -> None:
    declined = set()
    for cases in FILES.values():
        for case in cases:
            try:
                plan(case, golden.SHIPPED)
            except Declined as reason:
                assert str(reason)
                declined.add(case["name"])
    assert declined == DECLINED


def case_of(file: str, part: str = "") -> Case:
    return next(copy.deepcopy(case) for case in FILES[file] if part in case["name"])


@pytest.mark.parametrize("what", WHAT)
@pytest.mark.parametrize("file", ["llada_generate", "fast_dllm_v1_llada"])
def test_comparing_has_teeth(what: str, file: str) -> None:
    case = case_of(file, "batch")
    if what == "ids":
        case["generated_ids"][-1][3] += 1
    elif what == "forwards":
        case["nfe"] += 1
    elif what == "commit forward":
        case["commit_forward"][-1][3] += 1
    else:
        case["query_lens"][-1] -= 1
    assert what in golden.run_case(case)


@pytest.mark.parametrize(
    ("file", "part", "change"),
    [
        ("llada_generate", "", {"temperature": 0.7}),
        ("llada_generate", "", {"remasking": "random"}),
        ("dream_samplers", "entropy", {"alg_temp": 0.5}),
        ("dream_samplers", "entropy", {"alg": "origin"}),
        ("fast_dllm_dream", "dual_entropy", {"steps": 4}),
        ("dinfer_fastdllm_llada", "early_stop", {"eos_id": None}),
        ("cdlm_cad_llada", "", None),
    ],
)
def test_what_cannot_be_the_same_is_declined(file: str, part: str, change: dict[str, Any] | None) -> None:
    case = case_of(file, part)
    if change is None:
        case["commit_forward"][0] = -1
    elif "eos_id" in change:
        case["args"]["eos_id"] = case["prompt_ids"][0]
    else:
        case["args"].update(change)
    with pytest.raises(Declined):
        plan(case, golden.SHIPPED)
