"""Runs inside the cage: the untrusted program itself, as a script or as a set of functions to call.

argv: how ("script" or "calls"), name of the function, descriptor for results. Nothing secret may ever be here: the
program shares this process and can read and change all of it. It learns the inputs and never an expected output.
"""

from __future__ import annotations

import builtins
import contextlib
import os
import sys

TYPE_CHECKING = False  # what a script does not need is not imported
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

# What LiveCodeBench's grader puts in front of every program, in its order: builtins come after the modules that have
# a pow or an open of their own, and the modules last, since some of them hold a name of their own (copy, datetime).
COMMON_IMPORTS = """
from string import *
from re import *
from datetime import *
from collections import *
from heapq import *
from bisect import *
from copy import *
from math import *
from random import *
from statistics import *
from itertools import *
from functools import *
from operator import *
from io import *
from sys import *
from json import *
from builtins import *
from typing import *
import string, re, datetime, collections, heapq, bisect, copy, math, random, statistics, itertools, functools, operator
import io, sys, json
"""
RECURSION_LIMIT = 50_000
"""LiveCodeBench's, too: Python's own 1,000 fails many a right solution by recursion."""


def main() -> None:
    how, function, results = sys.argv[1], sys.argv[2], int(sys.argv[3])
    builtins.exit = builtins.quit = sys.exit  # type: ignore[assignment]  # the site module, which has them, is off
    sys.set_int_max_str_digits(0)
    with open("program.py", encoding="utf-8") as file:
        source = file.read()
    sys.argv = ["program.py"]
    module = type(sys)("__main__" if how == "script" else "program")
    module.__file__ = "program.py"
    sys.modules[module.__name__] = module
    namespace = module.__dict__
    exec(COMMON_IMPORTS, namespace)
    code = compile(source, "program.py", "exec", dont_inherit=True)  # not this file's annotations
    sys.setrecursionlimit(RECURSION_LIMIT)
    if how == "script":
        os.close(results)
        with contextlib.suppress(SystemExit):  # whatever its code: a script is judged by what it has printed
            exec(code, namespace)
        return
    import json

    calls = json.load(sys.stdin)
    exec(code, namespace)
    answer = find(namespace, function)
    with os.fdopen(results, "w", encoding="utf-8", buffering=1) as out:
        for arguments in calls:
            out.write(json.dumps(answer(*arguments)) + "\n")


def find(namespace: dict[str, Any], name: str) -> Callable[..., Any]:
    """``Solution().name`` if there is such a class, else the function ``name``."""
    if hasattr(namespace.get("Solution"), name):
        return getattr(namespace["Solution"](), name)
    if name not in namespace:
        raise NameError(f"no function {name!r} and no Solution.{name} in the program")
    return namespace[name]
