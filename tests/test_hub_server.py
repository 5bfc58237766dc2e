"""The tests' Hub server, exercised by the unmodified clients.

Clients read HF_ENDPOINT and HF_HOME when they are imported, so whatever uploads, or uses `transformers` or `datasets`,
runs in a process of its own. Plain downloads run in this one, with the address as an argument.
"""

import hashlib
import io
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import huggingface_hub
import pyarrow
import pyarrow.parquet
import pytest
from hub_server import HubServer
from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import get_session

ALICE, BOB, READER = "hf_alice_write", "hf_bob_write", "hf_alice_read"
TOKENS = {ALICE: ("alice", "write"), BOB: ("bob", "write"), READER: ("alice", "read")}
ROWS = [{"question": f"What is {n} + {n}, or “{n}” twice?", "answer": 2 * n} for n in range(12)]
JSONL = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


@pytest.fixture
def hub(tmp_path):
    with HubServer(tmp_path / "hub", tokens=TOKENS, multipart_bytes=1_000_000) as server:
        yield server


@pytest.fixture
def client(hub, tmp_path):
    """Runs Python code in a new process that knows only this server; returns what the code passes to `report`."""

    def run(code: str, token: str | None = None, **variables):
        home = tmp_path / f"home-{len(list(tmp_path.iterdir()))}"
        result = home / "report.json"
        home.mkdir()
        names = variables | {"result": str(result)}
        start = "".join(f"{name} = {value!r}\n" for name, value in names.items())
        start += "import json, pathlib\ndef report(value): pathlib.Path(result).write_text(json.dumps(value))\n"
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        environment = inherited | hub.environment(home, token)
        done = subprocess.run([sys.executable, "-c", start + code], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return json.loads(result.read_text())

    return run


@pytest.fixture
def download(hub, tmp_path):
    """Downloads a file of alice/model in this process and returns its content."""

    def fetch(name: str, **options) -> bytes:
        options = {"token": False, "cache_dir": tmp_path / "cache"} | options
        return Path(hf_hub_download("alice/model", name, endpoint=hub.url, **options)).read_bytes()

    return fetch


def serve_file(hub: HubServer, name: str, content: bytes) -> None:
    file = hub.root / "models/alice/model" / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content)


def asked(hub: HubServer, ending: str) -> list[tuple[str, int]]:
    """The method and the status of every request whose path ends so."""
    return [(method, status) for method, path, status in hub.requests if path.endswith(ending)]


# ---- models and datasets


@pytest.mark.slow
def test_model_and_tokenizer_survive_the_round_trip(hub, client, tmp_path):
    """A model pushed by one process gives the same logits, and its tokenizer the same ids, in another one."""
    code = """
import os
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

def tell():
    ids = tokenizer(text, return_tensors="pt").input_ids
    with torch.no_grad():
        return [ids.tolist(), model(ids).logits.double().tolist(), tokenizer.decode(ids[0]), tokenizer.eos_token]

# Two processes for one's imports: the fork pulls what its parent has pushed, without its token.
pushed, go = os.pipe()
if os.fork() == 0:
    os.environ.pop("HF_TOKEN")
    os.read(pushed, 1)
    model = AutoModelForCausalLM.from_pretrained("alice/tiny", torch_dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained("alice/tiny")
    pathlib.Path(pulled).write_text(json.dumps(tell()))
    os._exit(0)
core = Tokenizer(models.BPE())
core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
core.decoder = decoders.ByteLevel()
alphabet = pre_tokenizers.ByteLevel.alphabet()
core.train_from_iterator(
    [text] * 3, trainers.BpeTrainer(vocab_size=300, special_tokens=["</s>"], initial_alphabet=alphabet)
)
tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", pad_token="</s>")
torch.manual_seed(0)
sizes = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1)
model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=64, **sizes)).eval()
model.push_to_hub("alice/tiny")
tokenizer.push_to_hub("alice/tiny")
report(tell())
os.write(go, b"1")
assert os.wait()[1] == 0
"""
    text = "Grüße, world: 2 + 2 = 4"
    pushed = client(code, ALICE, text=text, pulled=str(tmp_path / "pulled.json"))
    pulled = json.loads((tmp_path / "pulled.json").read_text())
    assert pulled == pushed
    assert pulled[2] == text
    (weights,) = HfApi(endpoint=hub.url, token=False).get_paths_info("alice/tiny", "model.safetensors")
    assert weights.lfs.size == (hub.root / "models/alice/tiny/model.safetensors").stat().st_size


def test_datasets_of_three_formats(hub, client):
    parquet = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), parquet)
    table = "question,answer\n" + "".join(f'"{row["question"]}",{row["answer"]}\n' for row in ROWS)
    hub.add_dataset("alice/jsonl", {"train.jsonl": JSONL, "README.md": b"---\nlicense: mit\n---\n# Sums"})
    hub.add_dataset("alice/parquet", {"data/train-00000-of-00001.parquet": parquet.getvalue()})
    hub.add_dataset("alice/csv", {"train.csv": table.encode(), "test.csv": b"question,answer\nWhy?,7\n"})
    loaded = client("""
from datasets import load_dataset
names = ["alice/jsonl", "alice/parquet", "alice/csv"]
report({name: load_dataset(name, split="train").to_list() for name in names}
    | {"test": load_dataset("alice/csv", split="test").to_list()})
""")
    expected = dict.fromkeys(["alice/jsonl", "alice/parquet", "alice/csv"], ROWS)
    assert loaded == expected | {"test": [{"question": "Why?", "answer": 7}]}


def test_dataset_pushed_by_the_datasets_library(hub, client):
    seen = client(
        """
from datasets import Dataset, load_dataset
Dataset.from_list(rows).push_to_hub("alice/sums", private=True)
report(load_dataset("alice/sums", split="train").to_list())
""",
        ALICE,
        rows=ROWS,
    )
    assert seen == ROWS
    with pytest.raises(RepositoryNotFoundError):
        HfApi(endpoint=hub.url, token=False).dataset_info("alice/sums")


# ---- uploads


@pytest.fixture
def folder(tmp_path):
    """Files that go into a commit, files that go to large-file storage in one part and in several, an empty file."""
    random.seed(1)
    contents = {
        "README.md": b"---\nlicense: mit\n---\nHello\n",
        "config.json": b"{}",
        "sub/ö file.txt": "Grüße".encode(),
        "sub/adapter.safetensors": random.randbytes(300_000),
        "big.bin": random.randbytes(2_500_000),
        "empty.bin": b"",
    }
    for name, content in contents.items():
        file = tmp_path / "source" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
    return contents


def stored(folder: Path) -> dict[str, bytes]:
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


UPLOAD = """
from huggingface_hub import HfApi
HfApi().create_repo("alice/up", exist_ok=True)
report(HfApi().upload_folder(repo_id="alice/up", folder_path=source, commit_message="All files").oid)
"""


def test_uploaded_folder_comes_back_byte_for_byte(hub, client, folder, tmp_path):
    oid = client(UPLOAD, ALICE, source=str(tmp_path / "source"))
    assert stored(hub.root / "models/alice/up") == folder
    parts = [path for method, path, _ in hub.requests if method == "PUT"]
    big = hashlib.sha256(folder["big.bin"]).hexdigest()
    assert [path.rpartition("/")[2] for path in parts if big in path] == ["1", "2", "3"]
    assert len(parts) == 4  # three parts of the big file, and the smaller one: everything else is in the commit

    snapshot = snapshot_download("alice/up", endpoint=hub.url, token=False, cache_dir=tmp_path / "cache")
    assert stored(Path(snapshot)) == folder
    assert Path(snapshot).name == oid
    api = HfApi(endpoint=hub.url, token=False)
    assert api.model_info("alice/up").sha == oid
    assert {file.path for file in api.list_repo_tree("alice/up", recursive=True) if getattr(file, "lfs", None)} == {
        "big.bin",
        "sub/adapter.safetensors",
    }
    assert api.list_repo_commits("alice/up")[0].title == "All files"

    before = len(hub.requests)
    assert client(UPLOAD, ALICE, source=str(tmp_path / "source")) == oid, "nothing changed, so there is no commit"
    assert not [path for method, path, _ in hub.requests[before:] if method == "PUT" or "/commit/" in path]


def test_single_files_deletions_and_copies(hub, client):
    seen = client(
        """
from huggingface_hub import CommitOperationAdd, CommitOperationCopy, CommitOperationDelete, HfApi
api = HfApi()
api.create_repo("alice/edit", repo_type="dataset")
at = dict(repo_id="alice/edit", repo_type="dataset")
files = {"x.csv": b"a,b", "d/y.csv": b"a,b", "d/z.csv": b"", "w.safetensors": b"tensor"}
shas = [api.upload_file(path_or_fileobj=data, path_in_repo=name, **at).oid for name, data in files.items()]
changes = [CommitOperationDelete("x.csv"), CommitOperationDelete("d/"), CommitOperationAdd("new.txt", b"new"),
    CommitOperationCopy("w.safetensors", "copy.safetensors")]
shas.append(api.create_commit(operations=changes, commit_message="Edit", **at).oid)
try:
    api.delete_file("gone.txt", **at)
except Exception as error:
    report([shas, api.list_repo_files(**at), api.file_exists(filename="x.csv", **at), str(error)])
""",
        ALICE,
    )
    shas, files, exists, error = seen
    assert len(set(shas)) == 5, "every commit has an id of its own"
    assert files == ["copy.safetensors", "new.txt", "w.safetensors"]
    assert not exists
    assert "A file with this name doesn't exist" in error
    assert stored(hub.root / "datasets/alice/edit") == {
        "copy.safetensors": b"tensor",
        "new.txt": b"new",
        "w.safetensors": b"tensor",
    }


def test_upload_inside_the_commit_for_clients_with_xet_storage(tmp_path, folder):
    """With `lfs=False`, clients that have hf_xet need no setting to upload binary files."""
    with HubServer(tmp_path / "plain", tokens=TOKENS, lfs=False) as hub:
        code = UPLOAD.replace("report", "print").replace("source", repr(str(tmp_path / "source")))
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        environment = inherited | hub.environment(tmp_path / "home", ALICE)
        assert "HF_HUB_DISABLE_XET" not in environment
        subprocess.run([sys.executable, "-c", code], env=environment, check=True, capture_output=True)
        assert stored(hub.root / "models/alice/up") == folder
        assert "PUT" not in [request.method for request in hub.requests]


def test_xet_storage_is_refused_at_once(hub):
    serve_file(hub, "config.json", b"{}")
    answer = get_session().get(f"{hub.url}/api/models/alice/model/xet-write-token/main")
    assert answer.status_code == 400, "a status that clients do not retry"
    assert "no Xet storage" in answer.json()["error"]


# ---- who may do what


def test_create_repo(hub):
    api = HfApi(endpoint=hub.url, token=ALICE)
    assert api.create_repo("alice/secret", private=True).repo_id == "alice/secret"
    with pytest.raises(HfHubHTTPError) as error:
        api.create_repo("alice/secret")
    assert error.value.response.status_code == 409
    assert api.create_repo("alice/secret", exist_ok=True).repo_id == "alice/secret"
    assert api.model_info("alice/secret").private
    assert api.create_repo("open", repo_type="dataset").repo_id == "alice/open"
    assert not HfApi(endpoint=hub.url, token=False).dataset_info("alice/open").private
    # Everybody else gets the answer that the private repository does not exist.
    for token, status in ((False, 401), (BOB, 404)):
        with pytest.raises(RepositoryNotFoundError) as error:
            HfApi(endpoint=hub.url, token=token).model_info("alice/secret")
        assert error.value.response.status_code == status


def test_gated_model(tmp_path):
    gated = {"alice/model": ["bob"]}
    tokens = TOKENS | {"hf_carol": ("carol", "read")}
    with HubServer(tmp_path / "gated", tokens=tokens, gated=gated) as hub:
        serve_file(hub, "config.json", b'{"gated": 1}')
        for token, status, message in (
            (False, 401, "be authenticated"),
            ("hf_carol", 403, "not in the authorized list"),
        ):
            with pytest.raises(GatedRepoError, match=message) as error:
                hf_hub_download(
                    "alice/model", "config.json", endpoint=hub.url, token=token, cache_dir=tmp_path / "cache"
                )
            assert error.value.response.status_code == status
            assert HfApi(endpoint=hub.url, token=token).model_info("alice/model").gated == "manual"
        for number, token in enumerate((BOB, ALICE)):
            cache = tmp_path / f"cache-{number}"
            file = hf_hub_download("alice/model", "config.json", endpoint=hub.url, token=token, cache_dir=cache)
            assert Path(file).read_bytes() == b'{"gated": 1}'


@pytest.mark.parametrize(
    ("token", "repo_id", "status", "message"),
    [
        (False, "alice/new", 401, "Invalid username or password"),
        (READER, "alice/new", 403, "you must use a write token"),
        (BOB, "alice/new", 403, 'You don\'t have the rights to create a model under the namespace "alice"'),
        ("hf_unknown", "alice/new", 401, "Invalid credentials in Authorization header"),
    ],
)
def test_refused_writing(hub, token, repo_id, status, message):
    serve_file(hub, "config.json", b"{}")
    api = HfApi(endpoint=hub.url, token=token)
    with pytest.raises(HfHubHTTPError, match=message) as error:
        api.create_repo(repo_id)
    assert error.value.response.status_code == status
    with pytest.raises(HfHubHTTPError) as error:
        api.upload_file(path_or_fileobj=b"changed", path_in_repo="config.json", repo_id="alice/model")
    assert error.value.response.status_code == status
    assert stored(hub.root / "models") == {"alice/model/config.json": b"{}"}


def test_whoami(hub):
    assert HfApi(endpoint=hub.url, token=READER).whoami()["name"] == "alice"
    assert HfApi(endpoint=hub.url, token=READER).whoami()["auth"]["accessToken"]["role"] == "read"
    with pytest.raises(Exception, match="Invalid user token"):
        HfApi(endpoint=hub.url, token="hf_unknown").whoami()
    assert asked(hub, "/whoami-v2") == [("GET", 200), ("GET", 200), ("GET", 401)]


def test_missing_things_have_errors_of_their_own(hub, download):
    serve_file(hub, "config.json", b"{}")
    with pytest.raises(EntryNotFoundError):
        download("absent.json")
    with pytest.raises(RevisionNotFoundError):
        download("config.json", revision="v9")
    with pytest.raises(RepositoryNotFoundError):
        hf_hub_download("alice/absent", "config.json", endpoint=hub.url, token=ALICE)
    api = HfApi(endpoint=hub.url, token=False)
    assert api.file_exists("alice/model", "config.json")
    (hub.root / "models/secret").write_text("outside of every repository")
    assert get_session().get(f"{hub.url}/alice/model/resolve/main/..%2F..%2Fsecret").status_code == 400


# ---- planned failures

persistent_client = pytest.mark.skipif(
    int(huggingface_hub.__version__.split(".")[0]) < 1,
    reason="huggingface_hub 0.33 gives up at once in these cases; a second call resumes from what the first one kept",
)


@persistent_client
@pytest.mark.parametrize("status", [500, 502, 503, 504])
def test_failed_metadata_request_is_repeated(hub, download, status):
    serve_file(hub, "config.json", b"{}")
    hub.fault(status, path_contains="config.json", method="HEAD")
    assert download("config.json") == b"{}"
    assert asked(hub, "config.json") == [("HEAD", status), ("HEAD", 200), ("GET", 200)]


def test_failed_download_request_is_not_repeated(hub, download):
    """The client repeats the metadata request, but gives up when the transfer itself answers with an error."""
    serve_file(hub, "config.json", b"{}")
    hub.fault(503, path_contains="config.json", method="GET")
    with pytest.raises(HfHubHTTPError) as error:
        download("config.json")
    assert error.value.response.status_code == 503
    assert asked(hub, "config.json") == [("HEAD", 200), ("GET", 503)]


def test_client_waits_as_long_as_a_429_says(hub, download):
    serve_file(hub, "config.json", b"{}")
    hub.fault(429, path_contains="config.json", method="GET", retry_after=1)
    start = time.monotonic()
    assert download("config.json") == b"{}"
    assert time.monotonic() - start >= 1
    assert asked(hub, "config.json") == [("HEAD", 200), ("GET", 429), ("GET", 200)]


@persistent_client
def test_dropped_connection(hub, download):
    serve_file(hub, "config.json", b"{}")
    hub.fault("drop", path_contains="config.json", method="GET")
    assert download("config.json") == b"{}"
    assert asked(hub, "config.json") == [("HEAD", 200), ("GET", 0), ("GET", 200)]


@persistent_client
def test_connection_dropped_before_the_metadata(hub, download):
    """The one planned failure that reaches the caller at once: the client does not repeat such a request."""
    serve_file(hub, "config.json", b"{}")
    hub.fault("drop", path_contains="config.json", method="HEAD")
    with pytest.raises(Exception, match="disconnected"):
        download("config.json")
    assert asked(hub, "config.json") == [("HEAD", 0)]


@persistent_client
def test_interrupted_download_goes_on_where_it_stopped(hub, download):
    random.seed(2)
    weights = random.randbytes(24_000_000)
    serve_file(hub, "model.safetensors", weights)
    hub.fault("cut", path_contains="model.safetensors", method="GET", after=15_000_000)
    hub.fault("cut", path_contains="model.safetensors", method="GET", after=12_000_000)
    assert download("model.safetensors") == weights
    # 206 is the answer to a request for a range: the parts that had arrived were not sent again.
    assert asked(hub, "model.safetensors") == [("HEAD", 200), ("GET", 200), ("GET", 206), ("GET", 206)]


def test_slow_answer(hub):
    serve_file(hub, "config.json", b"{}")
    api = HfApi(endpoint=hub.url, token=False)
    hub.fault("delay", seconds=0.6, times=2)
    with pytest.raises(Exception, match="timed out"):
        api.model_info("alice/model", timeout=0.2)
    start = time.monotonic()
    assert api.model_info("alice/model", timeout=10).id == "alice/model"
    assert time.monotonic() - start >= 0.6


def test_failures_during_an_upload(hub, client, folder, tmp_path):
    """Transfers of large files are repeated; the commit is not, and without it nothing changes."""
    hub.fault(500, path_contains="/_lfs/", method="PUT")
    hub.fault(503, path_contains="/commit/")
    code = UPLOAD.replace("report(", "try: ").replace(
        ".oid)", "\nexcept Exception as error: report(type(error).__name__)"
    )
    assert client(code, ALICE, source=str(tmp_path / "source")) == "HfHubHTTPError"
    assert sorted(status for method, _, status in hub.requests if method == "PUT") == [200, 200, 200, 200, 500]
    assert asked(hub, "/commit/main") == [("POST", 503)]
    assert stored(hub.root / "models/alice/up") == {}
    client(UPLOAD, ALICE, source=str(tmp_path / "source"))
    assert stored(hub.root / "models/alice/up") == folder
    assert len([method for method, _, _ in hub.requests if method == "PUT"]) == 5, "what was uploaded is not sent again"


# ---- as a program of its own


def test_server_in_another_process(tmp_path):
    """Started from a shell: rights from a file, failures planned and requests read over HTTP, no token printed."""
    (tmp_path / "hub/models/alice/model").mkdir(parents=True)
    (tmp_path / "hub/models/alice/model/config.json").write_text("{}")
    (tmp_path / "access.json").write_text(json.dumps({"tokens": TOKENS}))
    command = [sys.executable, Path(__file__).with_name("hub_server.py"), "--root", tmp_path / "hub"]
    command += ["--access", tmp_path / "access.json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        try:
            url = process.stdout.readline().strip()
            fault = {"kind": 429, "path_contains": "config.json", "method": "GET", "retry_after": 0}
            assert get_session().post(f"{url}/_faults", json=fault).status_code == 200
            assert get_session().post(f"{url}/_faults", json={"kind": "flood"}).status_code == 400
            options = {"endpoint": url, "token": ALICE, "cache_dir": tmp_path / "cache"}
            assert Path(hf_hub_download("alice/model", "config.json", **options)).read_text() == "{}"
            seen = [entry["status"] for entry in get_session().get(f"{url}/_requests").json()]
        finally:
            process.terminate()
        assert process.stdout.read() == ""
    assert seen == [200, 429, 200]
