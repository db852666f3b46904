"""A report of shards for the terminal: findings first, then counts and measures in columns."""

from __future__ import annotations

from collections.abc import Sequence

from mmcontrast.check.findings import cut, share_of
from mmcontrast.check.measure import UNITS
from mmcontrast.check.results import Modality, Report
from mmcontrast.check.summary import Numbers
from mmcontrast.page import number

_WIDTH = 18
_MOST_LINES = 8  # of a list that has no end


def as_text(r: Report) -> str:
    """The whole report."""
    lines = [headline(r), ""]
    lines += [f"{f.level:8} {f.text}" for f in r.findings] or ["nothing to find fault with"]
    lines += ["", _columns("samples per shard", r.per_shard, "")]
    lines += _list("members", [f"{name} {number(count)}" for name, count in r.members.items()])
    lines += _list("modalities", [f"{' + '.join(m) or 'none'}: {share_of(n, r.examined)}" for m, n in r.present])
    if r.fields:
        lines += _list("metadata", [f"{name} {number(count)}" for name, count in r.fields.items()])
    for name, m in r.modalities.items():
        lines += _modality(name, m)
    if r.damage:
        lines += ["", "damage"]
        for d in r.damage[:_MOST_LINES]:
            left = ", left out" if d.left_out else ""
            keys = ", ".join(repr(key) for key in d.examples)
            lines.append(f"  {number(d.samples):>8}  {d.shard}: {d.reason}{left}; {keys}")
        if len(r.damage) > _MOST_LINES:
            lines.append(f"  and {number(len(r.damage) - _MOST_LINES)} more, in --json and --html")
    if r.plan is not None and r.plan.ranks and not r.plan.problem:
        lines += ["", f"{'ranks':>8}{'readers':>10}{'per rank':>10}  lanes"]
        for x in r.plan.ranks:
            lanes = x.problem or (f"{number(r.plan.lanes // x.ranks)} each" if x.own_lanes else "shared by all ranks")
            lines.append(f"{number(x.ranks):>8}{number(x.readers):>10}{number(x.per_rank):>10}  {lanes}")
        lines.append(f"  the shuffles of a reader hold {number(r.plan.window_bytes)} bytes")
    return "\n".join(_plain(line) for line in lines)


def headline(r: Report) -> str:
    """What was looked at."""
    units = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"))
    size = next((f"{r.bytes / f:.3g} {u}" for f, u in units if r.bytes >= f), f"{r.bytes} bytes")
    named = " ".join(r.patterns)
    shards = f"{number(r.shards)} {'shard' if r.shards == 1 else 'shards'}"
    part = "every sample was decoded"
    if r.examined < r.samples:
        part = f"{number(r.examined)} samples at random (seed {r.seed}) were decoded"
    return f"{named}: {number(r.samples)} samples in {shards}, {size}; {part}"


def _modality(name: str, m: Modality) -> list[str]:
    lines = ["", f"{name + ', ' + number(m.samples):18}" + "".join(f"{h:>10}" for h in _HEADS)]
    lines += [_columns(measure, numbers, UNITS.get(measure, "")) for measure, numbers in m.numbers.items()]
    for measure, words in m.words.items():
        lines += _list(measure, [f"{word} {number(n)}" for word, n in words.items()])
    for limit, value in m.asked.items():
        beyond = {"seconds": "above", "tokens": "above"}.get(limit, "below")
        lines += _list(f"{limit} asked", [f"{number(value)}; {beyond}: {share_of(m.short[limit], m.samples)}"])
    for flag, count in m.flags.items():
        if flag != "cut":
            lines += _list(flag, [share_of(count, m.samples)])
    lines += _list("repeats", [share_of(m.repeats.surplus, m.samples)])
    if m.kind == "text":
        lines += [f"  {number(t.count):>14}  {cut(t.text or '', 80)}" for t in m.repeats.top]
    if m.alike:
        lines += _list("look-alikes", [share_of(m.alike.samples, m.samples)])
    return lines


_HEADS = ("least", "1 %", "median", "99 %", "most", "mean")


def _columns(name: str, n: Numbers, unit: str) -> str:
    cells = (n.least, n.low, n.median, n.high, n.most, float(f"{n.mean:.4g}"))
    return f"{name:{_WIDTH}}" + "".join(f"{number(c):>10}" for c in cells) + (f"  {unit}" if unit else "")


def _list(name: str, entries: Sequence[str]) -> list[str]:
    shown = list(entries[:_MOST_LINES])
    if len(entries) > _MOST_LINES:
        shown.append(f"{number(len(entries) - _MOST_LINES)} more")
    return [f"{name:{_WIDTH}}  {'; '.join(shown)}"]


def _plain(line: str) -> str:
    """Without what would steer a terminal: captions and keys are strangers' words."""
    return "".join(c if c.isprintable() else "�" for c in line)
