"""Which papers stand behind a recipe, as BibTeX: `dllm-toolkit cite recipe.yaml`. Long because most of it is the one bibliography.

What is used is read off the recipe: the classes and presets that it names, and the `cite` of every part that they are built of.
`BIBLIOGRAPHY` is the one place with titles and authors. Where the authors of a paper could not be looked up, an entry has none.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import sys
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Union, get_args, get_origin

from dllm_toolkit import registry
from dllm_toolkit.recipe_hints import COMPONENT, Lazy, parameters, plain_hint, slot_of

NUMBER = re.compile(r"\b\d{4}\.\d{5}\b")


@dataclass(frozen=True)
class Reference:
    """A paper on arXiv. authors: as BibTeX wants them, `and` between names; empty if unknown."""

    title: str
    authors: str = ""


def _names(*authors: str) -> str:
    return " and ".join(authors)


BIBLIOGRAPHY: dict[str, Reference] = {
    "1604.06174": Reference(
        "Training Deep Nets with Sublinear Memory Cost", _names("Tianqi Chen", "Bing Xu", "Chiyuan Zhang", "Carlos Guestrin")
    ),
    "2103.03874": Reference(
        "Measuring Mathematical Problem Solving With the MATH Dataset",
        _names(
            "Dan Hendrycks", "Collin Burns", "Saurav Kadavath", "Akul Arora", "Steven Basart", "Eric Tang", "Dawn Song", "Jacob Steinhardt"
        ),
    ),
    "2103.07191": Reference(
        "Are NLP Models really able to Solve Simple Math Word Problems?", _names("Arkil Patel", "Satwik Bhattamishra", "Navin Goyal")
    ),
    "2107.03374": Reference(
        "Evaluating Large Language Models Trained on Code", _names("Mark Chen", "Jerry Tworek", "Heewoo Jun", "others")
    ),
    "2108.07732": Reference(
        "Program Synthesis with Large Language Models",
        _names(
            "Jacob Austin",
            "Augustus Odena",
            "Maxwell Nye",
            "Maarten Bosma",
            "Henryk Michalewski",
            "David Dohan",
            "Ellen Jiang",
            "Carrie Cai",
            "Michael Terry",
            "Quoc Le",
            "Charles Sutton",
        ),
    ),
    "2110.14168": Reference(
        "Training Verifiers to Solve Math Word Problems",
        _names(
            "Karl Cobbe",
            "Vineet Kosaraju",
            "Mohammad Bavarian",
            "Mark Chen",
            "Heewoo Jun",
            "Lukasz Kaiser",
            "Matthias Plappert",
            "Jerry Tworek",
            "Jacob Hilton",
            "Reiichiro Nakano",
            "Christopher Hesse",
            "John Schulman",
        ),
    ),
    "2208.07339": Reference(
        "LLM.int8(): 8-bit Matrix Multiplication for Transformers at Scale",
        _names("Tim Dettmers", "Mike Lewis", "Younes Belkada", "Luke Zettlemoyer"),
    ),
    "2209.05433": Reference("FP8 Formats for Deep Learning"),
    "2305.20050": Reference(
        "Let's Verify Step by Step",
        _names(
            "Hunter Lightman",
            "Vineet Kosaraju",
            "Yura Burda",
            "Harri Edwards",
            "Bowen Baker",
            "Teddy Lee",
            "Jan Leike",
            "John Schulman",
            "Ilya Sutskever",
            "Karl Cobbe",
        ),
    ),
    "2402.03300": Reference(
        "DeepSeekMath: Pushing the Limits of Mathematical Reasoning in Open Language Models",
        _names(
            "Zhihong Shao",
            "Peiyi Wang",
            "Qihao Zhu",
            "Runxin Xu",
            "Junxiao Song",
            "Xiao Bi",
            "Haowei Zhang",
            "Mingchuan Zhang",
            "Y. K. Li",
            "Y. Wu",
            "Daya Guo",
        ),
    ),
    "2410.05229": Reference(
        "GSM-Symbolic: Understanding the Limitations of Mathematical Reasoning in Large Language Models",
        _names("Iman Mirzadeh", "Keivan Alizadeh", "Hooman Shahrokhi", "Oncel Tuzel", "Samy Bengio", "Mehrdad Farajtabar"),
    ),
    "2503.20783": Reference(
        "Understanding R1-Zero-Like Training: A Critical Perspective",
        _names(
            "Zichen Liu", "Changyu Chen", "Wenjun Li", "Penghui Qi", "Tianyu Pang", "Chao Du", "Wee Sun Lee", "Min Lin"
        ),
    ),
    "2504.12216": Reference(
        "d1: Scaling Reasoning in Diffusion Large Language Models via Reinforcement Learning",
        _names("Siyan Zhao", "Devaansh Gupta", "Qinqing Zheng", "Aditya Grover"),
    ),
    "2510.04767": Reference(
        "ParallelBench: Understanding the Trade-offs of Parallel Decoding in Diffusion LLMs",
        _names(
            "Wonjun Kang",
            "Kevin Galim",
            "Seunghyuk Oh",
            "Minjae Lee",
            "Yuchen Zeng",
            "Shuibai Zhang",
            "Coleman Hooper",
            "Yuezhou Hu",
            "Hyung Il Koo",
            "Nam Ik Cho",
            "Kangwook Lee",
        ),
    ),
    "2106.09685": Reference(
        "LoRA: Low-Rank Adaptation of Large Language Models",
        _names("Edward J. Hu", "Yelong Shen", "Phillip Wallis", "Zeyuan Allen-Zhu", "Yuanzhi Li", "Shean Wang", "Lu Wang", "Weizhu Chen"),
    ),
    "2211.17192": Reference(
        "Fast Inference from Transformers via Speculative Decoding", _names("Yaniv Leviathan", "Matan Kalman", "Yossi Matias")
    ),
    "2410.17891": Reference(
        "Scaling Diffusion Language Models via Adaptation from Autoregressive Models", _names("Shansan Gong", "Shivam Agarwal", "others")
    ),
    "2410.18514": Reference(
        "Scaling up Masked Diffusion Models on Text",
        _names("Shen Nie", "Fengqi Zhu", "Chao Du", "Tianyu Pang", "Qian Liu", "Guangtao Zeng", "Min Lin", "Chongxuan Li"),
    ),
    "2502.09992": Reference(
        "Large Language Diffusion Models",
        _names(
            "Shen Nie",
            "Fengqi Zhu",
            "Zebin You",
            "Xiaolu Zhang",
            "Jingyang Ou",
            "Jun Hu",
            "Jun Zhou",
            "Yankai Lin",
            "Ji-Rong Wen",
            "Chongxuan Li",
        ),
    ),
    "2503.00307": Reference(
        "Remasking Discrete Diffusion Models with Inference-Time Scaling",
        _names("Guanghan Wang", "Yair Schiff", "Subham Sekhar Sahoo", "Volodymyr Kuleshov"),
    ),
    "2503.09573": Reference(
        "Block Diffusion: Interpolating Between Autoregressive and Diffusion Language Models", _names("Marianne Arriola", "others")
    ),
    "2505.15781": Reference(
        "dKV-Cache: The Cache for Diffusion Language Models", _names("Xinyin Ma", "Runpeng Yu", "Gongfan Fang", "Xinchao Wang")
    ),
    "2505.19223": Reference(
        "LLaDA 1.5: Variance-Reduced Preference Optimization for Large Language Diffusion Models",
        _names("Fengqi Zhu", "Rongzhen Wang", "Shen Nie", "Xiaolu Zhang", "Chunwei Wu", "Jun Hu", "others"),
    ),
    "2505.22618": Reference(
        "Fast-dLLM: Training-free Acceleration of Diffusion LLM by Enabling KV Cache and Parallel Decoding",
        _names("Chengyue Wu", "Hao Zhang", "Shuchen Xue", "Zhijian Liu", "Shizhe Diao", "Ligeng Zhu", "Ping Luo", "Song Han", "Enze Xie"),
    ),
    "2505.24857": Reference(
        "Accelerated Sampling from Masked Diffusion Models via Entropy Bounded Unmasking",
        _names("Heli Ben-Hamu", "Itai Gat", "Daniel Severo", "Niklas Nolte", "Brian Karrer"),
    ),
    "2506.01347": Reference(
        "The Surprising Effectiveness of Negative Reinforcement in LLM Reasoning",
        _names("Xinyu Zhu", "Mengzhou Xia", "Zhepei Wei", "Wei-Lin Chen", "Danqi Chen", "Yu Meng"),
    ),
    "2506.06295": Reference(
        "dLLM-Cache: Accelerating Diffusion Large Language Models with Adaptive Caching",
        _names(
            "Zhiyuan Liu",
            "Yicun Yang",
            "Yaojie Zhang",
            "Junjie Chen",
            "Chang Zou",
            "Qingyan Wei",
            "Shaobo Wang",
            "Yichen Zhu",
            "Linfeng Zhang",
        ),
    ),
    "2506.10848": Reference(
        "Accelerating Diffusion Large Language Models with SlowFast Sampling: The Three Golden Principles",
        _names("Qingyan Wei", "Yaojie Zhang", "Zhiyuan Liu", "Dongrui Liu", "Linfeng Zhang"),
    ),
    "2506.20639": Reference(
        "DiffuCoder: Understanding and Improving Masked Diffusion Models for Code Generation",
        _names("Shansan Gong", "Ruixiang Zhang", "Huangjie Zheng", "Jiatao Gu", "Navdeep Jaitly", "Lingpeng Kong", "Yizhe Zhang"),
    ),
    "2507.18578": Reference(
        "Wide-In, Narrow-Out: Revokable Decoding for Efficient and Effective DLLMs",
        _names("Feng Hong", "Geng Yu", "Yushi Ye", "Haicheng Huang", "Huangjie Zheng", "Ya Zhang", "Yanfeng Wang", "Jiangchao Yao"),
    ),
    "2508.09192": Reference(
        "Diffusion LLMs Can Do Faster-Than-AR Inference via Discrete Diffusion Forcing",
        _names("Xu Wang", "Chenkai Xu", "Yijie Jin", "Jiachun Jin", "Hao Zhang", "Zhijie Deng"),
    ),
    "2508.13021": Reference(
        "PC-Sampler: Position-Aware Calibration of Decoding Bias in Masked Diffusion Models",
        _names("Pengcheng Huang", "Shuhao Liu", "Zhenghao Liu", "Yukun Yan", "Shuo Wang", "Zulong Chen", "Tong Xiao"),
    ),
    "2508.15487": Reference(
        "Dream 7B: Diffusion Large Language Models",
        _names("Jiacheng Ye", "Zhihui Xie", "Lin Zheng", "Jiahui Gao", "Zirui Wu", "Xin Jiang", "Zhenguo Li", "Lingpeng Kong"),
    ),
    "2508.19982": Reference(
        "Diffusion Language Models Know the Answer Before Decoding",
        _names("Pengxiang Li", "Yefan Zhou", "Dilxat Muhtar", "Lu Yin", "Shilin Yan", "Li Shen", "Soroush Vosoughi", "Shiwei Liu"),
    ),
    "2509.23094": Reference(
        "d2Cache: Accelerating Diffusion-Based LLMs via Dual Adaptive Caching",
        _names("Yuchu Jiang", "Yue Cai", "Xiangzhong Luo", "Jiale Fu", "Jiarui Wang", "Chonghan Liu", "Xu Yang"),
    ),
    "2509.06949": Reference("Revolutionizing Reinforcement Learning Framework for Diffusion Large Language Models"),
    "2509.23924": Reference(
        "Taming Masked Diffusion Language Models via Consistency Trajectory Reinforcement Learning with Fewer Decoding Step",
        _names("Jingyi Yang", "Guanxu Chen", "Xuhao Hu", "Jing Shao"),
    ),
    "2509.25188": Reference(
        "Learning to Parallel: Accelerating Diffusion Large Language Models via Learnable Parallel Decoding",
        _names("W. Bao", "Z. Chen", "D. Xu", "Y. Shang"),
    ),
    "2509.26328": Reference(
        "Fast-dLLM v2: Efficient Block-Diffusion LLM",
        _names(
            "Chengyue Wu",
            "Hao Zhang",
            "Shuchen Xue",
            "Shizhe Diao",
            "Yonggan Fu",
            "Zhijian Liu",
            "Pavlo Molchanov",
            "Ping Luo",
            "Song Han",
            "Enze Xie",
        ),
    ),
    "2509.26432": Reference(
        "AdaBlock-dLLM: Semantic-Aware Diffusion LLM Inference via Adaptive Block Size",
        _names("Guanxi Lu", "Hao Mark Chen", "Yuto Karashima", "Zhican Wang", "Daichi Fujiki", "Hongxiang Fan"),
    ),
    "2509.26488": Reference(
        "dParallel: Learnable Parallel Decoding for dLLMs",
        _names("Zigeng Chen", "Gongfan Fang", "Xinyin Ma", "Ruonan Yu", "Xinchao Wang"),
    ),
    "2510.00294": Reference(
        "Free Draft-and-Verification: Toward Lossless Parallel Decoding for Diffusion Large Language Models",
        _names("Shutong Wu", "Jiawei Zhang"),
    ),
    "2510.06133": Reference(
        "CreditDecoding: Accelerating Parallel Decoding in Diffusion Large Language Models with Trace Credits",
        _names("K. Wang", "Z. Jiang", "H. Feng", "W. Zhao", "L. Liu", "J. Li", "Z. Lan", "W. Lin"),
    ),
    "2510.06303": Reference(
        "SDAR: A Synergistic Diffusion-AutoRegression Paradigm for Scalable Sequence Generation", _names("Shuang Cheng", "others")
    ),
    "2510.07081": Reference(
        "Accelerating Diffusion LLM Inference via Local Determinism Propagation",
        _names("Fanheng Kong", "Jingyuan Zhang", "Yahui Liu", "Zirui Wu", "Yu Tian", "Victoria W.", "Guorui Zhou"),
    ),
    "2510.08666": Reference(
        "dInfer: An Efficient Inference Framework for Diffusion Language Models",
        _names("Yuxin Ma", "Lun Du", "Lanning Wei", "Kun Chen", "Qian Xu", "Kangyu Wang", "others"),
    ),
    "2510.18165": Reference(
        "Saber: An Efficient Sampling with Adaptive Acceleration and Backtracking Enhanced Remasking for Diffusion Language Model",
        _names(
            "Yihong Dong",
            "Zhaoyu Ma",
            "Xue Jiang",
            "Zhiyuan Fan",
            "Jiaru Qian",
            "Yongmin Li",
            "Jianha Xiao",
            "Zhi Jin",
            "Rongyu Cao",
            "Binhua Li",
            "Fei Huang",
            "Yongbin Li",
            "Ge Li",
        ),
    ),
    "2511.05664": Reference(
        "KLASS: KL-Guided Fast Inference in Masked Diffusion Models",
        _names("Seo Hyun Kim", "Sunwoo Hong", "Hojung Jung", "Youngrok Park", "Se-Young Yun"),
    ),
    "2511.19269": Reference("CDLM: Consistency Diffusion Language Models For Faster Sampling"),
    "2511.21103": Reference(
        "From Bits to Rounds: Parallel Decoding with Exploration for Diffusion Language Models",
        _names("Hengyu Fu", "Baihe Huang", "Virginia Adams", "Charles Wang", "Venkat Srinivasan", "Jiantao Jiao"),
    ),
    "2512.02892": Reference(
        "Fast-Decoding Diffusion Language Models via Progress-Aware Confidence Schedules",
        _names("Amr Mohamed", "Yang Zhang", "Michalis Vazirgiannis", "Guokan Shang"),
    ),
    "2512.15176": Reference(
        "DEER: Draft with Diffusion, Verify with Autoregressive Models",
        _names("Zicong Cheng", "Guo-Wei Yang", "Jia Li", "Zhijie Deng", "Meng-Hao Guo", "Shi-Min Hu"),
    ),
    "2512.15745": Reference(
        "LLaDA2.0: Scaling Up Diffusion Language Models to 100B", _names("Tiwei Bie", "Maosong Cao", "Kun Chen", "Lun Du", "others")
    ),
    "2601.02236": Reference("CD4LM: Consistency Distillation and aDaptive Decoding for Diffusion Language Models"),
    "2601.07568": Reference(
        "d3LLM: Ultra-Fast Diffusion LLM using Pseudo-Trajectory Distillation",
        _names("Yu-Yang Qian", "Junda Su", "Lanxiang Hu", "Peiyuan Zhang", "Zhijie Deng", "Peng Zhao", "Hao Zhang"),
    ),
    "2601.20332": Reference(
        "Window-Diffusion: Accelerating Diffusion Language Model Inference with Windowed Token Pruning and Caching",
        _names("Fengrui Zuo", "Zhiwei Ke", "Yiming Liu", "Wenqi Lou", "Chao Wang", "Xuehai Zhou"),
    ),
    "2602.06036": Reference("DFlash: Block Diffusion for Flash Speculative Decoding", _names("Jian Chen", "Yesheng Liang", "Zhijian Liu")),
    "2602.08676": Reference(
        "LLaDA2.1: Speeding Up Text Diffusion via Token Editing", _names("Tiwei Bie", "Maosong Cao", "Xiang Cao", "Bingsen Chen", "others")
    ),
    "2602.09555": Reference(
        "Advancing Block Diffusion Language Models for Test-Time Scaling",
        _names(
            "Yi Lu",
            "Deyang Kong",
            "Jianing Wang",
            "Linsen Guo",
            "Xue Wang",
            "Qi Guo",
            "Tao Gui",
            "Xuanjing Huang",
            "Wei Ye",
            "Shikun Zhang",
            "Wei Wang",
        ),
    ),
    "2602.22661": Reference("dLLM: Simple Diffusion Language Modeling"),
    "2604.18738": Reference("Remask, Don't Replace: Token-to-Mask Refinement in Masked Diffusion Language Models", "Lin Yao"),
    "2605.26436": Reference(
        "Targeted Remasking: Replacing Token Editing with Token-to-Mask Refinement in Discrete Diffusion Language Models", "Lin Yao"
    ),
}
"""Every paper that the package names, by arXiv number, and those whose methods were left out."""


def toolkit() -> str:
    """The BibTeX entry of the toolkit itself."""
    from dllm_toolkit import __version__

    fields = {
        "title": "{dllm\\_toolkit}: Decoding, Comparing and Training Diffusion Language Models",
        "author": "{The dllm\\_toolkit authors}",
        "year": "2026",
        "version": __version__,
    }
    return _entry("software", "dllm_toolkit", fields)


def bibtex(number: str) -> str:
    """The BibTeX entry of an arXiv number; number and year only where nothing else is known, and a note for what is no number."""
    if not NUMBER.fullmatch(number):
        return _entry("misc", re.sub(r"\W", "_", number), {"note": f"repository {number}"})
    reference = BIBLIOGRAPHY.get(number)
    fields = {} if reference is None else {"title": "{" + reference.title + "}"}
    if reference is not None and reference.authors:
        fields["author"] = reference.authors
    fields |= {"year": f"20{number[:2]}", "eprint": number, "archivePrefix": "arXiv", "url": f"https://arxiv.org/abs/{number}"}
    return _entry("misc", f"arxiv{number.replace('.', '_')}", fields)


def _entry(kind: str, key: str, fields: Mapping[str, str]) -> str:
    lines = ",\n".join(f"  {name:<13} = {{{value}}}" for name, value in fields.items())
    return f"@{kind}{{{key},\n{lines}\n}}"


def papers_of(entry: Any) -> list[str]:
    """What `cite` says, or else the arXiv numbers in the documentation of a class or function, or else of its module."""
    cited: list[str] = list(getattr(entry, "cite", ()))
    texts = (inspect.getdoc(entry) or "", sys.modules[entry.__module__].__doc__ or "")
    found: list[list[str]] = [NUMBER.findall(text) for text in texts]
    return cited or list(dict.fromkeys(found[0] or found[1]))


def papers_in(tree: Any, root: Any, built: Any) -> dict[str, list[str]]:
    """arXiv number -> what it is cited for, for a resolved recipe of type `root` and the object that was built from it."""
    found: dict[str, list[str]] = {}
    for what, numbers in (*((name, papers_of(entry)) for name, entry in _named(tree, root)), *_parts(built)):
        for number in numbers:
            uses = found.setdefault(number, [])
            if not any(use == what or use.endswith(f" {what}") for use in uses):
                uses.append(what)
    return found


def bibliography(papers: Mapping[str, Sequence[str]]) -> str:
    """BibTeX: the toolkit, then every paper under a comment that says what it is cited for."""
    entries = [f"% {', '.join(uses)}\n{bibtex(number)}" for number, uses in sorted(papers.items())]
    return "\n\n".join([toolkit(), *entries])


def _named(node: Any, annotation: Any) -> Iterator[tuple[str, Any]]:
    """Every component that a recipe's data names, read as an `annotation`: (kind and name, class or function)."""
    annotation = plain_hint(annotation)
    origin, inside = get_origin(annotation), get_args(annotation)
    if origin is Lazy or origin in (Union, types.UnionType):
        for choice in inside:
            yield from _named(node, choice)
        return
    slot = slot_of(annotation)
    if slot is not None and isinstance(node, str | Mapping):
        name = node if isinstance(node, str) else node.get(COMPONENT)
        try:
            target = registry.lookup(slot[0], str(name))
        except registry.UnknownName:  # the other choice of a union was meant
            return
        yield f"{slot[0]} {name}", target
        yield from _arguments({} if isinstance(node, str) else node, target)
    elif dataclasses.is_dataclass(annotation) and isinstance(node, Mapping):
        yield from _arguments(node, annotation)
    elif isinstance(node, Mapping) and inside:
        for child in node.values():
            yield from _named(child, inside[-1])
    elif isinstance(node, list) and inside:
        for child in node:
            yield from _named(child, inside[0])


def _arguments(given: Mapping[str, Any], target: Any) -> Iterator[tuple[str, Any]]:
    takes, _ = parameters(target)
    for name, child in given.items():
        if name in takes:
            yield from _named(child, takes[name].annotation)


def _parts(thing: Any) -> Iterator[tuple[str, Sequence[str]]]:
    """(name, papers) of everything with a `cite` of its own inside a built object; what is not loaded yet is left to `_named`."""
    if isinstance(thing, Lazy | type):
        return
    cited = tuple(getattr(thing, "cite", ()))
    if cited:
        yield registry.name_of(type(thing)) or type(thing).__name__, cited
    if dataclasses.is_dataclass(thing):
        for item in dataclasses.fields(thing):
            yield from _parts(getattr(thing, item.name))
    elif isinstance(thing, list | tuple | set | frozenset):
        for item in thing:
            yield from _parts(item)
    elif isinstance(thing, Mapping):
        for item in thing.values():
            yield from _parts(item)
