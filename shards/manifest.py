"""corpus.json: what a corpus is made with, which stages are done, and their totals."""

from __future__ import annotations

from typing import Any

from infra.config import Config, differences, digest, essence
from infra.errors import UserError
from infra.storage import Folder
from shards.layout import DEDUP, FINAL, FORMAT_VERSION, MANIFEST, PLAN, RAW

STAGES = (PLAN, RAW, DEDUP, FINAL)


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

        Raises:
            UserError: the stage was begun with another configuration (every difference is named), or the
                stage before it is not done.
        """
        before = self._content["stages"].get(stage)
        if before is not None:
            found = differences(before["config"], essence(config))
            if found:
                raise UserError(
                    f"{self.folder.url}: '{stage}' was made with another configuration ({'; '.join(found)}); "
                    "use the same, or a new corpus folder"
                )
            return
        earlier = STAGES.index(stage)
        if earlier and not self.is_done(STAGES[earlier - 1]):
            raise UserError(f"{self.folder.url}: '{STAGES[earlier - 1]}' is not finished yet; run that first")
        self._content["stages"][stage] = {
            "config": essence(config), "digest": digest(config), "done": False, "totals": {},
        }  # fmt: skip
        self._save()

    def finish(self, stage: str, totals: dict[str, Any]) -> None:
        """Record that `stage` is done with these totals (`rows_in`, `by_status`, `by_reason`, ...)."""
        self._content["stages"][stage] |= {"done": True, "totals": totals}
        self._save()

    def reopen(self, stage: str) -> None:
        """Record that `stage` has work to do again, if it was done: some of what it made was dropped."""
        if self.is_done(stage):
            self._content["stages"][stage]["done"] = False
            self._save()

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
