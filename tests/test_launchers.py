"""How a run starts: what is left in the environment, signals, names, paths, the current folder, Pythons."""

import importlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import time
import zipfile
from pathlib import Path

import pytest
import torch
import yaml
from conftest import PROJECTS, REPOSITORY, refused
from launching import environment, error_line, project_modules

from common import launched, local_model, ray_address, runtime
from common.config import BaseConfig, ModelConfig, RuntimeConfig, parse_config

FOUNDRY_PYTHON = REPOSITORY / ".venv-foundry/bin/python"
LAUNCHED = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500", "LOCAL_RANK": "1"}


@pytest.fixture
def variables(monkeypatch):
    """variables(NAME="value", ...): the only ones of a launcher's in the environment."""

    def only(**these: str) -> None:
        for name in [*os.environ]:
            if name in (*launched.ALL, *launched.OTHERS) or name.startswith((*launched.ACCELERATE, "SLURM_")):
                monkeypatch.delenv(name)
        monkeypatch.delenv("NNODES", raising=False)
        monkeypatch.setenv("GLOO_SOCKET_IFNAME", "before")
        del os.environ["GLOO_SOCKET_IFNAME"]  # what is set from here on, monkeypatch takes back
        for name in (*launched.ALL, *launched.OTHERS):
            monkeypatch.setenv(name, "before")
            del os.environ[name]
        for name, value in these.items():
            monkeypatch.setenv(name, value)

    return only


def of_launchers() -> dict[str, str]:
    names = (*launched.ALL, *launched.OTHERS)
    return {k: v for k, v in os.environ.items() if k in names or k.startswith(launched.ACCELERATE)}


# --- left-over variables

LEFT_OVER = [
    {"RANK": "0"},
    {"RANK": ""},
    {"RANK": "", "WORLD_SIZE": "", "LOCAL_RANK": "", "MASTER_ADDR": "", "MASTER_PORT": ""},
    {"RANK": "0", "WORLD_SIZE": "1"},
    {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "10.0.0.1"},
    {"WORLD_SIZE": "2"},
    {"WORLD_SIZE": "2", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"},
    {"LOCAL_RANK": "1"},
    {"LOCAL_WORLD_SIZE": "4"},
    {"LOCAL_SIZE": "4", "CROSS_RANK": "0"},
    {"NODE_RANK": "1", "MASTER_PORT": "29500"},
    {"TORCHELASTIC_RUN_ID": "none"},
    {"OMPI_COMM_WORLD_SIZE": "2"},
    {"OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0"},
    {"PMI_SIZE": "2"},
    {"MV2_COMM_WORLD_SIZE": "2"},
    {"SLURM_NTASKS": "8", "SLURM_PROCID": "0"},  # in a batch script, which is one process
    {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"},
    {"ACCELERATE_USE_DEEPSPEED": "true"},
    {"ACCELERATE_MIXED_PRECISION": "fp16"},
]


@pytest.mark.parametrize("these", LEFT_OVER, ids=str)
def test_what_others_left_over_gives_a_group_of_one(variables, these):
    variables(**these)
    launched.settle()
    assert of_launchers() == {}
    assert os.environ["GLOO_SOCKET_IFNAME"] == "lo"


@pytest.mark.parametrize(
    ("these", "parts"),
    [
        ({"RANK": "0", "WORLD_SIZE": "2"}, ["RANK=0 and WORLD_SIZE=2", "MASTER_ADDR and MASTER_PORT are", "launch.sh"]),
        ({"RANK": "1"}, ["RANK=1", "WORLD_SIZE and MASTER_ADDR and MASTER_PORT are not set", "unset RANK"]),
        (LAUNCHED | {"MASTER_PORT": ""}, ["RANK=1", "MASTER_PORT is not set"]),
        (LAUNCHED | {"RANK": "2"}, ["RANK=2", "WORLD_SIZE=2", "the last is 1"]),
        (LAUNCHED | {"RANK": "first"}, ["RANK=first", "number"]),
        (LAUNCHED | {"LOCAL_RANK": "-1"}, ["LOCAL_RANK=-1", "number"]),
        (LAUNCHED | {"MASTER_PORT": "any"}, ["MASTER_PORT=any", "number"]),
        ({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1"}, ["mpirun started 2", "OMPI_COMM_WORLD_SIZE=2"]),
        ({"PMI_SIZE": "4", "PMI_RANK": "0"}, ["mpirun started 4", "launch.sh once on each machine"]),
        ({"SLURM_STEP_NUM_TASKS": "8", "SLURM_PROCID": "3"}, ["srun started 8", "NNODES, NODE_RANK and MASTER_ADDR"]),
    ],
    ids=str,
)
def test_one_process_of_several_that_cannot_find_the_others_is_refused(variables, these, parts):
    variables(**these)
    with refused(*parts):
        launched.settle()


@pytest.mark.parametrize(
    ("more", "local_world_size", "interface"),
    [
        ({"LOCAL_WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "x", "LOCAL_SIZE": "8"}, "2", "lo"),  # torchrun
        ({"LOCAL_SIZE": "2", "LOCAL_WORLD_SIZE": "4"}, "2", "lo"),  # deepspeed, and an earlier torchrun's
        ({"LOCAL_WORLD_SIZE": "2", "NODE_RANK": "0"}, "2", "lo"),  # composer
        ({"LOCAL_WORLD_SIZE": "1", "NODE_RANK": "1"}, "1", None),  # two machines, which need their network
        ({"LOCAL_WORLD_SIZE": "2", "PMI_SIZE": "2", "PMI_RANK": "1", "ACCELERATE_USE_FSDP": "true"}, "2", "lo"),
    ],
    ids=str,
)
def test_what_a_launcher_set_stays(variables, more, local_world_size, interface):
    variables(**LAUNCHED, **more)
    launched.settle()
    assert of_launchers().items() >= LAUNCHED.items()
    assert os.environ["LOCAL_WORLD_SIZE"] == local_world_size
    assert os.environ.get("GLOO_SOCKET_IFNAME") == interface
    assert not [name for name in os.environ if name.startswith(launched.ACCELERATE)]


def test_a_launcher_forgets_other_launches_and_keeps_its_users_machines(variables):
    place = {"NODE_RANK": "1", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29501"}
    variables(**LAUNCHED, LOCAL_WORLD_SIZE="4", NODE_RANK="1")
    launched.forget()
    assert of_launchers() == {}
    variables(**(LAUNCHED | place), NNODES="2", LOCAL_SIZE="1", SLURM_STEP_NUM_TASKS="2", SLURM_PROCID="1")
    launched.forget()
    assert of_launchers() == place
    variables(SLURM_STEP_NUM_TASKS="2", SLURM_PROCID="1")
    with refused("srun started 2"):
        launched.forget()


# --- signals and names

WAITS = """
import os, sys, time
from pathlib import Path
from common import errors, launched, runtime
from common.config import RuntimeConfig

def main():
    launched.settle()
    stop, folder, rank = runtime.StopRequest(RuntimeConfig()), Path(sys.argv[1]), os.environ["RANK"]
    (folder / f"{rank}.started").touch()
    while not (stop.reason or (folder / "end").exists()):
        time.sleep(0.05)
    time.sleep(0.5)  # a checkpoint
    (folder / f"{rank}.saved").write_text(str(stop.reason))

errors.run(main)
"""
LAUNCHERS = {
    "torchrun": [sys.executable, "-m", "launchers.torchrun", "--standalone", "--nproc_per_node", "2"],
    "deepspeed": [sys.executable, "-m", "launchers.deepspeed_launcher", "2"],
    "composer": [str(FOUNDRY_PYTHON), "llm-foundry-finetune/composer_launcher.py", "-n", "2"],
}


@pytest.mark.parametrize(("nohup", "reason"), [(True, None), (False, "SIGHUP")])
def test_a_lost_terminal_stops_a_run_unless_nohup_protects_it(nohup, reason):
    earlier = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    try:
        signal.signal(signal.SIGHUP, signal.SIG_IGN if nohup else signal.SIG_DFL)
        stop = runtime.StopRequest(RuntimeConfig())
        os.kill(os.getpid(), signal.SIGHUP)
        time.sleep(0.01)
        assert stop.reason == reason
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)


@pytest.mark.slow
@pytest.mark.parametrize("nohup", [True, False], ids=["nohup", "plain"])
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_every_launcher_ignores_a_lost_terminal_under_nohup_and_else_lets_the_run_save(tmp_path, launcher, nohup):
    (tmp_path / "waits.py").write_text(WAITS)
    process = subprocess.Popen(
        [*(["nohup"] if nohup else []), *LAUNCHERS[launcher], str(tmp_path / "waits.py"), str(tmp_path)],
        cwd=REPOSITORY,
        env=environment(cold=True, DS_ACCELERATOR="cpu", RANK="", WORLD_SIZE="3"),  # and what was left over
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,  # the terminal's
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),
    )
    try:
        while len([*tmp_path.glob("*.started")]) < 2:
            assert process.poll() is None, process.communicate()[0]
            time.sleep(0.1)
        os.killpg(process.pid, signal.SIGHUP)
        if nohup:
            time.sleep(2)
            assert process.poll() is None and not [*tmp_path.glob("*.saved")]
            (tmp_path / "end").touch()
        output, _ = process.communicate(timeout=300)
    finally:
        process.kill()
    saved = [(tmp_path / f"{rank}.saved").read_text() for rank in range(2)]
    if nohup:
        assert (process.returncode, saved) == (0, ["None", "None"]), output
    else:
        assert process.returncode == 128 + signal.SIGHUP, output
        assert {*saved} <= {"SIGHUP", "SIGTERM"}


@pytest.mark.slow
def test_one_machine_needs_no_name(tmp_path):
    """torchrun and Gloo if the machine's own name does not resolve: it took ten minutes."""
    alone = ["unshare", "--map-root-user", "--uts"]
    if subprocess.run([*alone, "true"]).returncode:
        pytest.skip("this machine permits no host name of one's own")
    script = tmp_path / "group.py"
    script.write_text(
        "import os, torch, torch.distributed as dist\nfrom common import launched\nlaunched.settle()\n"
        "dist.init_process_group('gloo')\nones = torch.ones(1)\ndist.all_reduce(ones)\n"
        "print(int(ones), os.environ['MASTER_ADDR'], os.environ['GLOO_SOCKET_IFNAME'])\n"
    )
    start = ["bash", "-c", 'hostname no-such-host-xyz && exec "$@"', "", *LAUNCHERS["torchrun"], str(script)]
    done = subprocess.run(
        [*alone, *start], cwd=REPOSITORY, env=environment(cold=True), capture_output=True, text=True, timeout=500
    )
    assert done.stdout.splitlines() == ["2 127.0.0.1 lo"] * 2, done


# --- launch.sh, wherever it is started


@pytest.fixture(scope="module")
def hostile_folder(tmp_path_factory) -> Path:
    """A current folder with packages and modules of the names that a run imports; importing any of them fails."""
    folder = tmp_path_factory.mktemp("a $HOME 'of' mine")
    names = ["common", "launchers", "tools", "train", "cluster", "torch", "deepspeed", "ray", "transformers", "psutil"]
    for name in names:
        (folder / name).mkdir()
        (folder / name / "__init__.py").write_text(f"raise SystemExit('{name} of the current folder was imported')")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("project", "how", "more"),
    [
        ("pytorch-ddp", "link", {"CDPATH": ".:/tmp"}),
        ("pytorch-fsdp", "sh", {"PYTHONSAFEPATH": "1"}),
        ("deepspeed-offload", "relative", {"CDPATH": ".:/", "RANK": "0", "WORLD_SIZE": "2"}),
        ("ray-train", "link", {"PYTHONSAFEPATH": "1"}),
    ],
)
def test_launch_works_from_any_folder_by_any_name(hostile_folder, tmp_path, project, how, more):
    """As far as the project's own settings: a misspelt key, which is the first thing that every train.py looks for."""
    script = REPOSITORY / project / "launch.sh"
    start = {"sh": ["sh", str(script)], "relative": [os.path.relpath(script, hostile_folder)]}.get(how)
    if start is None:
        (tmp_path / "my run").symlink_to(script)
        start = [str(tmp_path / "my run")]
    done = subprocess.run(
        [*start, "--config", "smoke.yaml", "train.max_step=2"],
        cwd=hostile_folder,
        env=environment(cold=True, NPROC_PER_NODE="1", **more),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=500,
    )
    assert done.returncode == 2, done.stdout
    assert "train.max_step; did you mean train.max_steps?" in error_line(done.stdout)


IN_A_WORKER = """
import sys, os
sys.path[:0] = sys.argv[1:]
import ray, cluster
from common.config import REPOSITORY
with cluster.ray_cluster() as resources:
    @ray.remote
    def found():
        import cluster, common
        return os.path.dirname(cluster.__file__), os.path.dirname(common.__file__), os.getcwd(), sys.executable
    print(*ray.get(found.remote(), timeout=120), sep="\\n")
"""


@pytest.mark.slow
def test_ray_s_workers_start_from_a_path_with_a_space_and_import_nothing_of_the_current_folder(
    hostile_folder, tmp_path
):
    here = tmp_path / "a $HOME b"
    here.mkdir()
    (here / "env").symlink_to(sys.prefix)
    (tmp_path / "driver.py").write_text(IN_A_WORKER)
    python = str(here / "env/bin/python")
    paths = [str(REPOSITORY / "ray-train"), str(REPOSITORY)]
    variables = environment(cold=True)
    variables["PYTHONPATH"] = os.pathsep.join(paths)
    done = subprocess.run(
        [python, tmp_path / "driver.py", *paths],
        cwd=hostile_folder, env=variables, capture_output=True, text=True, timeout=500,
    )  # fmt: skip
    expected = [str(REPOSITORY / "ray-train"), str(REPOSITORY / "common"), str(hostile_folder), python]
    assert done.stdout.splitlines() == expected, done


@pytest.mark.parametrize(
    ("path", "quoted"),
    [
        ("/opt/env/bin/python", None),
        ("/home/me/my env/bin/python", "'/home/me/my env/bin/python'"),
        ("/home/me/$x;y/bin/python", "'/home/me/$x;y/bin/python'"),
        ("/home/o'hara/bin/python", "refused"),
        ('/home/"me"/bin/python', "refused"),
        ("/home/a\\b/bin/python", "refused"),
    ],
)
def test_a_path_that_ray_cannot_start_workers_from_is_refused(monkeypatch, path, quoted):
    monkeypatch.setattr(sys, "executable", path)
    if quoted == "refused":
        with refused(path, "Ray starts no workers"):
            ray_address.worker_environment()
    else:
        assert ray_address.worker_environment() == ({"py_executable": quoted} if quoted else {})


def test_cpu_adam_names_the_space_and_waits_for_no_lock_of_a_killed_compilation(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    lock = tmp_path / "py311_cpu/cpu_adam/lock"
    lock.parent.mkdir(parents=True)
    with project_modules("deepspeed-offload", "cpu_adam_op") as modules:
        op = modules["cpu_adam_op"]
        owner = os.open(lock, os.O_CREAT | os.O_EXCL)  # as torch does it
        op.remove_stale_locks()
        assert lock.exists(), "a compilation is at work"
        os.close(owner)
        op.remove_stale_locks()
        assert not lock.exists()
        for path, odd in (("/home/my env/torch/lib", "a space"), ("/home/$x/torch/lib", "a character")):
            monkeypatch.setattr(op, "TORCH_LIB_PATH", path)
            with refused(path, odd, "offload.optimizer=torch"):
                op.find_tools()


# --- which file, which machine


@pytest.mark.slow
def test_a_file_of_the_current_folder_does_not_stand_in_for_a_default(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("config.yaml", "ds_config.json", "foundry.yaml"):
        Path(name).write_text('{"seed": 99}')
    for project in ("pytorch-ddp", "deepspeed-offload", "ray-train"):
        folder = REPOSITORY / project
        with project_modules(project, "train", *(["ds_settings"] if project != "pytorch-ddp" else [])) as modules:
            config = parse_config(modules["train"].Config, str(folder / "train.py"), [])
            assert (config.seed, config.output_dir) == (42, str(REPOSITORY / "runs" / project / "config"))
            if project != "pytorch-ddp":
                assert "zero_optimization" in modules["ds_settings"].read_ds_config("ds_config.json", folder)


@pytest.mark.parametrize("project", PROJECTS)
def test_the_real_run_asks_before_it_trains_on_a_cpu(project):
    cpu = torch.device("cpu")
    for name, asks in (("config.yaml", True), ("smoke.yaml", False)):
        settings = yaml.safe_load((REPOSITORY / project / name).read_text())
        cfg = BaseConfig(
            model=ModelConfig(settings["model"]["name"]), runtime=RuntimeConfig(**settings.get("runtime", {}))
        )
        if not asks:
            runtime.check_device(cfg, cpu)
            continue
        with refused(f"model.name={cfg.model.name}", "no GPU", "--config smoke.yaml", "runtime.allow_cpu=true"):
            runtime.check_device(cfg, cpu)
        cfg.runtime.allow_cpu = True
        runtime.check_device(cfg, cpu)
        cfg.runtime.allow_cpu, cfg.model.name = False, "tiny:llama"
        runtime.check_device(cfg, cpu)


def test_a_search_asks_before_it_loads_anything():
    with project_modules("ray-tune", "train", "cluster") as modules:
        cfg = modules["train"].Config(runtime=RuntimeConfig(allow_cpu=False), model=ModelConfig("owner/large"))
        with refused("model.name=owner/large", "runtime.allow_cpu=true"):
            modules["cluster"].check(cfg)


def test_what_is_wrong_with_a_local_model_folder(tmp_path, monkeypatch):
    from safetensors.torch import save_file

    monkeypatch.chdir(tmp_path)
    local_model.check_model_folder("owner/on-the-hub")
    folder = Path("owner/model")
    folder.mkdir(parents=True)
    with refused("model.name=owner/model", str(folder.resolve()), "no config.json", "on the Hub", "rename"):
        local_model.check_model_folder("owner/model")
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "owner/base"}')
    with refused("LoRA adapter", "model.name=owner/base"):
        local_model.check_model_folder("owner/model")
    (folder / "config.json").write_text("{}")
    local_model.check_model_folder("owner/model", with_weights=False)
    with refused("no weights", "model.safetensors"):
        local_model.check_model_folder("owner/model")
    index = folder / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}')
    save_file({"a": torch.zeros(9, 9)}, folder / "model-1.safetensors")
    with refused(index.name, "model-2.safetensors", "is not there"):
        local_model.check_model_folder("owner/model")
    save_file({"b": torch.zeros(9, 9)}, folder / "model-2.safetensors")
    local_model.check_model_folder("owner/model")
    whole = (folder / "model-2.safetensors").read_bytes()
    for size in (len(whole) - 1, 20, 4, 0):
        (folder / "model-2.safetensors").write_bytes(whole[:size])
        with refused("model-2.safetensors is damaged", "download or copy it again"):
            local_model.check_model_folder("owner/model")
    (folder / "file").touch()
    with refused("is a file"):
        local_model.check_model_folder("owner/model/file")


# --- Pythons


@pytest.fixture(scope="module")
def bare_python(tmp_path_factory) -> Path:
    """A Python without ensurepip and pip, as Debian's: the standard library of this one, by links."""
    folder, library = tmp_path_factory.mktemp("python"), Path(sysconfig.get_path("stdlib"))
    python, copied = folder / "bin/python3", folder / "lib" / library.name
    python.parent.mkdir()
    copied.mkdir(parents=True)
    shutil.copy2(os.path.realpath(sys.executable), python)
    for entry in library.iterdir():
        if entry.name not in ("ensurepip", "site-packages", "__pycache__"):
            (copied / entry.name).symlink_to(entry)
    (copied / "site-packages").mkdir()
    return python


@pytest.mark.slow
def test_an_environment_is_made_by_a_python_without_ensurepip(bare_python, tmp_path):
    make = [REPOSITORY / "launchers/new_environment.sh", bare_python]
    wheels = next((Path(importlib.import_module("ensurepip").__file__).parent / "_bundled").glob("pip-*.whl"))
    variables = environment(cold=True, PIP_NO_INDEX="1", PIP_FIND_LINKS=str(wheels.parent), PATH="/usr/bin:/bin")
    failed = subprocess.run([*make, tmp_path / "env"], env=variables, capture_output=True, text=True)
    assert failed.returncode == 2 and "python3-venv" in error_line(failed.stderr) and "uv" in failed.stderr
    with zipfile.ZipFile(wheels) as pip:
        pip.extractall(bare_python.parent.parent / "lib" / Path(sysconfig.get_path("stdlib")).name / "site-packages")
    done = subprocess.run([*make, tmp_path / "env"], env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done
    version = subprocess.run([tmp_path / "env/bin/python", "-m", "pip", "--version"], capture_output=True, text=True)
    assert f"from {tmp_path / 'env'}/" in version.stdout


def wheel(folder: Path, version: str) -> None:
    """A package called torch with nothing in it."""
    folder.mkdir(parents=True)
    with zipfile.ZipFile(folder / f"torch-{version}-py3-none-any.whl", "w") as file:
        info = f"torch-{version}.dist-info"
        file.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: torch\nVersion: {version}\n")
        file.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        file.writestr(f"{info}/RECORD", "")


@pytest.mark.slow
def test_without_a_gpu_torch_comes_from_the_cpu_index_if_that_answers(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    python = tmp_path / "env/bin/python"
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "env"], check=True)
    wheel(tmp_path / "index/torch", "99.0+cpu")
    wheel(tmp_path / "found", "99.0")  # what pip is configured to use has the other build
    server = subprocess.Popen(
        [sys.executable, "-u", "-m", "http.server", "0", "--bind", "127.0.0.1"],
        cwd=tmp_path / "index", stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    port = server.stdout.readline().split(" port ")[1].split()[0]
    own = {"PIP_CONFIG_FILE": os.devnull, "PIP_FIND_LINKS": str(tmp_path / "found")}
    variables = environment(cold=True, **own, PIP_INDEX_URL=f"http://127.0.0.1:{port}/none")

    def install(index: str) -> tuple[str, float]:
        started = time.monotonic()
        command = [REPOSITORY / "launchers/cpu_torch.sh", python, "torch==99.0", index]
        done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=60, check=True)
        return done.stdout, time.monotonic() - started

    try:
        # 192.0.2.1 (RFC 5737) never answers, and neither does the name; the build continues without.
        for index in ("http://192.0.2.1:9", "https://no-such-host.invalid"):
            output, seconds = install(index)
            assert f"{index} gave no CPU build" in output and seconds < 8
            assert not [*(tmp_path / "env").rglob("torch-*")]
        output, _ = install(f"http://127.0.0.1:{port}")
        assert "torch is the CPU build" in output
        assert [*(tmp_path / "env").rglob("torch-99.0+cpu.dist-info")]
        assert install(f"http://127.0.0.1:{port}")[0] == "", "it is there"
    finally:
        server.kill()
        server.communicate()


@pytest.mark.slow
@pytest.mark.parametrize("project", ["pytorch-ddp", "deepspeed-offload"])
def test_eval_starts_in_any_environment_in_which_launch_does(hostile_folder, tmp_path, project):
    """With a Python that has none of the packages, while launch.sh would find another; and from a hostile folder."""
    bare = next(Path(sys.base_prefix, "bin").glob("python3.*[0-9]"))
    variables = environment(cold=True, PYTHONSAFEPATH="1")
    variables.pop("PYTHONPATH")
    done = subprocess.run(
        [bare, "-S", REPOSITORY / project / "eval.py", "--config", "smoke.yaml", f"output_dir={tmp_path}/none"],
        cwd=hostile_folder, env=variables, capture_output=True, text=True, timeout=500,
    )  # fmt: skip
    assert done.returncode == 2, done
    assert error_line(done.stderr) == (
        f"error: {tmp_path}/none/model: no fine-tuned model yet; train first: {project}/launch.sh --config smoke.yaml "
        f"output_dir={tmp_path}/none"
    )


# --- what is answered at once


@pytest.mark.parametrize("project", PROJECTS)
@pytest.mark.parametrize(
    ("argument", "exit_code", "answer"),
    [
        ("--help", 0, "train.learning_rate=2e-05  peak learning rate of AdamW"),
        ("--check", 0, ""),
        ("train.lerning_rate=1", 2, "error: command line: unknown key train.lerning_rate; did you mean"),
    ],
)
def test_settings_are_checked_before_torch_is_imported(project, argument, exit_code, answer):
    command = [sys.executable, "-X", "importtime", f"{project}/train.py", argument]
    done = subprocess.run(command, cwd=REPOSITORY, env=environment(cold=True), capture_output=True, text=True)
    assert done.returncode == exit_code, done.stderr
    imported = {line.split("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert "common.config" in imported
    assert not imported & {"torch", "transformers", "deepspeed", "ray", "composer", "matplotlib", "accelerate"}
    assert answer in done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("project", [project for project in PROJECTS if project != "llm-foundry-finetune"])
def test_importing_a_project_leaves_plots_and_comparison_for_later(project):
    """A rank needs neither Matplotlib nor Accelerate nor MLflow to train; each takes a second to import."""
    script = "import sys, train; print(sorted({'matplotlib', 'accelerate', 'mlflow', 'wandb'} & {*sys.modules}))"
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=REPOSITORY / project,
        env=environment(cold=True, DS_ACCELERATOR="cpu"),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"


def test_launch_sh_reports_a_wrong_key_once_and_starts_nothing():
    for project in PROJECTS:
        command = [REPOSITORY / project / "launch.sh", "--config", "smoke.yaml", "train.lerning_rate=1"]
        done = subprocess.run(command, env=environment(cold=True, NPROC_PER_NODE="2"), capture_output=True, text=True)
        assert done.returncode == 2
        assert "did you mean train.learning_rate?" in error_line(done.stdout + done.stderr)


def test_python_without_docstrings_is_refused():
    command = [sys.executable, "-OO", "pytorch-ddp/train.py", "--config", "smoke.yaml"]
    done = subprocess.run(command, cwd=REPOSITORY, env=environment(cold=True), capture_output=True, text=True)
    assert done.returncode == 2 and "PYTHONOPTIMIZE" in error_line(done.stdout + done.stderr)


def test_the_ranks_port_is_none_that_an_outgoing_connection_may_take():
    lowest = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    ports = {launched.free_port() for _ in range(50)}
    assert len(ports) > 40 and max(ports) < lowest
    with socket.socket() as taken:
        taken.bind(("", min(ports)))
        assert min(ports) not in {launched.free_port() for _ in range(50)}
