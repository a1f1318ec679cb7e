"""`unirg doctor`: what is wrong with a node is said, with what to do; what is in order does not fail."""

import json
import os
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from unirg import check
from unirg.cli import main
from unirg.doctor import network, node, recipe
from unirg.doctor.finding import Finding
from unirg.errors import UserError


def bad(findings: Iterator[Finding], level: str = "fail") -> str:
    return "\n".join(finding.text for finding in findings if finding.level == level)


def test_versions_out_of_range_and_missing_ones_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    required = ["numpy<1", "no-such-package>=2", 'pillow<1; extra == "vllm"', 'ruff<0.1; extra == "dev"', "torch>=2"]
    monkeypatch.setattr(node.metadata, "requires", lambda name: required)
    findings = list(node.check_versions())
    failed = bad(iter(findings))
    assert "numpy" in failed and "tested with <1" in failed
    assert "no-such-package is not installed" in failed
    assert "pillow" in bad(iter(findings), "warn") and "pillow" not in failed
    assert not any("ruff" in finding.text for finding in findings)  # nobody trains with it
    assert any(finding.level == "ok" and "torch" in finding.text for finding in findings)


def test_a_gpu_that_a_cpu_build_of_torch_cannot_see_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(node.shutil, "which", lambda name: "/usr/bin/nvidia-smi")
    assert "a build without CUDA" in bad(node.check_gpus())


def test_threads_that_fight_for_cores_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1})
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert "OMP_NUM_THREADS=1" in bad(node.check_cpu(), "warn")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert not bad(node.check_cpu(), "warn")


def test_no_room_for_temporary_files_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path / "gone"))
    assert "name a folder that exists" in bad(node.check_temporary())
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    assert not bad(node.check_temporary())
    monkeypatch.setattr(node.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 10**6))
    assert "make room" in bad(node.check_temporary(), "warn")


@pytest.mark.parametrize("name", ["GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"])
def test_an_interface_that_is_not_there_is_named_beside_those_that_are(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, "ib77")
    assert "ib77; this node has" in bad(network.check_interfaces())
    monkeypatch.setenv(name, "^docker,lo")  # all but these
    assert not bad(network.check_interfaces())
    monkeypatch.setenv(name, "lo")
    assert not bad(network.check_interfaces())


def test_an_address_that_no_name_server_knows_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "node-1.invalid")
    assert "MASTER_ADDR node-1.invalid is not known here" in bad(network.check_interfaces())


def test_a_port_that_is_taken_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("", 0)) as taken:
        monkeypatch.setenv("MASTER_PORT", str(taken.getsockname()[1]))
        assert "cannot be listened on" in bad(network.check_port(), "warn")
    assert not bad(network.check_port(), "warn")


def test_ranks_that_do_not_come_are_an_error_that_names_the_address(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    for name, value in {"RANK": 1, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(network, "SECONDS", 1)
    with pytest.raises(UserError, match=f"rank 1 on .* met not all 2 ranks at 127.0.0.1:{port}"):
        network.join()


def test_nodes_that_differ_are_told_apart() -> None:
    alike, gpu = Finding("CPU", "ok", "8 cores"), Finding("GPUs", "fail", "cuda:3 is off by 1")
    versions = [Finding("versions", "ok", f"torch 2.1{minor}") for minor in (1, 3)]
    merged = network.agreement({"a": [versions[0], alike], "b": [versions[1], alike, gpu]})
    assert merged.count(alike) == 1
    assert Finding("GPUs", "fail", "b: cuda:3 is off by 1") in merged
    assert "different versions" in bad(iter(merged))
    assert not bad(iter(network.agreement({"a": [versions[0], alike], "b": [versions[0], alike]})))


def test_under_torchrun_all_ranks_meet_and_one_prints() -> None:
    command = [
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "unirg",
        "doctor",
        "--json",
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    ended = subprocess.run([sys.executable, *command], capture_output=True, text=True, env=environment, timeout=300)
    assert ended.returncode == 0, ended.stderr
    (said,) = ended.stdout.splitlines()
    texts = [finding["text"] for finding in json.loads(said)]
    assert sum("2 ranks add up 16 MiB rightly" in text for text in texts) == 1
    assert sum(text.startswith("Python") for text in texts) == 1


Written = Callable[..., Path]


@pytest.fixture
def written(tmp_path: Path) -> Written:
    """Writes a recipe on an invented study, with what is given added or replaced."""
    (tmp_path / "train.jsonl").write_text(
        json.dumps({"id": "s1", "split": "train", "findings": "No effusion.", "indication": "Cough."}) + "\n",
        encoding="utf-8",
    )

    def write(**changed: object) -> Path:
        stage = {"name": "sft", "kind": "sft", "steps": 1, "studies_per_step": 1, "optimiser": {"learning_rate": 1e-3}}
        tree = {
            "name": "r",
            "output": str(tmp_path / "run"),
            "data": {"adapter": "jsonl", "files": {"train": str(tmp_path / "train.jsonl")}},
            "prompt": {"images": False},
            "policy": {"tiny": {}},
            "stages": [stage],
            "evaluation": {"splits": []},
        }
        (tmp_path / "recipe.yaml").write_text(json.dumps(tree | changed), encoding="utf-8")
        return tmp_path / "recipe.yaml"

    return write


def test_a_recipe_that_can_run_passes(written: Written, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", str(written())]) == 0
    said = capsys.readouterr().out
    assert "jsonl train: 1 studies, all can be read" in said
    assert "2 ranks add up 16 MiB rightly" in said  # two processes were started, and met


def test_what_a_recipe_lacks_fails_line_by_line(written: Written, tmp_path: Path) -> None:
    grpo = {"name": "g", "kind": "grpo", "steps": 1, "studies_per_step": 3, "optimiser": {"learning_rate": 1e-3}}
    data = {"adapter": "jsonl", "files": {"train": str(tmp_path / "gone.jsonl")}}
    path = written(
        data=data, policy={"model": str(tmp_path / "no_model")}, stages=[grpo | {"rewards": [{"name": "bleu"}]}]
    )
    failed = bad(recipe.check_recipe(path, []))
    assert "no_model: there is no such folder" in failed
    assert "gone.jsonl" in failed


def test_a_reward_that_cannot_be_loaded_fails(written: Written) -> None:
    grpo = {"name": "g", "kind": "grpo", "steps": 1, "studies_per_step": 1, "optimiser": {"learning_rate": 1e-3}}
    path = written(stages=[grpo | {"rewards": [{"name": "radgraph_f1", "options": {"model_folder": "/no/archive"}}]}])
    assert "/no/archive" in bad(recipe.check_recipe(path, []))


def test_a_server_that_does_not_answer_fails_and_is_not_waited_for(written: Written) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    grpo = {"name": "g", "kind": "grpo", "steps": 1, "studies_per_step": 1, "optimiser": {"learning_rate": 1e-3}}
    rewards = [{"name": "bleu"}, {"name": "rouge_l", "server": url}]
    rollout = {"engine": "vllm", "vllm": {"mode": "server", "servers": [url]}}
    findings = list(recipe.check_recipe(written(stages=[grpo | {"rewards": rewards}], rollout=rollout), []))
    failed = bad(iter(findings))
    assert f"{url} does not answer" in failed
    assert "unirg rewards serve" in failed and "unirg rollout-server" in failed
    assert Finding("rewards", "ok", "stage g: bleu") in findings


def test_a_server_that_speaks_something_else_fails(written: Written) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        threading.Thread(target=lambda: other.accept()[0].sendall(b"SSH-2.0-OpenSSH\r\n"), daemon=True).start()
        url = f"http://127.0.0.1:{other.getsockname()[1]}"
        rollout = {"engine": "vllm", "vllm": {"mode": "server", "servers": [url]}}
        assert f"{url} does not answer (SSH-2.0-OpenSSH)" in bad(recipe.check_recipe(written(rollout=rollout), []))


def test_what_a_recipe_wants_installed_is_looked_for(written: Written, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recipe, "find_spec", lambda name: None)
    monkeypatch.setattr(check, "find_spec", lambda name: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    grpo = {"name": "g", "kind": "grpo", "steps": 1, "studies_per_step": 1, "optimiser": {"learning_rate": 1e-3}}
    stage = grpo | {"rewards": [{"name": "bleu"}], "shared_prefix_kernel": "flex"}
    policy = {"tiny": {}, "lora": {}}
    failed = bad(recipe.check_recipe(written(stages=[stage], rollout={"engine": "vllm"}, policy=policy), []))
    assert "vllm is not installed" in failed
    assert "policy.lora needs peft" in failed
    assert "flex needs a CUDA device" in failed


def test_studies_that_do_not_divide_by_the_ranks_fail(written: Written, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert "must divide evenly by 4 ranks" in bad(recipe.check_recipe(written(), []))


@pytest.mark.parametrize("fault", ["no weights", "cut short", "whole"])
def test_a_model_folder_is_looked_into(fault: str, written: Written, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("config.json", "tokenizer_config.json"):
        (folder / name).write_text("{}", encoding="ascii")
    if fault != "no weights":
        save_file({"a": torch.zeros(1000, 1000), "b": torch.zeros(7)}, folder / "model.safetensors")
    if fault == "cut short":
        with (folder / "model.safetensors").open("r+b") as file:
            file.truncate(1000)
    findings = list(recipe.check_recipe(written(policy={"model": str(folder)}), []))
    failed = bad(iter(findings))
    assert {"no weights": "no .safetensors", "cut short": "model.safetensors: cannot be read"}.get(fault, "") in failed
    if fault == "whole":
        assert not failed
        assert any("1 million weights in 1 files" in finding.text for finding in findings)


def test_a_model_that_is_not_cached_is_told(written: Written, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(policy={"model": "nobody/no-such-model"})
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "HF_HUB_OFFLINE=1 forbids to download it" in bad(recipe.check_recipe(path, []))
    monkeypatch.delenv("HF_HUB_OFFLINE")
    assert "it would be downloaded" in bad(recipe.check_recipe(path, []), "warn")


def test_a_disk_that_takes_no_files_fails(written: Written, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    path = written(output=str(tmp_path / "file" / "run"))
    assert "choose another `output`" in bad(recipe.check_recipe(path, []))


def test_folders_that_cannot_be_looked_into_fail(written: Written, tmp_path: Path) -> None:
    odd = str(tmp_path / ("x" * 300) / "m")  # the system refuses the name, whoever asks
    failed = bad(recipe.check_recipe(written(policy={"model": odd}), []))
    assert "policy.model:" in failed and "cannot be looked into" in failed
    assert "choose another `output`" in bad(recipe.check_recipe(written(output=odd), []))


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize(("policy", "gib"), [({}, 327), ({"lora": {"rank": 64}, "freeze_vision": True}, 23)])
def test_a_disk_must_hold_what_the_policy_writes(
    policy: dict[str, object], gib: int, written: Written, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """8.77 billion weights in float32, three times (with AdamW's moments) in each of three checkpoints, and once more
    as the policy that is left; or 175 million of adapters, beside a policy in bfloat16."""
    folder = tmp_path / "model"
    folder.mkdir()
    shutil.copy(Path(__file__).parents[2] / "docs" / "configs" / "qwen3-vl-8b.json", folder / "config.json")
    (folder / "tokenizer_config.json").write_text("{}", encoding="ascii")
    save_file({"a": torch.zeros(10)}, folder / "model.safetensors")
    path = written(policy={"model": str(folder), "dtype": "bfloat16", **policy})
    for more in (-1, 1):
        free = (gib + more) << 30
        monkeypatch.setattr(recipe.shutil, "disk_usage", lambda path, n=free: shutil._ntuple_diskusage(n, n, n))
        failed = bad(recipe.check_recipe(path, []))
        assert ("are needed for checkpoints" in failed) == (more < 0), failed


def test_a_small_policys_need_is_counted_too(written: Written) -> None:
    texts = [finding.text for finding in recipe.check_recipe(written(), []) if finding.area == "disk"]
    assert "MiB are needed for checkpoints and 1 stages' policies" in texts[0]


def test_deepspeed_that_is_not_there_fails_where_it_is_wanted(
    written: Written, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "deepspeed", None)  # as where it is not installed
    assert "pip install" in bad(recipe.check_recipe(written(distributed={"strategy": "zero3"}), []))
    assert not bad(recipe.check_recipe(written(), []))


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("WORLD_SIZE", "two", "WORLD_SIZE=two: expected a whole number"),
        ("MASTER_PORT", "99999", "MASTER_PORT=99999: expected .* at most 65535"),
        ("WORLD_SIZE", "2", "no RANK, MASTER_ADDR, MASTER_PORT: start the ranks with torchrun"),
    ],
)
def test_an_environment_that_is_no_ranks_is_bad_input(
    name: str, value: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=said):
        network.check_environment()


def test_a_recipe_that_is_not_valid_is_bad_input(written: Written, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", str(written(polcy={}))]) == 2
    assert "polcy" in capsys.readouterr().err
