"""Reads PTX and AMDGCN text: basic blocks, loops, where an address comes from; and what must hold there.

Every `check_` raises AssertionError. `test_checks_can_fail.py` has a broken kernel for each.
"""

import collections
import dataclasses
import functools
import pathlib
import re
import subprocess
import tempfile

import triton.backends.nvidia

from tcomm.memory.control import HostWord, Word
from tests.compile.cases import USUAL_PARAMETERS

_REGISTER = re.compile(r"%(?!p\d)[a-z]+\d+")
_LABEL = re.compile(r"^(\$L__BB\w+|\.LBB\w+):")
_PTX = re.compile(r"^\s*(?P<guard>@!?%p\d+\s+)?(?P<opcode>[a-z][\w.:]*)(?P<operands>[^;]*);")
_GCN = re.compile(r"^\s+(?P<opcode>[a-z]\w+)(?P<operands>[^;]*)")
_JUMPS = re.compile(r"bra\b|s_branch|s_cbranch")
_ENDS = ("ret", "s_endpgm", "exit", "trap")
_BARRIERS = ("bar.sync", "barrier.sync", "s_barrier")


@dataclasses.dataclass(frozen=True, eq=False)
class Op:
    opcode: str
    operands: str
    guarded: bool

    def __str__(self):
        return f"{self.opcode} {self.operands}"

    @property
    def is_barrier(self):
        return self.opcode.startswith(_BARRIERS)

    @property
    def falls_through(self):
        if self.opcode in _ENDS or self.opcode == "s_branch":
            return self.guarded
        return self.guarded or not self.opcode.startswith("bra")


class Flow:
    """The control flow of one kernel."""

    def __init__(self, asm):
        self.blocks = [[]]
        labels = {}
        for line in _body(asm):
            label = _LABEL.match(line)
            if label:
                labels[label[1]] = len(self.blocks)
                self.blocks.append([])
            elif op := _parsed(line):
                self.blocks[-1].append(op)
                if _JUMPS.match(op.opcode) or op.opcode in _ENDS:
                    self.blocks.append([])
        self.successors = [[] for _ in self.blocks]
        self.predecessors = [[] for _ in self.blocks]
        self._connect(labels)

    def _connect(self, labels):
        """Link the blocks that are reached from the first one."""
        queue, seen = [0], {0}
        while queue:
            index = queue.pop()
            self.successors[index] = self._successors(index, labels)
            for follower in self.successors[index]:
                self.predecessors[follower].append(index)
            fresh = [block for block in self.successors[index] if block not in seen]
            seen.update(fresh)
            queue += fresh

    def _successors(self, index, labels):
        block = self.blocks[index]
        last = block[-1] if block else None
        found = [labels[last.operands.split()[-1]]] if last and _JUMPS.match(last.opcode) else []
        if index + 1 < len(self.blocks) and (last is None or last.falls_through):
            found.append(index + 1)
        return found

    @functools.cached_property
    def ops(self):
        return [op for block in self.blocks for op in block]

    @functools.cached_property
    def places(self):
        return {
            op: (index, place) for index, block in enumerate(self.blocks) for place, op in enumerate(block)
        }

    def before(self, op, stop):
        """Ops from which `op` is reached, not looking beyond those where `stop`; None for the entry."""
        return self._walk(op, stop, self.predecessors, -1, [self.blocks[0]])

    def after(self, op, stop):
        """Ops that are reached from `op`, not looking beyond those where `stop`."""
        return self._walk(op, stop, self.successors, 1, [])

    def _walk(self, op, stop, neighbours, direction, borders):
        index, place = self.places[op]
        own = self.blocks[index]
        rest = own[:place][::-1] if direction < 0 else own[place + 1 :]
        queue, seen = [(index, rest)], set()
        while queue:
            index, rest = queue.pop()
            for found in rest:
                yield found
                if stop(found):
                    break
            else:
                if any(self.blocks[index] is border for border in borders):
                    yield None
                fresh = [block for block in neighbours[index] if block not in seen]
                seen.update(fresh)
                queue += [(block, self.blocks[block][::direction]) for block in fresh]

    @functools.cached_property
    def loops(self):
        """The ops of each loop that has no loop inside it."""
        dominators = self._dominators()
        bodies = collections.defaultdict(set)
        for index, followers in enumerate(self.successors):
            for header in followers:
                if dominators[index] >> header & 1:
                    bodies[header] |= self._natural_loop(header, index)
        inner = [body for header, body in bodies.items() if not (body - {header}) & bodies.keys()]
        return [[op for index in sorted(body) for op in self.blocks[index]] for body in inner]

    def _natural_loop(self, header, tail):
        body, queue = {header, tail}, [tail] if tail != header else []
        while queue:
            fresh = set(self.predecessors[queue.pop()]) - body
            body |= fresh
            queue += fresh
        return body

    def _dominators(self):
        everything = (1 << len(self.blocks)) - 1
        found = [1] + [everything] * (len(self.blocks) - 1)
        changed = True
        while changed:
            changed = False
            for index in range(1, len(self.blocks)):
                common = everything
                for block in self.predecessors[index]:
                    common &= found[block]
                new = common | 1 << index
                changed |= new != found[index]
                found[index] = new
        return found


class Ptx(Flow):
    """A kernel in PTX, and the names of its run-time parameters, in order."""

    def __init__(self, asm, parameters=USUAL_PARAMETERS):
        super().__init__(asm)
        self.asm = asm
        self._roots = [name.removesuffix("_ptrs").removesuffix("_ptr") for name in parameters]
        self._definitions = collections.defaultdict(list)
        for op in self.ops:
            for register in _REGISTER.findall(_destination(op)):
                self._definitions[register].append(op)

    def matching(self, pattern):
        return [op for op in self.ops if re.match(pattern, op.opcode)]

    def touches(self, op, *places):
        """Whether the address of `op` comes from one of `places`.

        `staging` is the table and `*staging` what it points to; likewise `pad`, `*pad`, and `*pad[rank]`
        for this rank's own page.
        """
        return not self._origins(_address(op)).isdisjoint(places)

    def is_payload(self, op):
        plain = _is_plain_access(op) and self.touches(op, "x", "out", "*staging")
        return plain or _is_multimem(op)

    @functools.cached_property
    def _known(self):
        return {}

    def _origins(self, text):
        if text not in self._known:
            self._known[text] = frozenset(self._trace(text))
        return self._known[text]

    def _trace(self, text):
        queue = list(_REGISTER.findall(text))
        seen = set(queue)
        while queue:
            for op in self._definitions[queue.pop()]:
                if op.opcode.startswith("ld.param"):
                    yield self._parameter(op)
                elif op.opcode.startswith(("ld.", "atom.")):
                    yield self._loaded(op)
                else:
                    fresh = set(_REGISTER.findall(op.operands)) - seen
                    seen |= fresh
                    queue += fresh

    def _parameter(self, op):
        number = int(re.search(r"_param_(\d+)", op.operands)[1])
        return self._roots[number] if number < len(self._roots) else "scratch"

    def _loaded(self, op):
        """What a value is that comes out of memory: a pointer if out of a table, else no address at all."""
        origins = self._origins(_address(op))
        if "staging" in origins:
            return "*staging"
        if "pad" in origins:
            return "*pad[rank]" if "rank" in origins else "*pad"
        return "value"

    def word(self, op):
        """Index of the word at a constant offset into a page, or None."""
        (register, *more) = _REGISTER.findall(_address(op))
        definitions = [found for found in self._definitions[register] if found.opcode.startswith("add.s64")]
        if more or len(definitions) != 1:
            return None
        offset = definitions[0].operands.rpartition(",")[2].strip()
        return int(offset) // 8 if offset.isdecimal() else None


def _body(asm):
    return asm.partition(".Lfunc_end0:")[0].splitlines()


def _parsed(line):
    match = _PTX.match(line) or _GCN.match(line)
    if match is None:
        return None
    opcode, operands = match["opcode"], match["operands"].strip()
    guard = match.groupdict().get("guard") or opcode.startswith("s_cbranch")
    return Op(opcode, operands, bool(guard))


def _destination(op):
    if op.opcode.startswith(("st.", "multimem.st", "bar", "bra", "ret", "red.")):
        return ""
    return op.operands.partition("}")[0] if op.operands.startswith("{") else op.operands.partition(",")[0]


def _address(op):
    found = re.search(r"\[([^\]]*)\]", op.operands)
    return found[1] if found else ""


def _is_plain_access(op):
    return re.match(r"(ld|st)\.(volatile\.)?global", op.opcode) is not None


def _is_multimem(op):
    return op.opcode.startswith("multimem.")


def _is_load(op):
    return op.opcode.startswith(("ld.", "multimem.ld"))


def _is_store(op):
    return op.opcode.startswith(("st.", "multimem.st"))


def _bits(op):
    """Bits of one element, or of a pair, and of the whole access."""
    number, pair = re.search(r"\.b?[bufs](\d+)(x2)?$", op.opcode).groups()
    element = int(number) * (2 if pair else 1)
    vector = re.search(r"\.v(\d)", op.opcode)
    return element, element * (int(vector[1]) if vector else 1)


def _show(ops):
    return "; ".join(str(op) for op in ops)


def _publishes(ptx):
    return [op for op in ptx.matching(r"(atom|red)\b.*\b(exch|add|cas)\b") if ptx.touches(op, "*pad")]


def check_publish_semantics(ptx, phases):
    found = _publishes(ptx)
    assert len(found) == phases, f"{len(found)} publishes, not {phases}: {_show(found)}"
    weak = [op for op in found if not {"sys", "release", "exch", "b64"} <= set(op.opcode.split("."))]
    assert not weak, f"not a release at system scope: {_show(weak)}"


def check_publish_barriers(ptx):
    """Between whatever another warp stored and the publish, on every path, all warps meet."""
    assert _publishes(ptx), "nothing is published"
    for op in _publishes(ptx):
        for earlier in ptx.before(op, lambda found: found.is_barrier):
            assert earlier is not None, f"no barrier between the entry and {op}"
            late = _is_store(earlier) and ptx.is_payload(earlier)
            assert not late, f"no barrier between {earlier} and {op}"


def _acquires(ptx):
    words = [op for op in ptx.matching(r"(atom|red)\b.*\badd\b") if ptx.touches(op, "*pad[rank]")]
    return [op for op in words if ptx.word(op) != Word.BLOCKS_DONE and "acq_rel" not in op.opcode]


def check_acquire_semantics(ptx, phases):
    found = _acquires(ptx)
    assert len(found) == phases, f"{len(found)} acquires, not {phases}: {_show(found)}"
    weak = [op for op in found if not {"sys", "acquire"} <= set(op.opcode.split("."))]
    assert not weak, f"not an acquire at system scope: {_show(weak)}"


def check_acquire_barriers(ptx):
    """Between the acquire and whatever another warp loads, on every path, all warps meet."""
    assert _acquires(ptx), "nothing is acquired"
    for op in _acquires(ptx):
        for later in ptx.after(op, lambda found: found.is_barrier):
            assert not ptx.is_payload(later), f"no barrier between {op} and {later}"


def check_loads_follow_acquires(ptx):
    """What peers wrote is read only after an acquire of the phase that published it."""
    acquires, publishes = set(_acquires(ptx)), set(_publishes(ptx))
    loads = [op for op in ptx.matching(r"ld\.(volatile\.)?global") if ptx.touches(op, "*staging")]
    loads += ptx.matching(r"multimem\.ld")
    assert loads, "no staging memory is read"
    for load in loads:
        for earlier in ptx.before(load, acquires.__contains__):
            assert earlier is not None, f"{load} has no acquire before it"
            assert earlier not in publishes, f"{load} follows {earlier} without an acquire"


def check_atomics(ptx, phases, lane_spins=0):
    """Gpu scope is for two words of this rank's own page; every other atomic is at system scope."""
    ours = set(_publishes(ptx)) | set(_acquires(ptx))
    found = collections.Counter()
    for op in ptx.matching(r"(atom|red)\b"):
        if op not in ours:
            assert ptx.touches(op, "*pad[rank]"), f"an atomic on memory that is not this rank's: {op}"
            sort = set(op.opcode.split(".")) & {"exch", "add", "cas", "sys", "gpu", "release", "acq_rel"}
            found[ptx.word(op), ".".join(sorted(sort))] += 1
    records = found.pop((Word.ERROR_KIND, "acq_rel.cas.sys"), 0)
    assert records >= phases, f"{records} error records are claimed, not {phases}"
    expected = {
        (Word.ABORT, "exch.gpu.release"): phases + lane_spins,
        (Word.BLOCKS_DONE, "acq_rel.add.gpu"): 1,
    }
    assert found == expected, f"atomics are {dict(found)}, not {expected}"


def check_mailbox_atomics(ptx, records):
    """Gpu scope is for the count of blocks that are done with a slot, and nothing else.

    All warps are done with the slot before their block is counted.
    """
    ours = set(_publishes(ptx)) | set(_acquires(ptx))
    rest = [op for op in ptx.matching(r"(atom|red)\b") if op not in ours]
    foreign = [op for op in rest if not ptx.touches(op, "*pad[rank]")]
    assert not foreign, f"an atomic on memory that is not this rank's: {_show(foreign)}"
    claims = [op for op in rest if {"cas", "sys"} <= set(op.opcode.split("."))]
    assert len(claims) >= records, f"{len(claims)} error records are claimed, not {records}"
    assert all(ptx.word(op) == Word.ERROR_KIND for op in claims), _show(claims)
    counts = [op for op in rest if op not in claims]
    assert len(counts) == 1, f"{len(counts)} atomics count blocks, not 1: {_show(counts)}"
    assert {"add", "gpu", "acq_rel"} <= set(counts[0].opcode.split(".")), _show(counts)
    for earlier in ptx.before(counts[0], lambda found: found.is_barrier):
        assert earlier is not None, "no barrier between the entry and the count"
        assert not ptx.is_payload(earlier), f"no barrier between {earlier} and {counts[0]}"


def check_spins(ptx, phases, lane_spins):
    """Every wait is a loop that reads memory: the words of the page and the abort word, or lanes."""
    polls = [[op for op in loop if op.opcode.startswith("ld.volatile.global")] for loop in ptx.loops]
    lanes = [loop for loop in polls if any(ptx.touches(op, "*staging") for op in loop)]
    waits = [loop for loop in polls if any(ptx.touches(op, "*pad[rank]") for op in loop)]
    pages = [loop for loop in waits if loop not in lanes]
    assert len(pages) == phases, f"{len(pages)} loops wait for words, not {phases}"
    for loop in waits:
        words = [ptx.word(op) for op in loop if ptx.touches(op, "*pad[rank]")]
        assert words.count(Word.ABORT) == 1, f"words read while waiting: {words}"
        assert len(loop) > 1, "only the abort word is read while waiting"
    assert len(lanes) == lane_spins, f"{len(lanes)} loops wait for lanes, not {lane_spins}"


def check_deadlines(ptx, waits):
    """Every loop that waits reads the clock, and an abort word that is not in this rank's page."""
    spins = [loop for loop in ptx.loops if any(_is_volatile_load(op) for op in loop)]
    assert len(spins) == waits, f"{len(spins)} loops wait, not {waits}"
    for loop in spins:
        assert any("%globaltimer" in op.operands for op in loop), "a loop that waits does not read the clock"
        elsewhere = [op for op in loop if _is_volatile_load(op) and ptx.word(op) == HostWord.ABORT]
        assert any(not ptx.touches(op, "*pad[rank]", "*staging") for op in elsewhere), "no abort word"


def _is_volatile_load(op):
    return op.opcode.startswith("ld.volatile.global")


def check_mailbox_spins(ptx):
    """The wait is a loop around one read of this rank's page: a count in one lane, an error in another."""
    polls = [[op for op in loop if op.opcode.startswith("ld.volatile.global")] for loop in ptx.loops]
    waits = [ops for ops in polls if any(ptx.touches(op, "*pad[rank]") for op in ops)]
    assert len(waits) == 1, f"{len(waits)} loops wait for a count, not 1"
    words = [ptx.word(op) for op in waits[0] if ptx.touches(op, "*pad[rank]")]
    assert words == [None], f"words read while waiting: {_show(waits[0])}"


def check_vectors(ptx, loops):
    """Unmasked loops move the payload by 128 bits; there are at least `loops` that load and store it."""
    payloads = [[op for op in loop if ptx.is_payload(op) and not op.guarded] for loop in ptx.loops]
    payloads = [ops for ops in payloads if any(map(_is_load, ops))]
    narrow = [op for ops in payloads for op in ops if _bits(op)[1] < 128]
    assert not narrow, f"narrower than 128 bits in a loop: {_show(narrow[:4])}"
    moving = [ops for ops in payloads if any(map(_is_store, ops))]
    assert len(moving) >= loops, f"{len(moving)} loops move the payload, not {loops}"


def check_lanes(ptx, world_size):
    """Flag and data go and come as one 64-bit element, polled past the caches."""
    lanes = [op for op in ptx.ops if _is_plain_access(op) and ptx.touches(op, "*staging")]
    split = [op for op in lanes if _bits(op)[0] != 64]
    assert not split, f"a lane is accessed in parts: {_show(split[:4])}"
    cached = [op for op in lanes if op.opcode.startswith("ld.global")]
    assert not cached, f"a lane is read through a cache: {_show(cached[:4])}"
    stores = sum(op.opcode.startswith("st.") for op in lanes)
    assert stores >= world_size, f"{stores} stores of lanes for {world_size} ranks"


def _sums(ptx):
    return ptx.matching(r"multimem\.ld_reduce")


def _multicasts(ptx):
    return ptx.matching(r"multimem\.st")


def _is_alias_fence(op):
    return op.opcode == "fence.proxy.alias"


def check_multimem_forms(ptx, form, sums, multicasts):
    """16 bytes, relaxed, at system scope; 16-bit types accumulate in fp32; nothing else is multimem.

    Each is there for full tiles, in a loop and without a mask, and once more, masked, for what is left over.
    """
    load, store = f"multimem.ld_reduce.relaxed.sys.global.add{form}", "multimem.st.relaxed.sys.global.v4.f32"
    found = collections.Counter((op.opcode, op.guarded) for op in ptx.ops if _is_multimem(op))
    wanted = dict.fromkeys([(load, False), (load, True)] if sums else [], 1)
    wanted |= dict.fromkeys([(store, False), (store, True)] if multicasts else [], 1)
    assert found == wanted, f"multimem accesses are {dict(found)}, not {wanted}"
    loops = [[op for op in loop if _is_multimem(op)] for loop in ptx.loops]
    looping = [ops for ops in loops if ops]
    assert len(looping) == 1, f"{len(looping)} loops have multimem accesses, not 1"
    assert len(looping[0]) == sums + multicasts, f"in the loop: {_show(looping[0])}"
    assert not any(op.guarded for op in looping[0]), f"masked in the loop: {_show(looping[0])}"


def check_multimem_addresses(ptx):
    """Multimem accesses are at the multicast address, and no other access is."""
    places = ("x", "out", "staging", "*staging", "pad", "*pad", "*pad[rank]", "scratch")
    assert any(map(_is_multimem, ptx.ops)), "no multimem accesses"
    for op in ptx.ops:
        if _is_multimem(op):
            assert ptx.touches(op, "multicast"), f"not at the multicast address: {op}"
            assert not ptx.touches(op, *places), f"not only at the multicast address: {op}"
        elif re.match(r"(ld|st|atom|red)\.(?!param)", op.opcode):
            assert not ptx.touches(op, "multicast"), f"at the multicast address: {op}"


def check_sums_are_restaged_in_place(ptx):
    """A thread stores to all what it has loaded from all, at the same address."""
    stored, loaded = list(map(_address, _multicasts(ptx))), list(map(_address, _sums(ptx)))
    assert loaded, "no sums are loaded"
    assert stored == loaded, f"stored at {stored}, loaded at {loaded}"


def check_alias_fences(ptx, phases):
    """What was written through one address is read through the other after a barrier and an alias fence.

    The barrier is the one behind the acquire. Own staging is read by ordinary loads after multimem stores.
    """
    fences = [op for op in ptx.ops if _is_alias_fence(op)]
    assert len(fences) == phases, f"{len(fences)} alias fences, not {phases}"
    acquires, publishes = set(_acquires(ptx)), set(_publishes(ptx))
    for fence in fences:
        for earlier in ptx.before(fence, lambda found: found.is_barrier):
            assert earlier is not None, f"no barrier between the entry and {fence}"
            assert earlier not in acquires, f"no barrier between {earlier} and {fence}"
    plain = [op for op in ptx.matching(r"ld\.global") if ptx.touches(op, "*staging")]
    for load in _sums(ptx) + plain:
        for earlier in ptx.before(load, _is_alias_fence):
            assert earlier is not None, f"no alias fence between the entry and {load}"
            assert earlier not in acquires | publishes, f"no alias fence between {earlier} and {load}"


def check_no_multimem(ptx):
    """No instruction that sm_80 lacks, and no fence that only multicast needs."""
    found = [op for op in ptx.ops if _is_multimem(op) or _is_alias_fence(op)]
    assert not found, f"multimem accesses: {_show(found)}"


def check_no_gpu_scope(ptx):
    """No flag between GPUs at a scope that ends at one: only words of this rank's page are at gpu scope."""
    found = [op for op in ptx.ops if "gpu" in op.opcode.split(".")]
    foreign = [op for op in found if not ptx.touches(op, "*pad[rank]") or ptx.touches(op, "*pad")]
    assert not foreign, f"at gpu scope: {_show(foreign)}"


def check_no_dependent_launch(ptx):
    """No kernel begins before the one ahead of it in its stream has ended: epochs are counted by that."""
    found = ptx.matching(r"griddepcontrol")
    assert not found, f"launched as a dependent: {_show(found)}"


def check_arithmetic(ptx):
    """Nothing that rounds otherwise than the reference, flushes subnormals or drops NaN."""
    bad = ptx.matching(r"div\..*f\d|fma\.|rcp\.|(max|min)\.(?!NaN)\w*\.?b?f\d")
    bad += [op for op in ptx.ops if ".ftz" in op.opcode]
    bad += [op for op in ptx.matching(r"cvt\..*b?f16(x2)?\.f32") if not op.opcode.startswith("cvt.rn")]
    assert not bad, f"arithmetic: {_show(bad[:4])}"


@functools.cache
def resource_usage(cubin):
    """Registers a thread, and bytes of its stack and of its local memory."""
    tool = pathlib.Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return {name: int(re.search(rf"\b{name}:(\d+)", text)[1]) for name in ("REG", "STACK", "LOCAL")}


def check_resources(cubin, max_registers):
    usage = resource_usage(cubin)
    assert usage["STACK"] == usage["LOCAL"] == 0, f"registers are spilled: {usage}"
    assert usage["REG"] <= max_registers, f"too many registers: {usage}"


def _is_gcn_publish(op):
    return re.match(r"\w+_atomic_swap_x2", op.opcode) and f"offset:{Word.ABORT * 8}" not in op.operands


def _is_gcn_store(op):
    return re.match(r"(global|flat|buffer)_store_", op.opcode) is not None


def _is_gcn_load(op):
    return re.match(r"(global|flat|buffer)_load_", op.opcode) is not None


def _bypasses_caches(op):
    return {"sc0", "sc1"} <= set(op.operands.split())


def check_gcn_publishes(flow, phases):
    """A write-back of the caches to system scope, waited for, right before the word goes out."""
    found = [op for op in flow.ops if _is_gcn_publish(op)]
    assert len(found) == phases, f"{len(found)} publishes, not {phases}: {_show(found)}"
    for op in found:
        assert "sc1" in op.operands.split(), f"not at system scope: {op}"
        block, place = flow.places[op]
        write_back, wait = flow.blocks[block][max(place - 2, 0) : place] if place > 1 else (op, op)
        assert wait.opcode == "s_waitcnt", f"{wait} before {op}"
        assert "vmcnt(0)" in wait.operands, f"{wait} before {op}"
        assert str(write_back) == "buffer_wbl2 sc0 sc1", f"{write_back} before {op}"


def check_gcn_publish_barriers(flow):
    assert any(_is_gcn_publish(op) for op in flow.ops), "nothing is published"
    for op in filter(_is_gcn_publish, flow.ops):
        for earlier in flow.before(op, lambda found: found.is_barrier):
            assert earlier is not None, f"no barrier between the entry and {op}"
            assert not _is_gcn_store(earlier), f"no barrier between {earlier} and {op}"


def _gcn_polls(ops):
    """Acquiring reads of words or lanes. Before Triton 3.9 LLVM turns an atomic that adds 0 into a load."""
    returning = [op for op in ops if re.match(r"\w+_(atomic_add_x2|load_dwordx2)", op.opcode)]
    returning = [op for op in returning if {"sc0", "sc1"} & set(op.operands.split())]
    own = tuple(f"offset:{word * 8}" for word in (Word.ABORT, Word.BLOCKS_DONE))
    return [op for op in returning if not any(word in op.operands.split() for word in own)]


def check_gcn_spins(flow, phases, lane_spins):
    """Every wait is a loop around an acquiring read at system scope; LLVM may make two loops of one."""
    waits = [loop for loop in flow.loops if _gcn_polls(loop)]
    cached = [op for loop in waits for op in _gcn_polls(loop) if not _bypasses_caches(op)]
    assert not cached, f"polled through a cache: {_show(cached)}"
    aborts = [[op for op in loop if f"offset:{Word.ABORT * 8}" in op.operands.split()] for loop in waits]
    assert len(waits) >= phases + lane_spins, f"{len(waits)} loops wait for words or lanes"
    assert all(aborts), "a wait does not look at the abort word"
    for loop, found in zip(waits, aborts, strict=True):
        invalidated = "buffer_inv sc0 sc1" in map(str, loop)
        assert invalidated or all(map(_bypasses_caches, found)), f"stale forever: {_show(found)}"


def check_gcn_mailbox_spins(flow):
    """The wait is one loop, with one way into it, around an acquiring read at system scope."""
    waits = [loop for loop in flow.loops if _gcn_polls(loop)]
    assert len(waits) == 1, f"{len(waits)} loops wait for a count, not 1"
    cached = [op for op in _gcn_polls(waits[0]) if not _bypasses_caches(op)]
    assert not cached, f"polled through a cache: {_show(cached)}"


def check_gcn_mailbox_counts(flow):
    """All waves are done with a slot, and caches written back to the GPU, before their block is counted."""
    counts = [op for op in flow.ops if re.match(r"\w+_atomic_add_x2", op.opcode) and not _bypasses_caches(op)]
    assert len(counts) == 1, f"{len(counts)} atomics count blocks, not 1: {_show(counts)}"
    for earlier in flow.before(counts[0], lambda found: found.is_barrier):
        assert earlier is not None, "no barrier between the entry and the count"
        moves = _is_gcn_store(earlier) or _is_gcn_load(earlier)
        assert not moves, f"no barrier between {earlier} and {counts[0]}"
    block, place = flow.places[counts[0]]
    assert any(op.opcode == "buffer_wbl2" for op in flow.blocks[block][:place]), _show(flow.blocks[block])


def check_gcn_acquires(flow, phases):
    """A spin and one more read in each phase; after every one, caches are invalidated."""
    polls = [op for op in _gcn_polls(flow.ops) if _bypasses_caches(op)]
    assert len(polls) >= 2 * phases, f"{len(polls)} acquiring reads at system scope"
    for op in polls:
        block, place = flow.places[op]
        after = [str(found) for found in flow.blocks[block][place + 1 : place + 3]]
        assert after == ["s_waitcnt vmcnt(0)", "buffer_inv sc0 sc1"], f"{after} after {op}"


def check_gcn_vectors(flow, loops):
    """As `check_vectors`; a loop that masks lanes moves what is left behind the full tiles."""
    unmasked = [loop for loop in flow.loops if not any(op.opcode.startswith("s_and_saveexec") for op in loop)]
    moving = [loop for loop in unmasked if any(map(_is_gcn_load, loop)) and any(map(_is_gcn_store, loop))]
    accesses = [op for loop in moving for op in loop if _is_gcn_load(op) or _is_gcn_store(op)]
    narrow = [op for op in accesses if "dwordx4" not in op.opcode and not _is_gcn_table_read(op)]
    assert not narrow, f"narrower than 128 bits in a loop: {_show(narrow[:4])}"
    assert len(moving) >= loops, f"{len(moving)} loops move the payload, not {loops}"


def _is_gcn_table_read(op):
    """A pointer at a uniform address; the payload is never there."""
    return op.opcode == "global_load_dwordx2" and re.search(r"\bs\[\d+:\d+\]", op.operands) is not None


def check_gcn_lanes(flow, world_size):
    """The loop that pushes lanes stores nothing narrower than a lane."""
    pushing = [loop for loop in flow.loops if any(map(_is_gcn_load, loop)) and not _gcn_polls(loop)]
    stores = [op for loop in pushing for op in loop if _is_gcn_store(op)]
    split = [op for op in stores if not op.opcode.endswith(("dwordx2", "dwordx4"))]
    assert not split, f"a lane is stored in parts: {_show(split[:4])}"
    assert len(stores) >= world_size, f"{len(stores)} stores of lanes for {world_size} ranks"


def gcn_resource_usage(asm):
    names = ("vgpr_count", "vgpr_spill_count", "private_segment_fixed_size")
    return {name: int(re.search(rf"^\s*\.{name}:\s+(\d+)", asm, re.MULTILINE)[1]) for name in names}


def check_gcn_resources(asm, max_registers):
    usage = gcn_resource_usage(asm)
    assert usage["vgpr_spill_count"] == usage["private_segment_fixed_size"] == 0, f"spills: {usage}"
    assert usage["vgpr_count"] <= max_registers, f"too many registers: {usage}"
