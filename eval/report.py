"""Answers as a table for the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from mmcontrast.eval.answer import Answer


def as_table(answers: Sequence[Answer]) -> str:
    """Results in columns, one metric a line, with its interval and, against another model, its difference."""
    lines: list[str] = []
    for answer in answers:
        language = f"  [{answer.language}]" if answer.language else ""
        lines.append(f"{answer.dataset}  {answer.task}{language}  {answer.model.name}")
        other, differences = answer.against or ("", {})
        for name, metric in answer.result.metrics.items():
            interval = "" if metric.low is None else f"  [{_number(metric.low)}, {_number(metric.high)}]"
            line = f"  {name:32s} {_number(metric.value)}{interval}"
            if name in differences:
                d = differences[name]
                line += f"   {d.value:+.3f}  [{d.low:+.3f}, {d.high:+.3f}] against {other}"
            lines.append(line)
        numbers = [*answer.result.chance.items(), *answer.result.counts.items()]
        lines += [f"  {name:32s} {_number(value)}" for name, value in numbers]
        lines += [f"  note: {warning}" for warning in answer.result.warnings]
    return "\n".join(lines)


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.0f}" if value >= 2 and value == int(value) else f"{value:.3f}"
