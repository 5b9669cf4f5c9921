"""Small disks that a test mounts for itself, where the system lets it."""

from __future__ import annotations

import shutil
import subprocess

import pytest


def _can_mount() -> bool:
    command = ["unshare", "-rm", "sh", "-c", "mount -t tmpfs tmpfs /mnt"]
    return bool(shutil.which("unshare")) and subprocess.run(command, check=False, capture_output=True).returncode == 0


needs_mount = pytest.mark.skipif(not _can_mount(), reason="this system lets nobody mount a small disk of their own")
"""Marks a test that runs a command in a mount namespace of its own (`unshare -rm`)."""
