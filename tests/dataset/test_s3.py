"""`s3://` by s3fs and botocore, against moto's server on loopback; skips where they are not installed."""

import pytest

import dataset
from dataset.files import DatasetError
from dataset.plan import Request
from dataset.prepare import prepare
from dataset.remote import open_remote


@pytest.fixture
def bucket(monkeypatch, request):
    """An empty bucket, as (file system, URL)."""
    s3fs = pytest.importorskip("s3fs")
    moto = pytest.importorskip("moto.server", reason="needs moto[server]", exc_type=ImportError)
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "here")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "only")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    s3fs.S3FileSystem.clear_instance_cache()
    system = s3fs.S3FileSystem()
    name = request.node.name.replace("_", "-")  # the servers of one process share their memory
    system.mkdir(name)
    yield system, f"s3://{name}"
    s3fs.S3FileSystem.clear_instance_cache()
    server.stop()


def test_a_dataset_in_a_bucket(bucket, byte_data, tmp_path):
    system, url = bucket
    system.put(str(byte_data.path), f"{url}/bytes", recursive=True)
    far = open_remote(f"{url}/bytes", cache=tmp_path / "c")
    a, b = far.view(64, seed=3).batch(5, 8), byte_data.view(64, seed=3).batch(5, 8)
    assert far.id == byte_data.id and a.tokens.equal(b.tokens) and a.cu_seqlens.equal(b.cu_seqlens)
    shard = byte_data.splits["train"].shards[-1]
    good = system.cat(f"{url}/bytes/shards/{shard.name}.tok")
    system.pipe(f"{url}/bytes/shards/{shard.name}.tok", bytes([good[0] ^ 1]) + good[1:])
    with pytest.raises(DatasetError, match=f"{shard.name}.tok.*damaged"):
        open_remote(f"{url}/bytes", check="full", cache=tmp_path / "d")
    system.rm(f"{url}/bytes/shards/{shard.name}.len")
    with pytest.raises(DatasetError, match=f"{shard.name}.len: missing"):
        dataset.open(f"{url}/bytes")
    with pytest.raises(DatasetError, match="no dataset here"):
        dataset.open(f"{url}/nothing")


def test_a_corpus_in_a_bucket(bucket, corpus, tmp_path):
    system, url = bucket
    system.put(str(corpus), f"{url}/corpus", recursive=True)
    far = prepare(Request((f"{url}/corpus",)), tmp_path / "far").dataset
    near = prepare(Request((str(corpus),)), tmp_path / "near").dataset
    assert (far.path / "sources.jsonl").read_text() == (near.path / "sources.jsonl").read_text()
    for split in ("train", "heldout"):
        assert [list(a) for a in far.splits[split]] == [list(a) for a in near.splits[split]]
