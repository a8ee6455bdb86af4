"""Runs inside the cage: the untrusted program itself, as a script or as a set of functions to call.

argv: how ("script" or "calls"), name of the function, descriptor for results. Nothing secret may ever be here: the
program shares this process and can read and change all of it. It learns the inputs and never an expected output.
"""

from __future__ import annotations

import builtins
import os
import sys

TYPE_CHECKING = False  # what a script does not need is not imported
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

COMMON_IMPORTS = """
import bisect, collections, copy, functools, heapq, itertools, math, operator, random, re, string, sys
from bisect import *
from collections import *
from functools import *
from heapq import *
from itertools import *
from typing import *
from math import inf, gcd, sqrt, ceil, floor, log, log2, comb, factorial, isqrt
"""


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
    if how == "script":
        os.close(results)
        exec(compile(source, "program.py", "exec"), module.__dict__)
        return
    import json

    calls = json.load(sys.stdin)
    namespace = module.__dict__
    exec(COMMON_IMPORTS, namespace)
    exec(compile(source, "program.py", "exec"), namespace)
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
