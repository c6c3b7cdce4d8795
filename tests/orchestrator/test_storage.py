"""Storage: the same promises of a directory and of a real S3 protocol, and errors for people."""

import json
import multiprocessing
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from analysis.errors import InputError
from orchestrator.objects import ObjectStorage
from orchestrator.storage import LocalStorage, Refused, Storage, open_storage, prove, split

StartS3 = Callable[..., Iterator[str]]

FORK = multiprocessing.get_context("fork")


def _create(uri: str, number: int, start, results) -> None:
    storage = open_storage(uri)
    storage.exists("there")  # connected before the race
    start.wait()
    results.put((number, storage.create("race/name", b"%d" % number)))


def test_of_sixteen_racing_processes_one_creates(storage: Storage) -> None:
    start, results = FORK.Barrier(16), FORK.Queue()
    racers = [
        FORK.Process(target=_create, args=(storage.uri, i, start, results)) for i in range(16)
    ]
    for racer in racers:
        racer.start()
    told = dict(results.get(timeout=60) for _ in racers)
    for racer in racers:
        racer.join()
    (winner,) = [number for number, created in told.items() if created]
    assert storage.read("race/name") == b"%d" % winner
    assert storage.names("race") == ["name"]


def test_a_name_is_created_once_and_replaced_at_will(storage: Storage) -> None:
    assert storage.create("a/b", b"first")
    assert not storage.create("a/b", b"second")
    assert storage.read("a/b") == b"first"
    storage.replace("a/b", b"third")
    storage.replace("a/c", b"new")
    assert storage.read("a/b") == b"third"
    assert storage.read_many(["a/c", "a/none", "a/b"]) == {"a/c": b"new", "a/b": b"third"}
    assert storage.read_many([]) == {}
    with pytest.raises(FileNotFoundError):
        storage.read("a/none")
    assert (storage.exists("a/b"), storage.exists("a"), storage.exists("a/none")) == (1, 0, 0)


def test_all_below_a_directory_is_removed_and_nothing_beside_it(storage: Storage) -> None:
    for name in ("d/a", "d/.temporary", "d/below/b", "dd/c", "d.e"):
        storage.replace(name, b"")
    storage.remove_all("d")
    storage.remove_all("none")
    there = [storage.exists(n) for n in ("d/a", "d/.temporary", "d/below/b", "dd/c", "d.e")]
    assert there == [False, False, False, True, True]


def test_names_are_the_plain_files_of_one_directory(storage: Storage) -> None:
    for name in ("d/b-2.x", "d/b-1.x", "d/a-1.x", "d/.hidden", "d/below/c", "dd/e"):
        storage.create(name, b"")
    assert storage.names("d") == ["a-1.x", "b-1.x", "b-2.x"]
    assert storage.names("d", "b-") == ["b-1.x", "b-2.x"]
    assert storage.names("none") == []
    storage.remove("d/b-1.x")
    storage.remove("d/b-1.x")
    assert storage.names("d", "b-") == ["b-2.x"]


def test_what_another_connection_wrote_is_listed_at_once(storage: Storage) -> None:
    """A cached listing would hide it."""
    assert storage.names("d") == []
    code = "import sys, orchestrator.storage as s; s.open_storage(sys.argv[1]).create('d/new', b'')"
    _elsewhere(code, storage.uri)
    assert storage.names("d") == ["new"]
    assert storage.exists("d/new")


def _elsewhere(code: str, *arguments: str, **options) -> subprocess.CompletedProcess:
    """Run code in a process of its own."""
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, check=True, capture_output=True, timeout=60, **options)


def test_large_files_go_to_and_fro(storage: Storage, tmp_path: Path) -> None:
    data = os.urandom(11_000_000)
    (tmp_path / "large").write_bytes(data)
    storage.upload(tmp_path / "large", "checkpoints/k/1")
    storage.download("checkpoints/k/1", tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == data
    assert storage.names("checkpoints/k") == ["1"]
    with pytest.raises(FileNotFoundError):
        storage.download("checkpoints/k/2", tmp_path / "none")
    assert not (tmp_path / "none").exists()
    assert not [path for path in tmp_path.rglob("*") if path.name.startswith(".")]


def _read(storage: Storage, results) -> None:
    results.put(storage.read("a"))


def test_a_storage_in_use_goes_through_a_fork(storage: Storage) -> None:
    storage.create("a", b"word")
    results = FORK.Queue()
    process = FORK.Process(target=_read, args=(storage, results))
    process.start()
    assert results.get(timeout=60) == b"word"
    process.join()


def test_a_storage_in_use_is_pickled(storage: Storage) -> None:
    storage.create("a", b"word")
    code = "import pickle, sys; print(pickle.load(sys.stdin.buffer).read('a').decode())"
    done = _elsewhere(code, input=pickle.dumps(storage))
    assert done.stdout == b"word\n"


def test_a_storage_that_keeps_its_word_is_left_as_it_was(storage: Storage) -> None:
    prove(storage)
    storage.create("a", b"")
    assert storage.names("") == ["a"]
    if storage.local:
        assert [path.name for path in storage.local.iterdir()] == ["a"]


class _Forgetful(LocalStorage):
    """As an object store without conditional writes."""

    def create(self, name: str, data: bytes, *, durable: bool = True) -> bool:
        self.replace(name, data)
        return True


def test_a_storage_that_writes_over_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="writes a file over one that is there"):
        prove(_Forgetful(tmp_path))


def test_an_answer_that_was_lost_on_the_way_does_not_lose_the_file(tmp_path: Path, monkeypatch):
    """As NFS does it: the link was made, the answer lost, and the second try finds it there."""
    link = os.link

    def made_and_denied(source: Path, target: Path) -> None:
        link(source, target)
        raise FileExistsError

    monkeypatch.setattr(os, "link", made_and_denied)
    storage = LocalStorage(tmp_path)
    assert storage.create("a", b"mine")
    monkeypatch.setattr(os, "link", link)
    assert not storage.create("a", b"other")


@pytest.mark.parametrize(
    ("location", "uri"),
    [
        ("/a/b/", "/a/b"),
        (Path("/a/b"), "/a/b"),
        ("file:///a/b", "/a/b"),
        ("s3://bucket/a/b/", "s3://bucket/a/b"),
        (Path("s3://bucket/a"), "s3://bucket/a"),  # what a path makes of it has one slash
        ("s3://bucket", "s3://bucket"),
    ],
)
def test_paths_and_uris_name_storages(location: str | Path, uri: str) -> None:
    found = open_storage(location)
    assert found.uri == uri
    assert found.name == uri.rsplit("/", 1)[1]
    assert (found.local is None) == uri.startswith("s3")
    assert found.place("x") == f"{uri}/x"


def test_a_file_is_split_into_its_storage_and_its_name(tmp_path: Path) -> None:
    for location in (tmp_path / "p" / "next.toml", "s3://bucket/p/next.toml"):
        storage, name = split(location)
        assert storage.uri == str(location).rpartition("/")[0]
        assert name == "next.toml"


def test_unknown_schemes_are_named_with_those_that_are_known() -> None:
    with pytest.raises(InputError, match=r"called hdfs://; give a path, file://, s3://, gs://"):
        open_storage("hdfs://host/p")
    with pytest.raises(InputError, match="s3:// names no bucket: write s3://BUCKET/PROJECT"):
        open_storage("s3://")


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(InputError, match=r"pip install 'isoflop\[gcs\]'"):
        open_storage("gs://bucket/p")


def test_a_missing_bucket_is_named(s3: str) -> None:
    storage = open_storage("s3://no-such-bucket/p")
    for action in (
        lambda: storage.names("plans"),
        lambda: storage.read("a"),
        lambda: storage.create("a", b""),
        lambda: storage.replace("a", b""),
        lambda: prove(storage),
    ):
        with pytest.raises(InputError, match="there is no bucket 'no-such-bucket'"):
            action()


def test_a_directory_in_the_way_of_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"cannot write to .*file/p \(Not a directory\)"):
        prove(open_storage(tmp_path / "file" / "p"))


def _fresh(uri: str) -> ObjectStorage:
    """Connected anew, since clients read the environment once."""
    from s3fs import S3FileSystem

    S3FileSystem.clear_instance_cache()
    return ObjectStorage(uri)


@pytest.fixture
def reconnect() -> Iterator[None]:
    """Whatever connects after this test connects anew."""
    yield
    from s3fs import S3FileSystem

    S3FileSystem.clear_instance_cache()


@pytest.mark.usefixtures("reconnect")
def test_missing_credentials_are_told(bucket: str, monkeypatch, tmp_path: Path) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with pytest.raises(Refused, match=r"Unable to locate credentials\): check the credentials"):
        _fresh(f"{bucket}/p").names("plans")
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    with pytest.raises(Refused, match=r"profile \(nobody\) could not be found"):
        _fresh(f"{bucket}/p").names("plans")


@pytest.mark.usefixtures("reconnect")
def test_an_endpoint_that_does_not_answer_is_told(bucket: str, monkeypatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")  # discard: nobody listens
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    with pytest.raises(OSError, match="Could not connect to the endpoint"):
        _fresh(f"{bucket}/p").names("plans")


@pytest.fixture
def guarded(monkeypatch: pytest.MonkeyPatch, start_s3: StartS3, reconnect: None) -> Iterator[str]:
    """A bucket whose owner has let somebody only read it; the environment is that somebody's."""
    import boto3

    # The server asks for permission from the fifth request on: those below are the first four.
    for address in start_s3(INITIAL_NO_AUTH_ACTION_COUNT="4"):
        options = {"endpoint_url": address, "region_name": "us-east-1"}
        owner = {"aws_access_key_id": "owner", "aws_secret_access_key": "secret", **options}
        boto3.client("s3", **owner).create_bucket(Bucket="guarded")
        iam = boto3.client("iam", **owner)
        iam.create_user(UserName="somebody")
        actions = ["s3:ListBucket", "s3:GetObject"]
        allowed = {"Effect": "Allow", "Action": actions, "Resource": "*"}
        text = json.dumps({"Version": "2012-10-17", "Statement": [allowed]})
        iam.put_user_policy(UserName="somebody", PolicyName="read", PolicyDocument=text)
        key = iam.create_access_key(UserName="somebody")["AccessKey"]
        monkeypatch.setenv("AWS_ENDPOINT_URL", address)
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", key["AccessKeyId"])
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", key["SecretAccessKey"])
        monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        yield "s3://guarded/p"


def test_a_bucket_without_permission_is_named(guarded: str, monkeypatch) -> None:
    storage = _fresh(guarded)
    assert storage.names("plans") == []
    assert not storage.exists("a")
    for action in (
        lambda: storage.create("a", b""),
        lambda: storage.replace("a", b""),
        lambda: prove(storage),
    ):
        with pytest.raises(
            InputError, match=r"no permission to write s3://guarded/p .*credentials"
        ):
            action()
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIAUNKNOWN")
    with pytest.raises(InputError, match="no permission to list s3://guarded/p"):
        _fresh(guarded).names("plans")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_directory_without_permission_is_named(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(InputError, match="no permission for"):
        prove(open_storage(tmp_path))


def test_a_directory_that_the_system_does_not_let_us_write_is_named() -> None:
    """Root too may make nothing here."""
    with pytest.raises(InputError, match="cannot write to the project "):
        prove(open_storage("/proc/sys/p"))
