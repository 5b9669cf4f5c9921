"""How results look to a person on a terminal."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

console = Console()
GOES_ON = ("success", "planned")
"""Statuses of rows that the next stage takes in."""


def mapping(result: dict[str, Any]) -> None:
    """Show plain values, a line each."""
    table = Table(show_header=False, box=None)
    for name, value in result.items():
        if not isinstance(value, dict | list):
            table.add_row(name, _number(value))
    console.print(table)


def stage(result: dict[str, Any]) -> None:
    """Show one stage's totals: what came in, what came out, and why the rest did not."""
    stages([result])


def stages(results: list[dict[str, Any]]) -> None:
    """Show the accounting of several stages: for each, rows in equal the rows by status, to the row."""
    table = Table(title="rows in = rows out")
    for name in ("stage", "rows in", "status", "reason", "rows"):
        table.add_column(name, justify="right" if "rows" in name else "left")
    for result in results:
        if "rows_in" in result:
            _add_stage(table, result)
    console.print(table)
    for result in results:
        if "test_sets" in result:
            _test_sets(result["test_sets"])
        if "faults" in result:
            verify(result)


def _add_stage(table: Table, result: dict[str, Any]) -> None:
    rows = accounting(result)
    for number, (status, reason, count) in enumerate(rows):
        first = number == 0
        table.add_row(
            result["stage"] if first else "",
            _number(result["rows_in"]) if first else "",
            status,
            reason,
            _number(count),
        )
    total = sum(count for _, _, count in rows)
    table.add_row("", "", "[bold]sum", "", f"[bold]{_number(total)}", end_section=True)


def accounting(result: dict[str, Any]) -> list[tuple[str, str, int]]:
    """Return a stage's rows as (status, reason, count), counts adding up to its rows in.

    Statuses with reasons are told apart by reason; what a status has beyond its reasons stands without one.
    """
    by_status: dict[str, int] = dict(result["by_status"])
    reasons: dict[str, int] = dict(result.get("by_reason", {}))
    kept = [(name, "", count) for name, count in by_status.items() if name in GOES_ON]
    lost = sum(count for name, count in by_status.items() if name not in GOES_ON)
    named = sorted(reasons.items(), key=lambda item: -item[1])
    rows = [("", reason, count) for reason, count in named]
    if lost - sum(reasons.values()):
        rows.append(("other", "", lost - sum(reasons.values())))
    return kept + rows


def overlap(result: dict[str, Any]) -> None:
    """Show what a corpus has in common with test sets."""
    _test_sets(result["test_sets"])
    left = f", {_number(result['left'])} left by dedup" if "left" in result else ""
    console.print(f"{result['corpus']}: {_number(result['samples'])} samples{left}", soft_wrap=True)


def _test_sets(sets: list[dict[str, Any]]) -> None:
    """Show of each test set its pictures and those with a copy in the corpus, then the samples that show one."""
    labels = endings([str(one["suite"]) for one in sets])
    share = {"overlap": lambda one: f"{one['with_copy'] / max(1, one['pictures'] - one['broken']):.2%}"}
    is_left = any("samples_left" in one for one in sets)
    pictures = [
        ("pictures", "pictures"), ("broken", "broken"), ("no hash", "unhashed"),
        ("with a\ncopy", "with_copy"), ("overlap", "overlap"),
    ]  # fmt: skip
    samples = [("samples", "samples"), ("by hash", "samples_by_hash"), ("by\nembedding", "samples_by_embedding")]
    if is_left:
        pictures.append(("with a\ncopy left", "with_copy_left"))
        samples.append(("samples\nleft", "samples_left"))
    for title, columns in (("test pictures in the corpus", pictures), ("samples that show one", samples)):
        table = Table(title=title)
        table.add_column("test set", overflow="fold")
        for heading, _ in columns:
            table.add_column(heading, justify="right", no_wrap=True)  # room that lacks is taken from the name
        for one, label in zip(sets, labels, strict=True):
            counts = [share[name](one) if name in share else _counted(one, name) for _, name in columns]
            table.add_row(escape(label), *counts)
        console.print(table)


def _counted(one: dict[str, Any], name: str) -> str:
    return _number(one[name]) if name in one else ""  # totals of an earlier version have fewer counts


def endings(paths: list[str]) -> list[str]:
    """Return the shortest end of each path, of whole names, that no other path has; a path that comes twice whole."""
    parts = [path.rstrip("/").split("/") for path in paths]
    shortest = []
    for number, (path, own) in enumerate(zip(paths, parts, strict=True)):
        others = parts[:number] + parts[number + 1 :]
        sizes = (size for size in range(1, len(own) + 1) if all(own[-size:] != other[-size:] for other in others))
        size = next(sizes, None)
        shortest.append(path if size is None else "/".join(own[-size:]))
    return shortest


def verify(result: dict[str, Any]) -> None:
    """Show what was mended, what was checked, and every fault."""
    for line in result.get("repaired", ()):
        console.print(f"[yellow]repaired[/] {line}", highlight=False)
    holes = f", {_number(result['holes'])} of them taken down" if result.get("holes") else ""
    console.print(
        f"{result['folder']}: {_number(result['shards'])} shards, {_number(result['samples'])} samples{holes}"
    )
    for fault in result["faults"]:
        where = " ".join(filter(None, (fault["shard"], fault["key"]))) or "the folder"
        # soft_wrap: a line of its own for every fault, for those who look for one with grep; escaped: names are data.
        console.print(f"[red]fault[/] {escape(where)}: {escape(fault['what'])} ({fault['kind']})", soft_wrap=True)
    if not result["faults"]:
        console.print("[green]no fault")


def removal(result: dict[str, Any]) -> None:
    """Show what a take-down took out or would, and what of its list names nothing."""
    for one in result.get("going", ()):
        final = f"final {one['final_shard']} {one['final_key']}" if one["final_key"] else "not in final"
        where = f"raw {one['raw_shard']} {one['key']}" if one["raw_shard"] else "not in raw"
        console.print(f"{where}, {final}: {escape(one['matched'])}", highlight=False, soft_wrap=True)
    for entry in result["unmatched"]:
        console.print(f"[yellow]names no sample[/] {escape(entry)}", highlight=False, soft_wrap=True)
    if result["unhashed"]:
        console.print(f"[yellow]{_number(result['unhashed'])} samples have no PDQ hash to compare with")
    verb = "would go" if result.get("dry_run") else "removed"
    shards = ", ".join(f"{_number(count)} shards of {stage}/" for stage, count in result["shards"].items())
    console.print(f"{result['corpus']}: {_number(result['samples'])} samples {verb}, from {shards}", soft_wrap=True)
    aside = "samples that had gone for them, and are no copies,"
    if result["back"]:
        console.print(f"{_number(result['back'])} {aside} come back with the next repack", soft_wrap=True)
    if result["left_out"]:
        console.print(f"{_number(result['left_out'])} {aside} stay out of final/, which is laid out", soft_wrap=True)
    if result["copies_left"]:
        some = ", ".join(result["copies_left"][:5]) + (", …" if len(result["copies_left"]) > 5 else "")
        what = "[yellow]copies of them stay, for the list does not name those:"
        console.print(f"{what}[/] {some}; add their keys to take them out too", highlight=False, soft_wrap=True)
    if result["tombstone"]:
        console.print(f"tombstone {result['tombstone']}")


def evaluations(results: list[dict[str, Any]]) -> None:
    """Show the accuracies of one or more suites, and recalls at 1 for those with captions; columns that are known."""
    table = Table()
    ways = [way for way in ("image_to_text", "text_to_image") if any(one.get("retrieval") for one in results)]
    recalls = [f"{way.replace('_', ' ')} recall@1" for way in ways]
    counts = ["images"] if any("images" in one for one in results) else []
    for name in ("suite", *counts, "names", "top-1", "top-5", "chance", *recalls):
        table.add_column(name, justify="left" if name == "suite" else "right")
    for result in results:
        names, found = int(result["names"]), result.get("retrieval") or {}
        shares = (
            f"{names:,}", f"{result['top1']:.1%}", f"{result['top5']:.1%}", f"{1 / max(1, names):.2%}"
        ) if "top1" in result else ("", "", "", "")  # fmt: skip
        recall = [f"{found[way]['recall@1']:.1%}" if way in found else "" for way in ways]
        images = [_number(result.get(count, "")) for count in counts]
        table.add_row(str(result["suite"]), *images, *shares, *recall)
    console.print(table)


def quickstart(result: dict[str, Any]) -> None:
    """Show what the quickstart made and measured."""
    stages(result["stages"])
    evaluations([{"suite": name, **result[name]} for name in ("held_out_style", "unseen_concepts") if name in result])
    console.print(f"seconds  {'  '.join(f'{name} {value:.0f}' for name, value in result['seconds'].items())}")
    console.print(f"peak memory  {result['peak_memory_bytes'] / 2**30:.2f} GiB")
    console.print(f"report  {result['report']}")


def _number(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"
