"""The scripts under bench/ keep up with the package: what they import is there, and a bad result file ends them."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

BENCH = Path(__file__).parents[2] / "bench"
SCRIPTS = sorted(path.name for path in BENCH.glob("*.py") if not path.name.startswith("plot_"))  # which need a result


def opened(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCH))
    spec = importlib.util.spec_from_file_location("script", BENCH / name)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", SCRIPTS)
def test_everything_imported_is_there(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert opened(name, monkeypatch).__doc__


def test_a_record_is_written_anew_after_every_phase(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = opened("record.py", monkeypatch).Record
    kept = record(tmp_path / "a.json", {"steps": 3})
    with kept.phase("one"):
        kept.values["found"] = 1
    text = (tmp_path / "a.json").read_text()
    assert all(f'"{key}"' in text for key in ("command", "commit", "device", "versions", "settings", "found", "one"))
    with pytest.raises(SystemExit, match=r"error: result file .*: is a folder; name a file"):
        record(tmp_path)
