"""One readable transformer for every model here; attention is only a mask. Long because settings, layer and model are read together.

Pre-norm residual blocks with RMSNorm, rotary embeddings (half-split), grouped or plain multi-head attention, optional q/k/v
biases and SwiGLU: the layout of Llama, Qwen2, LLaDA (arXiv 2502.09992) and Dream (arXiv 2508.15487). What differs between them is
data in `TransformerConfig`. Numerics follow the originals: RMS statistics and rotations in float32, then a cast back.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, cast, get_args

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from dllm_toolkit import workspace
from dllm_toolkit.cache.buffer import KVBuffer, LayerBuffer
from dllm_toolkit.errors import ToolkitError
from dllm_toolkit.models.base import Flat, Query
from dllm_toolkit.models.fused import at_once, fused, gated, intact, together
from dllm_toolkit.ops import attention
from dllm_toolkit.registry import register
from dllm_toolkit.types import Attention, BlockAnchor, ModelSpec

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from dllm_toolkit.models.pieces import Pieces
    from dllm_toolkit.models.save import Origin


class ModelError(ToolkitError):
    """A model configuration that cannot be built or saved."""


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3.1's stretched rotary embedding: slow frequencies are divided by `factor`, fast ones kept, those between blended.

    A frequency is slow when its wavelength is above original_positions / low, fast when below original_positions / high.
    """

    factor: float
    low: float
    high: float
    original_positions: int

    def __call__(self, frequency: Tensor) -> Tensor:
        turns = self.original_positions * frequency / (2 * math.pi)  # whole turns within the original length
        keep = ((turns - self.low) / (self.high - self.low)).clamp(0, 1)
        return keep * frequency + (1 - keep) * frequency / self.factor


@dataclass(frozen=True)
class TransformerConfig:
    """Sizes and switches of a Transformer. Lengths in tokens, widths in features.

    qk_norm: RMSNorm on every query and key head before the rotation (Qwen3). mask_id: a row of the vocabulary; a causal model without a
    mask token has mask_id == vocab_size, which no decoder can propose and which takes no word from the vocabulary.
    """

    vocab_size: int
    width: int
    layers: int
    heads: int
    mlp_width: int
    mask_id: int
    eos_ids: tuple[int, ...]
    pad_id: int
    kv_heads: int | None = None
    head_dim: int | None = None
    max_positions: int = 2048
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    norm_eps: float = 1e-5
    qkv_bias: bool = False
    qk_norm: bool = False
    tie_embeddings: bool = False
    attention: Attention = "full"
    block_size: int | None = None
    block_anchor: BlockAnchor = "prompt"
    shift: Literal[0, 1] = 0

    def __post_init__(self) -> None:
        if self.kv_heads is None:
            object.__setattr__(self, "kv_heads", self.heads)
        if self.head_dim is None:
            object.__setattr__(self, "head_dim", self.width // self.heads if self.heads else 0)
        object.__setattr__(self, "eos_ids", tuple(self.eos_ids))
        sizes = ("vocab_size", "width", "layers", "heads", "mlp_width", "kv_heads", "head_dim", "max_positions", "rope_theta", "block_size")
        for name in sizes:
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ModelError(f"{name} must be above 0, got {value}. It is a size of the model. Write {name}: with a positive number.")
        if self.attention not in get_args(Attention) or self.block_anchor not in get_args(BlockAnchor) or self.shift not in (0, 1):
            raise ModelError(
                f"unknown attention, block_anchor or shift, got {self.attention!r}, {self.block_anchor!r} and {self.shift!r}. They decide "
                "who sees whom. Write attention: full, block_causal or causal; block_anchor: prompt or absolute; shift: 0 or 1."
            )
        if any(not 0 <= one < self.vocab_size for one in self.eos_ids):
            raise ModelError(
                f"eos_ids must be rows of the vocabulary, got {list(self.eos_ids)} with vocab_size={self.vocab_size}. They end a text. "
                "Use the config.json that came with the weights."
            )
        assert self.kv_heads is not None and self.head_dim is not None
        if self.heads % self.kv_heads:
            raise ModelError(
                f"heads must be a multiple of kv_heads, got heads={self.heads} and kv_heads={self.kv_heads}. Every key head serves "
                f"the same number of query heads. Write kv_heads: {self.heads} for plain multi-head attention."
            )
        if self.head_dim % 2:
            raise ModelError(f"head_dim must be even, got {self.head_dim}. Rotary embeddings turn pairs. Write head_dim: 32.")
        for name in ("mask_id", "pad_id"):
            value = getattr(self, name)
            maskless = name == "mask_id" and self.attention == "causal" and value == self.vocab_size
            if not (0 <= value < self.vocab_size or maskless):
                raise ModelError(
                    f"{name} must be a row of the vocabulary, got {value} with vocab_size={self.vocab_size}. Only a causal model does "
                    f"without a mask token. Write {name}: with an id below {self.vocab_size}."
                )

    @property
    def spec(self) -> ModelSpec:
        assert self.kv_heads is not None and self.head_dim is not None
        return ModelSpec(
            vocab_size=self.vocab_size,
            mask_id=self.mask_id,
            eos_ids=self.eos_ids,
            pad_id=self.pad_id,
            layers=self.layers,
            heads=self.heads,
            kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            width=self.width,
            max_positions=self.max_positions,
            attention=self.attention,
            block_size=self.block_size,
            block_anchor=self.block_anchor,
            shift=self.shift,
        )


class RMSNorm(nn.Module):
    """x / rms(x) * weight. Statistics in float32; the weight multiplies after the cast back, as in LLaDA and Qwen2."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype in (torch.float32, torch.float64):
            return F.rms_norm(x, (x.shape[-1],), self.weight, self.eps)
        return F.rms_norm(x.float(), (x.shape[-1],), None, self.eps).to(x.dtype) * self.weight


def rotate(
    x: Float[Tensor, "B W H D"], cos: Float[Tensor, "B W 1 D"], sin: Float[Tensor, "B W 1 D"]
) -> Float[Tensor, "B W H D"]:
    """Rotary embedding, halves rotated against each other, computed in the tables' precision (float32 or wider)."""
    wide = x.to(cos.dtype)
    half = x.shape[-1] // 2
    turned = torch.cat((-wide[..., half:], wide[..., :half]), dim=-1)
    return (wide * cos + turned * sin).to(x.dtype)


class Lanes(NamedTuple):
    """What all layers need of a query: rotations, who sees whom, and where keys and values go (see `KVBuffer.flat`).

    With `flat`, rotations and index are of the flat lanes.
    """

    cos: Float[Tensor, "B W 1 D"]
    sin: Float[Tensor, "B W 1 D"]
    allow: Bool[Tensor, "B 1 W S"] | None
    causal: bool
    index: Int[Tensor, "BW"] | None
    flat: Flat | None = None


Mix = Callable[[Tensor, Tensor, Tensor, Lanes], Tensor]
"""How queries mix values, (q [B, H, W, D], k, v [B, G, S, D], lanes) -> [B, H, W, D]: `dense`, or one that keeps the attention weights."""


def dense(
    q: Float[Tensor, "B H W D"], k: Float[Tensor, "B G S D"], v: Float[Tensor, "B G S D"], lanes: Lanes
) -> Float[Tensor, "B H W D"]:
    """Scaled dot product attention by the fastest way there is, H query heads on G key heads."""
    way = attention.way_for(q, lanes.allow)
    if way is not None:
        return attention.few(way, q, k, v, lanes.allow)
    grouped = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=lanes.allow, is_causal=lanes.causal, enable_gqa=grouped)


def rotating(
    q: Float[Tensor, "B H W D"], k: Float[Tensor, "B G S D"], v: Float[Tensor, "B G S D"], lanes: Lanes
) -> Float[Tensor, "B H W D"]:
    """`dense` for queries that are not rotated yet, where the kernel of few lanes does both at once."""
    return attention.few("triton", q, k, v, lanes.allow, (lanes.cos.squeeze(2), lanes.sin.squeeze(2)))


class Layer(nn.Module):
    """Attention and SwiGLU, both pre-norm and residual: x + attend(x), then x + transform(x)."""

    fused_attention: nn.Module | None
    fused_transform: nn.Module | None

    def __init__(self, config: TransformerConfig, index: int) -> None:
        super().__init__()
        assert config.kv_heads is not None and config.head_dim is not None
        self.part()
        self.index, self.heads, self.kv_heads, self.head_dim = index, config.heads, config.kv_heads, config.head_dim
        width, queries, keys = config.width, config.heads * config.head_dim, config.kv_heads * config.head_dim
        self.attention_norm = RMSNorm(width, config.norm_eps)
        self.q_proj = nn.Linear(width, queries, bias=config.qkv_bias)
        self.k_proj = nn.Linear(width, keys, bias=config.qkv_bias)
        self.v_proj = nn.Linear(width, keys, bias=config.qkv_bias)
        self.o_proj = nn.Linear(queries, width, bias=False)
        self.q_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else nn.Identity()
        self.mlp_norm = RMSNorm(width, config.norm_eps)
        self.gate_proj = nn.Linear(width, config.mlp_width, bias=False)
        self.up_proj = nn.Linear(width, config.mlp_width, bias=False)
        self.down_proj = nn.Linear(config.mlp_width, width, bias=False)

    def forward(self, x: Float[Tensor, "B W width"], lanes: Lanes, kv: KVBuffer | None) -> Float[Tensor, "B W width"]:
        x = x + self.attend(x, lanes, kv)
        return x + self.transform(x)

    def attend(
        self, x: Float[Tensor, "B W width"], lanes: Lanes, kv: KVBuffer | LayerBuffer | None, mix: Mix = dense
    ) -> Float[Tensor, "B W width"]:
        """What attention adds to the stream. The lanes' keys and values go into `kv` first, when one is given."""
        rows, width, _ = x.shape
        queries, keys, values = together(self.attention_norm(x), self.fused_attention, self.q_proj, self.k_proj, self.v_proj)
        q = self.q_norm(queries.reshape(rows, width, self.heads, self.head_dim))
        if mix is dense and lanes.flat is None and attention.way_for(q.transpose(1, 2), lanes.allow) == "triton":
            mix = rotating
        else:
            q = rotate(q, lanes.cos, lanes.sin)
        k = rotate(self.k_norm(keys.reshape(rows, width, self.kv_heads, self.head_dim)), lanes.cos, lanes.sin)
        v = values.reshape(rows, width, self.kv_heads, self.head_dim)
        if kv is not None:
            assert lanes.index is not None
            store = kv.layer(self.index) if isinstance(kv, KVBuffer) else kv
            if lanes.flat is not None:
                q = lanes.flat.back(q)
            k, v = store.write(q.shape[0], lanes.index, k, v)  # [B, S, H, D]
        mixed = rearrange(mix(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), lanes), "b h w d -> b w (h d)")
        return at_once(self.o_proj, mixed if lanes.flat is None else lanes.flat.of(mixed))

    def values(self, x: Float[Tensor, "B W width"]) -> Float[Tensor, "B W H D"]:
        """The values that `attend` would store for these lanes."""
        return self.v_proj(self.attention_norm(x)).view(*x.shape[:2], self.kv_heads, self.head_dim)

    def transform(self, x: Float[Tensor, "B W width"]) -> Float[Tensor, "B W width"]:
        """What the feed-forward network adds to the stream."""
        return self.down_proj(self.gated(x))

    def gated(self, x: Float[Tensor, "B W width"]) -> Float[Tensor, "B W mlp_width"]:
        """What `down_proj` is asked in the feed-forward network."""
        return gated(self.mlp_norm(x), self.fused_transform, self.gate_proj, self.up_proj)

    def fuse(self) -> None:
        """Let maps that read the same input share one product where nobody wants gradients. They keep their names and their values."""
        self._check()
        if self.fused_attention is None:
            object.__setattr__(self, "fused_attention", fused((self.q_proj, self.k_proj, self.v_proj)))
        if self.fused_transform is None:
            object.__setattr__(self, "fused_transform", fused((self.gate_proj, self.up_proj)))

    def _check(self) -> None:
        attention, transform = (self.q_proj, self.k_proj, self.v_proj), (self.gate_proj, self.up_proj)
        for whole, maps in ((self.fused_attention, attention), (self.fused_transform, transform)):
            if whole is not None and not intact(whole, maps):
                self.part()

    def part(self) -> None:
        """Forget the shared products: the maps are no longer what they were made of."""
        object.__setattr__(self, "fused_attention", None)  # not a submodule: its weights are those of the maps
        object.__setattr__(self, "fused_transform", None)

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, nn.Module) and name.endswith("_proj"):  # an adapter, or 8 bits, in the place of a map
            self.part()
        super().__setattr__(name, value)

    def __getstate__(self) -> dict[str, Any]:  # a copy's maps have weights of their own
        return {**self.__dict__, "fused_attention": None, "fused_transform": None}

    def _apply(self, fn: Any, recurse: bool = True) -> Layer:
        super()._apply(fn, recurse)
        self._check()  # a move to where the weights are leaves everything as it is
        return self


class Transformer(nn.Module):
    """The native model: answers a Query (see models/base.py), trains through `logits`, saves itself as safetensors."""

    cos: Tensor
    sin: Tensor

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        assert config.head_dim is not None
        self.config = config
        self.tokenizer: PreTrainedTokenizerFast | None = None
        self._pieces: Pieces | None = None
        self.origin: Origin | None = None  # the checkpoint it came from, for saving under the original names
        self.embed = nn.Embedding(config.vocab_size, config.width)
        self.layers = nn.ModuleList(Layer(config, index) for index in range(config.layers))
        self.norm = RMSNorm(config.width, config.norm_eps)
        self.lm_head = nn.Linear(config.width, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.lm_head.weight = self.embed.weight
        self._rotary_tables(torch.float32)
        self.apply(self._initialise)

    def _rotary_tables(self, dtype: torch.dtype) -> None:
        config, device = self.config, self.embed.weight.device
        assert config.head_dim is not None
        if device.type == "meta":
            cos, sin = (torch.empty(config.max_positions, config.head_dim, dtype=dtype, device=device) for _ in range(2))
        else:  # on the CPU, so that every device rotates by the same angles
            steps = torch.arange(0, config.head_dim, 2, dtype=torch.int64).to(dtype)
            frequency = 1.0 / (config.rope_theta ** (steps / config.head_dim))
            if config.rope_scaling is not None:
                frequency = config.rope_scaling(frequency)
            angle = torch.outer(torch.arange(config.max_positions, dtype=dtype), frequency)
            angle = torch.cat((angle, angle), dim=-1)  # [max_positions, D]
            cos, sin = angle.cos().to(device), angle.sin().to(device)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def _initialise(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def _apply(self, fn: Any, recurse: bool = True) -> Transformer:
        """Move and cast as usual, but keep the rotary tables at float32 or wider: bf16 angles are wrong by whole radians."""
        before, place = self.cos.dtype, self.device
        if self.config.tie_embeddings:  # one parameter under two names: move it once, and leave the meta device as one
            self.lm_head._parameters["weight"] = None
        super()._apply(fn, recurse)
        if self.config.tie_embeddings:
            self.lm_head.weight = self.embed.weight
        # A cast up from float32 would keep float32's angles, so every change of precision computes them anew.
        if not before == self.cos.dtype == self._rotary_dtype and self.cos.device.type != "meta":
            self.rebuild_rotary_tables()
        if self.device != place:
            workspace.forget(self)
        return self

    @property
    def _rotary_dtype(self) -> torch.dtype:
        return torch.float64 if self.embed.weight.dtype == torch.float64 else torch.float32

    def allocate(self, dtype: torch.dtype, device: torch.device | str) -> Transformer:
        """Leave the meta device: parameters on `device`, not yet filled, each allocated once and in its final dtype. Changes in place."""
        made: dict[nn.Parameter, nn.Parameter] = {}  # tied parameters stay one
        for module in self.modules():
            for name, parameter in module.named_parameters(recurse=False):
                if parameter not in made:
                    made[parameter] = nn.Parameter(torch.empty(parameter.shape, dtype=dtype, device=device))
                setattr(module, name, made[parameter])
        self.rebuild_rotary_tables()
        return self

    def rebuild_rotary_tables(self) -> None:
        """Compute the rotary tables anew on the weights' device; needed after `to_empty`, which leaves buffers undefined."""
        self._rotary_tables(self._rotary_dtype)

    @property
    def spec(self) -> ModelSpec:
        return self.config.spec

    @property
    def dtype(self) -> torch.dtype:
        return self.embed.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.embed.weight.device

    def buffer(self, rows: int, slots: int, *, hidden: bool = False) -> KVBuffer:
        """An empty K/V buffer for `rows` canvases of `slots` slots, on this model's device.

        hidden: remember the last hidden row of every slot, which models with shift 1 do anyway: what is read need not be computed then.
        """
        config = self.config
        assert config.kv_heads is not None and config.head_dim is not None
        return KVBuffer(
            rows,
            slots,
            layers=config.layers,
            kv_heads=config.kv_heads,
            head_dim=config.head_dim,
            hidden_width=config.width if config.shift or hidden else None,
            dtype=self.dtype,
            device=self.device,
        )

    def with_attention(self, attention: Attention, block_size: int | None = None) -> Transformer:
        """The same weights under another attention rule (a D2F student is its teacher, block-causal). Changes in place."""
        self.config = replace(self.config, attention=attention, block_size=block_size)
        return self

    def forward(self, query: Query, kv: KVBuffer | None = None) -> Float[Tensor, "B R V"]:
        """Logits of the read slots. Writes the lanes' keys and values into `kv` when one is given."""
        if self._pieces is not None and kv is not None and not torch.is_grad_enabled():
            return self._pieces(self, query, kv)
        x, lanes = self.enter(query), self.lanes(query, kv)
        for layer in self.layers:
            x = layer(x, lanes, kv)
        return self.leave(x, query, kv)

    def fuse(self) -> None:
        """Let maps that read the same input share one product in forwards without gradients (see fused.py)."""
        for layer in cast("list[Layer]", self.layers):
            layer.fuse()

    def __getstate__(self) -> dict[str, Any]:  # recorded graphs read the weights of this very model
        return {name: value for name, value in self.__dict__.items() if name != "_workspaces"}

    @contextlib.contextmanager
    def in_pieces(self, pieces: Pieces) -> Iterator[None]:
        """Forwards without gradients go through compiled pieces meanwhile, also those that a wrapper asks for."""
        before, self._pieces = self._pieces, pieces
        try:
            yield
        finally:
            self._pieces = before

    def enter(self, query: Query) -> Float[Tensor, "B W width"]:
        """What the first layer sees: the lanes' embeddings, and what the query adds to them."""
        tokens, config = query.tokens, self.config
        if config.mask_id == config.vocab_size:  # an undecided lane of a causal model: it has no embedding, and nobody looks at it
            tokens = tokens.masked_fill(tokens == config.mask_id, config.pad_id)
        x = self.embed(tokens if query.flat is None else query.flat.of(tokens))
        return x if query.added is None else x + query.added

    def lanes(self, query: Query, kv: KVBuffer | None) -> Lanes:
        """What every layer needs of a query."""
        positions = query.positions if query.flat is None else query.flat.of(query.positions)
        return Lanes(
            cos=self.cos[positions].unsqueeze(2),
            sin=self.sin[positions].unsqueeze(2),
            allow=None if query.allow is None else query.allow.unsqueeze(1),
            causal=kv is None and query.allow is None and self.config.attention == "causal",
            index=None if kv is None or query.slots is None else self._index(query, kv),
            flat=query.flat,
        )

    @staticmethod
    def _index(query: Query, kv: KVBuffer) -> Int[Tensor, "N"]:
        """Where the lanes' keys go. Flat places without a lane repeat a live or dead one, with the same values or none that count."""
        assert query.slots is not None
        index = kv.flat(query.slots)
        return index if query.flat is None else index.index_select(0, query.flat.lane)

    def leave(self, x: Float[Tensor, "B W width"], query: Query, kv: KVBuffer | None) -> Float[Tensor, "B R V"]:
        """Logits of the read slots, from what the last layer gave for the lanes. A buffer with hidden rows remembers those too."""
        hidden = self.norm(x)  # [B, W, width]
        if kv is not None and kv.hidden is not None:
            kv.write_hidden(self._index(query, kv), hidden)
            hidden = kv.hidden  # [B, S, width]
        elif kv is not None and query.read is not None:
            query = self._lanes_of(query, kv)
            if query.flat is not None:
                hidden = query.flat.back(hidden)
        if query.read is not None:
            hidden = hidden.gather(1, query.read.unsqueeze(-1).expand(-1, -1, hidden.shape[-1]))  # [B, R, width]
        return self.lm_head(hidden)

    def _lanes_of(self, query: Query, kv: KVBuffer) -> Query:
        """Turn read slots into read lanes: without a shift every slot that is read was computed in this very forward."""
        assert query.slots is not None and query.read is not None
        lanes = torch.arange(query.slots.shape[1], device=query.slots.device).expand_as(query.slots)
        lane_of = torch.zeros(kv.rows, kv.slots, dtype=torch.long, device=lanes.device).scatter_(1, query.slots, lanes)
        return query._replace(read=lane_of.gather(1, query.read))

    def logits(
        self,
        tokens: Int[Tensor, "B L"],
        allow: Bool[Tensor, "B L L"] | None = None,
        positions: Int[Tensor, "B L"] | None = None,
    ) -> Float[Tensor, "B L V"]:
        """Dense logits for training and tests, aligned: row i is the distribution of the token AT position i.

        `allow` None: everybody sees everybody (causal models: the past). With shift 1, row 0 has no predictor and repeats row 1's.
        """
        if positions is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        raw = self(Query(tokens, positions, None, allow, None))
        return torch.cat((raw[:, :1], raw[:, :-1]), dim=1) if self.config.shift else raw

    def save_pretrained(
        self,
        directory: str | Path,
        dtype: torch.dtype | None = None,
        names: Literal["native", "original"] = "native",
        shard_bytes: int = 4 << 30,
    ) -> None:
        """Write config.json, the weights and the tokenizer's files; the directory loads back with `models.load`.

        names `original`: tensor names and config.json of the checkpoint that the model was loaded from, for other tools. Weights beyond
        `shard_bytes` are split into shards with an index; host memory holds one shard at a time. Raises ModelError.
        """
        from dllm_toolkit.models.save import save

        save(self, Path(directory), dtype, names, shard_bytes)


@register("model", "transformer")
def transformer(
    vocab_size: int,
    mask_id: int,
    eos_ids: list[int],
    pad_id: int,
    width: int = 256,
    layers: int = 6,
    heads: int = 8,
    kv_heads: int | None = None,
    mlp_width: int | None = None,
    max_positions: int = 512,
    rope_theta: float = 10000.0,
    attention: Attention = "full",
    block_size: int | None = None,
    shift: Literal[0, 1] = 0,
    seed: int = 0,
) -> Transformer:
    """A freshly initialised Transformer (std 0.02), for training from scratch."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Transformer(
            TransformerConfig(
                vocab_size=vocab_size,
                width=width,
                layers=layers,
                heads=heads,
                kv_heads=kv_heads,
                mlp_width=mlp_width if mlp_width is not None else -(-width * 8 // 3 // 32) * 32,
                mask_id=mask_id,
                eos_ids=tuple(eos_ids),
                pad_id=pad_id,
                max_positions=max_positions,
                rope_theta=rope_theta,
                attention=attention,
                block_size=block_size,
                shift=shift,
            )
        )
