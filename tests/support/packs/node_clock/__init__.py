"""Times each node from the executor's call to its return: its inputs, its own function, and its outputs being kept.

Without the time in which the thread was ready and other processes had the core (Linux tells that). Used by the end-to-end tests
only.
"""
import functools
import inspect
import json
import os
import time

import execution
import folder_paths

NODE_CLASS_MAPPINGS = {}
FILE = os.path.join(folder_paths.get_user_directory(), "nodes.jsonl")


def now():
    """Seconds of a clock that stops while this thread waits for a core."""
    try:
        with open("/proc/thread-self/schedstat", encoding="ascii") as file:
            waited = int(file.read().split()[1]) / 1e9
    except (OSError, IndexError, ValueError):
        waited = 0.0
    return time.perf_counter() - waited


def timed(execute):
    signature = inspect.signature(execute)

    @functools.wraps(execute)
    async def wrapper(*args, **kwargs):
        started = now()
        try:
            return await execute(*args, **kwargs)
        finally:
            seconds = now() - started
            call = signature.bind(*args, **kwargs).arguments
            kind = call["dynprompt"].get_node(call["current_item"])["class_type"]
            with open(FILE, "a", encoding="utf-8") as file:
                file.write(json.dumps({"prompt": call["prompt_id"], "kind": kind, "seconds": seconds}) + "\n")

    return wrapper


execution.execute = timed(execution.execute)
