"""What both ranks of test_sft_torchrun.py run: rank 0 tokenises for longer than torch waits by itself."""

import sys
import time
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch.distributed as dist
from torch.distributed import distributed_c10d

from infir2.data.chat import Sample
from infir2.data.sft import TokenRows
from infir2.launch import sft_rows


def slowly(*_: Any, **__: Any) -> sft_rows.SftRows:
    time.sleep(5)
    rows = TokenRows.join([Sample(np.arange(3, dtype=np.int32), np.ones(3, np.bool_))])
    return sft_rows.SftRows(rows, rows, {}, rows.sha256(), rows.sha256())


distributed_c10d._get_default_timeout = lambda backend: timedelta(seconds=2)  # half an hour, but for this test
sft_rows.tokenize, sft_rows._rows_key = slowly, lambda *_: "key"
dist.init_process_group("gloo", timeout=timedelta(minutes=5))
config: Any = SimpleNamespace(run=sys.argv[1], data=None, train=SimpleNamespace(seed=0))
assert len(sft_rows.tokenize_once(config, None).train) == 1  # type: ignore[arg-type]
dist.destroy_process_group()
