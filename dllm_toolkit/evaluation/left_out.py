"""Published methods that are not built, with the reason; the page of decoders shows them (decoder_page.py)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LeftOut:
    """A method and why it is missing. papers: arXiv numbers. unless: registered names that would make it untrue; it is then not shown."""

    name: str
    reason: str
    papers: tuple[str, ...] = ()
    unless: tuple[str, ...] = ()


LEFT_OUT: tuple[LeftOut, ...] = (
    LeftOut(
        "DFlash",
        "Its drafter is trained on the target's hidden states, and no such drafter ships. Verification is that of `deer`; what is missing "
        "is the model.",
        ("2602.06036",),
        ("dflash",),
    ),
    LeftOut(
        "LLaDA2.2, Levenshtein editing",
        "It inserts and deletes tokens. A canvas has fixed positions: caches, blocks and seeds of the noise are keyed by them.",
        (),
        ("levenshtein",),
    ),
    LeftOut(
        "ETE, branching",
        "The paper's algorithm was not accessible to us; what is built after its abstract leaves out the rows that explore alternatives.",
        ("2511.21103",),
        ("explore_branches",),
    ),
    LeftOut(
        "Progressive block size (TDAR)",
        "A training schedule. At inference it is a larger `block_length`; several of them in one text are a program of stages (`staged`).",
        ("2602.09555",),
    ),
    LeftOut(
        "Dilated groups, attention-graph gates, entropy-driven blocks, superposed segments, tree search",
        "Known to us from their abstracts only. Each would be one rule: a region, a gate, a schedule, a model wrapper, a driver.",
    ),
)
