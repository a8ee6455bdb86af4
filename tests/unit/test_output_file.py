"""Files that a user names to be written: whatever is wrong with them is one line, and told in time."""

import os
from pathlib import Path

import pytest

from infir2.cli import main
from infir2.durable import check_output, write_output
from infir2.errors import UserError


def test_what_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path, why in (
        (tmp_path, "is a folder; name a file"),
        (tmp_path / "none" / "a.json", f"there is no folder {tmp_path / 'none'}; make it, or name another file"),
        (tmp_path / "file" / "a.json", f"there is no folder {tmp_path / 'file'}; make it, or name another file"),
        (tmp_path / ("n" * 300), "cannot be written: File name too long; name another file"),
        (Path("/proc/a.json"), "cannot be written: No such file or directory; name another file"),
    ):
        with pytest.raises(UserError) as told:
            check_output(path, "--json")
        assert str(told.value) == f"--json {path}: {why}"
        with pytest.raises(UserError, match="cannot be written: "):
            write_output(path, "text")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission_is_told(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match="cannot be written: Permission denied"):
        check_output(tmp_path / "a.json", "--json")


def test_checking_leaves_nothing_and_harms_nothing(tmp_path: Path) -> None:
    old = tmp_path / "old.json"
    old.write_text("before")
    check_output(old, "--json")
    check_output(tmp_path / "new.json", "--json")
    assert [path.name for path in tmp_path.iterdir()] == ["old.json"]
    assert old.read_text() == "before"
    write_output(old, "after")
    assert [path.name for path in tmp_path.iterdir()] == ["old.json"]
    assert old.read_text() == "after"


def test_links_stay_links(tmp_path: Path) -> None:
    """/dev/stdout is one."""
    (tmp_path / "link").symlink_to(tmp_path / "target")
    check_output(tmp_path / "link", "--json")
    write_output(tmp_path / "link", "text")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "target").read_text() == "text"
    check_output(Path("/dev/null"), "--json")
    write_output(Path("/dev/null"), "text")
    assert Path("/dev/null").is_char_device()


def test_examples_say_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    for out, why in (
        (tmp_path, "is a folder; name a file"),
        (tmp_path / "file" / "a.jsonl", f"there is no folder {tmp_path / 'file'}; make it, or name another file"),
    ):
        assert main(["examples", str(out), "--count", "2"]) == 2
        assert capsys.readouterr().err == f"infir2: error: OUT {out}: {why}\n"


def test_a_conversion_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / ("n" * 300)
    assert main(["convert", str(tmp_path), str(out)]) == 2
    assert capsys.readouterr().err == f"infir2: error: {out}: cannot be written: File name too long\n"


def test_a_report_says_so_before_it_reads_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(tmp_path / "no_run"), "--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"infir2: error: --out {tmp_path}: is a folder; name a file\n"
