"""ATen graph of one element -> CUDA C, by the helpers of kernels/mods.cuh.

16-bit floating-point numbers are computed in fp32, as compilers do. A score is divided by what all
scores have in common with a multiplication by the inverse. Gradients of captured tensors
are no values but lists of what is added where: torch's graph builds them with index_put.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import fx

from flash_attn_sm120.mods.trace import COORDS, Trace

C_TYPES = {
    torch.float32: "float",
    torch.float16: "float",
    torch.bfloat16: "float",
    torch.int64: "long long",
    torch.int32: "int",
    torch.int16: "int",
    torch.int8: "int",
    torch.uint8: "int",
    torch.bool: "bool",
}
MEMORY_TYPES = {
    **C_TYPES,
    torch.float16: "captured_fp16",
    torch.bfloat16: "captured_bf16",
    torch.int16: "short",
    torch.int8: "signed char",
    torch.uint8: "unsigned char",
}
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
MAX_CAPTURED, MAX_DIMS, MAX_ADDITIONS = 8, 4, 64


class Number(NamedTuple):
    """A value: C text, and torch's type of it."""

    text: str
    dtype: torch.dtype


class View(NamedTuple):
    """A captured tensor, of which some first indices are given."""

    number: int
    indices: tuple[str, ...]
    dtype: torch.dtype


class Addition(NamedTuple):
    """A value that is added to the gradient of a captured tensor, at some first indices."""

    indices: tuple[str, ...]
    value: Any  # Number, or a list of Addition for the other indices


def _literal(x: Any, dtype: torch.dtype) -> str:
    if dtype is torch.bool:
        return "true" if x else "false"
    if not dtype.is_floating_point:
        return f"{int(x)}LL" if dtype is torch.int64 else str(int(x))
    x = float(x)
    if math.isnan(x):
        return "(INF - INF)"
    if math.isinf(x) or abs(x) > 3.4028235677973366e38:
        return "INF" if x > 0 else "(-INF)"
    return f"{x!r}f" if "e" in repr(x) or "." in repr(x) else f"{x!r}.0f"


def _is_factor(x: Any) -> bool:
    """Whether a Python number can be a factor of a factor: in fp32, and its inverse, too."""
    is_number = isinstance(x, (int, float)) and not isinstance(x, bool)
    return is_number and 2.0**-100 < abs(x) < 2.0**100


def _depending(graph: fx.Graph, inputs: list[fx.Node]) -> set[fx.Node]:
    """The nodes whose values depend on one of the inputs, and these."""
    found = set(inputs)
    for node in graph.nodes:
        if not found.isdisjoint(node.all_input_nodes):
            found.add(node)
    return found


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


def _infix(sign: str) -> str:
    return f"({{}} {sign} {{}})"


# op -> C text of the operands; "same": in the type of the result, "wide": in the type that torch
# promotes both operands to, "own": as they are.
_TEXTS: dict[str, tuple[str, str]] = {
    "add": ("same", "plus({}, {})"),
    "sub": ("same", "minus({}, {})"),
    "rsub": ("same", "minus({1}, {0})"),
    "mul": ("same", "times({}, {})"),
    "div": ("same", _infix("/")),
    "floor_divide": ("same", "floor_divided({}, {})"),
    "remainder": ("same", "floor_rest({}, {})"),
    "fmod": ("same", "fmodf({}, {})"),
    "pow": ("same", "powf({}, {})"),
    "minimum": ("same", "smaller({}, {})"),
    "maximum": ("same", "larger({}, {})"),
    "neg": ("same", "(-{})"),
    "abs": ("same", "magnitude({})"),
    "sign": ("same", "sign_of({})"),
    "sgn": ("same", "sign_of({})"),
    "relu": ("same", "larger({}, {zero})"),
    "exp": ("same", "exponential({})"),
    "exp2": ("same", "exp2f({})"),
    "log": ("same", "logf({})"),
    "log2": ("same", "log2f({})"),
    "log1p": ("same", "log1pf({})"),
    "sqrt": ("same", "sqrtf({})"),
    "rsqrt": ("same", "(1.0f / sqrtf({}))"),
    "reciprocal": ("same", "(1.0f / {})"),
    "sin": ("same", "sinf({})"),
    "cos": ("same", "cosf({})"),
    "tanh": ("same", "tanhf({})"),
    "sigmoid": ("same", "sigmoid({})"),
    "erf": ("same", "erff({})"),
    "floor": ("same", "floorf({})"),
    "ceil": ("same", "ceilf({})"),
    "trunc": ("same", "truncf({})"),
    "round": ("same", "rintf({})"),
    "eq": ("wide", _infix("==")),
    "ne": ("wide", _infix("!=")),
    "lt": ("wide", _infix("<")),
    "le": ("wide", _infix("<=")),
    "gt": ("wide", _infix(">")),
    "ge": ("wide", _infix(">=")),
    "bitwise_and": ("same", _infix("&")),
    "bitwise_or": ("same", _infix("|")),
    "bitwise_xor": ("same", _infix("^")),
    "__and__": ("same", _infix("&")),
    "__or__": ("same", _infix("|")),
    "logical_and": ("truth", _infix("&&")),
    "logical_or": ("truth", _infix("||")),
    "logical_xor": ("truth", _infix("!=")),
    "logical_not": ("truth", "(!{})"),
    "isnan": ("own", "({0} != {0})"),
    "tanh_backward": ("same", "({0} * (1.0f - {1} * {1}))"),
    "sigmoid_backward": ("same", "({0} * {1} * (1.0f - {1}))"),
}
_FLOAT_ONLY = _words(
    "div fmod pow exp exp2 log log2 log1p sqrt rsqrt reciprocal sin cos tanh sigmoid erf"
)
SAME_VALUE = _words(
    "detach alias clone lift_fresh_copy lift_fresh contiguous view _unsafe_view expand "
    "view_as squeeze"
)
_SPECIAL = _words(
    "index select where clamp clamp_min clamp_max _to_copy scalar_tensor full full_like zeros_like "
    "ones_like new_zeros new_full zeros ones bitwise_not gelu gelu_backward threshold_backward "
    "masked_fill index_put _index_put_impl_ select_backward"
)
SUPPORTED = tuple(sorted({*_TEXTS, *SAME_VALUE, *_SPECIAL}))
# Exponents that take no powf; 1 is that of the derivative of a square.
_POWERS = {1: "{0}", 2: "times({0}, {0})", 3: "times({0}, times({0}, {0}))"}


class Body:
    """The statements of a graph, and what its result is."""

    def __init__(self, name: str, trace: Trace, gradient: str = "") -> None:
        self.name = name
        self.lines: list[str] = []
        self._values: dict[fx.Node, Any] = {}
        self._products: dict[str, tuple[str, float]] = {}  # of a number and a constant: by name
        self._unused = iter(range(1 << 30))
        names = ["score"] if name == "score_mod" else []
        texts = [*names, *(f"at.{x}" for x in ("batch", "head", "query", "key"))]
        placeholders = [n for n in trace.graph.nodes if n.op == "placeholder"]
        assert len(texts) == trace.inputs and len(COORDS) == 4
        own = placeholders[: trace.inputs]
        self._of_score = _depending(trace.graph, own[:-4])
        self._of_element = _depending(trace.graph, [*own[:-4], *own[-2:]])
        for node, text in zip(placeholders, texts, strict=False):
            dtype = torch.float32 if text == "score" else torch.int32
            self._values[node] = Number(text, dtype)
        for i, x in enumerate(trace.captured):
            self._values[placeholders[trace.inputs + i]] = self._load(View(i, (), x.dtype), x.dim())
        if gradient:
            self._values[placeholders[-1]] = Number(gradient, torch.float32)
        for node in trace.graph.nodes:
            if node.op == "call_function":
                self._values[node] = self._call(node)
            elif node.op == "get_attr":
                self._values[node] = self._constant(trace, node)
            elif node.op == "output":
                self.result = self._value(node.args[0])

    def _value(self, x: Any) -> Any:
        if isinstance(x, fx.Node):
            return self._values[x]
        if isinstance(x, (list, tuple)):
            return [self._value(item) for item in x]
        return x

    def _constant(self, trace: Trace, node: fx.Node) -> Any:
        x = getattr(trace.graph.owning_module, str(node.target))
        if x.dim():
            raise NotImplementedError(f"{self.name} makes a tensor: capture it instead")
        return Number(_literal(x.item(), x.dtype), x.dtype)

    def _let(self, text: str, dtype: torch.dtype) -> Number:
        if dtype not in C_TYPES:
            raise NotImplementedError(
                f"{self.name} computes in {dtype}: float32 and integers are supported"
            )
        name = f"v{next(self._unused)}"
        self.lines.append(f"const {C_TYPES[dtype]} {name} = {text};")
        return Number(name, dtype)

    def _cast(self, x: Any, dtype: torch.dtype) -> str:
        """In the C type of ``dtype``; constants are folded."""
        if isinstance(x, Number):
            return x.text if C_TYPES[x.dtype] == C_TYPES[dtype] else f"({C_TYPES[dtype]}){x.text}"
        return _literal(x, dtype)

    def _load(self, view: View, dims: int) -> Any:
        if dims:
            return view
        if view.dtype not in C_TYPES:
            raise TypeError(
                f"{self.name} captures a tensor of {view.dtype}: supported are "
                f"{', '.join(str(x).removeprefix('torch.') for x in C_TYPES)}"
            )
        arguments = ", ".join((f"mod[{view.number}]", *view.indices))
        return self._let(f"captured<{MEMORY_TYPES[view.dtype]}>({arguments})", view.dtype)

    def _call(self, node: fx.Node) -> Any:
        target = node.target
        name = getattr(getattr(target, "overloadpacket", None), "__name__", str(target))
        meta: Any = node.meta.get("val")
        dtype = getattr(meta, "dtype", torch.float32)
        args = [self._value(x) for x in node.args]
        kwargs = {k: self._value(v) for k, v in node.kwargs.items()}
        if name in SAME_VALUE and (not isinstance(args[0], Number) or not meta.dim()):
            if (
                isinstance(args[0], View)
                and meta.shape != node.all_input_nodes[0].meta["val"].shape
            ):
                self._refuse(name, meta)
            return args[0]
        special: Callable[..., Any] | None = getattr(self, f"_op_{name.strip('_')}", None)
        if name in _SPECIAL and special:
            return special(dtype, meta, *args, **kwargs)
        if any(isinstance(x, list) for x in args) and name == "add":
            return [*args[0], *args[1]]  # of what is added to one gradient
        if name not in _TEXTS or meta is None or meta.dim():
            self._refuse(name, meta)
        if name == "div" and node.args[0] in self._of_score and not kwargs.get("rounding_mode"):
            name, args = self._without_division(node, args)
        return self._elementwise(name, dtype, args, kwargs)

    def _refuse(self, name: str, meta: Any) -> None:
        shape = "" if meta is None or not meta.dim() else f" of the shape {tuple(meta.shape)}"
        raise NotImplementedError(
            f"{self.name} uses aten.{name}{shape}, which is not supported; of single numbers "
            f"supported are {', '.join(SUPPORTED)}"
        )

    def _elementwise(
        self, name: str, dtype: torch.dtype, args: list[Any], kwargs: dict[str, Any]
    ) -> Number:
        how, text = _TEXTS[name]
        mode = kwargs.pop("rounding_mode", None)
        alpha = kwargs.pop("alpha", 1)
        if kwargs and any(v is not None for v in kwargs.values()):
            self._refuse(f"{name} with {', '.join(kwargs)}", None)
        if name == "div" and mode == "floor":
            text = _TEXTS["floor_divide"][1]
        elif name == "div" and mode == "trunc":
            text = "truncf({} / {})" if dtype.is_floating_point else _infix("/")
        elif name in _FLOAT_ONLY and not dtype.is_floating_point:
            self._refuse(f"{name} of integers", None)
        elif name in ("floor", "ceil", "trunc", "round") and not dtype.is_floating_point:
            return self._let(self._cast(args[0], dtype), dtype)
        if name == "pow" and args[1] in _POWERS:
            text = _POWERS[args[1]]
        if name == "mul" and dtype.is_floating_point:
            for x, factor in (args, args[::-1]):
                if isinstance(x, Number) and _is_factor(factor) and x.dtype in _FLOATS:
                    return self._times(Number(x.text, dtype), factor)
        operand = dtype
        if how == "wide":
            operand = self._promoted(args)
        elif how == "truth":
            operand = torch.bool
        elif how == "own":
            operand = args[0].dtype
        operands = [self._cast(x, operand) for x in args[:2]]
        if alpha != 1:
            operands[-1] = f"times({operands[-1]}, {_literal(alpha, operand)})"
        return self._let(text.format(*operands, zero=_literal(0, operand)), dtype)

    def _without_division(self, node: fx.Node, args: list[Any]) -> tuple[str, list[Any]]:
        """The quotient of a score as a product, if other scores have the same divisor."""
        divisor = args[1]
        if _is_factor(divisor):
            return "mul", [args[0], 1.0 / divisor]
        if not isinstance(divisor, Number) or node.args[1] in self._of_element:
            return "div", args
        text = f"(1.0f / {self._cast(divisor, torch.float32)})"
        return "mul", [args[0], self._let(text, torch.float32)]

    def _times(self, x: Number, factor: float) -> Number:
        """A product with a constant; with the score its scale takes it."""
        text = _literal(factor, x.dtype)
        if x.text == "score":
            return self._let(f"times(s, scale * {text})", x.dtype)
        product = self._let(f"times({x.text}, {text})", x.dtype)
        self._products[product.text] = x.text, factor
        return product

    def in_powers_of_two(self) -> str:
        """The result times log2(e), which goes into its last factor if that is a constant."""
        text = self.result.text
        x, factor = self._products.get(text, (text, 1.0))
        if x != text and self.lines[-1].startswith(f"const float {text} ="):
            self.lines.pop()
            return f"times({x}, {_literal(factor, torch.float32)} * LOG2_E)"
        return "times(s, scale * LOG2_E)" if text == "score" else f"times({text}, LOG2_E)"

    def _promoted(self, args: list[Any]) -> torch.dtype:
        examples = [torch.empty((), dtype=x.dtype) if isinstance(x, Number) else x for x in args]
        return torch.result_type(*examples)

    # ---- by name ---------------------------------------------------------------------------------

    def _op_index(self, dtype: Any, meta: Any, /, x: Any, indices: list[Any]) -> Any:
        if not isinstance(x, View):
            self._refuse("index", None)
        for index in indices:
            if not isinstance(index, Number) or index.dtype in (torch.bool, torch.float32):
                raise NotImplementedError(f"{self.name} indexes by something else than integers")
        texts = tuple(index.text for index in indices)
        return self._load(View(x.number, (*x.indices, *texts), x.dtype), meta.dim())

    def _op_select(self, dtype: Any, meta: Any, /, x: Any, dim: int, index: int) -> Any:
        if not isinstance(x, View) or dim != 0:
            self._refuse("select of another dimension than the first", None)
        return self._load(View(x.number, (*x.indices, str(index)), x.dtype), meta.dim())

    def _op_where(self, dtype: Any, meta: Any, /, condition: Any, a: Any, b: Any) -> Any:
        a, b = self._cast(a, dtype), self._cast(b, dtype)
        return self._let(f"({self._cast(condition, torch.bool)} ? {a} : {b})", dtype)

    def _op_masked_fill(self, dtype: Any, meta: Any, /, x: Any, mask: Any, value: Any) -> Any:
        return self._op_where(dtype, meta, mask, value, x)

    def _op_clamp(self, dtype: Any, meta: Any, /, x: Any, min: Any = None, max: Any = None) -> Any:
        text = self._cast(x, dtype)
        if min is not None:
            text = f"larger({text}, {self._cast(min, dtype)})"
        if max is not None:
            text = f"smaller({text}, {self._cast(max, dtype)})"
        return self._let(text, dtype)

    def _op_clamp_min(self, dtype: Any, meta: Any, /, x: Any, min: Any) -> Any:
        return self._op_clamp(dtype, meta, x, min)

    def _op_clamp_max(self, dtype: Any, meta: Any, /, x: Any, max: Any) -> Any:
        return self._op_clamp(dtype, meta, x, None, max)

    def _op_to_copy(self, dtype: Any, meta: Any, /, x: Any, **_: Any) -> Any:
        return x if isinstance(x, list) else self._let(self._cast(x, dtype), dtype)

    def _op_scalar_tensor(self, dtype: Any, meta: Any, /, value: Any, **_: Any) -> Any:
        return Number(self._cast(value, dtype), dtype)

    def _filled(self, dtype: Any, meta: Any, /, value: Any) -> Any:
        """Zeros of the shape of a captured tensor begin a gradient: so far nothing is added."""
        if meta.dim():
            return [] if value == 0 else self._refuse("full", meta)
        return Number(self._cast(value, dtype), dtype)

    def _op_full(self, dtype: Any, meta: Any, /, size: Any, value: Any, **_: Any) -> Any:
        return self._filled(dtype, meta, value)

    def _op_full_like(self, dtype: Any, meta: Any, /, x: Any, value: Any, **_: Any) -> Any:
        return self._filled(dtype, meta, value)

    def _op_new_full(
        self, dtype: Any, meta: Any, /, x: Any, size: Any, value: Any, **_: Any
    ) -> Any:
        return self._filled(dtype, meta, value)

    def _op_zeros(self, dtype: Any, meta: Any, /, *_: Any, **__: Any) -> Any:
        return self._filled(dtype, meta, 0)

    _op_zeros_like = _op_new_zeros = _op_zeros

    def _op_ones(self, dtype: Any, meta: Any, /, *_: Any, **__: Any) -> Any:
        return self._filled(dtype, meta, 1)

    _op_ones_like = _op_ones

    def _op_bitwise_not(self, dtype: Any, meta: Any, /, x: Any) -> Any:
        return self._let(f"({'!' if dtype is torch.bool else '~'}{x.text})", dtype)

    def _op_gelu(self, dtype: Any, meta: Any, /, x: Any, *, approximate: str = "none") -> Any:
        name = "gelu" if approximate == "none" else "gelu_by_tanh"
        return self._let(f"{name}({self._cast(x, dtype)})", dtype)

    def _op_gelu_backward(
        self, dtype: Any, meta: Any, /, grad: Any, x: Any, *, approximate: str = "none"
    ) -> Any:
        name = "gelu_slope" if approximate == "none" else "gelu_by_tanh_slope"
        return self._let(f"{self._cast(grad, dtype)} * {name}({self._cast(x, dtype)})", dtype)

    def _op_threshold_backward(
        self, dtype: Any, meta: Any, /, grad: Any, x: Any, limit: Any
    ) -> Any:
        x, limit = self._cast(x, dtype), self._cast(limit, dtype)
        return self._let(f"({x} <= {limit} ? 0.0f : {self._cast(grad, dtype)})", dtype)

    def _op_index_put(
        self, dtype: Any, meta: Any, /, zeros: Any, indices: Any, value: Any, *_: Any
    ) -> Any:
        return [*zeros, Addition(tuple(x.text for x in indices), value)]

    _op_index_put_impl = _op_index_put

    def _op_select_backward(
        self, dtype: Any, meta: Any, /, value: Any, sizes: Any, dim: int, index: int
    ) -> Any:
        if dim != 0:
            self._refuse("select of another dimension than the first", None)
        return [Addition((str(index),), value)]


# ---- headers -------------------------------------------------------------------------------------


def _function(result: str, name: str, parameters: str, lines: list[str]) -> str:
    body = "\n".join(f"    {line}" for line in lines)
    return f"__device__ __forceinline__ {result} {name}({parameters})\n{{\n{body}\n}}\n"


_SCORE = "float s, float scale"
_SCALED = "const float score = s * scale;"
_PLACE = "const score_coords &at, const fa_captured *mod"


def check_captured(name: str, captured: list[torch.Tensor]) -> None:
    """Raises NotImplementedError of more tensors, or dimensions, than kernels take."""
    if len(captured) > MAX_CAPTURED:
        raise NotImplementedError(
            f"{name} captures {len(captured)} tensors, at most {MAX_CAPTURED} are supported"
        )
    for x in captured:
        if x.dim() > MAX_DIMS:
            raise NotImplementedError(
                f"{name} captures a tensor of {x.dim()} dimensions, at most {MAX_DIMS} are "
                "supported"
            )


def mask_text(trace: Trace) -> str:
    body = Body("mask_mod", trace)
    lines = [*body.lines, f"return {body.result.text};"]
    return _function("bool", "mask_mod_of", _PLACE, lines)


def score_text(trace: Trace, joint: Trace | None) -> str:
    """Of the mod, of its derivative, and of the gradients of captured tensors; without a graph of
    gradients of the mod alone."""
    body = Body("score_mod", trace)
    result = body.in_powers_of_two()
    lines = [*body.lines, f"return {result};"]
    text = _function("float", "score_mod_of", f"{_SCORE}, {_PLACE}", [_SCALED, *lines])
    lines = ["return 1.0f;"]
    additions: list[str] = []
    sums: list[str] = []
    if joint is not None:
        slope = Body("score_mod", joint, "1.0f")
        lines = [*slope.lines, f"return {_text_of(slope.result[0])};"]
        additions, sums = _additions(joint)
    gradients = "const gradients_t &gradients, float *sums"
    return "\n".join(
        (
            text,
            _function("float", "score_mod_slope", f"{_SCORE}, {_PLACE}", [_SCALED, *lines]),
            "template <class gradients_t>",
            _function(
                "void",
                "add_score_mod_gradients",
                f"float dout, {_SCORE}, {_PLACE}, {gradients}",
                [_SCALED, *additions],
            ),
            "template <class gradients_t>",
            _function("void", "add_score_mod_sums", f"const score_coords &at, {gradients}", sums),
            f"enum : bool {{ SCORE_MOD_READS_KEY = {_literal(_reads_key(trace), torch.bool)} }};\n",
        )
    )


def _reads_key(trace: Trace) -> bool:
    placeholders = [node for node in trace.graph.nodes if node.op == "placeholder"]
    return bool(placeholders[trace.inputs - 1].users)


def _text_of(slope: Number | None) -> str:
    return "0.0f" if slope is None else slope.text


def _additions(joint: Trace) -> tuple[list[str], list[str]]:
    """Statements for each score, and for each head: additions at indices that only the head has
    part in are summed up first, in one of ``sums`` each."""
    body = Body("score_mod", joint, "dout")
    lines: list[str] = []
    of_head: list[str] = []
    learned = [i for i, x in enumerate(joint.captured) if x.requires_grad]
    for index, result in zip(learned, body.result[1:], strict=True):
        for indices, value in _flat(result):
            where = "".join(f", {x}" for x in indices)
            is_of_head = all(x in ("at.head", "at.batch") or x.isdigit() for x in indices)
            if is_of_head and len(of_head) < MAX_CAPTURED:
                lines.append(f"sums[{len(of_head)}] += {value};")
                of_head.append(f"gradients.add_sum({index}, sums[{len(of_head)}]{where});")
            else:
                lines.append(f"gradients.add({index}, {value}{where});")
    if len(lines) > MAX_ADDITIONS:
        raise NotImplementedError(
            f"score_mod reads tensors that require a gradient {len(lines)} times, at most "
            f"{MAX_ADDITIONS} are supported"
        )
    return [*body.lines, *lines], of_head


def _flat(result: Any, before: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], str]]:
    """What is added where, in all dimensions."""
    if result is None:
        return []
    if isinstance(result, Number):
        return [(before, result.text)]
    return [pair for added in result for pair in _flat(added.value, (*before, *added.indices))]
