"""No pickle of a checkpoint is executed, and its index cannot point outside the checkpoint."""

import builtins
import os
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import metadata as dcp_metadata

from infir2.checkpoint import manifest, safe_reader
from infir2.checkpoint.store import CheckpointStore
from infir2.errors import CheckpointError

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


class Payload:
    """Calls a function when it is unpickled."""

    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        self.call = (function, args)

    def __reduce__(self) -> Any:
        return self.call


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    with CheckpointStore(tmp_path / "checkpoints", async_save=False) as store:
        store.save(1, {"w": torch.ones(3)}, {})
    return tmp_path / "checkpoints" / "step-000001"


def seal(folder: Path) -> None:
    """Recompute the manifest, as an attacker would."""
    (folder / manifest.MANIFEST).unlink()
    entries = {path.name: manifest.measure(path) for path in folder.iterdir()}
    (folder / manifest.MANIFEST).write_bytes(manifest.encode(entries))


def load(folder: Path) -> torch.Tensor:
    tensors = {"w": torch.zeros(3)}
    CheckpointStore(folder.parent).load(folder, tensors)
    return tensors["w"]


def payloads(mark: Path) -> dict[str, Any]:
    touch = f"open({str(mark)!r}, 'w').close()"
    index = pickle.dumps(dcp_metadata.Metadata({}))
    return {
        "os.system": pickle.dumps(Payload(os.system, f"touch {mark}")),
        "eval": pickle.dumps(Payload(eval, touch)),
        "exec": pickle.dumps(Payload(exec, touch)),
        "getattr": pickle.dumps(Payload(getattr(builtins, "open"), str(mark), "w")),  # noqa: B009
        "inside an index": pickle.dumps(dcp_metadata.Metadata({"w": Payload(os.system, f"touch {mark}")})),  # type: ignore[dict-item]
        "before an index": pickle.dumps(Payload(os.system, f"touch {mark}"))[:-1] + b"0" + index,
        "by module path": b"cos\nsystem\n(S'touch " + str(mark).encode() + b"'\ntR.",
        "through an allowed module": b"\x80\x04\x8c\x05torch\x8c\x0b_utils.eval\x93(S'" + touch.encode() + b"'\ntR.",
    }


@pytest.mark.parametrize("kind", list(payloads(Path("x"))))
@pytest.mark.parametrize("sealed", [False, True])
def test_a_hostile_index_is_never_executed(folder: Path, tmp_path: Path, kind: str, sealed: bool) -> None:
    mark = tmp_path / "executed"
    (folder / ".metadata").write_bytes(payloads(mark)[kind])
    if sealed:
        seal(folder)
    with pytest.raises(CheckpointError, match=r"\.metadata"):
        load(folder)
    with pytest.raises(CheckpointError, match=r"\.metadata"):
        safe_reader.read_metadata(folder, {".metadata": 1})
    assert not mark.exists()


@pytest.mark.parametrize("kind", ["os.system", "eval", "exec", "getattr", "inside an index", "before an index"])
def test_the_payloads_work_on_an_ordinary_unpickler(tmp_path: Path, kind: str) -> None:
    pickle.loads(payloads(tmp_path / "executed")[kind])
    assert (tmp_path / "executed").exists()


def test_a_pickle_cannot_change_the_classes_it_names(folder: Path) -> None:
    # BUILD with a (state, slots) pair sets attributes on whatever object is on the stack, classes included.
    for name in ("Metadata", "MetadataIndex", "TensorStorageMetadata"):
        code = f"c{dcp_metadata.__name__}\n{name}\n(N(S'evil'\nI1\ndtb.".encode()
        (folder / ".metadata").write_bytes(code)
        seal(folder)
        with pytest.raises(CheckpointError):
            load(folder)
        assert not hasattr(getattr(dcp_metadata, name), "evil")
        assert not hasattr(safe_reader._Record, "evil")


def test_a_pickled_entry_is_refused(tmp_path: Path) -> None:
    mark, folder = tmp_path / "executed", tmp_path / "step-000001"
    state = {"w": torch.ones(3), "lr": Payload(os.system, f"touch {mark}")}
    dcp.save(state, storage_writer=dcp.FileSystemWriter(folder), no_dist=True)
    (folder / "meta.json").write_text("{}")
    (folder / manifest.MANIFEST).touch()
    seal(folder)
    with pytest.raises(CheckpointError, match="lr is a pickled object"):
        load(folder)
    assert not mark.exists()
    dcp.load({"w": torch.ones(3), "lr": 0}, storage_reader=dcp.FileSystemReader(folder), no_dist=True)
    assert mark.exists(), "the payload would have run"


TRAVERSALS = ["../secret.distcp", "../../etc/passwd", "a/../../secret.distcp", "{outside}", "..", ".", "", "meta.json"]


@pytest.mark.parametrize("target", [*TRAVERSALS, "__9_0.distcp", "__0_0.distcp\0", "..\\secret.distcp"])
def test_the_index_cannot_point_outside(folder: Path, tmp_path: Path, target: str) -> None:
    outside = folder.parent / "secret.distcp"
    outside.write_bytes((folder / "__0_0.distcp").read_bytes())
    index = pickle.loads((folder / ".metadata").read_bytes())
    for info in index.storage_data.values():
        info.relative_path = target.format(outside=outside)
    (folder / ".metadata").write_bytes(pickle.dumps(index))
    seal(folder)
    with pytest.raises(CheckpointError, match="refused: w points to"):
        load(folder)


@pytest.mark.parametrize("name", ["../secret.distcp", "/etc/passwd", "a/b", ".."])
def test_the_manifest_cannot_name_other_folders(folder: Path, name: str) -> None:
    entries = manifest.read(folder)
    (folder / manifest.MANIFEST).write_bytes(manifest.encode({**entries, name: manifest.Entry(1, "0")}))
    with pytest.raises(CheckpointError, match="not a plain file name"):
        load(folder)


@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata", "meta.json"])
def test_links_are_refused(folder: Path, tmp_path: Path, name: str) -> None:
    outside = tmp_path / "outside"
    (folder / name).rename(outside)
    (folder / name).symlink_to(outside)
    with pytest.raises(CheckpointError, match="not a regular file"):
        load(folder)


def changed(folder: Path, change: Callable[[Any], None]) -> None:
    index = pickle.loads((folder / ".metadata").read_bytes())
    change(index)
    (folder / ".metadata").write_bytes(pickle.dumps(index))
    seal(folder)


def test_an_index_that_lies_is_refused(folder: Path) -> None:
    original = (folder / ".metadata").read_bytes()

    def set_offset(index: Any) -> None:
        next(iter(index.storage_data.values())).offset = 10**9

    def set_transform(index: Any) -> None:
        next(iter(index.storage_data.values())).transform_descriptors = ["zstd"]

    def drop_data(index: Any) -> None:
        index.storage_data.clear()

    def drop_chunk(index: Any) -> None:
        index.state_dict_metadata["w"].chunks.clear()

    def bad_shape(index: Any) -> None:
        index.state_dict_metadata["w"].chunks[0].sizes = torch.Size([4])

    for change, message in (
        (set_offset, "outside __0_0"),
        (set_transform, "stream transform"),
        (drop_data, "no data stored"),
        (drop_chunk, "do not cover"),
        (bad_shape, "outside its shape"),
    ):
        (folder / ".metadata").write_bytes(original)
        changed(folder, change)
        with pytest.raises(CheckpointError, match=message):
            load(folder)
    (folder / ".metadata").write_bytes(original)
    seal(folder)
    assert load(folder).tolist() == [1, 1, 1]


def test_tensor_data_is_read_without_running_it(folder: Path, tmp_path: Path) -> None:
    mark = tmp_path / "executed"
    torch.save(Payload(os.system, f"touch {mark}"), folder / "__0_0.distcp")

    def fit(index: Any) -> None:
        info = next(iter(index.storage_data.values()))
        info.offset, info.length = 0, (folder / "__0_0.distcp").stat().st_size

    changed(folder, fit)
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        load(folder)
    assert not mark.exists()


def test_the_allow_list_is_what_a_real_index_needs(folder: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found: set[tuple[str, str]] = set()

        class Spy(pickle.Unpickler):
            def find_class(self, module: str, name: str) -> Any:
                found.add((module, name))
                return super().find_class(module, name)

        with open(folder / ".metadata", "rb") as file:
            Spy(file).load()
    assert found - safe_reader._NAMES == {("torch", "float32")}
    assert len(safe_reader._NAMES - found) <= 4  # BytesStorageMetadata, and other spellings of a path
