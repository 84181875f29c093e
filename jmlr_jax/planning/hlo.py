"""What a compiled program says of itself: the text of its optimized HLO, read as a list of priced operations.

The compiler's own cost analysis counts the body of a loop once and gives no time. Its text carries, for every fusion,
its estimate of the cycles; this file walks the program in the order in which it will run, loops as often as they turn.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

BYTES = {
    **dict.fromkeys(("s4", "u4"), 0.5),
    **dict.fromkeys(("pred", "s8", "u8", "f8e4m3fn", "f8e5m2"), 1),
    **dict.fromkeys(("bf16", "f16", "s16", "u16"), 2),
    **dict.fromkeys(("s32", "u32", "f32"), 4),
    **dict.fromkeys(("s64", "u64", "f64"), 8),
}
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
FREE = ("parameter", "constant", "get-tuple-element", "tuple", "bitcast", "partition-id", "after-all", "iota")
_SHAPE = re.compile(r"(\w+)\[([\d,]*)\]")
_ATTRIBUTE = {
    name: re.compile(pattern)
    for name, pattern in {
        "calls": r"calls=%?([\w.\-]+)",
        "to_apply": r"to_apply=%?([\w.\-]+)",
        "body": r"body=%?([\w.\-]+)",
        "condition": r"condition=%?([\w.\-]+)",
        "branches": r"branch_computations=\{([^}]*)\}",
        "cycles": r'"estimated_cycles":"(\d+)"',
        "trips": r'"known_trip_count":\{"n":"(\d+)"\}',
        "op_name": r'op_name="([^"]*)"',
        "index": r"index=(\d+)",
        "window": r"window=\{([^}]*)\}",
        "dim_labels": r"dim_labels=(\w+)_(\w+)->(\w+)",
        "groups": r"feature_group_count=(\d+)",
        "contracting": r"lhs_contracting_dims=\{([\d,]*)\}",
        "channel": r"channel_id=(\d+)",
        "target": r'custom_call_target="([^"]*)"',
    }.items()
}


@dataclass(frozen=True)
class Instruction:
    """One line: `shape` is its text, `operands` are names within the computation, `rest` the attributes."""

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    literal: str
    rest: str
    root: bool

    def get(self, attribute: str) -> str:
        """The attribute's text, or nothing."""
        found = _ATTRIBUTE[attribute].search(self.rest)
        return found[1] if found else ""

    @property
    def bytes(self) -> float:
        """Of the result."""
        return sum(math.prod(dims) * BYTES[kind] for kind, dims in shapes(self.shape))


Computation = dict[str, Instruction]
# (path of names of a choice, how many branches it has) -> how often each is taken, or None where that is not known.
Taken = Callable[[str, int], Sequence[float] | None]


@dataclass(frozen=True)
class Operation:
    """Something that takes time, `times` times in one run of the program, or so often in the mean of many.

    Attributes:
      kind: "compute"; "kernel", a custom call without an estimate; or the name of a collective.
      where: path of names that the source gave it.
      cycles: the compiler's estimate, 0 where it has none.
      flops: of matrix products, two for each multiplication and addition.
      bytes: of a collective, those that a device receives; else those of operands and result.
      loop: `where` of the innermost loop it stands in, and the loop's own name.
      operands: shapes of the operands.
      overlapped: of a collective: the program goes on while it runs.
    """

    kind: str
    where: str
    times: float
    cycles: int
    flops: float
    bytes: float
    loop: str
    operands: tuple[tuple[int, ...], ...] = ()
    overlapped: bool = False


@dataclass
class Module:
    """The computations of a program by name."""

    computations: dict[str, Computation] = field(default_factory=dict)
    entry: str = ""

    def operations(self, taken: Taken = lambda where, branches: None) -> Iterator[Operation]:
        """Every operation that takes time, in the order of the schedule; loops once, with their number of turns.

        Args:
          taken: how often the branches of a choice are taken; of one that it does not know, the dearest is.
        """
        yield from self._walk(self.entry, 1, "", set(), taken)

    def _walk(self, name: str, times: float, loop: str, seen: set[str], taken: Taken) -> Iterator[Operation]:
        inside = self.computations[name]
        for one in inside.values():
            if one.opcode == "while":
                turns, here = self._turns(one, inside), f"{one.get('op_name')}/{one.name}"
                yield from self._walk(one.get("body"), times * turns, here, seen, taken)
            elif one.opcode == "call":
                yield from self._walk(one.get("to_apply"), times, loop, seen, taken)
            elif one.opcode == "conditional":
                branches = re.findall(r"[\w.\-]+", one.get("branches"))
                found = [list(self._walk(branch, times, loop, seen, taken)) for branch in branches]
                # A choice that is differentiated has no name of its own; the dearest of what it holds has one.
                dearest = max((o for operations in found for o in operations), key=lambda o: o.cycles, default=None)
                often = taken(one.get("op_name") or (dearest.where if dearest else ""), len(branches))
                if often is None:
                    yield from max(found, key=lambda operations: sum(o.cycles for o in operations), default=[])
                else:
                    for share, operations in zip(often, found, strict=True):
                        yield from (replace(o, times=o.times * share) for o in operations if share)
            elif one.opcode not in FREE and not one.opcode.endswith("-done"):
                yield self._price(one, inside, times, loop, seen)

    def _price(self, one: Instruction, inside: Computation, times: float, loop: str, seen: set[str]) -> Operation:
        read = [inside[o] for o in one.operands if o in inside]
        operands = tuple(dims for operand in read for _, dims in shapes(operand.shape))
        kind, moved, overlapped = "compute", one.bytes + sum(operand.bytes for operand in read), False
        called = self.computations.get(one.get("calls"), {})
        # A collective that runs beside other work stands in several fusions: where it starts, in those that carry it
        # on while they do their own work, and where it ends. One channel is one collective.
        fused = next((i for i in called.values() if _collective(i.opcode)), None)
        if fused is not None:
            if (channel := fused.get("channel")) not in seen:
                kind, overlapped = _collective(fused.opcode), True
                moved = _received(kind, fused, [called[o] for o in fused.operands if o in called])
                seen.add(channel)
        elif _collective(one.opcode):
            kind, overlapped = _collective(one.opcode), one.opcode.endswith("-start")
            moved = _received(kind, one, read)
        elif one.opcode == "custom-call" and one.get("target") == "tpu_custom_call":
            kind = "kernel"
        flops = _product_flops(one, inside) + self._fused_flops(one)
        cycles = int(one.get("cycles") or 0)
        return Operation(kind, one.get("op_name"), times, cycles, flops, moved, loop, operands, overlapped)

    def _fused_flops(self, one: Instruction) -> float:
        called = self.computations.get(one.get("calls"), {})
        return sum(_product_flops(inner, called) + self._fused_flops(inner) for inner in called.values())

    def _turns(self, loop: Instruction, inside: Computation) -> int:
        """How often a loop turns at most: a counter from a constant up to a constant, as scans compile to, and loops
        that may end before.

        Raises:
            ValueError: the loop's bounds are not constants.
        """
        if loop.get("trips"):
            return int(loop.get("trips"))
        start = inside[loop.operands[0]]
        condition = self.computations[loop.get("condition")]
        test = next(i for i in condition.values() if i.root)
        for found, scope in self._comparisons(test, _Scope(condition, (), None)):
            first, bound = (self._constant(name, scope, start, inside) for name in found.operands)
            if first is not None and bound is not None:
                return bound - first
        raise ValueError(f"loop {loop.name}: its condition compares no counter with a constant")

    def _comparisons(self, test: Instruction, scope: _Scope) -> Iterator[tuple[Instruction, _Scope]]:
        """Every ``a < b`` that must hold for `test` to hold."""
        if test.opcode == "compare" and "direction=LT" in test.rest:
            yield test, scope
        elif test.opcode == "fusion":
            called = self.computations[test.get("calls")]
            root = next(i for i in called.values() if i.root)
            yield from self._comparisons(root, _Scope(called, test.operands, scope))
        elif test.opcode == "parameter" and scope.caller is not None:
            name = scope.operands[int(test.literal)]
            yield from self._comparisons(scope.caller.computation[name], scope.caller)
        elif test.opcode in ("and", "copy", "bitcast"):
            for name in test.operands:
                yield from self._comparisons(scope.computation[name], scope)

    def _constant(self, name: str, scope: _Scope, start: Instruction, inside: Computation) -> int | None:
        """The value of an integer of a loop's condition, the counter's before the first turn; None if it has none."""
        one = scope.computation[name]
        while one.opcode in ("parameter", "copy", "bitcast"):
            if one.opcode != "parameter":
                one = scope.computation[one.operands[0]]
            elif scope.caller is None:
                return None
            else:
                one, scope = scope.caller.computation[scope.operands[int(one.literal)]], scope.caller
        if one.opcode == "get-tuple-element" and start.opcode == "tuple":
            one = inside[start.operands[int(one.get("index"))]]
            while one.opcode in ("copy", "bitcast", "copy-done", "copy-start"):
                one = inside[one.operands[0]]
        return int(one.literal) if one.opcode == "constant" and one.literal.lstrip("-").isdigit() else None


@dataclass(frozen=True)
class _Scope:
    """A computation with what it was called on, names in the computation that calls it."""

    computation: Computation
    operands: tuple[str, ...]
    caller: _Scope | None


def parse(text: str) -> Module:
    """Reads the text of a compiled program (``jax.stages.Compiled.as_text()``).

    >>> text = '''
    ... ENTRY %main (a: f32[8,4], b: f32[4,2]) -> f32[8,2] {
    ...   %a = f32[8,4]{1,0} parameter(0)
    ...   %b = f32[4,2]{1,0} parameter(1)
    ...   ROOT %dot.1 = f32[8,2]{1,0} dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}
    ... }
    ... '''
    >>> [(o.flops, o.bytes) for o in parse(text).operations()]
    [(128, 224)]
    """
    module, current = Module(), None
    for line in text.splitlines():
        head = re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{\s*$", line)
        if head and not line.startswith(" "):
            current = module.computations[head[2]] = {}
            if head[1]:
                module.entry = head[2]
        elif current is not None and line.startswith(" "):
            one = _instruction(line)
            if one is not None:
                current[one.name] = one
    return module


def shapes(text: str) -> list[tuple[str, tuple[int, ...]]]:
    """(dtype, dimensions) of every array in the text of a shape."""
    found = ((kind, dims) for kind, dims in _SHAPE.findall(text) if kind in BYTES)
    return [(kind, tuple(int(d) for d in dims.split(",") if d)) for kind, dims in found]


def _instruction(line: str) -> Instruction | None:
    head = re.match(r"\s+(ROOT )?%?([\w.\-]+) = ", line)
    if not head:
        return None
    rest = line[head.end() :]
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    shape, rest = rest[:end], rest[end:].lstrip()
    opcode = rest[: rest.index("(")]
    last = _closing(rest, len(opcode))
    inside = rest[len(opcode) + 1 : last]
    return Instruction(
        head[2], shape, opcode, tuple(re.findall(r"%([\w.\-]+)", inside)), inside, rest[last:], bool(head[1])
    )


def _closing(text: str, start: int) -> int:
    """Where the bracket that opens at `start` closes."""
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] == "(") - (text[i] == ")")
        if depth == 0:
            return i
    raise ValueError(f"bracket not closed: {text[:80]}")


def _collective(opcode: str) -> str:
    plain = opcode.removesuffix("-start")
    return plain if plain in COLLECTIVES else ""


def _received(kind: str, one: Instruction, operands: list[Instruction]) -> float:
    """Bytes that one device receives: what it did not have of a gathered array, twice that for an all-reduce."""
    given = sum(o.bytes for o in operands)
    result = one.bytes - (given if one.opcode.endswith("-start") else 0)
    if kind == "all-gather":
        return max(result - given, 0)
    if kind == "reduce-scatter":
        return max(given - result, 0)
    return {"all-reduce": 2.0}.get(kind, 1.0) * given


def _product_flops(one: Instruction, inside: Computation) -> int:
    """Two for each multiplication of a matrix product, which TPUs write as a convolution."""
    if one.opcode not in ("dot", "convolution"):
        return 0
    (_, result), *_ = shapes(one.shape)
    (_, left), *_ = shapes(inside[one.operands[0]].shape)
    if one.opcode == "dot":
        return 2 * math.prod(result) * math.prod(left[int(d)] for d in one.get("contracting").split(",") if d)
    (_, right), *_ = shapes(inside[one.operands[1]].shape)
    labels = _ATTRIBUTE["dim_labels"].search(one.rest)
    assert labels is not None
    lhs, rhs, out = labels[1], labels[2], labels[3]
    features = right[rhs.index("i")]
    pairs = 1
    window = dict(part.split("=") for part in one.get("window").split()) if one.get("window") else {}
    for at, spatial in enumerate(sorted(c for c in rhs if c.isdigit())):
        pairs *= _window_pairs(
            left[lhs.index(spatial)],
            right[rhs.index(spatial)],
            result[out.index(spatial)],
            {name: value.split("x")[at] for name, value in window.items()},
        )
    outside = result[out.index("b")] * result[out.index("f")]
    return 2 * outside * features * pairs


def _window_pairs(size: int, kernel: int, result: int, window: dict[str, str]) -> int:
    """Pairs of a result position and a kernel position that meet a real element, in one spatial dimension."""
    stride, dilate, spread = (int(window.get(k, 1)) for k in ("stride", "rhs_dilate", "lhs_dilate"))
    low = int(window.get("pad", "0_0").split("_")[0])
    extent = (size - 1) * spread + 1
    count = 0
    for k in range(kernel):
        first = k * dilate - low
        if spread == 1:  # result positions whose input is in range, counted without walking them
            least, most = math.ceil(-first / stride), math.floor((extent - 1 - first) / stride)
            count += max(0, min(most, result - 1) - max(least, 0) + 1)
        else:
            count += sum(0 <= (at := o * stride + first) < extent and at % spread == 0 for o in range(result))
    return count
