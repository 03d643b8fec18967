"""Kills a process in the middle of what it writes into a cache."""

import itertools
import os
import signal

from kdkernels.cache import index


def die_at(point):
    """Kill this process at the ``point``-th of: half of a write, an fsync, a rename."""
    events = itertools.count()

    def event():
        if next(events) == point:
            os.kill(os.getpid(), signal.SIGKILL)

    def with_event(function):
        return lambda *arguments: (event(), function(*arguments))[1]

    class HalfWritten:
        def __init__(self, *arguments, **options):
            self.file = open(*arguments, **options)

        def __enter__(self):
            return self

        def __exit__(self, *error):
            self.file.close()

        def __getattr__(self, name):
            return getattr(self.file, name)

        def write(self, content):
            half = len(content) // 2
            self.file.write(content[:half])
            self.file.flush()
            event()
            self.file.write(content[half:])

    # Writes outlive their process without fsync, which would take most of the time.
    os.fsync, os.replace, index.open = with_event(lambda descriptor: None), with_event(os.replace), HalfWritten
