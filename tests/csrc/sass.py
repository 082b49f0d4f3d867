"""Machine code of the compiled kernels: whether a loop of matrix products goes to local memory."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PRODUCTS = ("HGMMA", "QGMMA", "IGMMA", "HMMA")
LOCAL = ("LDL", "STL")

_FUNCTION = re.compile(r"^\s*Function : (\S+)$", re.MULTILINE)
_INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+ )?\s*([A-Z][A-Z0-9_.]*)\s*([^;]*);")


@dataclass(frozen=True)
class Instruction:
    address: int
    conditional: bool
    opcode: str
    target: int | None
    """Of a branch."""


def disassembler() -> str | None:
    """cuobjdump on PATH, or the one that Triton's wheel holds."""
    found = shutil.which("cuobjdump")
    spec = None if found else importlib.util.find_spec("triton")
    if spec is None or spec.origin is None:
        return found
    path = Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return str(path) if path.is_file() else None


def functions(tool: str, binary: Path) -> Iterator[tuple[str, list[Instruction]]]:
    """(mangled name, code) of every function in an object."""
    done = subprocess.run([tool, "-sass", str(binary)], capture_output=True, text=True, check=True)
    parts = _FUNCTION.split(done.stdout)[1:]
    for name, text in zip(parts[::2], parts[1::2], strict=True):
        yield name, parse(text)


def parse(text: str) -> list[Instruction]:
    code = []
    for address, predicate, opcode, rest in _INSTRUCTION.findall(text):
        target = re.search(r"0x([0-9a-f]+)\s*$", rest) if opcode.startswith("BRA") else None
        # BRA.DIV and BRA.U.ANY carry their condition in the opcode.
        conditional = bool(predicate) or opcode.count(".") > 0
        code.append(Instruction(int(address, 16), conditional, opcode, int(target[1], 16) if target else None))
    return code


def _blocks(code: list[Instruction]) -> tuple[list[list[Instruction]], list[list[int]]]:
    """Basic blocks, and which block may follow which."""
    starts = {code[0].address, *(i.target for i in code if i.target is not None)}
    for before, after in zip(code, code[1:], strict=False):
        if before.target is not None or before.opcode == "EXIT":
            starts.add(after.address)
    blocks: list[list[Instruction]] = []
    for instruction in code:
        if instruction.address in starts:
            blocks.append([])
        blocks[-1].append(instruction)
    number = {block[0].address: i for i, block in enumerate(blocks)}
    follow: list[list[int]] = []
    for i, block in enumerate(blocks):
        last = block[-1]
        own = [number[last.target]] if last.target is not None else []
        ends = last.opcode == "EXIT" or last.target is not None
        if (not ends or last.conditional) and i + 1 < len(blocks):
            own.append(i + 1)
        follow.append(own)
    return blocks, follow


Graph = dict[int, list[int]]


def _finished(graph: Graph) -> list[int]:
    """Nodes in the order in which a depth-first search leaves them."""
    order: list[int] = []
    seen: set[int] = set()
    for root in graph:
        stack = [] if root in seen else [(root, iter(graph[root]))]
        seen.add(root)
        while stack:
            node, rest = stack[-1]
            child = next(rest, None)
            if child is None:
                order.append(stack.pop()[0])
            elif child not in seen:
                seen.add(child)
                stack.append((child, iter(graph[child])))
    return order


def _cycles(graph: Graph) -> list[set[int]]:
    """The strongly connected components that hold a cycle."""
    backwards: Graph = {node: [] for node in graph}
    for node, children in graph.items():
        for child in children:
            backwards[child].append(node)
    found, seen = [], set[int]()
    for root in reversed(_finished(graph)):
        component, queue = set[int](), [root]
        while queue:
            node = queue.pop()
            if node not in seen:
                seen.add(node)
                component.add(node)
                queue += backwards[node]
        if len(component) > 1 or root in graph[root]:
            found.append(component)
    return found


def _innermost(whole: Graph, graph: Graph, wanted: set[int]) -> list[set[int]]:
    """Cycles of `graph` with a wanted node that hold no smaller such cycle.

    Loops may be entered in several places (the compiler takes the first wait of a loop out of it), so a loop is what is
    strongly connected, and what is inside it is what still is when no edge leads to where it is entered.
    """
    found = []
    for cycle in _cycles(graph):
        if cycle & wanted:
            entries = {child for node in whole.keys() - cycle for child in whole[node]} & cycle or {min(cycle)}
            inside = {node: [c for c in graph[node] if c in cycle and c not in entries] for node in cycle}
            found += _innermost(whole, inside, wanted) or [cycle]
    return found


def loops_of_products(code: list[Instruction]) -> list[list[Instruction]]:
    """The loops with matrix products that hold no smaller such loop."""
    if not code:
        return []
    blocks, follow = _blocks(code)
    graph = dict(enumerate(follow))
    products = {n for n, block in enumerate(blocks) if any(i.opcode.startswith(PRODUCTS) for i in block)}
    return [[i for node in sorted(loop) for i in blocks[node]] for loop in _innermost(graph, graph, products)]


def spilling_loops(code: list[Instruction]) -> list[str]:
    """Those of `loops_of_products` that read or write local memory, by their first and last addresses."""
    loops = loops_of_products(code)
    bad = [loop for loop in loops if any(i.opcode.startswith(LOCAL) for i in loop)]
    return [f"{loop[0].address:#x}-{loop[-1].address:#x}" for loop in bad]
