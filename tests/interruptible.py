"""A program that SIGINT reaches, also where the tests run in the background and all around them ignores it."""

import signal
import subprocess
from typing import Any


def started(command: list[str], **options: Any) -> subprocess.Popen:
    """`subprocess.Popen`; a program ignores what its parent ignored when it began."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return subprocess.Popen(command, **options)
    finally:
        signal.signal(signal.SIGINT, before)
