"""One call of a public function, made of features (features.py), and what it must give.

Two sequences, of which the reference sees the rows that are in use; the function gets them dense,
packed, in pages or in a cache.
"""

import math
from dataclasses import dataclass, field

import torch
from torch.nn.functional import pad

from flash_attn_sm120.fa2 import flash_attn_with_kvcache
from helpers.devices import CPU, Device, writable
from helpers.dropout import factors
from helpers.reference import attention_reference
from helpers.rotary import rotate

BATCH, QUERIES, KEYS, HEADS, HEADS_KV = 2, 70, 140, 4, 2
SEED = (2**62 + 5, 17)
SIDE = {"q": "q", "k": "k", "v": "k"}  # whose rows a tensor has


@dataclass
class Call:
    device: Device
    function: object
    dims: tuple[int, int] = (32, 32)
    named: dict = field(default_factory=dict)  # arguments of the function
    meant: dict = field(default_factory=dict)  # of the reference
    masks: dict = field(default_factory=dict)  # (b, h, q, k) -> seen
    learned: list = field(default_factory=list)  # (name, the call's tensor, the reference's)
    eight_bits: set = field(default_factory=set)
    factors: dict = field(default_factory=dict)  # descales, (BATCH, HEADS_KV)
    rows: dict = field(default_factory=lambda: {"q": [QUERIES] * BATCH, "k": [KEYS] * BATCH})
    packed: set = field(default_factory=set)  # sides
    used: dict = field(default_factory=dict)  # side -> rows of each sequence
    page_size: int = 0
    new_rows: int = 0
    rotary: dict = field(default_factory=dict)
    entries: list | None = None
    left_pad: list | None = None
    dropout_p: float = 0.0
    returns_lse: bool = False
    writes_out: bool = False

    # ---- what features say ----

    def say(self, **options):
        """The same to both."""
        self.named |= options
        self.meant |= options

    def learn(self, name, tensor):
        """A tensor that gets a gradient: the call's, and the reference's."""
        theirs = tensor.clone().requires_grad_()
        ours = self.device.place(tensor.clone()).requires_grad_()
        self.learned.append((name or "captured", ours, theirs))
        if name:
            self.named[name], self.meant[name] = ours, theirs
        return ours, theirs

    def scale_by(self, name, factor):
        self.named[f"{name}_descale"] = self.device.place(factor)
        self.factors[name] = factor.expand(BATCH, HEADS_KV)

    def pack(self, side, rows):
        self.packed.add(side)
        self.rows[side] = rows

    # ---- the tensors ----

    @property
    def is_cache(self):
        return self.function is flash_attn_with_kvcache

    @property
    def dtype(self):
        return torch.float32 if self.device is CPU else torch.bfloat16

    @property
    def in_use(self):
        return {side: self.used.get(side, rows) for side, rows in self.rows.items()}

    @property
    def held(self):
        """Rows of each sequence that are in the caches before the call."""
        return [rows - self.new_rows for rows in self.in_use["k"]]

    def make(self):
        """q, k and v for both: self.dense (BATCH, rows, heads, dim), and self.given."""
        self.dense, self.given = {}, {}
        sizes = {
            "q": (QUERIES, HEADS, self.dims[0]),
            "k": (KEYS, HEADS_KV, self.dims[0]),
            "v": (KEYS, HEADS_KV, self.dims[1]),
        }
        for name, size in sizes.items():
            in_bits = torch.float8_e4m3fn if name in self.eight_bits else self.dtype
            x = torch.randn(BATCH, *size).to(in_bits)
            self.dense[name] = self.dequantised(name, x)
            ours = self.device.place(self.stored(name, x))
            if name not in self.eight_bits:
                self.dense[name].requires_grad_()
                ours.requires_grad_()
                self.learned.append((name, ours, self.dense[name]))
            self.given[name] = ours
        self.say_where()
        if self.new_rows:
            for name in "kv":
                x = self.dense[name].detach()
                rows = [x[b, n : n + self.new_rows] for b, n in enumerate(self.held)]
                self.named[name] = self.device.place(torch.stack(rows).to(self.dtype))
        if self.rotary:
            tables = {name: x.to(self.dtype) for name, x in self.rotary.items()}
            self.named |= {name: self.device.place(x) for name, x in tables.items()}
            self.rotate(*tables.values())

    def dequantised(self, name, x):
        if name not in self.factors:
            return x.float().clone()
        factor = self.factors[name].repeat_interleave(x.shape[2] // HEADS_KV, dim=1)
        return x.float() * factor[:, None, :, None]

    def rotate(self, cos, sin):
        """The reference's q and new rows of k."""
        moves = "causal" in self.named or "window_size" in self.named
        for b, held in enumerate(self.held):
            at = torch.full((QUERIES,), held) + (torch.arange(QUERIES) if moves else 0)
            at = at.clamp(max=len(cos) - 1)
            q, k = (self.dense[x].data[b] for x in "qk")
            q.copy_(rotate(q.to(self.dtype), at, cos, sin, True))
            new = slice(held, held + self.new_rows)
            at = torch.arange(new.start, new.stop)
            k[new] = rotate(k[new].to(self.dtype), at, cos, sin, True).float()
            if "k" in self.eight_bits:
                factor = self.factors.get("k", torch.ones(BATCH, HEADS_KV))[b, :, None]
                k[new] = (k[new] / factor).to(torch.float8_e4m3fn).float() * factor

    # ---- where rows are ----

    def stored(self, name, x):
        """(BATCH, rows, ...) as the function has it, NaN where no sequence has rows."""
        side = SIDE[name]
        if side == "k" and (self.page_size or self.is_cache):
            return self.cached(x)
        if side in self.packed:
            return torch.cat([x[b, :rows] for b, rows in enumerate(self.rows[side])])
        return x

    def cached(self, x):
        """In pages, or in entries, of which there is one more than sequences."""
        x = x.clone()
        for b, held in enumerate(self.held):
            x[b, held:] = torch.nan
        if self.page_size:
            pages = torch.full((20, self.page_size, *x.shape[2:]), torch.nan).to(x.dtype)
            pages[self.table().long().flatten()] = x.reshape(-1, self.page_size, *x.shape[2:])
            return pages
        cache = torch.full((BATCH + 1, *x.shape[1:]), torch.nan).to(x.dtype)
        cache[self.entries or [0, 1]] = x
        return cache if self.entries else cache[:BATCH]

    def table(self):
        """The pages of each sequence."""
        count = BATCH * KEYS // self.page_size
        return (torch.arange(count) * 3 % 20).reshape(BATCH, -1).int()

    def say_where(self):
        where = {}
        for side in self.packed:
            ends = torch.tensor([0, *self.rows[side]]).cumsum(0)
            where[f"cu_seqlens_{side}"] = ends
            self.named[f"max_seqlen_{side}"] = max(self.rows[side])
        for side, rows in self.used.items():
            if not (self.is_cache and side == "k"):
                where[f"seqused_{side}"] = torch.tensor(rows)
        if self.is_cache and ("k" in self.used or self.new_rows):
            where["cache_seqlens"] = torch.tensor(self.held)
        if self.page_size:
            table = self.table()
            if self.entries:
                rows = torch.zeros(BATCH + 1, table.shape[1], dtype=torch.int32)
                rows[self.entries] = table
                table = rows
            where["page_table"] = table
        if self.entries:
            where["cache_batch_idx"] = torch.tensor(self.entries)
        if self.left_pad:
            where["cache_leftpad"] = torch.tensor(self.left_pad)
        self.named |= {name: self.device.place(x.int()) for name, x in where.items()}

    # ---- both sides of the comparison ----

    def run(self):
        """(out, lse) of the function."""
        named = dict(self.named)
        given = [self.given[x] for x in "qkv"]
        if self.is_cache:
            given = [given[0], *map(writable, given[1:])]
        if self.returns_lse:
            named["return_softmax_lse" if self.is_cache else "return_lse"] = True
        if self.writes_out:
            named["out"] = self.empty_out()
        results = self.function(*given, **named)
        found = results if isinstance(results, tuple) else (results, None)
        if self.writes_out:
            assert found[0].data_ptr() == named["out"].data_ptr()
        assert (found[1] is not None) == self.returns_lse
        return found

    def empty_out(self):
        q = self.given["q"]
        dtype = self.dtype if q.element_size() == 1 else q.dtype
        x = torch.full((*q.shape[:-1], self.dims[1]), torch.nan, dtype=dtype)
        return writable(self.device.place(x))

    def reference(self):
        """(out, lse) as the function returns them; in rows that are not in use 0 and -inf."""
        found = [self.reference_of(b) for b in range(BATCH)]
        out, lse = (torch.stack(x) for x in zip(*found, strict=True))
        if self.is_cache:
            lse = torch.where(lse == -math.inf, math.inf, lse)
        if "q" not in self.packed:
            return out, lse
        rows = self.rows["q"]
        lse = torch.cat([lse[b, :, :n] for b, n in enumerate(rows)], dim=-1)
        return self.stored("q", out), lse

    def reference_of(self, b):
        queries, keys = (self.in_use[side][b] for side in "qk")
        meant = dict(self.meant)
        if "attn_bias" in meant:
            meant["attn_bias"] = meant["attn_bias"][..., :queries, :keys]
        if "score_mod" in meant:
            mod = meant["score_mod"]
            meant["score_mod"] = lambda s, _, h, i, j: mod(s, torch.full_like(h, b), h, i, j)
        if self.masks or self.left_pad:
            meant["mask_mod"] = lambda _, h, i, j: self.seen(torch.full_like(h, b), h, i, j)
        if self.dropout_p:
            meant["dropout"] = factors(SEED, self.dropout_p, [b], HEADS, queries, keys)
        q = self.dense["q"][b : b + 1, :queries]
        k, v = (self.dense[x][b : b + 1, :keys] for x in "kv")
        out, lse = attention_reference(q, k, v, **meant)
        missing = QUERIES - queries
        return pad(out[0], (0, 0, 0, 0, 0, missing)), pad(lse[0], (0, missing), value=-math.inf)

    def seen(self, b, h, i, j):
        """Of partial blocks the mask is asked, of full ones it is not."""
        at = b, h, i, j
        seen = self.masks["mask_mod"](*at) if "mask_mod" in self.masks else j >= 0
        if "full" in self.masks:
            seen = self.masks["full"](*at) | self.masks["partial"](*at) & seen
        return seen & (j >= self.left_pad[int(b.flatten()[0])]) if self.left_pad else seen
