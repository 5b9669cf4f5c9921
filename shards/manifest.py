"""corpus.json: what a corpus is made with, which stages are done, and their totals."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from infra.config import Config, completed, differences, digest, essence
from infra.errors import RunError, UserError
from infra.logs import log
from infra.storage import Folder
from shards import tombstones
from shards.layout import DEDUP, FINAL, FORMAT_VERSION, MANIFEST, PLAN, RAW, SIGNATURES
from shards.writer import committed

COMMANDS = {PLAN: "plan", RAW: "ingest", DEDUP: "dedup", FINAL: "repack"}
"""Which command makes which stage's folder, in the order of the stages."""
STAGES = tuple(COMMANDS)


class Manifest:
    """The stages' records of one corpus. Each stage writes its own record and no other's."""

    def __init__(self, folder: Folder, content: dict[str, Any]) -> None:
        self.folder, self._content = folder, content

    @classmethod
    def open(cls, folder: Folder) -> Manifest:
        """Read the manifest, or start an empty one in an empty or missing folder.

        Raises:
            UserError: the folder holds something else, or a corpus of a newer format.
        """
        if not folder.exists(MANIFEST):
            strangers = [name for name in folder.names() + folder.folders() if not name.startswith(".")]
            if strangers:
                raise UserError(
                    f"{folder.url}: holds something else ('{strangers[0]}' and no {MANIFEST}); "
                    "name an empty or a new folder"
                )
            return cls(folder, {"format": FORMAT_VERSION, "stages": {}})
        content = folder.read_json(MANIFEST)
        if not isinstance(content, dict) or "format" not in content or "stages" not in content:
            raise UserError(f"{folder.path(MANIFEST)}: not the manifest of a corpus; name another folder")
        if content["format"] > FORMAT_VERSION:
            raise UserError(
                f"{folder.url}: corpus format {content['format']}, this version reads {FORMAT_VERSION}; update pairmill"
            )
        return cls(folder, content)

    @classmethod
    def existing(cls, folder: Folder) -> Manifest:
        """Read the manifest of a corpus that must be there. Raises UserError if it is not."""
        if not folder.exists(MANIFEST):
            raise UserError(f"{folder.url}: no corpus here (no {MANIFEST}); start one with `pairmill plan`")
        return cls.open(folder)

    def begin(self, stage: str, config: Config) -> None:
        """Record that `stage` starts with `config`, or check that it goes on with the same.

        An option that the record does not know, since it is younger, counts as set to its default there.

        Raises:
            UserError: the stage was begun with another configuration (every difference is named), the
                stage before it is not done, or a removal was interrupted.
        """
        tombstones.check_none_is_open(self.folder)
        before = self._content["stages"].get(stage)
        if before is not None:
            found = differences(completed(before["config"], type(config)), essence(config))
            if found:
                anew = "; or begin it anew with --anew" if stage == DEDUP else ""
                raise UserError(
                    f"{self.folder.url}: '{stage}' was made with another configuration ({'; '.join(found)}); "
                    f"use the same, or a new corpus folder{anew}"
                )
        self._check_before(stage)
        if before is None:
            self._record(stage, config)

    def begin_anew(self, stage: str, config: Config) -> None:
        """Record that `stage` starts with `config`, whatever it was made with before; what it wrote stays.

        Raises:
            UserError: a stage after it has written something, the one before it is not done, or a removal was
                interrupted.
        """
        tombstones.check_none_is_open(self.folder)
        self._check_before(stage)
        after = STAGES[STAGES.index(stage) + 1 :]
        for later in after:
            place = self.folder / later
            if any(not name.startswith(".") for name in place.names() + place.folders()):
                raise UserError(
                    f"{place.url}: `pairmill {COMMANDS[later]}` has begun it from what '{stage}' made; remove "
                    f"{later}/ and give the same command again, or use a new corpus folder"
                )
        for later in after:
            self._content["stages"].pop(later, None)
        self._record(stage, config)

    def _check_before(self, stage: str) -> None:
        earlier = STAGES.index(stage)
        if earlier and not self.is_done(STAGES[earlier - 1]):
            raise UserError(f"{self.folder.url}: '{STAGES[earlier - 1]}' is not finished yet; run that first")

    def _record(self, stage: str, config: Config) -> None:
        self._content["stages"][stage] = {
            "config": essence(config), "digest": digest(config), "done": False, "totals": {},
        }  # fmt: skip
        self._save()

    def finish(self, stage: str, totals: dict[str, Any]) -> None:
        """Record that `stage` is done with these totals (`rows_in`, `by_status`, `by_reason`, ...)."""
        self._content["stages"][stage] |= {"done": True, "totals": totals}
        self._save()

    def amend(self, totals: dict[str, dict[str, Any]]) -> None:
        """Record new totals of stages that are done."""
        for stage, now in totals.items():
            self._content["stages"][stage]["totals"] = now
        self._save()

    def reopen(self, stage: str, lost: Iterable[str] = ()) -> None:
        """Record that `stage` has its shards `lost` to make again, and every stage after it to look again.

        What dedup noted of a lost raw shard goes first: whoever is killed in between finds the shard missing.
        """
        if stage == RAW:
            for shard in lost:
                (self.folder / DEDUP / SIGNATURES).delete(f"{shard}.parquet")
        undone = [name for name in STAGES[STAGES.index(stage) :] if self.is_done(name)]
        for name in undone:
            self._content["stages"][name] |= {"done": False, "totals": {}}
        if undone:
            self._save()

    def still_done(self, stage: str, shards: Iterable[str]) -> bool:
        """Tell whether `stage` is done and its `shards` are there; where some have gone, reopen it.

        Without a single one, and with the final shards done, they were removed on purpose: nothing needs them.
        """
        if not self.is_done(stage):
            return False
        there = set(committed(self.folder / stage))
        lost = [shard for shard in shards if shard not in there]
        if not lost or (not there and stage != FINAL and self.is_done(FINAL)):
            return True
        log.warning("%s: %d shards have gone, the first is %s", (self.folder / stage).url, len(lost), lost[0])
        self.reopen(stage, lost)
        return False

    def shards(self, stage: str) -> list[str]:
        """Return the shards of a stage that is done. Raises RunError if some of them have gone."""
        found = committed(self.folder / stage)
        made = int(self.totals(stage).get("shards", len(found)))
        if len(found) < made:
            raise RunError(
                f"{(self.folder / stage).url}: {made - len(found)} of {made} shards have gone; "
                f"`pairmill {COMMANDS[stage]}` makes them again"
            )
        return found

    def is_done(self, stage: str) -> bool:
        """Tell whether `stage` has been finished."""
        return bool(self._content["stages"].get(stage, {}).get("done"))

    def totals(self, stage: str) -> dict[str, Any]:
        """Return the totals of a stage, empty if it is not done."""
        return dict(self._content["stages"].get(stage, {}).get("totals", {}))

    def config(self, stage: str) -> dict[str, Any]:
        """Return the configuration a stage was begun with, empty if it was not begun."""
        return dict(self._content["stages"].get(stage, {}).get("config", {}))

    def as_dict(self) -> dict[str, Any]:
        """Return the whole manifest as plain values."""
        return dict(self._content)

    def _save(self) -> None:
        self.folder.write_json(MANIFEST, self._content)
