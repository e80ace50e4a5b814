"""What was damaged is found, named, and not opened."""

import json
import shutil

import numpy as np
import pytest

import dataset
from dataset import files
from dataset.files import DatasetError
from dataset.sidecar import SidecarWriter
from dataset.verify import verify


@pytest.fixture
def copy(byte_data, tmp_path):
    shutil.copytree(byte_data.path, tmp_path / "copy")
    return tmp_path / "copy"


def flip(path, at):
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(bytes(data))


def test_a_sound_copy_opens(copy, byte_data):
    assert dataset.open(copy, check="full").id == byte_data.id
    assert verify(copy) == []


@pytest.mark.parametrize("kind", ["tok", "len", "end"])
def test_one_flipped_byte_is_found_and_its_block_named(copy, kind):
    rng = np.random.default_rng(1)
    shards = sorted((copy / "shards").glob(f"*.{kind}"))
    path = shards[int(rng.integers(len(shards)))]
    flip(path, int(rng.integers(path.stat().st_size)))
    (fault,) = verify(copy)
    assert path.name in fault and "block 0" in fault
    with pytest.raises(DatasetError, match=path.name):
        dataset.open(copy)


def test_the_damaged_block_of_many_is_named(monkeypatch, tmp_path, corpus):
    from dataset.plan import Request
    from dataset.prepare import prepare

    monkeypatch.setattr(files, "BLOCK", 1024)
    data = prepare(Request((str(corpus),), heldout=0.0), tmp_path / "d").dataset
    path = data.splits["train"].shards[0].path("tok")
    flip(path, 5 * 1024 + 7)
    (fault,) = verify(tmp_path / "d")
    assert "block 5 (bytes 5,120 to 6,144)" in fault
    flip(path, 5 * 1024 + 7)
    blocks = bytearray(path.read_bytes())
    blocks[:1024], blocks[1024:2048] = blocks[1024:2048], blocks[:1024]
    path.write_bytes(bytes(blocks))
    assert len(verify(tmp_path / "d")) == 2
    with pytest.raises(DatasetError, match="block 0"):
        dataset.open(tmp_path / "d")


def test_truncated_missing_and_swapped_shards_are_refused(copy):
    shards = sorted((copy / "shards").glob("train*.tok"))
    whole = shards[0].read_bytes()
    shards[0].write_bytes(whole[:-2])
    with pytest.raises(DatasetError, match=r"bytes, the manifest says"):
        dataset.open(copy)
    shards[0].unlink()
    with pytest.raises(DatasetError, match="missing"):
        dataset.open(copy, check="sizes")
    shards[0].write_bytes(shards[1].read_bytes()[: len(whole)].ljust(len(whole), b"\0"))
    with pytest.raises(DatasetError, match="damaged"):
        dataset.open(copy)


def test_a_damaged_sidecar_is_found(copy, byte_data):
    data = dataset.open(copy)
    shards = data.splits["train"].shards
    side = SidecarWriter(data, {"name": "damage"})
    for shard in shards:
        side.write(shard, np.ones(shard.tokens))
    side.finish(shards)
    assert verify(copy) == []
    flip(side.folder / f"{shards[1].name}.wgt", 3)
    (side.folder / f"{shards[2].name}.wgt").unlink()
    first, second = verify(copy)
    assert f"{shards[1].name}.wgt: damaged" in first and f"{shards[2].name}.wgt" in second


def test_processes_of_two_machines_with_one_number_do_not_meet(tmp_path, monkeypatch):
    """In containers process ids repeat, and the folder may be shared."""
    with files.writing(tmp_path / "a") as mine:
        mine.write(b"first")
        with monkeypatch.context() as patch:
            patch.setattr("platform.node", lambda: "other")
            with files.writing(tmp_path / "a") as theirs:
                theirs.write(b"second")
        assert (tmp_path / "a").read_bytes() == b"second"
    assert (tmp_path / "a").read_bytes() == b"first"
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(DatasetError, match="file/x"), files.writing(tmp_path / "file" / "x"):
        pass


def test_manifest_edited_by_hand_is_refused(copy):
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["eos_id"] = 0
    (copy / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DatasetError, match="edited by hand"):
        dataset.open(copy)
    (copy / "manifest.json").write_text("{")
    with pytest.raises(DatasetError, match="not valid JSON"):
        dataset.open(copy)
    (copy / "manifest.json").write_text('{"format": "other"}')
    with pytest.raises(DatasetError, match="not a manifest"):
        dataset.open(copy)
    (copy / "manifest.json").unlink()
    with pytest.raises(DatasetError, match="no dataset here"):
        dataset.open(copy)


def test_another_tokenizer_is_refused(copy, byte_data):
    meta = copy / "tokenizer" / "meta.json"
    meta.write_text(meta.read_text().replace("256", "257"))
    with pytest.raises(DatasetError, match="not the tokenizer"):
        dataset.open(copy)


def test_models_of_another_vocabulary_or_tokenizer_are_refused(byte_data):
    byte_data.require(vocab=260, identity=byte_data.tokenizer.identity)
    with pytest.raises(DatasetError, match="260 ids, the model 50,257"):
        byte_data.require(vocab=50257)
    with pytest.raises(DatasetError, match="trained with blake3:00"):
        byte_data.require(identity="blake3:00")
